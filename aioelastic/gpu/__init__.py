"""Memory and events of NVIDIA's GPUs between processes, and what this machine's GPUs can do.

In: names of devices, arrays, streams. Out: `SharedArray` on a GPU (by `aioelastic.sharing`), events, answers in words.
It needs the extra `gpu` (cuda-python), which is imported with the first use. What it must never do: call the driver in
the caller's thread (but for that thread's own default stream, which nobody else can speak of), disturb the capture of a
graph, give memory to somebody else before it is known that nobody uses it, or import torch, cupy, numba or asyncio by
itself.
"""

from ..memory import ShareStats
from ._array import DeviceArray, copy, empty, is_on_gpu
from ._block import arena_of, set_limit
from ._driver import device, end
from ._errors import CudaError, DeviceUnavailable, ForkedCudaError, Reason, ReshareError
from ._event import GpuEvent
from ._message import reducers
from ._nvml import Gpu, GpuProcess, devices, inventory, meant, why_unproven
from ._probe import Ability, Probe, probe

__all__ = [
    "probe",
    "Probe",
    "Ability",
    "Reason",
    "devices",
    "Gpu",
    "GpuProcess",
    "GpuEvent",
    "stats",
    "DeviceUnavailable",
    "ForkedCudaError",
    "ReshareError",
    "CudaError",
    # for the rooms above
    "DeviceArray",
    "copy",
    "empty",
    "end",
    "inventory",
    "is_on_gpu",
    "meant",
    "reducers",
    "set_limit",
    "why_unproven",
]


def stats(name: str = "cuda") -> ShareStats:
    """What this process has of shared memory on a GPU.

    Args:
        name: `"cuda:0"`, or a UUID.

    Raises:
        DeviceUnavailable: it is not here.
    """
    return arena_of(device(name)).stats()
