"""What is had of the C library without `ctypes`, to import which takes 4 ms, and a worker waits: functions that return
an int, and files in memory."""

from __future__ import annotations

import _ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


class _Holding(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI
    _restype_ = _Int


def function(name: str, holds: bool = False) -> Callable[..., Any]:
    """One of the C library's. `holds`: it is called without letting go of the interpreter's lock, and
    its errno is not kept, which takes a quarter of the time."""
    kind = _Holding if holds else _Function
    found: Callable[..., Any] = kind(_ctypes.dlsym(_ctypes.dlopen(None, 0), name))  # type: ignore[arg-type]
    return found


def buffer(size: int) -> Any:
    """Memory that a function of it can write to: `bytes()` is what is there."""
    kind: Any = type(_ctypes.Array)
    return kind("Buffer", (_ctypes.Array,), {"_type_": _Byte, "_length_": size})()


def forget_printed() -> None:
    """In a forked copy: what C code has printed, and is to be written by the original."""
    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    for name in ("stdout", "stderr"):
        try:
            stream = _Address.from_address(_ctypes.dlsym(library, name))
            function("__fpurge")(stream)
        except OSError:
            return  # a C library without that


def errno_of() -> int:
    """Why the last call failed."""
    return _ctypes.get_errno()


# --- files in memory: Python's `mmap` has a descriptor of its own for each, as long as it lives (until 3.13) ---


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "B"


class _Size(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _Address(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "P"


class _Mmap(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Address


_READ_WRITE, _SHARED, _PRIVATE = 3, 1, 2
_NOWHERE = 2 ** (8 * _ctypes.sizeof(_Size)) - 1  # MAP_FAILED
_mmap: Callable[..., Any] = _Mmap(_ctypes.dlsym(_ctypes.dlopen(None, 0), "mmap"))  # type: ignore[arg-type]
_mmap.argtypes = (_Address, _Size, _Int, _Int, _Int, _Size)  # type: ignore[attr-defined]
_munmap = function("munmap")
_munmap.argtypes = (_Address, _Size)  # type: ignore[attr-defined]
_blocks: dict[int, Any] = {}  # types of arrays, by the logarithm of their length: each is one for good


class _Mapping:
    """Ends with the last view of it."""

    __slots__ = ("address", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size

    def __del__(self, munmap: Callable[..., Any] = _munmap) -> None:
        munmap(self.address, self.size)


def mapped(fd: int, size: int, private: bool = False) -> memoryview:
    """So many bytes of a file, in memory until the last view of them is gone; the descriptor is not needed for that.

    Args:
        private: what is written there is not seen in the file.

    Raises:
        OSError: there is no room, or nothing to be mapped.
    """
    address = _mmap(None, size, _READ_WRITE, _PRIVATE if private else _SHARED, fd, 0)
    if address in (None, _NOWHERE):
        raise OSError(errno_of(), os.strerror(errno_of()))
    keep = _Mapping(address, size)
    bits = size.bit_length()
    block = _blocks.get(bits)
    if block is None:
        kind: Any = type(_ctypes.Array)
        block = _blocks[bits] = kind("Block", (_ctypes.Array,), {"_type_": _Byte, "_length_": 1 << bits})
    part = block.from_address(address)
    part.keep = keep
    return memoryview(part).cast("B")[:size]
