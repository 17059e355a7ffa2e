"""Memory of other libraries: what a pointer is, and how it can be shared.

Sources: CUDA driver API, "Unified Addressing" (cuPointerGetAttribute) and "Memory Management" (cuIpcGetMemHandle,
cuMemPoolExportPointer). An early free by who made it is undefined behaviour with both: the object that owns the memory
is held until the last lease has ended. All of this runs in the device's thread.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from ..memory import NotShareable
from ..system.descriptors import shut
from . import _vmm
from ._driver_calls import bindings, call
from ._errors import CudaError, ReshareError

VMM, LEGACY, POOL = "vmm", "legacy", "pool"  # by virtual memory management, by cuIpc handle, from a pool

_COPY = "send sharing.copy(x)"
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
_LAZY_PEER = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_POSIX = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_HANDLE = 64  # bytes of the driver's handles
# of CUpointer_attribute
_IS_MANAGED, _ORDINAL, _LEGACY, _START, _SIZE, _KINDS, _POOL, _MAPPED_SIZE, _MAPPED_AT = (
    8,
    9,
    10,
    11,
    12,
    14,
    17,
    18,
    19,
)

_pools: dict[str, list[Any]] = {}  # imported: the pool, and how many pointers of it


def attribute(what: int, address: int) -> int:
    """One property of a pointer."""
    return int(call("cuPointerGetAttribute", bindings().CUpointer_attribute(what), address) or 0)


def ordinal_of(low: int, high: int) -> int:
    """The device that memory belongs to. Raises `NotShareable` if it is not all of one allocation."""
    size = attribute(_SIZE, low)
    if size and high > attribute(_START, low) + size:
        problem = f"an array of {high - low} bytes reaches beyond its memory"
        raise NotShareable(f"{problem}; give one that its library has made")
    return attribute(_ORDINAL, low)


def range_of(low: int, high: int) -> tuple[str, int, int]:
    """How memory can be shared, a kind of tickets, and what of it is: from where, how many bytes.

    Raises:
        NotShareable: it cannot be; says what to do.
    """
    if attribute(_IS_MANAGED, low):
        raise NotShareable(f"managed memory (cudaMallocManaged) cannot be shared between processes; {_COPY}")
    kinds = attribute(_KINDS, low)
    if attribute(_POOL, low):
        if not kinds & _POSIX:
            problem = "it is from a memory pool that cannot be shared, as that of cudaMallocAsync is"
            raise NotShareable(f"{problem}; {_COPY}")
        return POOL, attribute(_START, low), attribute(_SIZE, low)  # the driver shares it as a whole
    if kinds & _POSIX:
        return VMM, low, high - low
    if attribute(_LEGACY, low):
        return LEGACY, low, high - low
    raise NotShareable(f"this memory of a GPU cannot be shared between processes; {_COPY}")


def export(kind: str, start: int, size: int) -> tuple[dict[str, Any], list[int]]:
    """What a ticket says of such memory, and descriptors that stand for it, the caller's to close.

    Raises:
        ReshareError: it was imported by somebody else.
    """
    try:
        if kind == POOL:
            pool = attribute(_POOL, start)
            data = _bytes(call("cuMemPoolExportPointer", start))
            fd_kind = bindings().CUmemAllocationHandleType(_POSIX)
            fd = int(call("cuMemPoolExportToShareableHandle", bindings().CUmemoryPool(pool), fd_kind, 0))
            os.set_inheritable(fd, False)
            return {"handle": data, "origin": f"{os.getpid()}-{pool}"}, [fd]
        if kind == LEGACY:
            inset = start - attribute(_START, start)
            return {"handle": _bytes(call("cuIpcGetMemHandle", start - inset)), "inset": inset}, []
    except CudaError as exc:
        if exc.status != _INVALID_VALUE:
            raise
        problem = "this memory of a GPU was imported from another process by somebody else, and cannot be sent on"
        raise ReshareError(f"{problem}; {_COPY}") from None
    sizes: list[int] = []
    fds: list[int] = []
    first = at = attribute(_MAPPED_AT, start)
    try:
        while at < start + size:
            fds.append(_vmm.export_mapped(at))
            sizes.append(attribute(_MAPPED_SIZE, at))
            at += sizes[-1]
    except BaseException:
        for fd in fds:
            shut(fd)
        raise
    return {"sizes": tuple(sizes), "inset": start - first}, fds


def open_block(handle: bytes) -> int:
    """Where a block of another process is mapped now. The driver counts how often."""
    return int(call("cuIpcOpenMemHandle", _made("CUipcMemHandle", handle), _LAZY_PEER))


def close_block(base: int) -> None:
    """Once less."""
    call("cuIpcCloseMemHandle", base)


def open_pooled(origin: str, fd: int, data: bytes) -> int:
    """Where an allocation from a pool of another process is mapped now."""
    known = _pools.get(origin)
    if known is None:
        fd_kind = bindings().CUmemAllocationHandleType(_POSIX)
        known = _pools[origin] = [call("cuMemPoolImportFromShareableHandle", fd, fd_kind, 0), 0]
    try:
        address = int(call("cuMemPoolImportPointer", known[0], _made("CUmemPoolPtrExportData", data)))
        known[1] += 1
        return address
    finally:
        _drop_unused(origin)


def close_pooled(origin: str, base: int) -> None:
    """It is not mapped any more."""
    call("cuMemFree", base)
    _pools[origin][1] -= 1
    _drop_unused(origin)


def _drop_unused(origin: str) -> None:
    if not _pools[origin][1]:
        call("cuMemPoolDestroy", _pools.pop(origin)[0])


def _bytes(handle: Any) -> bytes:
    return ctypes.string_at(handle.getPtr(), _HANDLE)


def _made(kind: str, data: bytes) -> Any:
    one = getattr(bindings(), kind)()
    ctypes.memmove(one.getPtr(), data, _HANDLE)
    return one
