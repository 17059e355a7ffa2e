"""Arrays of other libraries: where they lie. What a protocol says is checked whole before a byte of them is read.

Sources: numpy's "The array interface protocol", version 3; numba's "CUDA Array Interface", version 3; PEP 3118.
"""

from __future__ import annotations

import ctypes
import operator
import os
import re
import sys
from array import array as numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..model.errors import SpecError
from ..model.text import shown, told
from ..system.descriptors import shut
from ._errors import FAILURES, NotShareable, ShareLimit
from .dtypes import ORDER, DType, parse
from .shared_segments import PAGE

MOST_DIMENSIONS = 64  # of numpy's arrays, and of buffers
OWNERS = (bytes, bytearray, numbers)  # of memory that surely is there
_VERSION = 3  # of both array interfaces
_AT_ONCE = 1024  # pieces of memory in one system call (IOV_MAX)

_pwritev = ctypes.CDLL(None).pwritev
_pwritev.restype, _pwritev.argtypes = ctypes.c_ssize_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]


class Foreign(NamedTuple):
    """Memory of another library's array, and what keeps it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: DType
    keep: Any


class _Buffer(ctypes.Structure):
    """Py_buffer, which is part of the stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),  # a reference: only PyBuffer_Release may touch it
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


_FULL_RO = 0x011C  # PyBUF_FULL_RO: any layout, and it need not be writable
_api = ctypes.pythonapi
_api.PyObject_GetBuffer.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_api.PyBuffer_Release.argtypes = [ctypes.POINTER(_Buffer)]
_api.PyMemoryView_FromBuffer.argtypes = [ctypes.POINTER(_Buffer)]
_api.PyMemoryView_FromBuffer.restype = ctypes.py_object


def elements(shape: Sequence[int]) -> int:
    """How many, in an array of that shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def contiguous(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides, in bytes, in C order."""
    out, step = [], itemsize
    for size in reversed(shape):
        out.append(step)
        step *= max(size, 1)
    return tuple(reversed(out))


def wrong(field: str, value: object, problem: str) -> NotShareable:
    """What its library says of an array cannot be."""
    return NotShareable(f"{field}={shown(value)} {problem}; mend what says so, or give its elements as a numpy array")


def cannot_say(array: object, protocol: str, exc: BaseException) -> NotShareable:
    """Its library raises when it is asked where an array lies."""
    return NotShareable(
        f"{type(array).__name__} cannot show its memory by {protocol}: {told(exc)}; give a numpy array of it"
    )


def speaks(array: object, protocol: str) -> bool:
    """Whether that is a name of an array itself.

    Raises:
        NotShareable: it passes on what another array says, and may have more than that has.
    """
    try:
        if getattr(array, protocol, None) is None:
            return False
        its_own = any(protocol in vars(one) for one in type(array).__mro__) or protocol in array.__dict__
    except FAILURES as exc:
        raise cannot_say(array, protocol, exc) from exc
    if not its_own:
        problem = f"{type(array).__name__} speaks for another array, and may have more than that (a unit, say)"
        raise NotShareable(f"{problem}, which would be left behind; give that array, or numpy.asarray(x)")
    return True


# --- elements ---

_OTHER = ">" if ORDER == "<" else "<"  # the byte order that this machine does not have

# what to share instead, by the kind of the elements, as numpy has it
_INSTEAD = {
    **dict.fromkeys("OT", "they are objects: send the array itself, which is pickled"),
    **dict.fromkeys("SU", 'they are text: share its bytes, as x.view("uint8"), or send the array itself'),
    **dict.fromkeys("Mm", 'share x.view("int64"), and take numpy.asarray(it).view(dtype) there'),
    "V": 'they are records: share each field by itself, as x["name"], or the bytes, as x.view("uint8")',
    "f": 'share x.astype("float64")',
    "c": 'share x.astype("complex128")',
}


def unfit(kind: str, name: object, order: str = "=") -> NotShareable:
    """No elements of ours. `kind` and `order` as numpy has them."""
    remedy = _INSTEAD.get(kind, 'share them as numbers, or the bytes, as x.view("uint8")')
    if order == _OTHER and kind in "biufc":
        remedy = 'they have the other byte order: share x.astype(x.dtype.newbyteorder("="))'
    return NotShareable(f"its elements ({shown(name)}) cannot be shared; {remedy}")


# --- places ---


def bounds(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """The first byte of an array that has elements, and the one behind its last."""
    low = high = address
    for size, step in zip(shape, strides, strict=True):
        if step < 0:
            low += step * (size - 1)
        else:
            high += step * (size - 1)
    return low, high + itemsize


def is_bool(value: object) -> bool:
    """Whether it is one of Python's or numpy's, which are whole numbers to many."""
    return type(value).__name__ in ("bool", "bool_")


def whole(field: str, value: object, least: int = -sys.maxsize - 1, most: int = sys.maxsize) -> int:
    """As an int of Python's. Raises `NotShareable`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except FAILURES:
        raise wrong(field, value, "is no whole number") from None
    if is_bool(value) or not least <= number <= most:
        raise wrong(field, value, f"is no whole number from {least} to {most}")
    return number


def _wholes(field: str, value: object, least: int) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise wrong(field, value, "is no tuple of whole numbers")
    if len(value) > MOST_DIMENSIONS:
        raise wrong(field, value, f"has {len(value)} dimensions, more than {MOST_DIMENSIONS}")
    return tuple(whole(field, one, least) for one in value)


def placed(
    address: int, shape: object, strides: object, dtype: DType, keep: Any, within: tuple[int, int] | None = None
) -> Foreign:
    """What lies there, if it can lie there.

    Args:
        shape: what the other library says.
        strides: in bytes; None: in C order.
        within: the addresses of the memory that it is in, where they are known.

    Raises:
        NotShareable: it names the field.
    """
    sizes = _wholes("shape", shape, 0)
    if elements([max(size, 1) for size in sizes]) * dtype.itemsize > sys.maxsize:
        raise wrong("shape", shape, f"is more than memory can be, with {dtype.itemsize} bytes for an element")
    steps = contiguous(sizes, dtype.itemsize) if strides is None else _wholes("strides", strides, -sys.maxsize)
    if len(steps) != len(sizes):
        raise wrong("strides", strides, f"is not for {len(sizes)} dimensions")
    if not elements(sizes):
        return Foreign(0, sizes, steps, dtype, keep)
    low, high = bounds(address, sizes, steps, dtype.itemsize)
    first, end = within or (1, sys.maxsize)
    if low < first or high > end:
        size = "" if within is None else f" of {end - first} bytes"
        begin = hex(address) if within is None else f"byte {address - first}"
        raise wrong("shape", sizes, f"with strides {shown(steps)} from {begin} on is outside of its memory{size}")
    return Foreign(address, sizes, steps, dtype, keep)


def check_readable(place: Foreign) -> Foreign:
    """The same, if its memory can be read. Raises `NotShareable`."""
    if elements(place.shape):
        low, high = bounds(place.address, place.shape, place.strides, place.dtype.itemsize)
        if not readable(low, high):
            raise wrong("data", hex(place.address), f"is not where {high - low} bytes of memory can be read")
    return place


def readable(low: int, high: int) -> bool:
    """Whether the kernel can read there, a byte of each page. Who reads elsewhere is ended (SIGSEGV, SIGBUS).

    Raises:
        ShareLimit: this process has no descriptor left.
    """
    if low <= 0 or high > sys.maxsize:
        return False
    pages = range(low - low % PAGE, high, PAGE)
    try:
        fd = os.memfd_create("aioelastic", os.MFD_CLOEXEC)
    except OSError as exc:
        raise ShareLimit(f"cannot look at the memory of another library: {exc}") from exc
    try:
        for at in range(0, len(pages), _AT_ONCE):
            part = numbers("Q", pages[at : at + _AT_ONCE])
            part[0] = max(part[0], low)
            vector = numbers("Q", [1]) * (2 * len(part))  # address and length of each
            vector[::2] = part
            if _pwritev(fd, vector.buffer_info()[0], len(part), 0) != len(part):  # EFAULT, at the first or a later one
                return False
    finally:
        shut(fd)
    return True


# --- the array interfaces ---

_TYPESTR = re.compile(r"([<>|=]?)([a-zA-Z])([0-9]{1,9})(\[[^\]]*\])?")


def interface(array: Any, name: str = "__array_interface__") -> dict[str, Any]:
    """What it says by that protocol. Raises `NotShareable`."""
    try:
        said = getattr(array, name)
    except FAILURES as exc:
        raise cannot_say(array, name, exc) from exc
    if not isinstance(said, dict):
        raise wrong(name, said, "is no dict")
    return said


def by_interface(array: object, said: dict[str, Any]) -> Foreign:
    """Where it lies, by either array interface. Raises `NotShareable`."""
    if said.get("mask") is not None:
        raise NotShareable("it has a mask, which would be left behind; share its elements and its mask by themselves")
    whole("version", said.get("version", _VERSION), 0, _VERSION)
    dtype = _element_type(array, said)
    address, within, keep = memory_of(array, said)
    return placed(address, said.get("shape"), said.get("strides"), dtype, (array, said, keep), within)


def memory_of(array: object, said: dict[str, Any]) -> tuple[int, tuple[int, int] | None, Any]:
    """The address; of a buffer, too, where that begins and ends, and what keeps it. Raises `NotShareable`."""
    data, offset = said.get("data"), said.get("offset")
    offset = 0 if offset is None else whole("offset", offset, 0)
    if isinstance(data, tuple | list):
        if len(data) != 2 or not (is_bool(data[1]) or type(data[1]) is int):
            raise wrong("data", data, "is not a pointer and whether it is read-only")
        address = 0 if data[0] is None else whole("data", data[0], 0)
        if offset:
            raise wrong("offset", offset, "is given beside a pointer")
        return address, None, None
    try:
        view = memoryview(array if data is None else data)  # type: ignore[arg-type]
    except FAILURES:
        raise wrong("data", data, "is neither a pointer, as (number, read-only), nor a buffer") from None
    if not view.contiguous:
        raise wrong("data", data, "is a buffer that is not contiguous")
    first = address_of(view)
    return first + offset, (first, first + view.nbytes), view


def _element_type(array: object, said: dict[str, Any]) -> DType:
    typestr, descr = said.get("typestr"), said.get("descr")
    found = _TYPESTR.fullmatch(typestr) if isinstance(typestr, str) else None
    if found is None or not isinstance(typestr, str):
        raise wrong("typestr", typestr, 'is no element type, as "<f4"')
    if descr is not None:
        one = descr[0] if isinstance(descr, list | tuple) and len(descr) == 1 else None
        texts = [text if isinstance(text, str) else None for text in one] if isinstance(one, tuple | list) else []
        if texts != ["", typestr]:
            raise wrong("descr", descr, f"is not of elements {typestr}: records, and padding, cannot be shared")
    order, kind, size = found[1], found[2], int(found[3])
    try:
        its_own = getattr(getattr(array, "dtype", None), "str", None)  # of numpy's, which most libraries use
    except FAILURES as exc:
        raise cannot_say(array, "its dtype", exc) from exc
    if isinstance(its_own, str) and its_own[1:] != typestr[len(order) :]:
        raise wrong("typestr", typestr, f"is not that of its dtype, {shown(its_own)}")
    try:
        if kind != "V":
            return parse(kind + found[3] if size == 1 else typestr)
        # raw bytes: types that numpy does not have
        named = parse(str(array.dtype))  # type: ignore[attr-defined]
    except FAILURES:
        raise unfit(kind, typestr, order) from None
    if named.itemsize != size:
        raise wrong("typestr", typestr, f"has another size than elements of type {named.name}")
    return named


# --- buffers ---

# format characters (struct): of which kind the elements are; how large they are says the buffer
_KINDS = {
    "?": "bool",
    "c": "uint",
    **dict.fromkeys("bhilqn", "int"),
    **dict.fromkeys("BHILQN", "uint"),
    **dict.fromkeys("efdg", "float"),
    **dict.fromkeys(("Ze", "Zf", "Zd", "Zg"), "complex"),
}
# the kinds of those that cannot be shared, as numpy has it, by their first letter
_AS_NUMPY = {"O": "O", "s": "S", "p": "S", "u": "U", "w": "U", "g": "f", "Z": "c", "T": "V"}


def by_buffer(array: object) -> Foreign:
    """Where it lies, by the buffer protocol. Raises `NotShareable`."""
    try:
        view = memoryview(array)  # type: ignore[arg-type]
    except TypeError:
        problem = f"{type(array).__name__} is no array: it has neither DLPack, nor an array interface, nor a buffer"
        raise NotShareable(f"{problem}; give numpy.asarray() of it") from None
    except FAILURES as exc:
        raise cannot_say(array, "a buffer", exc) from exc
    if view.suboffsets:
        raise NotShareable("a buffer of pointers to rows (suboffsets); give an array of it")
    return placed(address_of(view), view.shape, view.strides, _of_format(view), view)


def _of_format(view: memoryview) -> DType:
    kind = view.format.lstrip("@=<>!")
    family = _KINDS.get(kind)
    swapped = view.itemsize > 1 and view.format[:1] in (_OTHER, "!"[ORDER == ">" :])
    try:
        if family is None or swapped:
            raise SpecError("format", view.format, "is none of ours", "")
        return parse(family if family == "bool" else f"{family}{8 * view.itemsize}")
    except SpecError:
        as_numpy = "i" if swapped and family else _AS_NUMPY.get(kind.lstrip("0123456789")[:1], "")
        raise unfit(as_numpy, view.format, _OTHER if swapped else "=") from None


def address_of(view: memoryview) -> int:
    """Where the first element of a buffer is. Raises `BufferError`, or `ValueError`: it was released."""
    one = _Buffer()
    _api.PyObject_GetBuffer(view, ctypes.byref(one), _FULL_RO)
    address = one.buf or 0
    _api.PyBuffer_Release(ctypes.byref(one))
    return address


_BYTES = {one: one.encode() for one in "?bhiqBHIQfd"}  # a view points to its format, and does not keep it
_empty = ctypes.create_string_buffer(1)
NOWHERE = ctypes.addressof(_empty)  # where there are no elements: numpy before 1.25 takes no 0


def without_elements(format: str, shape: tuple[int, ...], itemsize: int) -> memoryview:
    """A buffer of that shape, in which there is a 0: `memoryview.cast` makes none."""
    sizes = (ctypes.c_ssize_t * len(shape))(*shape)
    steps = (ctypes.c_ssize_t * len(shape))(*contiguous(shape, itemsize))
    one = _Buffer(NOWHERE, None, 0, itemsize, 0, len(shape), _BYTES[format], sizes, steps, None, None)
    view: memoryview = _api.PyMemoryView_FromBuffer(ctypes.byref(one))
    return view
