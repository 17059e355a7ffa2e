"""Shared arrays on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import gpu, memory


def empty(shape: int | Sequence[int], dtype: Any = "float64", device: Any = "cpu") -> memory.SharedArray:
    """A shared array with any contents.

    Args:
        shape: one whole number, or several.
        dtype: a name (`"float32"`, `"f4"`, `"bfloat16"`, `"float8_e4m3fn"`), or a type of Python's, numpy's or torch's.
        device: `"cpu"`, `"cuda:0"`, or the UUID of a GPU, which needs the extra `gpu`. The first array on a GPU waits
            until CUDA is set up, which can take a second: in an event loop, `await asyncio.to_thread(sharing.empty,
            ...)`.

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
    if str(device) == "cpu":
        return memory.empty(shape, dtype)
    return gpu.empty(shape, dtype, device)


def copy(array: Any, device: Any = None) -> memory.SharedArray:
    """A shared copy of an array: numpy's, torch's, any with DLPack or `__cuda_array_interface__`, or a buffer.

    Args:
        device: where, as for `empty`; where the array is when not given.

    Raises:
        NotShareable: its elements cannot be shared.
        ShareLimit: no room for it.
        DeviceUnavailable: that GPU is not here; says why.
        CudaError: the GPU has failed with what it was asked for before.

    Example::

        x = sharing.copy(numpy.ones(1000), device="cuda:0")
        y = sharing.copy(x, device="cpu")
    """
    if gpu.is_on_gpu(array) or (device is not None and str(device) != "cpu"):
        return gpu.copy(array, device)
    return memory.copy(array)
