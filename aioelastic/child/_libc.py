"""Functions of the C library that return an int, without `ctypes`: to import that takes 4 ms, and a worker waits."""

from __future__ import annotations

import _ctypes

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


def errno_of() -> int:
    """Why the last call failed."""
    return _ctypes.get_errno()
