"""Shared arrays on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

from .. import gpu, memory
from ..model.errors import SpecError
from ..model.validation import check_bool


def empty(
    shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: Any = "float64",
    device: Any = "cpu",
    *,
    isolated: bool = False,
) -> memory.SharedArray:
    """A shared array with any contents.

    Args:
        shape: one whole number, or several.
        dtype: a name (`"float32"`, `"f4"`, `"bfloat16"`, `"float8_e4m3fn"`), or a type of Python's, numpy's or torch's.
        device: `"cpu"`, `"cuda:0"`, or the UUID of a GPU, which needs the extra `gpu`. The first array on a GPU waits
            until CUDA is set up, which can take a second: in an event loop, `await asyncio.to_thread(sharing.empty,
            ...)`.
        isolated: in memory of its own (a memfd), zeroed, which is used for nothing else afterwards: only such arrays
            can be offered to other users, or to be read only (`Endpoint`). Others lie beside each other, and what they
            lie in is used again. On the CPU.

    Raises:
        SpecError: there is no such array, or no device can have that name.
        ShareLimit: no room for it.
        DeviceUnavailable: that GPU is not here; says why.
        ForkedCudaError: CUDA was used before this process was forked.

    Example::

        x = sharing.empty((1024, 1024), "float32", device="cuda:0")
        torch.from_dlpack(x).fill_(1)
        await supervise(Function(train, x), n=4)
    """
    _check_isolated(isolated, device)
    if str(device) == "cpu":
        return memory.empty(shape, dtype, isolated)
    return gpu.empty(shape, dtype, device)


def copy(array: Any, device: Any = None, *, isolated: bool = False) -> memory.SharedArray:
    """A shared copy of an array: numpy's, torch's, any with DLPack or `__cuda_array_interface__`, or a buffer.

    Args:
        array: what is copied.
        device: where, as for `empty`; where the array is when not given.
        isolated: as for `empty`; on the CPU when no device is given.

    Raises:
        NotShareable: its elements cannot be shared.
        ShareLimit: no room for it.
        DeviceUnavailable: that GPU is not here; says why.
        CudaError: the GPU has failed with what it was asked for before.

    Example::

        x = sharing.copy(numpy.ones(1000), device="cuda:0")
        y = sharing.copy(x, device="cpu")
    """
    _check_isolated(isolated, device or "cpu")
    if gpu.is_on_gpu(array) or (device is not None and str(device) != "cpu"):
        array = gpu.copy(array, device or ("cpu" if isolated else None))
        return memory.copy(array, True) if isolated else array
    return memory.copy(array, isolated)


def _check_isolated(isolated: bool, device: Any) -> None:
    check_bool("isolated", isolated)
    if isolated and str(device) != "cpu":
        raise SpecError("isolated", True, f"cannot be on {device}", "leave it out, or take an array on the CPU")
