"""Files in the memory of this process, and memory by its address."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
from typing import Any

from ._errors import ShareLimit

_HUGE = 2 << 20
_READ_WRITE, _FIXED, _NORESERVE = 3, 0x10, 0x4000  # mman.h

_libc = ctypes.CDLL(None, use_errno=True)
_alone = ctypes.PyDLL(None, use_errno=True)  # no other thread of Python's runs in its calls
for _one in (_libc, _alone):
    _one.mmap.restype = ctypes.c_void_p
    _one.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def mapped(fd: int, size: int, kind: int) -> tuple[mmap.mmap, int]:
    """So many bytes of a file in memory, and where; for that the descriptor is not needed.

    Python's `mmap` of a file has a descriptor of its own (until 3.13). One of no file has none, and what its memory
    shows can be changed.

    Raises:
        ShareLimit: there is no room.
    """
    mapping, address = unmapped(size)
    show(address, fd, size, kind)
    return mapping, address


def unmapped(size: int) -> tuple[mmap.mmap, int]:
    """Addresses for so many bytes of a file, which `show` puts there. Raises `ShareLimit`."""
    try:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError, OverflowError) as exc:
        raise ShareLimit(f"cannot map {size} bytes: {exc}") from None
    return mapping, ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))


def show(address: int, fd: int, size: int, kind: int) -> None:
    """Let memory of ours show a file: what is written there is seen in it (`MAP_SHARED`), or not (`MAP_PRIVATE`).
    Raises `ShareLimit`."""
    if _libc.mmap(*showing(address, fd, size, kind)) != address:
        raise ShareLimit(f"cannot map {size} bytes: {os.strerror(ctypes.get_errno())}")
    if size >= _HUGE:
        _libc.madvise(address, size, mmap.MADV_HUGEPAGE)  # where the system gives them to those who ask


def showing(address: int, fd: int, size: int, kind: int) -> tuple[int, ...]:
    """The arguments of mmap(2) for that."""
    return (address, size, _READ_WRITE, kind | _FIXED | _NORESERVE, fd, 0)


def show_once(what: list[tuple[int, ...]]) -> None:
    """Do that, and take it out of the list, in one operation: nothing else of this program runs in between, so nobody
    writes there and then finds it done once more. Raises `ShareLimit`."""
    for arguments in list(what):
        try:
            if next(itertools.starmap(_alone.mmap, iter(what.pop, None))) != arguments[0]:
                what.append(arguments)
                raise ShareLimit(f"cannot map {arguments[1]} bytes: {os.strerror(ctypes.get_errno())}")
        except IndexError:
            pass  # somebody else has done it


@functools.lru_cache(256)
def block(nbytes: int) -> Any:
    """The type of so many bytes. ctypes forgets it with its last object, and making it takes longer than a send."""
    return ctypes.c_ubyte * nbytes


def view(address: int, nbytes: int, keep: Any) -> memoryview:
    """Memory that `keep` keeps alive, as the view does that."""
    part = block(nbytes).from_address(address)
    part.keep = keep
    return memoryview(part).cast("B")
