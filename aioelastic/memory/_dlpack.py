"""DLPack with nothing but ctypes: so types work that numpy does not have.

Source: dlpack.h of DLPack 1, `DLManagedTensor`; https://dmlc.github.io/dlpack/latest/python_spec.html.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

from ._dtypes import DTYPES, DType
from ._errors import NotShareable

CPU = (1, 0)  # kDLCPU
CUDA = 2  # kDLCUDA
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
# in the destructor the capsule has no references left: it must not be made an object again
_raw_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_raw_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))

_lent: dict[int, tuple[Any, ...]] = {}  # what the tensors in use point to


def _delete(address: int) -> None:
    _lent.pop(address, None)


def _destroy(capsule: int) -> None:
    if _raw_is_valid(capsule, _NAME):  # else somebody took it, and will call the deleter
        _delete(_raw_pointer(capsule, _NAME))


_deleter, _destructor = _Deleter(_delete), _Destructor(_destroy)


def export(
    loan: Any, address: int, shape: Sequence[int], strides: Sequence[int], dtype: DType, device: tuple[int, int]
) -> Any:
    """A capsule that keeps `loan`. `strides` in elements.

    Raises:
        BufferError: it runs backwards, which makes torch abort the process.
    """
    if min(strides, default=0) < 0:
        raise BufferError("it has a negative stride, which not all libraries can have; copy it, or turn it round there")
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*strides)
    one = _Managed()
    one.tensor = _Tensor(address, *device, len(shape), dtype.code, 8 * dtype.itemsize, 1, sizes, steps, 0)
    one.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    where = ctypes.addressof(one)
    _lent[where] = (one, loan, sizes, steps)
    return _new(where, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))


class Foreign(NamedTuple):
    """Memory of another library's array; the capsule keeps it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: DType
    keep: Any


def read(array: Any, wanted: int = CPU[0]) -> Foreign:
    """Where an array with `__dlpack__` lies, on that type of device. Raises `NotShareable`."""
    try:
        kind, _ = array.__dlpack_device__()
        if kind != wanted:
            raise NotShareable(f"its memory is on a device (DLPack type {kind}); copy it to the CPU first")
        capsule = array.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as exc:
        raise NotShareable(f"its library cannot show it by DLPack: {exc}") from exc
    tensor = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    bits = tensor.bits * tensor.lanes
    found = [one for one in DTYPES.values() if (one.code, 8 * one.itemsize) == (tensor.code, bits)]
    if not found or tensor.lanes != 1:
        raise NotShareable(f"its element type has no name here (DLPack code {tensor.code}, {bits} bits)")
    shape = tuple(tensor.shape[: tensor.ndim])
    size = found[0].itemsize
    strides = tuple(size * one for one in tensor.strides[: tensor.ndim]) if tensor.strides else contiguous(shape, size)
    return Foreign((tensor.data or 0) + tensor.byte_offset, shape, strides, found[0], capsule)


def contiguous(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides, in bytes, in C order."""
    out, step = [], itemsize
    for size in reversed(shape):
        out.append(step)
        step *= max(size, 1)
    return tuple(reversed(out))
