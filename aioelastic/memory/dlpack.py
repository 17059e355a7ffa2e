"""DLPack with nothing but ctypes: so types work that numpy does not have.

Source: dlpack.h of DLPack 1, `DLManagedTensor`; https://dmlc.github.io/dlpack/latest/python_spec.html.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ._errors import FAILURES, NotShareable
from .dtypes import DTYPES, DType
from .foreign_arrays import MOST_DIMENSIONS, Foreign, cannot_say, placed, readable, whole, wrong

CPU = (1, 0)  # kDLCPU
CUDA = 2  # kDLCUDA
_NAME = b"dltensor"
_VERSIONED = b"dltensor_versioned"
_MAJOR = 1  # of DLPack: others may have another layout


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


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),  # read-only, a copy, padded: whatever they are, it may be read
        ("tensor", _Tensor),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
# in the destructor the capsule has no references left: it must not be made an object again
_raw_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_raw_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))

_clear = ctypes.PYFUNCTYPE(None)(("PyErr_Clear", _api))

_lent: dict[int, tuple[Any, ...]] = {}  # what the tensors in use point to


# Either may be called while an exception is on its way, when no other call works. The exception is lost, as nothing in
# Python can hand it on: so `export` is for where there is no library to do it.


def _delete(address: int) -> None:
    _clear()
    _lent.pop(address, None)


def _destroy(capsule: int) -> None:
    _clear()
    if _raw_is_valid(capsule, _NAME):  # else somebody took it, and will call the deleter
        _delete(_raw_pointer(capsule, _NAME))


_deleter, _destructor = _Deleter(_delete), _Destructor(_destroy)


def export(
    loan: Any, address: int, shape: Sequence[int], strides: Sequence[int], dtype: DType, device: tuple[int, int]
) -> Any:
    """A capsule that keeps `loan`. `strides` in elements.

    Raises:
        BufferError: it runs backwards.
    """
    check_forward(strides)
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*strides)
    one = _Managed()
    one.tensor = _Tensor(address, *device, len(shape), dtype.code, 8 * dtype.itemsize, 1, sizes, steps, 0)
    one.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    where = ctypes.addressof(one)
    _lent[where] = (one, loan, sizes, steps)
    return _new(where, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))


def set_code(capsule: Any, code: int) -> None:
    """In a capsule that nobody has taken yet: of which kind the elements are, which have the same size."""
    _Managed.from_address(_pointer(capsule, _NAME)).tensor.code = code


def check_forward(strides: Sequence[int]) -> None:
    """Raises `BufferError`: torch aborts the process."""
    if min(strides, default=0) < 0:
        raise BufferError("it has a negative stride, which not all libraries can have; copy it, or turn it round there")


def read(array: Any, wanted: int = CPU[0]) -> Foreign:
    """Where an array with `__dlpack__` lies, on that type of device. Raises `NotShareable`."""
    tensor, keep = tensor_of(array, wanted)
    bits = tensor.bits * tensor.lanes
    found = [one for one in DTYPES.values() if (one.code, 8 * one.itemsize) == (tensor.code, bits)]
    if not found or tensor.lanes != 1:
        problem = f"its element type has no name here (DLPack code {tensor.code}, {bits} bits)"
        raise NotShareable(f"{problem}; convert it, or share its bytes")
    size = found[0].itemsize
    steps = [size * one for one in _numbers("strides", tensor)] if tensor.strides else None
    return placed((tensor.data or 0) + tensor.byte_offset, _numbers("shape", tensor), steps, found[0], keep)


def _numbers(field: str, tensor: Any) -> list[int]:
    """Its sizes, or strides: as many as it has dimensions."""
    if not tensor.ndim:
        return []
    where = ctypes.cast(getattr(tensor, field), ctypes.c_void_p).value or 0
    if not readable(where, where + 8 * tensor.ndim):
        raise wrong(field, hex(where), f"is not where {tensor.ndim} numbers can be read")
    return list(getattr(tensor, field)[: tensor.ndim])


def tensor_of(array: Any, wanted: int | None = None) -> tuple[Any, Any]:
    """What its capsule holds, and what keeps that.

    Args:
        wanted: the only type of device that will do.

    Raises:
        NotShareable: it is on another, or its library does not say what can be.
    """
    try:
        device = array.__dlpack_device__()
    except FAILURES as exc:
        raise cannot_say(array, "DLPack", exc) from exc
    if not isinstance(device, tuple | list) or len(device) != 2:
        raise wrong("__dlpack_device__()", device, "is not the type of a device and its number")
    kind = whole("__dlpack_device__()", device[0])
    if wanted not in (None, kind):
        raise NotShareable(f"its memory is on a device (DLPack type {kind}); copy it to the CPU first")
    try:
        try:
            capsule = array.__dlpack__(max_version=(_MAJOR, 0))
        except TypeError:  # it is older than versions
            capsule = array.__dlpack__()
    except FAILURES as exc:
        raise cannot_say(array, "DLPack", exc) from exc
    layouts: dict[bytes, Any] = {_NAME: _Managed, _VERSIONED: _ManagedVersioned}
    name = next((one for one in layouts if _is_valid(capsule, one)), None)
    if name is None:
        raise wrong("__dlpack__()", capsule, "is no capsule with a tensor, or somebody has taken that")
    layout, where = layouts[name], _pointer(capsule, name)
    if not readable(where, where + ctypes.sizeof(layout)):
        raise wrong("__dlpack__()", hex(where), "is not where a tensor can be read")
    managed = layout.from_address(where)
    if name == _VERSIONED and managed.major != _MAJOR:
        raise wrong("__dlpack__()", f"version {managed.major}.{managed.minor}", f"is not of DLPack {_MAJOR}")
    tensor = managed.tensor
    if not 0 <= tensor.ndim <= MOST_DIMENSIONS:
        raise wrong("ndim", tensor.ndim, f"is not from 0 to {MOST_DIMENSIONS}")
    if tensor.device_type != kind:
        raise wrong("__dlpack_device__()", device, f"is not that of its tensor, {tensor.device_type}")
    return tensor, (array, capsule)
