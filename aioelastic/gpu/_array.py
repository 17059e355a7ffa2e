"""Shared arrays in the memory of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn, SupportsIndex

from ..memory import NotShareable, dlpack, foreign_arrays, shared_array
from ..memory.dtypes import DType, parse
from ..memory.foreign_arrays import Foreign, bounds, contiguous, elements
from ..memory.shared_array import SharedArray, check_shape
from ..memory.shared_array import empty as empty_on_cpu
from ..model.errors import SpecError
from ..model.text import shown
from ..model.validation import has_method
from . import _driver
from ._block import Loan, arena_of
from ._completion import ready, streams
from ._driver import Device
from ._driver_calls import bindings, call
from ._foreign_memory import ordinal_of
from ._streams import views

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
        told = self._interface()
        self._shown()
        return {**told, "stream": None}  # what was written before it was sent is there

    def __dlpack__(self, *, copy: bool | None = None, dl_device: tuple[int, int] | None = None, **_: Any) -> Any:
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(_NOT_HERE)
        if copy:
            return globals()["copy"](self).__dlpack__()
        steps = [one // self.itemsize for one in self.strides]
        made = dlpack.export(self._loan, self.address, self.shape, steps, self._type, self.__dlpack_device__())
        self._shown()
        return made

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CUDA, _driver.device(self.uuid).ordinal)

    def __copy__(self) -> SharedArray:
        return copy(self)

    def _shown(self) -> None:
        """To another library: the streams on which it may work with it are waited for, too."""
        if self._loan is not None:
            self._loan.block.seen(views(_driver.device(self.uuid).ordinal))

    def _part(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self._loan, offset, shape, strides, self._type, self.uuid)

    def __repr__(self) -> str:
        return f"<SharedArray {self.dtype} {self.shape} on {self.uuid}>"


def empty(shape: SupportsIndex | Sequence[SupportsIndex], dtype: Any, device: Any) -> DeviceArray:
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
        array = shared_array.copy(array)  # in order
        source, _ = _source(array)
    out = _empty_like(source, target)
    via = target or origin
    assert via is not None
    if origin is not None:
        ready(origin, streams(origin, streams_of(array))).result()
    via.run(lambda: _transfer(source, out, via.stream))
    return out


def is_on_gpu(array: Any) -> bool:
    """Whether that is an array in the memory of a GPU. It raises nothing: what cannot say so is none."""
    if issubclass(type(array), SharedArray):
        return issubclass(type(array), DeviceArray)
    try:
        if getattr(array, "requires_grad", False):
            array = array.detach()  # else torch does not tell
        if hasattr(array, "__cuda_array_interface__"):
            return True
        return hasattr(array, "__dlpack_device__") and bool(array.__dlpack_device__()[0] == dlpack.CUDA)
    except Exception:  # torch's of a device that DLPack does not know, and the code of others
        return False


def _source(array: Any) -> tuple[Foreign, Device | None]:
    if isinstance(array, DeviceArray):
        place = shared_array.place_of(array)
        return place, _driver.device(array.uuid)
    if isinstance(array, SharedArray):
        return shared_array.place_of(array), None
    if not is_on_gpu(array):
        return shared_array.foreign(array), None
    place = foreign(array)
    return place, device_of(*extent(place), array)


def extent(place: Foreign) -> tuple[int, int]:
    """Its first byte, and the one behind its last; twice the same where it has none."""
    if not place.address or not elements(place.shape):
        return 0, 0
    return bounds(place.address, place.shape, place.strides, place.dtype.itemsize)


def device_of(low: int, high: int, array: Any) -> Device:
    """The device of memory of another library; where there is none, the one that its array says."""
    if high > low:
        return _driver.device(f"cuda:{_driver.without_context(lambda: ordinal_of(low, high))}")
    told = array.__dlpack_device__()[1] if hasattr(array, "__dlpack_device__") else 0
    return _driver.device(f"cuda:{told}")


def streams_of(array: Any) -> dict[int, Any]:
    """Those on which others may work with an array of ours, beside those that are always waited for."""
    loan = array._loan if isinstance(array, DeviceArray) else None
    return {} if loan is None else loan.block.streams


def foreign(array: Any) -> Foreign:
    """Where another library's array lies on a GPU. Raises `NotShareable`."""
    if getattr(array, "requires_grad", False):
        array = array.detach()
    for name in ("resolve_conj", "resolve_neg"):  # torch's views with other values than their memory has
        if has_method(array, name):
            array = getattr(array, name)()
    if has_method(array, "__dlpack__") and has_method(array, "__dlpack_device__"):
        return dlpack.read(array, dlpack.CUDA)
    told = foreign_arrays.interface(array, "__cuda_array_interface__")
    if not isinstance(told.get("data"), tuple | list):
        raise foreign_arrays.wrong("data", told.get("data"), "is not a pointer, as (number, read-only)")
    return foreign_arrays.by_interface(array, told)


def is_read_only(array: Any) -> bool:
    """Whether its library says that nobody may write there."""
    told = getattr(array, "__cuda_array_interface__", None)
    return told is not None and bool(told["data"][1])


def _empty_like(source: Foreign, target: Device | None) -> SharedArray:
    if target is None:
        return empty_on_cpu(source.shape, source.dtype.name)
    return empty(source.shape, source.dtype.name, target.uuid)


def _transfer(source: Foreign, out: SharedArray, stream: Any) -> None:
    """In the thread of a device, on a stream of its own; done when it returns."""
    itemsize = out.itemsize
    low, high = bounds(source.address, source.shape, source.strides, itemsize)
    try:
        if source.strides == out.strides or all(size == 1 for size in source.shape):
            call("cuMemcpyAsync", out.address, source.address, out.nbytes, stream)
        elif high - low == out.nbytes and min(source.strides) > 0:
            # all of it, in another order: it keeps that
            call("cuMemcpyAsync", out.address, low, out.nbytes, stream)
            out.strides = source.strides
        elif min(source.strides) < 0:
            raise NotShareable("an array of a GPU that runs backwards; copy it in order first, as by x.copy()")
        else:
            _rows(source.address, source.strides, out.address, out.strides, source.shape, itemsize, stream)
    finally:
        call("cuStreamSynchronize", stream)  # else a part might be written when somebody else has that memory


def _rows(
    source: int,
    steps: Sequence[int],
    target: int,
    pace: Sequence[int],
    shape: Sequence[int],
    size: int,
    stream: Any,
) -> None:
    depth, run = len(shape), size
    while depth and (steps[depth - 1] == run or shape[depth - 1] == 1):
        depth -= 1
        run *= shape[depth]
    if depth == 0:
        call("cuMemcpyAsync", target, source, run, stream)
        return
    if depth > 1:
        for number in range(shape[0]):
            _rows(source + number * steps[0], steps[1:], target + number * pace[0], pace[1:], shape[1:], size, stream)
        return
    if steps[0] < run:  # broadcast, or rows that overlap
        for number in range(shape[0]):
            call("cuMemcpyAsync", target + number * pace[0], source + number * steps[0], run, stream)
        return
    one = bindings().CUDA_MEMCPY2D()
    one.srcMemoryType = one.dstMemoryType = bindings().CUmemorytype(_UNIFIED)
    one.srcDevice, one.dstDevice = source, target
    one.srcPitch, one.dstPitch = steps[0], pace[0]
    one.WidthInBytes, one.Height = run, shape[0]
    call("cuMemcpy2DAsync", one, stream)
