"""`SharedArray`: shape and element type over shared memory. numpy, torch and others make their own views of it."""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Sequence
from typing import Any

from ..checks import check_whole
from ..errors import SpecError
from ..shown import shown
from . import _dlpack
from ._arena import arena
from ._dlpack import contiguous
from ._dtypes import FORMATS, ORDER, DType, parse
from ._errors import NotShareable
from ._segment import find, gate


class SharedArray:
    """An array in memory that other processes can map. Made by `empty` and `copy`; nothing is copied from here on.

    `numpy.asarray(x)`, `torch.from_dlpack(x)` and all else that knows `__array_interface__` or DLPack give views of the
    same memory; indexing gives parts of it. It lives as long as any view, in any process, or any message that carries
    it. Both ends may write; there is no lock.

    Attributes:
        shape: as numpy's.
        strides: bytes from one element to the next, for each dimension.
        dtype: the name of the element type, as `"float32"`.

    Example::

        x = sharing.empty((1024, 1024), "float32")
        numpy.asarray(x)[:] = 1
        result = await supervise(Function(total, x), n=4)
    """

    __slots__ = ("__weakref__", "_loan", "_offset", "_type", "shape", "strides")

    def __init__(self, loan: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType) -> None:
        self._loan = loan
        self._offset = offset
        self._type = dtype
        self.shape = shape
        self.strides = strides

    @property
    def dtype(self) -> str:
        """The name of the element type."""
        return self._type.name

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self._type.itemsize

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return elements(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.itemsize

    @property
    def device(self) -> str:
        """The device that it lies on.

        `"cpu"`, or a GPU by its number in this process, as `"cuda:0"`.
        """
        return "cpu"

    @property
    def buffer(self) -> memoryview:
        """Its memory, for anything that takes a buffer. Raises `BufferError` if it is not contiguous."""
        if self.strides != contiguous(self.shape, self.itemsize) and self.size:
            raise BufferError("not contiguous: take a buffer of the whole array, or numpy.asarray()")
        if not self.size:
            return memoryview(bytearray())
        flat = memoryview(self._loan).cast("B")[self._offset : self._offset + self.nbytes]
        format: Any = self._type.format
        return flat.cast(format, self.shape) if format else flat

    @property
    def address(self) -> int:
        """Where its first element is in this process."""
        return ctypes.addressof(self._loan) + self._offset if self._loan is not None else 0

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._interface()

    def _interface(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self._type.typestr,
            "data": (self.address, False),
            "strides": self.strides,
        }

    def __dlpack__(self, *, copy: bool | None = None, **_: Any) -> Any:
        if copy:
            return globals()["copy"](self).__dlpack__()
        steps = [one // self.itemsize for one in self.strides]
        return _dlpack.export(self._loan, self.address, self.shape, steps, self._type, _dlpack.CPU)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _dlpack.CPU

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("it has no dimensions")
        return self.shape[0]

    def __getitem__(self, key: Any) -> SharedArray:
        """A part of it, by whole numbers, slices and `...`: always a view."""
        keys = list(key) if isinstance(key, tuple) else [key]
        dots = [at for at, one in enumerate(keys) if one is Ellipsis]
        missing = self.ndim - len(keys) + len(dots)
        if missing < 0 or len(dots) > 1:
            raise IndexError(f"too many indices for {self.ndim} dimensions")
        at = dots[0] if dots else len(keys)
        keys[at : at + len(dots)] = [slice(None)] * missing
        offset, shape, strides = self._offset, [], []
        for one, size, step in zip(keys, self.shape, self.strides, strict=True):
            if isinstance(one, slice):
                start, stop, by = one.indices(size)
                count = len(range(start, stop, by))
                offset += start * step if count else 0
                shape.append(count)
                strides.append(step * by)
                continue
            number = operator.index(one)
            if not -size <= number < size:
                raise IndexError(f"index {number} is out of bounds for {size}")
            offset += step * (number % size)
        return self._part(offset, tuple(shape), tuple(strides))

    def _part(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> SharedArray:
        return SharedArray(self._loan, offset, shape, strides, self._type)

    def __repr__(self) -> str:
        return f"<SharedArray {self.dtype} {self.shape}>"

    def __reduce__(self) -> Any:
        raise NotShareable(
            "a shared array travels in arguments and results of workers, by worker.send() and in a sharing.Queue; "
            "elsewhere, pickle numpy.array(x)"
        )


def elements(shape: Sequence[int]) -> int:
    """How many, in an array of that shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def check_shape(shape: Any) -> tuple[int, ...]:
    """As a tuple. Raises `SpecError`."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str | bytes) else (shape,)
    whole = []
    for size in sizes:
        if not isinstance(size, int) and hasattr(size, "__index__"):
            size = operator.index(size)  # numpy's
        check_whole("shape", size, 0, sys.maxsize)
        whole.append(size)
    return tuple(whole)


def empty(shape: int | Sequence[int], dtype: Any = "float64") -> SharedArray:
    """A shared array with any contents.

    Args:
        shape: one whole number, or several.
        dtype: a name (`"float32"`, `"f4"`, `"bfloat16"`, `"float8_e4m3fn"`), or a type of Python's, numpy's or torch's.

    Raises:
        SpecError: there is no such array.
        ShareLimit: no room for it.
    """
    sizes, kind = check_shape(shape), parse(dtype)
    nbytes = elements(sizes) * kind.itemsize
    if nbytes > sys.maxsize // 2:
        raise SpecError("shape", shown(shape), "is more than any machine can have", "give a smaller one")
    loan = None
    if nbytes:
        with gate:
            _, loan = arena.part(nbytes)
    return SharedArray(loan, 0, sizes, contiguous(sizes, kind.itemsize), kind)


def copy(array: Any) -> SharedArray:
    """A shared copy of an array: numpy's, torch's, any with DLPack on the CPU, or a contiguous buffer.

    Raises:
        NotShareable: its elements cannot be shared, or it is not in memory of the CPU.
        ShareLimit: no room for it.
    """
    source = place_of(array) if isinstance(array, SharedArray) else foreign(array)
    out = empty(source.shape, source.dtype.name)
    if out.size:
        _copy(source, out)
    return out


def place_of(array: SharedArray) -> _dlpack.Foreign:
    """Where one of ours lies."""
    return _dlpack.Foreign(array.address, array.shape, array.strides, array._type, array)


def foreign(array: Any) -> _dlpack.Foreign:
    """Where an array of another library lies, on the CPU. Raises `NotShareable`."""
    if hasattr(array, "__dlpack__") and type(array).__module__.partition(".")[0] != "numpy":
        if getattr(array, "requires_grad", False):
            array = array.detach()
        return _dlpack.read(array)
    return _from_interface(array)


def is_shared(array: Any) -> bool:
    """Whether the memory of an array is shared: a `SharedArray`, or a view of one, by whatever library."""
    if isinstance(array, SharedArray):
        return True
    if hasattr(array, "data_ptr"):
        try:
            address = array.data_ptr()
        except RuntimeError:
            return False  # torch's, without a memory of its own
    elif hasattr(array, "__array_interface__"):
        address = array.__array_interface__["data"][0]
    elif hasattr(array, "__cuda_array_interface__"):
        address = array.__cuda_array_interface__["data"][0]
    elif hasattr(array, "__dlpack__"):
        address = _dlpack.read(array).address
    else:
        return False
    with gate:
        return find(address) is not None


def _from_interface(array: Any) -> _dlpack.Foreign:
    told = getattr(array, "__array_interface__", None)
    if told is None:
        try:
            flat = memoryview(array)
        except TypeError:
            problem = f"{type(array).__name__} is no array: it has neither DLPack, nor an array interface, nor a buffer"
            raise NotShareable(f"{problem}; give numpy.asarray() of it") from None
        if not flat.c_contiguous:
            raise NotShareable("a buffer that is not contiguous; give an array of it")
        format = flat.format.removeprefix(ORDER)  # ctypes says it
        try:
            kind = parse(FORMATS.get(format, format))
        except SpecError:
            problem = f"its elements ({shown(flat.format)}) cannot be shared; use a plain number type"
            raise NotShareable(problem) from None
        held = flat if not flat.readonly else memoryview(bytearray(flat))
        address = ctypes.addressof((ctypes.c_ubyte * held.nbytes).from_buffer(held)) if held.nbytes else 0
        shape = tuple(flat.shape or ())
        return _dlpack.Foreign(address, shape, contiguous(shape, kind.itemsize), kind, held)
    try:
        dtype = parse(str(getattr(array, "dtype", "")) or told["typestr"])
    except SpecError as exc:
        raise NotShareable(f"its elements ({shown(exc.value)}) cannot be shared; use a plain number type") from None
    strides = told.get("strides") or contiguous(told["shape"], dtype.itemsize)
    return _dlpack.Foreign(told["data"][0], told["shape"], strides, dtype, array)


def _copy(source: _dlpack.Foreign, out: SharedArray) -> None:
    if source.strides == out.strides:
        ctypes.memmove(out.address, source.address, out.nbytes)
        return
    # the innermost dimensions that lie together are one run
    run, depth = out.itemsize, len(source.shape)
    while depth and (source.strides[depth - 1] == run or source.shape[depth - 1] == 1):
        depth -= 1
        run *= source.shape[depth]
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # fast for any strides
        raw = f"|V{out.itemsize}"
        left = numpy.asarray(_Raw(out.address, out.shape, out.strides, raw))
        left[...] = numpy.asarray(_Raw(source.address, source.shape, source.strides, raw))
        return
    _runs(source.address, source.strides, out.address, out.strides, source.shape[:depth], run)


def _runs(source: int, steps: Sequence[int], target: int, pace: Sequence[int], shape: Sequence[int], run: int) -> None:
    if not shape:
        ctypes.memmove(target, source, run)
        return
    for number in range(shape[0]):
        _runs(source + number * steps[0], steps[1:], target + number * pace[0], pace[1:], shape[1:], run)


class _Raw:
    """Memory by its address, for numpy."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "strides": strides,
        }
