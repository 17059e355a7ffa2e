"""Files in the memory of this process, and memory by its address."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

from ._errors import ShareLimit

_HUGE = 2 << 20
_READ_WRITE, _FIXED, _NORESERVE = 3, 0x10, 0x4000  # mman.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def mapped(fd: int, size: int, kind: int) -> tuple[mmap.mmap, int]:
    """So many bytes of a file in memory, and where; for that the descriptor is not needed.

    Python's `mmap` of a file has a descriptor of its own (until 3.13). One of no file has none, and what its memory
    shows can be changed.

    Raises:
        ShareLimit: there is no room.
    """
    try:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError, OverflowError) as exc:
        raise ShareLimit(f"cannot map {size} bytes: {exc}") from None
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
    show(address, fd, size, kind)
    if size >= _HUGE:
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)  # where the system gives them to those who ask
        except OSError:
            pass
    return mapping, address


def show(address: int, fd: int, size: int, kind: int) -> None:
    """Let memory of ours show a file: what is written there is seen in it (`MAP_SHARED`), or not (`MAP_PRIVATE`).
    Raises `ShareLimit`."""
    if _libc.mmap(address, size, _READ_WRITE, kind | _FIXED | _NORESERVE, fd, 0) != address:
        raise ShareLimit(f"cannot map {size} bytes: {os.strerror(ctypes.get_errno())}")


@functools.lru_cache(256)
def block(nbytes: int) -> Any:
    """The type of so many bytes. ctypes forgets it with its last object, and making it takes longer than a send."""
    return ctypes.c_ubyte * nbytes


def view(address: int, nbytes: int, keep: Any) -> memoryview:
    """Memory that `keep` keeps alive, as the view does that."""
    part = block(nbytes).from_address(address)
    part.keep = keep
    return memoryview(part).cast("B")
