"""What this machine can and cannot do with its GPUs, in words."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from . import _driver, _vmm
from ._driver import IPC_EVENTS, POOLS, POSIX_FD, VMM, Seen, attribute, bindings, call
from ._errors import CudaError, DeviceUnavailable, ForkedCudaError, Reason

# without which nothing of ours works
_NEEDED = (
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuLaunchHostFunc",
)
_VERSION = 13000  # of the functions, as the bindings ask for them


@dataclass(frozen=True)
class Ability:
    """What one GPU can, as this process sees it.

    Attributes:
        device: as `"cuda:0"`.
        uuid: what it is in any process.
        name: of its model.
        reason: why its memory cannot be shared; None when it can.
        pools: whether there are memory pools.
        events: whether there are events between processes.
        mig: it is an instance of a divided GPU.
        tried: it was not only asked about, but done.
    """

    device: str
    uuid: str
    name: str
    reason: Reason | None
    pools: bool
    events: bool
    mig: bool
    tried: bool


@dataclass(frozen=True)
class Probe:
    """The answer of `probe`. `str()` says it in words.

    Attributes:
        reason: why nothing can be done with GPUs here; None when something can.
        detail: more of that.
        driver: the newest CUDA that the driver can, as `"13.0"`; empty when there is none.
        devices: what each can.
    """

    reason: Reason | None
    detail: str = ""
    driver: str = ""
    devices: tuple[Ability, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether memory of at least one GPU can be shared."""
        return any(one.reason is None for one in self.devices)

    def __str__(self) -> str:
        lines = []
        if self.driver:
            lines.append(f"cuda-python {_installed()}, and a driver for CUDA {self.driver}")
        if self.reason is not None:
            lines.append(f"arrays on GPUs cannot be shared: {DeviceUnavailable(self.reason, self.detail)}")
        for one in self.devices:
            head = f"{one.device} is {one.uuid} ({one.name})"
            if one.reason is not None:
                lines.append(f"{head}: its memory cannot be shared: {one.reason.value}")
                continue
            how = "tried" if one.tried else "it says so; probe(tries=True) tries it"
            lines.append(f"{head}: sharing.empty, sharing.copy, and tensors of other libraries ({how})")
            if not one.pools:
                lines.append(f"  no memory pools: those of other libraries cannot be shared; {Reason.TOO_OLD.value}")
            if not one.events:
                lines.append("  no events between processes: GpuEvent cannot be sent; await it before you send")
            if one.mig:
                lines.append("  an instance of a divided GPU (MIG): nothing is shared with another instance")
        return "\n".join(lines)


def probe(tries: bool = False) -> Probe:
    """What this process can do with GPUs, and why not.

    Args:
        tries: not only ask the driver, but make memory, export it, import and map it on each GPU. That makes a context,
            which takes some hundred MiB of the GPU and a good part of a second.

    Example::

        print(gpu.probe())
    """
    try:
        _driver.check_fork()
        seen = _driver.visible()
    except DeviceUnavailable as exc:
        return Probe(exc.reason, exc.detail, _version())
    except (ForkedCudaError, CudaError) as exc:
        return Probe(Reason.REFUSED, str(exc))
    missing = _driver.aside(lambda: [name for name in _NEEDED if not _has(name)])
    if missing:
        return Probe(Reason.TOO_OLD, f"it has no {', '.join(missing)}", _version())
    return Probe(None, "", _version(), tuple(_ability(one, tries) for one in seen))


def _ability(seen: Seen, tries: bool) -> Ability:
    def ask() -> tuple[Reason | None, bool, bool]:
        reason = None
        if not attribute(VMM, seen.ordinal):
            reason = Reason.NO_VMM
        elif not attribute(POSIX_FD, seen.ordinal):
            reason = Reason.NO_POSIX_FD
        return reason, bool(attribute(POOLS, seen.ordinal)), bool(attribute(IPC_EVENTS, seen.ordinal))

    reason, pools, events = _driver.aside(ask)
    tried = False
    if tries and reason is None:
        try:
            device = _driver.device(seen.uuid)
            device.run(lambda: _try(seen.ordinal))
            tried = True
        except CudaError:
            reason = Reason.REFUSED
    return Ability(f"cuda:{seen.ordinal}", seen.uuid, seen.name, reason, pools, events, seen.uuid[:3] == "MIG", tried)


def _try(ordinal: int) -> None:
    size = _vmm.granularity(ordinal)
    address, fd = _vmm.create(ordinal, size)
    try:
        other = _vmm.attach(ordinal, [fd], [size])
        _vmm.unmap(other, [size])
    finally:
        os.close(fd)
        _vmm.unmap(address, [size])


def _has(name: str) -> bool:
    try:
        status, address, *_ = _driver.raw("cuGetProcAddress", name.encode(), _VERSION, 0)
    except DeviceUnavailable:
        return False
    return status == 0 and bool(int(address or 0))


def _version() -> str:
    try:
        number = int(_driver.aside(lambda: call("cuDriverGetVersion")))
    except (DeviceUnavailable, ForkedCudaError, CudaError):
        return ""
    return f"{number // 1000}.{number % 1000 // 10}"


def _installed() -> str:
    from importlib import metadata  # 20 ms

    bindings()
    return metadata.version("cuda-bindings")
