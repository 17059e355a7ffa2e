"""The GPUs of this machine as its management library sees them (NVML): all of them, by UUID.

Its numbers are not those of CUDA, and it does not heed CUDA_VISIBLE_DEVICES. Where the driver does not look into PID
namespaces, the process ids are those of the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._driver import aside
from ._errors import DeviceUnavailable, Reason

_UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses a GPU.

    Attributes:
        pid: its id, in a container perhaps that of the host.
        used: bytes of the GPU's memory; None where the driver does not tell.
    """

    pid: int
    used: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        uuid: what it is, in any process: `sharing.empty(..., device=uuid)`.
        name: of its model.
        total: bytes of its memory.
        used: bytes in use, by anybody.
        free: bytes that are free.
        mig: whether it is divided into instances (MIG).
        instances: UUIDs of its instances.
        processes: those that use it; a hint.
    """

    uuid: str
    name: str
    total: int
    used: int
    free: int
    mig: bool
    instances: tuple[str, ...]
    processes: tuple[GpuProcess, ...]


def devices() -> tuple[Gpu, ...]:
    """The GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says.

    Raises:
        DeviceUnavailable: there is no cuda-python, no driver, or it does not answer.

    Example::

        for one in gpu.devices():
            print(one.uuid, one.name, one.free // 2**20, "MiB free")
    """
    return aside(_look)


def _look() -> tuple[Gpu, ...]:
    try:
        from cuda.bindings import nvml
    except ImportError:
        raise DeviceUnavailable(Reason.NO_EXTRA) from None
    try:
        nvml.init_v2()
        try:
            return tuple(_gpu(nvml, number) for number in range(nvml.device_get_count_v2()))
        finally:
            nvml.shutdown()
    except nvml.NvmlError as exc:
        name = type(exc).__name__
        reason = Reason.NO_DRIVER if name in ("DriverNotLoadedError", "LibraryNotFoundError") else Reason.REFUSED
        raise DeviceUnavailable(reason, f"NVML says {exc}") from None
    except RuntimeError as exc:  # the two that the bindings raise
        if type(exc).__name__ == "DynamicLibNotFoundError":
            raise DeviceUnavailable(Reason.NO_DRIVER) from None
        if type(exc).__name__ == "FunctionNotFoundError":
            raise DeviceUnavailable(Reason.TOO_OLD, str(exc)) from None
        raise


def _gpu(nvml: Any, number: int) -> Gpu:
    handle = nvml.device_get_handle_by_index_v2(number)
    memory = nvml.device_get_memory_info_v2(handle)
    try:
        mig = nvml.device_get_mig_mode(handle)[0] == 1
    except nvml.NvmlError:
        mig = False  # a model that cannot be divided
    instances = []
    for place in range(nvml.device_get_max_mig_device_count(handle) if mig else 0):
        try:
            one = nvml.device_get_mig_device_handle_by_index(handle, place)
        except nvml.NvmlError:
            continue  # nothing is in this place
        instances.append(nvml.device_get_uuid(one))
    return Gpu(
        uuid=nvml.device_get_uuid(handle),
        name=nvml.device_get_name(handle),
        total=int(memory.total),
        used=int(memory.used),
        free=int(memory.free),
        mig=mig,
        instances=tuple(instances),
        processes=_processes(nvml, handle),
    )


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    try:
        found = nvml.device_get_compute_running_processes_v3(handle)
    except nvml.NvmlError:
        return ()
    told = [(int(one.pid), int(one.used_gpu_memory)) for one in found]
    return tuple(GpuProcess(pid, None if used == _UNKNOWN else used) for pid, used in told)
