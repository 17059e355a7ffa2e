"""numpy's arrays: where they lie, and how they travel in messages."""

from __future__ import annotations

import sys
from typing import Any

import numpy

from ..model.errors import SpecError
from . import dlpack
from ._errors import NotShareable
from .dtypes import DType, parse
from .foreign_arrays import Foreign, bounds, unfit
from .incoming import for_views, incoming
from .reducers import OutgoingMessage

_BUILT_IN = 24  # numbers of element types from here on are not numpy's own (NPY_NTYPES_LEGACY)
# subclasses of numpy's own, whose attributes say nothing of the values
_PLAIN = (numpy.ndarray, numpy.memmap, numpy.matrix, numpy.recarray)
_OF_A_FILE = ("_mmap", "filename", "mode", "offset")
_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def place_of(one: Any) -> Foreign:
    """Where an array, or a scalar, lies. Raises `NotShareable`: it has more than elements, or not those of ours."""
    if isinstance(one, numpy.generic):
        one = numpy.asarray(one)
    if type(one) not in _PLAIN:
        attributes, slots = _state(one)
        if _is_masked(one):
            more, remedy = "a mask", "share x.data and numpy.ma.getmaskarray(x), each by itself"
        else:
            more, remedy = f"attributes ({', '.join({**attributes, **slots})})", "share numpy.asarray(x), and send them"
        if attributes or slots:
            raise NotShareable(f"{type(one).__name__} has {more}, which would be left behind; {remedy}")
    plain = numpy.ndarray.view(one, numpy.ndarray)  # what a subclass has made otherwise is not asked
    try:
        dtype = parse(str(plain.dtype))
    except SpecError:
        # to types of others, which are no records, numpy gives the kind of those
        kind = plain.dtype.kind if plain.dtype.kind != "V" or issubclass(plain.dtype.type, numpy.void) else ""
        raise unfit(kind, str(plain.dtype), plain.dtype.byteorder) from None
    return Foreign(plain.__array_interface__["data"][0], plain.shape, plain.strides, dtype, plain)


def export(array: Any, kind: DType) -> Any:
    """A DLPack capsule of a shared array. To numpy, elements that it does not have or not export are numbers."""
    view = numpy.asarray(array)
    capsule = view.view(f"u{kind.itemsize}" if kind.typestr[1] in "Vb" else view.dtype).__dlpack__()
    dlpack.set_code(capsule, kind.code)
    return capsule


def reducers(message: OutgoingMessage) -> dict[Any, Any]:
    """How they are reduced in this message; by a tuple of types, what is derived from them."""

    def array(one: Any) -> Any:
        may = one.flags.writeable
        if not one.nbytes or one.dtype.hasobject:
            reduced = one.__reduce_ex__(5)
            return reduced if may or len(reduced) < 3 else (*reduced[:3], None, None, lock)
        address, itemsize = one.__array_interface__["data"][0], one.itemsize
        low, high = bounds(address, one.shape, one.strides, itemsize)

        def tight() -> tuple[int, tuple[int, ...], Any]:
            copied = numpy.ascontiguousarray(one)
            return copied.ctypes.data, copied.strides, copied

        dtype = one.dtype
        if message.for_others and _has_gaps(dtype):
            raise NotShareable(
                "its records have bytes that are in no field, which would go along: offer "
                "numpy.lib.recfunctions.repack_fields(x)"
            )
        number = message.ref(low, high, one.nbytes, one, tight)
        if dtype.kind != "V" and not dtype.metadata and dtype.num < _BUILT_IN:
            dtype = dtype.str
        return (rebuild, (number, address - low, one.shape, one.strides, dtype, *(() if may else (False,))))

    def derived(one: Any) -> Any:
        if not _is_pickled_by_numpy(type(one)):
            return NotImplemented
        # numpy's own way leaves most attributes behind
        attributes, slots = _state(one)
        if isinstance(one, numpy.memmap):  # there, it is of no file
            attributes = {name: value for name, value in attributes.items() if name not in _OF_A_FILE}
        made = (derive, (numpy.ndarray.view(one, numpy.ndarray), type(one)))
        return (*made, (attributes, slots), None, None, update) if attributes or slots else made

    return {numpy.ndarray: array, (numpy.ndarray,): derived}


def _has_gaps(dtype: Any) -> bool:
    """Whether not all bytes of an element are of some field."""
    if dtype.subdtype is not None:
        return _has_gaps(dtype.subdtype[0])
    if dtype.names is None:
        return False
    fields = [dtype.fields[name][:2] for name in dtype.names]
    ends = {at: at + field.itemsize for field, at in fields}
    at = 0
    for begin in sorted(ends):
        if begin > at:
            return True
        at = max(at, ends[begin])
    return at < dtype.itemsize or any(_has_gaps(field) for field, _ in fields)


def _is_masked(one: Any) -> bool:
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(one, ma.MaskedArray)


def _state(one: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes of an instance, and those in its `__slots__`."""
    state: Any = object.__getstate__(one)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    return attributes or {}, slots or {}


def _is_pickled_by_numpy(kind: type) -> bool:
    """Whether it has no way of its own to be pickled."""
    ma = sys.modules.get("numpy.ma")
    bases = (numpy.ndarray,) if ma is None else (numpy.ndarray, ma.MaskedArray)
    return any(all(getattr(kind, one) is getattr(base, one) for one in _PICKLING) for base in bases)


def lock(made: Any, state: Any) -> None:
    """One that must not be written to."""
    made.__setstate__(state)
    made.flags.writeable = False


def derive(plain: Any, kind: type) -> Any:
    """An array of that type over the memory of a plain one."""
    return plain.view(kind)


def update(made: Any, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """With the attributes that it had."""
    attributes, slots = state
    if attributes:
        made.__dict__.update(attributes)
    for name, value in slots.items():
        setattr(made, name, value)


def rebuild(
    number: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, writeable: bool = True
) -> Any:
    """The same array over the memory of the message."""
    memory, others = incoming().take(number)
    if others is not None:
        offset, strides = 0, others
    made = numpy.ndarray(shape, dtype, for_views(memory), offset, strides)
    made.flags.writeable = writeable and made.flags.writeable
    return made
