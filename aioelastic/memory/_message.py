"""What of a message is memory: which of it is shared and travels as it is, and which is copied once.

While a message is pickled, each array in it becomes a number; what the number means is in a table beside the pickle.
An array in a segment is a place in that segment, whose descriptor travels along. All others are copied after the
pickling, when it is known what overlaps: views of one array in one message are views of one array again, and of an
array of which only a part is sent, only that part is copied.
"""

from __future__ import annotations

import copyreg
import ctypes
import io
import marshal
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ..errors import SpecError
from ._array import SharedArray
from ._dtypes import DTYPES, ORDER
from ._errors import ShareLost
from ._later import Done, here, now
from ._segment import Segment, attach, block, find, gate, view

Reducer = Callable[[Any], Any]
_registered: dict[type, Reducer] = {}
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
        fds: descriptors to send with it, the caller's to close.
        slow: who unpickles it has to wait for a driver.
        last: this process ends when it is sent.
        asked: the GPUs that have been asked when they will have done their work.
    """

    def __init__(self, made_for: tuple[int, int]) -> None:
        self.made_for = made_for
        self._reducers = self._table()
        self._clear()

    def _clear(self) -> None:
        self.fds: list[int] = []
        self.slow = self.last = False
        self.asked: set[str] = set()
        self._after: list[Done] = []
        self._refs: list[_Ref] = []
        self._slots: dict[tuple[int, int], int] = {}

    def over(self) -> None:
        """It is packed: what it is made of can serve for the next message of this thread."""
        self._clear()
        here.spare = self

    def dumps(self, body: Any, place: Callable[[pickle.PickleBuffer], bool], by_value: bool) -> bytes:
        """The pickle. With `by_value`, by cloudpickle."""
        table = {**copyreg.dispatch_table, **self._reducers}
        out = io.BytesIO()
        if by_value:
            import cloudpickle

            base = cloudpickle.Pickler
            kind = type("Pickler", (base,), {"dispatch_table": {**base.dispatch_table, **table}})
            pickler = kind(out, protocol=5, buffer_callback=place)
        else:
            pickler = pickle.Pickler(out, protocol=5, buffer_callback=place)
            pickler.dispatch_table = table
        try:
            pickler.dump(body)
        except BaseException:
            self.close()
            raise
        return out.getvalue()

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

    def close(self) -> None:
        """It will not be sent."""
        while self.fds:
            os.close(self.fds.pop())
        self._clear()

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
        with gate:
            segment = find(low, high - low)
            if segment is not None:
                one.slot = self.slot(segment)
                one.offset = low - segment.address
                one.nbytes = high - low
        self._refs.append(one)
        return len(self._refs) - 1

    def slot(self, segment: Segment) -> int:
        """The number under which a lease on a segment travels along, with what is beside it. Behind the gate."""
        slot = self._slots.get(segment.key, -1)
        if slot < 0:
            slot = self._slots[segment.key] = len(self.fds)
            self.fds.append(segment.lend())
            for fd in segment.beside():
                self.descriptor(fd)
        return slot

    def after(self, done: Done) -> None:
        """It must not be received before that is done."""
        self._after.append(done)

    def descriptor(self, fd: int) -> int:
        """The number under which a copy of any descriptor travels along."""
        self.fds.append(os.dup(fd))
        return len(self.fds) - 1

    def _group(self, refs: Sequence[_Ref]) -> list[memoryview]:
        """Those that overlap are one piece, and so are views of one whole that touch."""
        groups: list[list[_Ref]] = []
        high = -1
        for one in sorted(refs, key=lambda ref: ref.low):
            if one.low > high or (one.low == high and not 0 != one.whole == groups[-1][-1].whole):
                groups.append([])
            groups[-1].append(one)
            high = max(high, one.high)
        pieces = []
        for slot, group in enumerate(groups):
            first, low = group[0], group[0].low
            high = max(one.high for one in group)
            if len(group) == 1 and first.tight is not None and high - low > 2 * first.nbytes:
                low, first.strides, first.keep = first.tight()  # most of it is not wanted
                first.low, high = low, low + first.nbytes
            for one in group:
                one.slot, one.offset, one.nbytes = -1 - slot, one.low - low, one.high - one.low
            if len(group) == 1:
                first.nbytes = high - low
            pieces.append(view(low, high - low, [one.keep for one in group]))
        return pieces

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

    def _table(self) -> dict[type, Reducer]:
        table: dict[type, Reducer] = {SharedArray: self._shared, memoryview: self._buffer, **_registered}
        if "numpy" in sys.modules:
            from ._numpy import reducers

            table.update(reducers(self))
        if "torch" in sys.modules:
            from ._torch import reducers as of_torch

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
            raise ShareLost("its memory is not this process's any more: it was inherited when descriptors were short")
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
    spare: Outgoing | None = getattr(here, "spare", None)
    if spare is None or spare.made_for != now_is:
        return Outgoing(now_is)
    here.spare = None
    return spare


class Incoming:
    """The memory of a message while it is unpickled, in this thread."""

    def __init__(self, table: memoryview, pieces: Sequence[memoryview], fds: Sequence[int]) -> None:
        self._refs = marshal.loads(table)
        self._pieces = pieces
        self._fds = fds
        self._wholes: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._before = getattr(here, "message", None)
        here.message = self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        here.message = self._before

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
        with gate:
            segment = attach(self.fd(slot))
            if offset + nbytes > segment.size:
                raise ShareLost("a shared segment is smaller than what should be in it")
            if segment.owned:
                _arena().came_back(segment)
            return segment.loan(offset, nbytes)

    def fd(self, slot: int) -> int:
        """A descriptor that came along, not ours to close. Raises `ShareLost`."""
        try:
            return self._fds[slot]
        except IndexError:
            raise ShareLost("a descriptor is missing: this process may have too many of them open") from None


# what is asked how objects of libraries are reduced: each adds to the table of a message
tables: list[Callable[[Outgoing, dict[type, Reducer]], None]] = []
_carried: dict[type, Callable[[Any, Outgoing], Any]] = {}


def incoming() -> Incoming:
    """The message that is being unpickled in this thread. Raises `ShareLost`."""
    message: Incoming | None = getattr(here, "message", None)
    if message is None:
        raise ShareLost("this is part of a message of aioelastic's, and cannot be unpickled by itself")
    return message


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


def bounds(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """The first byte of an array that has elements, and the one behind its last."""
    low = high = address
    for size, step in zip(shape, strides, strict=True):
        if step < 0:
            low += step * (size - 1)
        else:
            high += step * (size - 1)
    return low, high + itemsize


def _rebuild(number: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> SharedArray:
    loan, _ = incoming().take(number)
    return SharedArray(loan, offset, shape, strides, DTYPES[dtype])


def _rebuild_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> SharedArray:
    return SharedArray(None, 0, shape, strides, DTYPES[dtype])


def _rebuild_buffer(number: int, kind: str, shape: tuple[int, ...]) -> memoryview:
    memory, _ = incoming().take(number)
    return memoryview(memory).cast("B").cast(kind, shape)  # type: ignore[call-overload, no-any-return]


def _can_be_cast(kind: str) -> bool:
    try:
        memoryview(bytes(16)).cast(kind)  # type: ignore[call-overload]
    except ValueError:
        return False
    return True


def _rebuild_bytes(data: bytes, kind: str, shape: tuple[int, ...], readonly: bool) -> memoryview:
    flat = memoryview(data if readonly else bytearray(data))
    return flat.cast(kind, shape) if data else flat.cast(kind)  # type: ignore[call-overload, no-any-return]


def _arena() -> Any:
    from ._arena import arena

    return arena
