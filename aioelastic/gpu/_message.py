"""Arrays on GPUs in messages: ours, and those of torch, cupy and numba.

A message with any of them is sent when the GPU has done what it was asked for so far. Memory of other libraries stays
where it is, too; its owner is held until the last lease on it has ended.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import Any

from ..memory import NotShareable
from ..memory.address_index import find
from ..memory.array_messages import Outgoing, tables
from ..memory.dtypes import DTYPES, loaded
from ..memory.reducers import Reducer
from . import _driver
from ._array import DeviceArray, device_of, extent, foreign, is_read_only, streams_of
from ._block import Block, arena_of, take
from ._completion import ready, streams
from ._driver import Device
from ._foreign_memory import VMM, export, range_of
from ._ticket import Ticket, What, issue, lend


def reducers(message: Outgoing, table: dict[type, Reducer]) -> None:
    """Add to the table how they are reduced in this message."""

    def after(device: Device, more: dict[int, Any]) -> None:
        """It is sent when the device has done what it was asked for so far, on these streams, too."""
        new = {stream: keep for stream, keep in more.items() if f"{device.uuid} {stream}" not in message.asked}
        if device.uuid not in message.asked:
            message.after(ready(device, streams(device, new)))
        elif new:
            message.after(ready(device, new))
        message.asked.update((device.uuid, *(f"{device.uuid} {stream}" for stream in new)))

    def ours(one: DeviceArray) -> Any:
        if not one.size:
            return (rebuild_empty, (one.shape, one.strides, one.dtype, one.uuid))
        block = one._loan.block
        block.check()
        if block.address:  # else nothing was done with it here
            after(_driver.device(one.uuid), streams_of(one))
        slot = message.slot(block)
        return (rebuild, (slot, one._loan.offset + one._offset, one.shape, one.strides, one.dtype))

    def placed(low: int, high: int, owner: Any) -> tuple[int, int, str]:
        """The slot of what lies there, where in it, and its device."""
        message.slow = True
        more: dict[int, Any] = {}
        found = find(low, high - low)
        if isinstance(found, Block):
            found.check()
            slot = message.slot(found)
            offset, uuid, more = low - found.address, found.where, found.streams
        else:
            device = device_of(low, high, owner)
            slot, start = _lent(message, device, low, high, owner)
            offset, uuid = low - start, device.uuid
        after(_driver.device(uuid), more)
        return slot, offset, uuid

    def other(make: Callable[..., Any]) -> Reducer:
        """How an array of another library is reduced, that `make` makes again of one of ours."""

        def reduce(one: Any) -> Any:
            place = foreign(one)
            low, high = extent(place)
            if low == high:
                told = (place.shape, place.strides, place.dtype.name, device_of(0, 0, one).uuid)
                return (make, (rebuild_empty, told))
            if is_read_only(one):
                raise NotShareable("a read-only array of a GPU: whoever has it could write to it; send sharing.copy(x)")
            slot, offset, _ = placed(low, high, one)
            return (
                make,
                (rebuild, (slot, offset + place.address - low, place.shape, place.strides, place.dtype.name)),
            )

        return reduce

    table[DeviceArray] = ours
    cupy = loaded("cupy", "ndarray")
    if cupy is not None:
        table[cupy.ndarray] = other(as_cupy)
    numba = loaded("numba.cuda.cudadrv.devicearray", "DeviceNDArray")
    if numba is not None:
        table[numba.DeviceNDArray] = other(as_numba)
    if loaded("torch", "Tensor", "torch.utils") is not None:
        from ._torch import reducers as of_torch  # torch may not be here

        table.update(of_torch(table, placed))


def _lent(message: Outgoing, device: Device, low: int, high: int, owner: Any) -> tuple[int, int]:
    """The slot of another library's memory, and where it begins."""
    arena_of(device)  # by which `sharing.trim` finds what was lent
    kind, start, size = device.run(lambda: range_of(low, high))
    if message.last and kind != VMM:
        raise NotShareable("this memory of a GPU ends with its process, which ends now; return sharing.copy(x)")

    def make() -> Ticket:
        told, fds = device.run(lambda: export(kind, start, size))
        handles = list(map(select.epoll.fromfd, fds))
        block: Block = issue(Block, What(kind, device.uuid, size, **told), handles, owner)
        block.address = start
        return block

    return lend((device.uuid, start, size), make, message.slot), start


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
