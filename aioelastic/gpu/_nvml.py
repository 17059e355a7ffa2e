"""The GPUs of this machine as its management library sees them (NVML): all of them, by UUID.

Its numbers are not those of CUDA, and it does not heed CUDA_VISIBLE_DEVICES. What it does not tell of one (which is
lost, or is divided and not ours) is told as unknown, and hides no other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..memory import SharingError
from ..model.frozen import dataclass
from . import _driver
from ._driver_calls import aside
from ._errors import DeviceUnavailable, Reason

T = TypeVar("T")

_UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
_FIRST = 0xEFFFFFFC  # the inode of the PID namespace of the machine itself: PROC_PID_INIT_INO, linux/proc_ns.h


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
    """One GPU. What is None, the driver does not tell.

    Attributes:
        uuid: what it is, in any process: `sharing.empty(..., device=uuid)`. Empty where `trouble` keeps it from us.
        name: of its model.
        total: bytes of its memory.
        used: bytes in use, by anybody.
        free: bytes that are free.
        mig: whether it is divided into instances (MIG).
        instances: UUIDs of its instances.
        processes: those that use it; in a PID namespace their ids may be those of the host, or nobody's.
        index: its number for nvidia-smi, and for `Placement(gpus=...)`.
        trouble: why it cannot be asked, as `"GPU is lost"`; else empty.
    """

    uuid: str
    name: str
    total: int | None
    used: int | None
    free: int | None
    mig: bool
    instances: tuple[str, ...]
    processes: tuple[GpuProcess, ...] | None
    index: int
    trouble: str = ""


def devices() -> tuple[Gpu, ...]:
    """The GPUs of this machine: `devices()[0]` is what `"cuda:0"` is in this process, and so on; behind them are those
    that CUDA does not have here, whatever CUDA_VISIBLE_DEVICES says. (Of an instance of a divided GPU, the GPU.)

    Where there are several, CUDA is asked for its order. It is initialised by that, as by `probe`: copies of this
    process by fork(2) cannot use it then.

    Raises:
        DeviceUnavailable: there is no cuda-python, no driver, or it does not answer.
        ShareLimit: no thread can be had to ask.

    Example::

        for one in gpu.devices():
            print(one.uuid, one.name, one.free)
    """
    found = inventory()
    if len(found) < 2:
        return found
    try:
        order = [one.uuid for one in _driver.visible()]
    except SharingError:
        return found  # CUDA has none of them here

    def place(one: Gpu) -> int:
        return min((order.index(uuid) for uuid in (one.uuid, *one.instances) if uuid in order), default=len(order))

    return tuple(sorted(found, key=place))


def inventory() -> tuple[Gpu, ...]:
    """As `devices`, in the order of nvidia-smi, that of the bus; CUDA is not asked."""
    return aside(_look)


def meant(wanted: int | str, device: Gpu) -> list[str]:
    """What of it is meant by a number, or by the beginning of a UUID: its own UUID, or those of instances."""
    if isinstance(wanted, int):
        return [device.uuid] if wanted == device.index else []
    return _driver.matching(wanted, (device.uuid, *device.instances))


def why_unproven() -> str:
    """Why the driver's list of processes does not tell whether one of ours is in it; empty where it does."""
    try:
        first = os.stat("/proc/self/ns/pid").st_ino == _FIRST
    except OSError:
        first = False
    return "" if first else "this is a PID namespace, and the driver's process ids may be those of the host"


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
    try:
        handle = nvml.device_get_handle_by_index_v2(number)
        uuid, name = nvml.device_get_uuid(handle), nvml.device_get_name(handle)
    except nvml.NvmlError as exc:
        return Gpu("", "", None, None, None, False, (), None, number, str(exc))

    def told(ask: Callable[..., T], *args: Any) -> T | None:
        try:
            return ask(*args)
        except nvml.NvmlError:
            return None

    mode = told(nvml.device_get_mig_mode, handle)  # None: a model that cannot be divided
    mig = mode is not None and mode[0] == 1
    places = range((told(nvml.device_get_max_mig_device_count, handle) or 0) if mig else 0)
    parts = [told(nvml.device_get_mig_device_handle_by_index, handle, place) for place in places]
    parts = [one for one in parts if one is not None]  # else nothing is in this place
    memory = told(nvml.device_get_memory_info_v2, handle)
    # who may not see the whole of a divided one may see its parts
    lists = [told(nvml.device_get_compute_running_processes_v3, one) for one in (handle, *parts)]
    known = lists[0] is not None or (bool(parts) and None not in lists[1:])
    processes = tuple(dict.fromkeys(_process(one) for some in lists for one in some or ()))
    return Gpu(
        uuid=uuid,
        name=name,
        total=None if memory is None else int(memory.total),
        used=None if memory is None else int(memory.used),
        free=None if memory is None else int(memory.free),
        mig=mig,
        instances=tuple(uuid for one in parts if (uuid := told(nvml.device_get_uuid, one)) is not None),
        processes=processes if known else None,
        index=number,
    )


def _process(one: Any) -> GpuProcess:
    used = int(one.used_gpu_memory)
    return GpuProcess(int(one.pid), None if used == _UNKNOWN else used)
