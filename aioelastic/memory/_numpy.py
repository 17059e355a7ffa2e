"""numpy's arrays in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from ._message import bounds, incoming

if TYPE_CHECKING:
    from ._message import Outgoing


def reducers(message: Outgoing) -> dict[type, Any]:
    """How they are reduced in this message."""

    def array(one: Any) -> Any:
        if not one.size or one.dtype.hasobject:
            return one.__reduce_ex__(5)
        address, itemsize = one.__array_interface__["data"][0], one.itemsize
        low, high = bounds(address, one.shape, one.strides, itemsize)

        def tight() -> tuple[int, tuple[int, ...], Any]:
            copied = numpy.ascontiguousarray(one)
            return copied.ctypes.data, copied.strides, copied

        number = message.ref(low, high, one.nbytes, one, tight)
        dtype = one.dtype if one.dtype.kind == "V" or one.dtype.metadata else one.dtype.str
        may = () if one.flags.writeable else (False,)
        return (rebuild, (number, address - low, one.shape, one.strides, dtype, *may))

    return {numpy.ndarray: array}


def rebuild(
    number: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, writeable: bool = True
) -> Any:
    """The same array over the memory of the message."""
    memory, others = incoming().take(number)
    if others is not None:
        offset, strides = 0, others
    made = numpy.ndarray(shape, dtype, memory, offset, strides)
    made.flags.writeable = writeable
    return made
