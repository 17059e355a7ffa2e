"""Memory of a GPU that is known by file descriptors: made, exported, imported and mapped by virtual memory management.

The driver counts who holds it, in all processes: it is free "when all outstanding mappings are unmapped and when all
outstanding references to the handle (including its shareable counterparts) are also released" (cuMemRelease, CUDA
driver API). Here the counterparts are file descriptors, so the kernel closes them with their process. All of this runs
in the device's thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections.abc import Sequence
from typing import Any

from ..system.descriptors import shut
from ._driver_calls import attribute, bindings, call
from ._errors import DeviceUnavailable, Reason

VMM, POSIX_FD = 102, 103  # of CUdevice_attribute: VIRTUAL_MEMORY_MANAGEMENT, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


@functools.cache
def granularity(ordinal: int) -> int:
    """Bytes of which memory is a multiple. Raises `DeviceUnavailable` where it cannot be exported."""
    check(ordinal)
    minimum = bindings().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(call("cuMemGetAllocationGranularity", _property(ordinal), minimum))


def check(ordinal: int) -> None:
    """Whether this device can do all of this."""
    if not attribute(VMM, ordinal):
        raise DeviceUnavailable(Reason.NO_VMM, f"cuda:{ordinal}")
    if not attribute(POSIX_FD, ordinal):
        raise DeviceUnavailable(Reason.NO_POSIX_FD, f"cuda:{ordinal}")


def create(ordinal: int, size: int) -> tuple[int, int]:
    """New memory: where it is mapped, and the descriptor by which it is known. `size` in whole `granularity`.

    Raises:
        ShareLimit: the GPU has no more.
    """
    handle = call("cuMemCreate", size, _property(ordinal), 0)
    try:
        fd = export(handle)
        try:
            return _map(ordinal, [handle], [size]), fd
        except BaseException:
            shut(fd)
            raise
    finally:
        call("cuMemRelease", handle)  # the mapping and the descriptor keep it


def attach(ordinal: int, fds: Sequence[int], sizes: Sequence[int]) -> int:
    """Where memory is mapped now, its pieces one behind the other. The descriptors stay the caller's."""
    kind = _fd_kind()
    with contextlib.ExitStack() as handles:
        found = []
        for fd in fds:
            found.append(call("cuMemImportFromShareableHandle", fd, kind))
            handles.callback(call, "cuMemRelease", found[-1])
        return _map(ordinal, found, sizes)


def unmap(address: int, sizes: Sequence[int]) -> None:
    """It is not mapped any more."""
    at = address
    for size in sizes:
        call("cuMemUnmap", at, size)
        at += size
    call("cuMemAddressFree", address, sum(sizes))


def export(handle: Any) -> int:
    """A new descriptor for memory, close-on-exec."""
    fd = int(call("cuMemExportToShareableHandle", handle, _fd_kind(), 0))
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return fd


def export_mapped(address: int) -> int:
    """A descriptor for memory that somebody else has mapped here."""
    handle = call("cuMemRetainAllocationHandle", address)
    try:
        return export(handle)
    finally:
        call("cuMemRelease", handle)


def _map(ordinal: int, handles: Sequence[Any], sizes: Sequence[int]) -> int:
    total = sum(sizes)
    access = bindings().CUmemAccessDesc()
    access.location = _property(ordinal).location
    access.flags = bindings().CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    with contextlib.ExitStack() as undo:
        address = int(call("cuMemAddressReserve", total, 0, 0, 0))
        undo.callback(call, "cuMemAddressFree", address, total)
        at = address
        for handle, size in zip(handles, sizes, strict=True):
            call("cuMemMap", at, size, 0, handle, 0)
            undo.callback(call, "cuMemUnmap", at, size)
            at += size
        call("cuMemSetAccess", address, total, [access], 1)
        undo.pop_all()
    return address


def _property(ordinal: int) -> Any:
    driver = bindings()
    one = driver.CUmemAllocationProp()
    one.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    one.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    one.location.id = ordinal
    one.requestedHandleTypes = _fd_kind()
    return one


def _fd_kind() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
