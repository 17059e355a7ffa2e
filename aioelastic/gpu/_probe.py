"""What this machine can and cannot do with its GPUs, in words."""

from __future__ import annotations

from dataclasses import field, replace

from ..memory import ShareLimit
from ..model.frozen import dataclass
from ..system.descriptors import shut
from . import _driver, _vmm
from ._driver import Seen
from ._driver_calls import aside, attribute, bindings, call, raw
from ._errors import CudaError, DeviceUnavailable, ForkedCudaError, Reason

POOLS, IPC_EVENTS = 115, 125  # of CUdevice_attribute: MEMORY_POOLS, IPC_EVENT

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
    "cuStreamIsCapturing",
    "cuThreadExchangeStreamCaptureMode",
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
        detail: more of the reason.
    """

    device: str
    uuid: str
    name: str
    reason: Reason | None
    pools: bool
    events: bool
    mig: bool
    tried: bool
    detail: str = ""


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
                lines.append(f"{head}: its memory cannot be shared: {DeviceUnavailable(one.reason, one.detail)}")
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
            which takes some hundred MiB of the GPU and a good part of a second. Where there is no room for it, that is
            the answer (`Reason.NO_ROOM`).

    Example::

        print(gpu.probe())
    """
    try:
        seen = _driver.visible()
        missing = aside(lambda: [name for name in _NEEDED if not _has(name)])
        if missing:
            return Probe(Reason.TOO_OLD, f"it has no {', '.join(missing)}", _version())
        return Probe(None, "", _version(), tuple(_ability(one, tries) for one in seen))
    except (DeviceUnavailable, ForkedCudaError, CudaError, ShareLimit) as exc:
        return Probe(*_reason(exc), _version())


def _ability(seen: Seen, tries: bool) -> Ability:
    found = Ability(f"cuda:{seen.ordinal}", seen.uuid, seen.name, None, False, False, seen.uuid[:3] == "MIG", False)

    def ask() -> None:
        nonlocal found
        pools, events = (bool(attribute(what, seen.ordinal)) for what in (POOLS, IPC_EVENTS))
        found = replace(found, pools=pools, events=events)
        _vmm.check(seen.ordinal)

    try:
        aside(ask)
        if tries:
            _driver.device(seen.uuid).run(lambda: _try(seen.ordinal))
        return replace(found, tried=tries)
    except (DeviceUnavailable, CudaError, ShareLimit) as exc:
        reason, detail = _reason(exc)
        return replace(found, reason=reason, detail=detail.removeprefix(found.device))


def _reason(exc: Exception) -> tuple[Reason, str]:
    if isinstance(exc, DeviceUnavailable):
        return exc.reason, exc.detail
    return Reason.NO_ROOM if isinstance(exc, ShareLimit) else Reason.REFUSED, str(exc)


def _try(ordinal: int) -> None:
    size = _vmm.granularity(ordinal)
    address, fd = _vmm.create(ordinal, size)
    try:
        other = _vmm.attach(ordinal, [fd], [size])
        _vmm.unmap(other, [size])
    finally:
        shut(fd)
        _vmm.unmap(address, [size])


def _has(name: str) -> bool:
    try:
        status, address, *_ = raw("cuGetProcAddress", name.encode(), _VERSION, 0)
    except DeviceUnavailable:
        return False
    return status == 0 and bool(int(address or 0))


def _version() -> str:
    try:
        number = int(aside(lambda: call("cuDriverGetVersion")))
    except (DeviceUnavailable, ForkedCudaError, CudaError, ShareLimit):
        return ""
    return f"{number // 1000}.{number % 1000 // 10}"


def _installed() -> str:
    from importlib import metadata  # 20 ms

    bindings()
    return metadata.version("cuda-bindings")
