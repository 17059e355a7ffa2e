"""The memory of a message on its arrival: what of it is mapped, and what is made of it."""

from __future__ import annotations

import marshal
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from ._arena import arena
from ._deferred import here
from ._errors import ShareLost
from .shared_segments import attach


class Incoming:
    """The memory of a message while it is unpickled, in this thread."""

    def __init__(self, table: memoryview, pieces: Sequence[memoryview], fds: Sequence[int]) -> None:
        self._refs = marshal.loads(table)
        self._pieces = pieces
        self._fds = fds
        self._wholes: dict[int, Any] = {}

    def loads(self, data: memoryview, buffers: Sequence[memoryview]) -> Any:
        """What the pickle is of. Raises whatever unpickling raises."""
        before = getattr(here, "message", None)
        try:
            here.message = self
            return pickle.loads(data, buffers=buffers)
        finally:
            here.message = before

    def take(self, number: int) -> tuple[Any, tuple[int, ...] | None]:
        """The memory of that number, and its strides if they are not those it had. Raises `ShareLost`."""
        slot, offset, nbytes, strides, _ = self._refs[number]
        return self._range(slot, offset, nbytes), strides

    def part(self, number: int, itemsize: int, make: Callable[[Any], Any]) -> tuple[Any, int, tuple[int, ...] | None]:
        """What is made of memory, once for all views of one whole; where in it, in items, that number is; its strides.

        Raises `ShareLost`.
        """
        slot, offset, nbytes, strides, part = self._refs[number]
        if part is not None:
            whole, low, size = part
            at, odd = divmod(offset - low, itemsize)
            if not odd:
                if whole not in self._wholes:
                    self._wholes[whole] = make(self._range(slot, low, size))
                return self._wholes[whole], at, strides
        return make(self._range(slot, offset, nbytes)), 0, strides

    def _range(self, slot: int, offset: int, nbytes: int) -> Any:
        if slot < 0:
            return self._pieces[-1 - slot][offset : offset + nbytes]
        segment = attach(self.fd(slot))
        if offset + nbytes > segment.size:
            raise ShareLost("a shared segment is smaller than what should be in it")
        loan = segment.loan(offset, nbytes)
        if segment.owned:
            arena.came_back(segment)  # only now: as long as it is not in use, it may be idle at any time
        return loan

    def fd(self, slot: int) -> int:
        """A descriptor that came along, not ours to close. Raises `ShareLost`."""
        try:
            return self._fds[slot]
        except IndexError:
            raise ShareLost("a descriptor is missing: this process may have too many of them open") from None


def incoming() -> Incoming:
    """The message that is being unpickled in this thread. Raises `ShareLost`."""
    message: Incoming | None = getattr(here, "message", None)
    if message is None:
        raise ShareLost("this is part of a message of aioelastic's, and cannot be unpickled by itself")
    return message


def for_views(memory: Any) -> Any:
    """Memory of a message, as views of it are made that cannot be written to where it is read only."""
    return memoryview(memory).toreadonly() if getattr(memory, "read_only", False) else memory
