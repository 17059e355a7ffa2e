"""Shared arrays in the memory of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import SpecError
from ..memory import NotShareable, SharedArray, _array, _dlpack
from ..memory import empty as empty_on_cpu
from ..memory._array import check_shape, elements
from ..memory._dlpack import Foreign, contiguous
from ..memory._dtypes import DType, parse
from ..memory._message import bounds
from ..shown import shown
from . import _driver
from ._block import Loan, arena_of
from ._driver import Device, bindings, call
from ._legacy import ordinal_of
from ._wait import ready, streams

_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the driver knows what an address is of
_NOT_HERE = (
    "its memory is on a GPU: give it to torch.from_dlpack() or cupy.asarray(), or take sharing.copy(x, device='cpu')"
)


class DeviceArray(SharedArray):
    """A `SharedArray` on a GPU: `torch.from_dlpack(x)`, `cupy.asarray(x)` and `numba.cuda.as_cuda_array(x)` are views.

    One that came in a message is mapped when somebody asks where it is; until then, and when it is only sent on, this
    process needs no GPU.

    Attributes:
        uuid: of its GPU, which is the same in every process.
    """

    __slots__ = ("uuid",)

    def __init__(
        self,
        loan: Loan | None,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: DType,
        uuid: str,
    ) -> None:
        super().__init__(loan, offset, shape, strides, dtype)
        self.uuid = uuid

    @property
    def device(self) -> str:
        return f"cuda:{_driver.device(self.uuid).ordinal}"

    @property
    def buffer(self) -> NoReturn:
        raise BufferError(_NOT_HERE)

    @property
    def address(self) -> int:
        loan = self._loan
        return loan.block.there() + loan.offset + self._offset if loan is not None else 0

    @property
    def __array_interface__(self) -> NoReturn:
        raise AttributeError(_NOT_HERE)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(_NOT_HERE)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._interface(), "stream": None}  # what was written before it was sent is there

    def __dlpack__(self, *, copy: bool | None = None, dl_device: tuple[int, int] | None = None, **_: Any) -> Any:
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(_NOT_HERE)
        if copy:
            return globals()["copy"](self).__dlpack__()
        steps = [one // self.itemsize for one in self.strides]
        return _dlpack.export(self._loan, self.address, self.shape, steps, self._type, self.__dlpack_device__())

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_dlpack.CUDA, _driver.device(self.uuid).ordinal)

    def _part(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self._loan, offset, shape, strides, self._type, self.uuid)

    def __repr__(self) -> str:
        return f"<SharedArray {self.dtype} {self.shape} on {self.uuid}>"


def empty(shape: int | Sequence[int], dtype: Any, device: Any) -> DeviceArray:
    """See `aioelastic.sharing.empty`."""
    sizes, kind = check_shape(shape), parse(dtype)
    where = _driver.device(device)
    nbytes = elements(sizes) * kind.itemsize
    if nbytes > sys.maxsize // 2:
        raise SpecError("shape", shown(shape), "is more than any GPU can have", "give a smaller one")
    loan = arena_of(where).loan(nbytes) if nbytes else None
    return DeviceArray(loan, 0, sizes, contiguous(sizes, kind.itemsize), kind, where.uuid)


def copy(array: Any, device: Any = None) -> SharedArray:
    """See `aioelastic.sharing.copy`: to a GPU, from one, or both."""
    source, origin = _source(array)
    target = origin if device is None else None if str(device) == "cpu" else _driver.device(device)
    if not elements(source.shape):
        out: SharedArray = _empty_like(source, target)
        return out
    if origin is None and source.strides != contiguous(source.shape, source.dtype.itemsize):
        array = _array.copy(array)  # in order
        source, _ = _source(array)
    out = _empty_like(source, target)
    via = target or origin
    assert via is not None
    if origin is not None:
        ready(origin, streams(origin)).result()
    via.run(lambda: _transfer(source, out))
    return out


def is_on_gpu(array: Any) -> bool:
    """Whether that is an array in the memory of a GPU."""
    if isinstance(array, SharedArray):
        return isinstance(array, DeviceArray)
    if getattr(array, "requires_grad", False):
        array = array.detach()  # else torch does not tell
    if hasattr(array, "__cuda_array_interface__"):
        return True
    try:
        return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == _dlpack.CUDA
    except (BufferError, RuntimeError, ValueError):
        return False  # torch's of a device that DLPack does not know


def _source(array: Any) -> tuple[Foreign, Device | None]:
    if isinstance(array, DeviceArray):
        place = _array.place_of(array)
        return place, _driver.device(array.uuid)
    if isinstance(array, SharedArray):
        return _array.place_of(array), None
    if not is_on_gpu(array):
        return _array.foreign(array), None
    place = foreign(array)
    if not place.address:
        return place, _driver.device("cuda")
    return place, device_of(place.address)


def device_of(address: int) -> Device:
    """The device of a pointer of another library."""
    first = _driver.device("cuda")
    return _driver.device(f"cuda:{first.run(lambda: ordinal_of(address))}")


def foreign(array: Any) -> Foreign:
    """Where another library's array lies on a GPU. Raises `NotShareable`."""
    if getattr(array, "requires_grad", False):
        array = array.detach()
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _dlpack.read(array, _dlpack.CUDA)
    told = array.__cuda_array_interface__
    try:
        kind = parse(str(getattr(array, "dtype", "")) or told["typestr"])
    except SpecError as exc:
        raise NotShareable(f"its elements ({shown(exc.value)}) cannot be shared; use a plain number type") from None
    shape = tuple(told["shape"])
    strides = tuple(told.get("strides") or contiguous(shape, kind.itemsize))
    return Foreign(told["data"][0] or 0, shape, strides, kind, array)


def _empty_like(source: Foreign, target: Device | None) -> SharedArray:
    if target is None:
        return empty_on_cpu(source.shape, source.dtype.name)
    return empty(source.shape, source.dtype.name, target.uuid)


def _transfer(source: Foreign, out: SharedArray) -> None:
    """In the thread of a device; done when it returns."""
    itemsize = out.itemsize
    low, high = bounds(source.address, source.shape, source.strides, itemsize)
    if source.strides == out.strides or all(size == 1 for size in source.shape):
        call("cuMemcpy", out.address, source.address, out.nbytes)
    elif high - low == out.nbytes and min(source.strides) > 0:
        # all of it, in another order: it keeps that
        call("cuMemcpy", out.address, low, out.nbytes)
        out.strides = source.strides
    elif min(source.strides) < 0:
        raise NotShareable("an array of a GPU that runs backwards; copy it in order first, as by x.copy()")
    else:
        _rows(source.address, source.strides, out.address, out.strides, source.shape, itemsize)
    call("cuStreamSynchronize", 0)  # copies within a device are done later


def _rows(source: int, steps: Sequence[int], target: int, pace: Sequence[int], shape: Sequence[int], size: int) -> None:
    depth, run = len(shape), size
    while depth and (steps[depth - 1] == run or shape[depth - 1] == 1):
        depth -= 1
        run *= shape[depth]
    if depth == 0:
        call("cuMemcpy", target, source, run)
        return
    if depth > 1:
        for number in range(shape[0]):
            _rows(source + number * steps[0], steps[1:], target + number * pace[0], pace[1:], shape[1:], size)
        return
    if steps[0] < run:  # broadcast, or rows that overlap
        for number in range(shape[0]):
            call("cuMemcpy", target + number * pace[0], source + number * steps[0], run)
        return
    one = bindings().CUDA_MEMCPY2D()
    one.srcMemoryType = one.dstMemoryType = bindings().CUmemorytype(_UNIFIED)
    one.srcDevice, one.dstDevice = source, target
    one.srcPitch, one.dstPitch = steps[0], pace[0]
    one.WidthInBytes, one.Height = run, shape[0]
    call("cuMemcpy2D", one)
