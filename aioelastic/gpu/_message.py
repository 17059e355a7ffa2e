"""Arrays on GPUs in messages: ours, and those of torch, cupy and numba.

A message with any of them is sent when the GPU has done what it was asked for so far. Memory of other libraries stays
where it is, too; its owner is held until the last lease on it has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..memory import NotShareable, Outgoing, gate, incoming, tables
from ..memory._dtypes import DTYPES
from ..memory._message import Reducer, bounds
from ..memory._segment import find
from . import _driver
from ._array import DeviceArray, device_of, foreign
from ._block import Block, Loan, arena_of
from ._driver import Device
from ._legacy import VMM, export, range_of
from ._ticket import Ticket, What, admit, issue, lend
from ._wait import ready, streams


def reducers(message: Outgoing, table: dict[type, Reducer]) -> None:
    """Add to the table how they are reduced in this message."""

    def after(device: Device) -> None:
        if device.uuid not in message.asked:
            message.asked.add(device.uuid)
            message.after(ready(device, streams(device)))

    def ours(one: DeviceArray) -> Any:
        if not one.size:
            return (rebuild_empty, (one.shape, one.strides, one.dtype, one.uuid))
        block = one._loan.block
        block.check()
        if block.address:  # else nothing was done with it here
            after(_driver.device(one.uuid))
        with gate:
            slot = message.slot(block)
        return (rebuild, (slot, one._loan.offset + one._offset, one.shape, one.strides, one.dtype))

    def placed(low: int, high: int, owner: Any) -> tuple[int, int, str]:
        """The slot of what lies there, where in it, and its device."""
        message.slow = True
        with gate:
            found = find(low, high - low)
            if isinstance(found, Block):
                found.check()
                slot = message.slot(found)
                offset, uuid = low - found.address, found.where
        if not isinstance(found, Block):
            device = device_of(low)
            slot, start = _lent(message, device, low, high, owner)
            offset, uuid = low - start, device.uuid
        after(_driver.device(uuid))
        return slot, offset, uuid

    def other(make: Callable[..., Any]) -> Reducer:
        """How an array of another library is reduced, that `make` makes again of one of ours."""

        def reduce(one: Any) -> Any:
            place = foreign(one)
            low, high = 0, 0
            if place.address and 0 not in place.shape:
                low, high = bounds(place.address, place.shape, place.strides, place.dtype.itemsize)
            if low == high:
                return (make, (rebuild_empty, (place.shape, place.strides, place.dtype.name, "")))
            slot, offset, _ = placed(low, high, one)
            return (
                make,
                (rebuild, (slot, offset + place.address - low, place.shape, place.strides, place.dtype.name)),
            )

        return reduce

    table[DeviceArray] = ours
    if "cupy" in sys.modules:
        table[sys.modules["cupy"].ndarray] = other(as_cupy)
    numba = sys.modules.get("numba.cuda.cudadrv.devicearray")
    if numba is not None:
        table[numba.DeviceNDArray] = other(as_numba)
    if "torch.cuda" in sys.modules:
        from ._torch import reducers as of_torch

        table.update(of_torch(table, placed))


def _lent(message: Outgoing, device: Device, low: int, high: int, owner: Any) -> tuple[int, int]:
    """The slot of another library's memory, and where it begins."""
    arena_of(device)  # by which `sharing.trim` finds what was lent
    kind, start, size = device.run(lambda: range_of(low, high))
    if message.last and kind != VMM:
        raise NotShareable("this memory of a GPU ends with its process, which ends now; return sharing.copy(x)")

    def make() -> Ticket:
        told, fds = device.run(lambda: export(kind, start, size))
        with gate:
            block: Block = issue(Block, What(kind, device.uuid, size, **told), fds, owner)
            block.address = start
            return block

    return lend((device.uuid, start, size), make, message.slot), start


def take(slot: int, offset: int = 0) -> Loan:
    """A part of the block that came under that number. Raises `ShareLost`."""
    message = incoming()
    with gate:
        block: Block = admit(Block, message, slot)
        return block.loan(offset, 0)


def rebuild(slot: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> DeviceArray:
    """The same array over the memory of the message."""
    loan = take(slot)
    return DeviceArray(loan, offset, shape, strides, DTYPES[dtype], loan.block.where)


def rebuild_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, uuid: str) -> DeviceArray:
    """One without elements."""
    return DeviceArray(None, 0, shape, strides, DTYPES[dtype], uuid)


def as_cupy(make: Callable[..., DeviceArray], told: Sequence[Any]) -> Any:
    """An array of cupy over it; ours, where there is no cupy."""
    try:
        import cupy
    except ImportError:
        return make(*told)
    return cupy.asarray(make(*told))


def as_numba(make: Callable[..., DeviceArray], told: Sequence[Any]) -> Any:
    """An array of numba over it; ours, where there is no numba."""
    try:
        from numba import cuda
    except ImportError:
        return make(*told)
    return cuda.as_cuda_array(make(*told))


tables.append(reducers)
