"""`SharedArray`: shape and element type over shared memory. numpy, torch and others make their own views of it."""

from __future__ import annotations

import contextlib
import ctypes
import operator
import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

from ..model.errors import SpecError
from ..model.text import shown
from ..model.validation import check_whole, has_method
from . import dlpack, foreign_arrays
from ._arena import arena
from ._errors import FAILURES, NotShareable
from .address_index import find
from .dtypes import DType, loaded, parse
from .foreign_arrays import MOST_DIMENSIONS, Foreign, contiguous, elements

_TRUTH, _AT_ONCE = bytes((0, *[1] * 255)), 1 << 20


class SharedArray:
    """An array in memory that other processes can map. Made by `empty` and `copy`; nothing is copied from here on.

    `numpy.asarray(x)`, `torch.from_dlpack(x)` and all else that knows `__array_interface__` or DLPack give views of the
    same memory; indexing gives parts of it. It lives as long as any view, in any process, or any message that carries
    it. Both ends may write, unless it came `read_only`; there is no lock.

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
    def read_only(self) -> bool:
        """Whether it came from who offers it so (`sharing.Endpoint`). Views of it cannot be written to. A library that
        knows no such views, as torch, changes a copy of the page that is this process's own: it is not sent on, and
        shows no more what the owner writes. So do pages that are locked (`mlockall`).
        """
        return self._loan is not None and bool(self._loan.read_only)

    @property
    def buffer(self) -> memoryview:
        """Its memory, for anything that takes a buffer.

        Of its shape and format, or its bytes where there is no format for its elements.

        Raises:
            BufferError: it is not contiguous.
        """
        format: Any = self._type.format
        if not self.size:
            return (
                foreign_arrays.without_elements(format, self.shape, self.itemsize)
                if format
                else memoryview(bytearray())
            )
        if self.strides != contiguous(self.shape, self.itemsize):
            raise BufferError("not contiguous: take a buffer of the whole array, or numpy.asarray()")
        flat = memoryview(self._loan).cast("B")[self._offset : self._offset + self.nbytes]
        if self.read_only:
            flat = flat.toreadonly()
        return flat.cast(format, self.shape) if format else flat

    @property
    def address(self) -> int:
        """Where its first element is in this process."""
        return ctypes.addressof(self._loan) + self._offset if self._loan is not None else 0

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._interface(foreign_arrays.NOWHERE)

    def _interface(self, nowhere: int = 0) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self._type.typestr,
            "data": (self.address or nowhere, self.read_only),
            "strides": self.strides,
        }

    def __dlpack__(self, *, copy: bool | None = None, dl_device: tuple[int, int] | None = None, **_: Any) -> Any:
        if dl_device is not None and tuple(dl_device) != dlpack.CPU:
            raise BufferError(f"its memory is on the CPU, not on {shown(dl_device)}; have a copy made there")
        if copy:
            return self.__copy__().__dlpack__()
        if self.read_only:
            raise BufferError("it is read-only, which DLPack cannot say: take numpy.asarray(x), or sharing.copy(x)")
        dlpack.check_forward(self.strides)
        # by a library, where there is one: it lets go without Python, in which an exception on its way would be lost
        if _numpys():
            from . import _numpy_arrays  # numpy may not be here

            return _numpy_arrays.export(self, self._type)
        if _torchs():
            from . import _torch_tensors  # torch may not be here

            return _torch_tensors.over(self._loan, self._offset, self.shape, self.strides, self._type).__dlpack__()
        steps = [one // self.itemsize for one in self.strides]
        return dlpack.export(self._loan, self.address, self.shape, steps, self._type, dlpack.CPU)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU

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
            number = None
            if not foreign_arrays.is_bool(one):  # numpy takes it for a mask
                with contextlib.suppress(TypeError):
                    number = operator.index(one)
            if number is None:
                problem = "is no whole number, no slice and no ..."
                raise IndexError(f"index {shown(one)} {problem}; numpy.asarray(x) can have more")
            if not -size <= number < size:
                raise IndexError(f"index {number} is out of bounds for {size}")
            offset += step * (number % size)
        return self._part(offset, tuple(shape), tuple(strides))

    def _part(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> SharedArray:
        return SharedArray(self._loan, offset, shape, strides, self._type)

    def __copy__(self) -> SharedArray:
        """As numpy's: an array of its own, which shares nothing with this one; not isolated. `x[...]` is a view."""
        return copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedArray:
        return self.__copy__()

    def __repr__(self) -> str:
        return f"<SharedArray {self.dtype} {self.shape}>"

    def __reduce__(self) -> Any:
        raise NotShareable(
            "a shared array travels in arguments and results of workers, by worker.send() and in a sharing.Queue; "
            "elsewhere, pickle numpy.array(x)"
        )


def check_shape(shape: Any) -> tuple[int, ...]:
    """As a tuple. Raises `SpecError`."""
    if has_method(shape, "tolist"):
        shape = shape.tolist()  # of numpy's scalars and arrays
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str | bytes) else (shape,)
    if len(sizes) > MOST_DIMENSIONS:
        raise SpecError("shape", shape, f"has {len(sizes)} dimensions", f"give at most {MOST_DIMENSIONS}")
    whole = []
    for size in sizes:
        if not foreign_arrays.is_bool(size):
            with contextlib.suppress(Exception):  # it is told below
                size = operator.index(size)  # numpy's
        check_whole("shape", size, 0, sys.maxsize)
        whole.append(size)
    return tuple(whole)


def empty(
    shape: SupportsIndex | Sequence[SupportsIndex], dtype: Any = "float64", isolated: bool = False
) -> SharedArray:
    """A shared array with any contents.

    Args:
        shape: one whole number, or several.
        dtype: a name (`"float32"`, `"f4"`, `"bfloat16"`, `"float8_e4m3fn"`), or a type of Python's, numpy's or torch's.
        isolated: in memory of its own, zeroed, which is used for nothing else afterwards.

    Raises:
        SpecError: there is no such array.
        ShareLimit: no room for it.
    """
    sizes, kind = check_shape(shape), parse(dtype)
    nbytes = elements(sizes) * kind.itemsize
    if elements([max(size, 1) for size in sizes]) * kind.itemsize > sys.maxsize // 2:  # its strides are numbers, too
        raise SpecError("shape", shown(shape), "is more than any machine can have", "give a smaller one")
    loan = None
    if nbytes:
        loan = arena.part(nbytes, isolated)
    return SharedArray(loan, 0, sizes, contiguous(sizes, kind.itemsize), kind)


def copy(array: Any, isolated: bool = False) -> SharedArray:
    """A shared copy of an array: numpy's, torch's, any with DLPack on the CPU, or a buffer.

    Args:
        isolated: as for `empty`.

    Raises:
        NotShareable: its elements cannot be shared, it has more than elements (a mask, a unit), or it is not in memory
            of the CPU; or its library says of it what cannot be.
        ShareLimit: no room for it.
    """
    source = place_of(array) if issubclass(type(array), SharedArray) else foreign(array)
    out = empty(source.shape, source.dtype.name, isolated)
    if out.size:
        _copy(source, out)
        if out.dtype == "bool":  # some have other bytes than 0 and 1 for it
            flat = out.buffer.cast("B")
            for at in range(0, flat.nbytes, _AT_ONCE):
                flat[at : at + _AT_ONCE] = bytes(flat[at : at + _AT_ONCE]).translate(_TRUTH)
    return out


def place_of(array: SharedArray) -> Foreign:
    """Where one of ours lies."""
    return Foreign(array.address, array.shape, array.strides, array._type, array)


def foreign(array: Any) -> Foreign:
    """Where an array of another library lies, on the CPU. Raises `NotShareable`."""
    if issubclass(type(array), _numpys()):  # what `isinstance` asks may be anything
        from . import _numpy_arrays  # numpy may not be here

        return _numpy_arrays.place_of(array)
    if issubclass(type(array), _torchs()):
        from . import _torch_tensors  # torch may not be here

        return _torch_tensors.place_of(array)
    if type(array) in foreign_arrays.OWNERS:
        return foreign_arrays.by_buffer(array)
    if foreign_arrays.speaks(array, "__dlpack__"):
        place = dlpack.read(array)
    elif foreign_arrays.speaks(array, "__array_interface__"):
        place = foreign_arrays.by_interface(array, foreign_arrays.interface(array))
    else:
        place = foreign_arrays.by_buffer(array)
    return foreign_arrays.check_readable(place)


def _numpys() -> tuple[type, ...]:
    """The types of numpy's arrays and scalars, where it is loaded."""
    numpy = loaded("numpy", "ndarray", "numpy.lib")
    return () if numpy is None else (numpy.ndarray, numpy.generic)


def _torchs() -> tuple[type, ...]:
    torch = loaded("torch", "Tensor", "torch.utils")
    return () if torch is None else (torch.Tensor,)


def is_shared(array: Any) -> bool:
    """Whether the memory of an array is shared: a `SharedArray`, or a view of one, by whatever library, or a buffer.

    It raises nothing: what is no array is not shared.

    Args:
        array: what is asked about.
    """
    if issubclass(type(array), SharedArray):
        return True
    try:
        address = operator.index(_address_of(array))
    except FAILURES:  # the code of others
        return False
    return find(address) is not None


def _address_of(array: Any) -> int:
    """Where its first element is, on whatever device. Raises anything."""
    if has_method(array, "data_ptr"):
        return array.data_ptr()  # type: ignore[no-any-return]
    # a scalar of numpy's says where a copy of it is; as a buffer, where it is itself
    if not issubclass(type(array), _numpys()[1:]):
        for name in ("__array_interface__", "__cuda_array_interface__"):
            if hasattr(array, name):
                return foreign_arrays.memory_of(array, foreign_arrays.interface(array, name))[0]
        if has_method(array, "__dlpack__"):
            tensor, _ = dlpack.tensor_of(array)
            return (tensor.data or 0) + int(tensor.byte_offset)
    return foreign_arrays.address_of(memoryview(array))


def _copy(source: Foreign, out: SharedArray) -> None:
    if source.strides == out.strides:
        ctypes.memmove(out.address, source.address, out.nbytes)
        return
    # the innermost dimensions that lie together are one run
    run, depth = out.itemsize, len(source.shape)
    while depth and (source.strides[depth - 1] == run or source.shape[depth - 1] == 1):
        depth -= 1
        run *= source.shape[depth]
    numpy = loaded("numpy", "ndarray", "numpy.lib")
    if numpy is not None and len(source.shape) <= 32:  # fast for any strides; numpy 1 has no more dimensions
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
