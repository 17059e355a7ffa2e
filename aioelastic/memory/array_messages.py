"""What of a message is memory: which of it is shared and travels as it is, and which is copied once.

While a message is pickled, each array in it becomes a number; what the number means is in a table beside the pickle.
An array in a segment is a place in that segment, whose descriptor travels along. All others are copied after the
pickling, when it is known what overlaps: views of one array in one message are views of one array again. Of an array
of which only parts are sent, only these are copied: they are arrays of their own then.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..model.errors import SpecError
from ..system.descriptors import into, reopened
from ._deferred import Done, here, now
from ._errors import NotShareable, ShareLost
from .address_index import find
from .dtypes import DTYPES, ORDER, loaded
from .file_mapping import block, view
from .foreign_arrays import bounds
from .incoming import for_views, incoming
from .reducers import Reducer
from .shared_array import SharedArray
from .shared_segments import Segment

_registered: dict[type, Reducer] = {}
_A_PART = (
    "it is a part of an isolated array, all of which could be read by who gets it: offer the whole, or a copy of the "
    "part, sharing.copy(x, isolated=True)"
)
_STORAGE = "a storage carries all that is in it: offer a plain tensor, as x.detach().clone().as_subclass(torch.Tensor)"
_NOT_ISOLATED = (
    "its memory holds other arrays, or will be used again for others, which who gets this one could read and change: "
    "make it by sharing.empty(..., isolated=True) or sharing.copy(x, isolated=True)"
)
_ON_GPU = "memory of a GPU cannot be offered to other users, or read-only: offer sharing.copy(x, 'cpu', isolated=True)"
_changes = 0  # how often something was registered


class _Ref:
    """An array in a message."""

    __slots__ = ("high", "keep", "low", "nbytes", "offset", "part", "slot", "strides", "tight", "whole")

    def __init__(
        self, low: int, high: int, nbytes: int, keep: Any, tight: Callable[[], Any] | None, whole: int
    ) -> None:
        self.low, self.high, self.nbytes, self.keep, self.tight = low, high, nbytes, keep, tight
        self.whole = whole
        self.slot, self.offset = -1, 0
        self.strides: tuple[int, ...] | None = None
        self.part: tuple[int, int, int] | None = None  # of a range with others: whose, where, and its length


class Outgoing:
    """The memory in one message that is being pickled. Got by `outgoing`.

    Attributes:
        fds: descriptors to send with it, the caller's to close, whatever comes of it.
        for_others: processes of other users may get it: there is nothing in it but what it is meant to carry.
        read_only: who gets it cannot write to the shared memory in it.
        trial: it is only asked whether that can be, and changes nothing.
        slow: who unpickles it has to wait for a driver.
        last: this process ends when it is sent.
        reducers, derived: how objects of a type, and of those derived from some types, are reduced in this message.
        asked: the GPUs that have been asked when they will have done their work.
    """

    def __init__(self, made_for: tuple[int, int]) -> None:
        self.made_for = made_for
        table = self._table()
        self.reducers = {kind: reducer for kind, reducer in table.items() if isinstance(kind, type)}
        self.derived = [(kinds, reducer) for kinds, reducer in table.items() if not isinstance(kinds, type)]
        self.clear()

    def clear(self) -> None:
        """It holds nothing, and may serve for another message."""
        self.fds: list[int] = []
        self.slow = self.last = self.for_others = self.read_only = self.trial = False
        self.asked: set[str] = set()
        self._after: list[Done] = []
        self._refs: list[_Ref] = []
        self._slots: dict[tuple[int, int], int] = {}

    def over(self) -> None:
        """It is packed: it can serve for the next message of this thread."""
        self.clear()
        here.spare = self

    def finish(self) -> tuple[bytes, list[memoryview]] | None:
        """The table, and what is to be copied. None: there is no memory in it.

        Waits until GPUs have done what was asked of them for arrays in it, unless somebody does that `later`.
        """
        what = now()
        for one in self._after:
            if what is None:
                one.result()
            else:
                what.waits.append(one)
        if not self._refs and not self.fds:
            return None
        pieces = self._group([one for one in self._refs if one.slot < 0])
        self._join()
        return marshal.dumps([(one.slot, one.offset, one.nbytes, one.strides, one.part) for one in self._refs]), pieces

    def ref(
        self, low: int, high: int, nbytes: int, keep: Any, tight: Callable[[], Any] | None = None, whole: int = 0
    ) -> int:
        """The number of an array that lies at `low` up to `high`.

        Args:
            nbytes: what its elements need.
            tight: makes a contiguous copy of it, as its address, strides and what keeps it.
            whole: says what it is a view of, to `Incoming.part`; 0: nobody asks.
        """
        one = _Ref(low, high, nbytes, keep, tight, whole)
        segment = find(low, high - low)
        if segment is not None:
            one.slot = self.slot(segment)
            one.offset = low - segment.address
            one.nbytes = high - low
            if self._is_guarded and (one.offset, one.nbytes) != (0, segment.isolated):
                raise NotShareable(_A_PART)
        elif self.for_others and nbytes != high - low:  # what lies between its elements stays here
            if tight is None:
                raise NotShareable(_STORAGE)
            one.low, one.strides, one.keep = tight()
            one.high, one.whole = one.low + nbytes, 0
        elif self.for_others and tight is None and whole:
            raise NotShareable(_STORAGE)
        self._refs.append(one)
        return len(self._refs) - 1

    def slot(self, segment: Segment) -> int:
        """The number under which a lease on a segment travels along, with what is beside it."""
        slot = self._slots.get(segment.key, -1)
        if slot < 0:
            if self._is_guarded and not segment.isolated:
                raise NotShareable(_ON_GPU if segment.where else _NOT_ISOLATED)
            if self.read_only and not self.trial:
                segment.seal()
            slot = self._slots[segment.key] = len(self.fds)
            segment.lend(self.fds, self.read_only, self.for_others)
            for fd in segment.beside():
                self.descriptor(fd)
        return slot

    def after(self, done: Done) -> None:
        """It must not be received before that is done."""
        self._after.append(done)

    def descriptor(self, fd: int) -> int:
        """The number under which a copy of any descriptor travels along."""
        into(self.fds, os.dup, fd)
        return len(self.fds) - 1

    def opened(self, fd: int) -> int:
        """The number under which the same file travels along, by an open file description of its own."""
        reopened(self.fds, fd)
        return len(self.fds) - 1

    @property
    def _is_guarded(self) -> bool:
        return self.for_others or self.read_only

    def _group(self, refs: Sequence[_Ref]) -> list[memoryview]:
        """What overlaps is one piece, and so are views of one whole that touch: unless most of it is not wanted."""
        if len(refs) == 1 and refs[0].high - refs[0].low <= 2 * refs[0].nbytes:
            return [self._piece(refs, 0)]  # as most messages are
        groups: list[list[_Ref]] = []
        high = -1
        for one in sorted(refs, key=lambda ref: ref.low):
            if one.low > high or (one.low == high and not 0 != one.whole == groups[-1][-1].whole):
                groups.append([])
            groups[-1].append(one)
            high = max(high, one.high)
        pieces: list[memoryview] = []
        for group in groups:
            low, high = group[0].low, max(one.high for one in group)
            if high - low > 2 * sum(one.nbytes for one in group):
                for one in group:
                    if one.tight is not None:
                        one.low, one.strides, one.keep = one.tight()
                        one.high, one.whole = one.low + one.nbytes, 0
                        pieces.append(self._piece([one], len(pieces)))
                group = [one for one in group if one.tight is None]
            if group:
                pieces.append(self._piece(group, len(pieces)))
        return pieces

    def _piece(self, group: Sequence[_Ref], number: int) -> memoryview:
        """One piece of the message, with these in it."""
        low, high = min(one.low for one in group), max(one.high for one in group)
        for one in group:
            one.slot, one.offset, one.nbytes = -1 - number, one.low - low, one.high - one.low
        return view(low, high - low, [one.keep for one in group])

    def _join(self) -> None:
        """Which are views of one whole, and lie in one slot: the range that they have together."""
        wholes: dict[tuple[int, int], list[_Ref]] = {}
        for one in self._refs:
            if one.whole:
                wholes.setdefault((one.whole, one.slot), []).append(one)
        for number, parts in enumerate(wholes.values()):
            if len(parts) > 1:
                low = min(one.offset for one in parts)
                size = max(one.offset + one.nbytes for one in parts) - low
                for one in parts:
                    one.part = number, low, size

    def _table(self) -> dict[Any, Reducer]:
        table: dict[Any, Reducer] = {SharedArray: self._shared, memoryview: self._buffer, **_registered}
        if loaded("numpy", "ndarray", "numpy.lib") is not None:
            from ._numpy_arrays import reducers  # numpy may not be here

            table.update(reducers(self))
        if loaded("torch", "Tensor", "torch.utils") is not None:
            from ._torch_tensors import reducers as of_torch  # nor torch

            table.update(of_torch(self))
        for add in tables:
            add(self, table)
        for kind, reducer in _carried.items():
            table[kind] = lambda one, reducer=reducer: reducer(one, self)  # type: ignore[misc]
        return table

    def _shared(self, array: SharedArray) -> Any:
        shape, strides, kind, address = array.shape, array.strides, array._type, array.address
        if not address or 0 in shape:
            return (_rebuild_empty, (shape, strides, kind.name))
        low, high = bounds(address, shape, strides, kind.itemsize)
        number = self.ref(low, high, high - low, array)
        if self._refs[number].slot < 0:
            raise ShareLost("its memory is not this process's any more: the garbage collector has come for it")
        return (_rebuild, (number, address - low, shape, strides, kind.name))

    def _buffer(self, one: memoryview) -> Any:
        kind, shape = one.format.removeprefix(ORDER), one.shape
        if not _can_be_cast(kind):
            kind, shape = "B", (one.nbytes,)  # records, and whatever else only libraries know
        if one.readonly or not one.c_contiguous or not one.nbytes:
            return (_rebuild_bytes, (one.tobytes(), kind, shape, one.readonly))
        low = ctypes.addressof(block(one.nbytes).from_buffer(one))
        return (_rebuild_buffer, (self.ref(low, low + one.nbytes, one.nbytes, one), kind, shape))


def outgoing() -> Outgoing:
    """For a message that is pickled in this thread."""
    # what was loaded or registered since may be asked how its objects are reduced
    now_is = (_changes, len(sys.modules))
    spare: Outgoing | None = here.__dict__.pop("spare", None)  # a handler in the middle of this does not get it, too
    return Outgoing(now_is) if spare is None or spare.made_for != now_is else spare


# what is asked how objects of libraries are reduced: each adds to the table of a message
tables: list[Callable[[Outgoing, dict[type, Reducer]], None]] = []
_carried: dict[type, Callable[[Any, Outgoing], Any]] = {}


def carry(kind: type, reducer: Callable[[Any, Outgoing], Any]) -> None:
    """Objects of this type are reduced so, in messages; the reducer is given the message, too."""
    global _changes
    _carried[kind] = reducer
    _changes += 1


def register(kind: type, export: Callable[[Any], Any], rebuild: Callable[[Any], Any]) -> None:
    """Let objects of a type travel by what they are made of, arrays first of all.

    Args:
        kind: this very type, not what is derived from it.
        export: makes something of an object that can be pickled; shared arrays in it stay shared.
        rebuild: makes the object of it again, in the other process; it must be found there by its name.

    Raises:
        SpecError: an argument is not that; pickle does not ask for built-in types.

    Example::

        sharing.register(Frame, lambda frame: (frame.pixels, frame.time), make_frame)
    """
    global _changes
    if not isinstance(kind, type) or kind.__module__ == "builtins":
        raise SpecError("kind", kind, "is no type of yours", "give the class, which may be derived from a built-in one")
    for field, given in (("export", export), ("rebuild", rebuild)):
        if not callable(given):
            raise SpecError(field, given, "cannot be called", "give a function of one argument")
    _changes += 1
    _registered[kind] = lambda one: (rebuild, (export(one),))


def _rebuild(number: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> SharedArray:
    loan, _ = incoming().take(number)
    return SharedArray(loan, offset, shape, strides, DTYPES[dtype])


def _rebuild_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> SharedArray:
    return SharedArray(None, 0, shape, strides, DTYPES[dtype])


def _rebuild_buffer(number: int, kind: str, shape: tuple[int, ...]) -> memoryview:
    memory, _ = incoming().take(number)
    return memoryview(for_views(memory)).cast("B").cast(kind, shape)  # type: ignore[call-overload, no-any-return]


def _can_be_cast(kind: str) -> bool:
    try:
        memoryview(bytes(16)).cast(kind)  # type: ignore[call-overload]
    except ValueError:
        return False
    return True


def _rebuild_bytes(data: bytes, kind: str, shape: tuple[int, ...], readonly: bool) -> memoryview:
    flat = memoryview(data if readonly else bytearray(data))
    return flat.cast(kind, shape) if data else flat.cast(kind)  # type: ignore[call-overload, no-any-return]
