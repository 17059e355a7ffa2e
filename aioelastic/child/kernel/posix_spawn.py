"""posix_spawn(3): the one way to start a process that stops neither other threads nor the interpreter.

`subprocess.Popen` and `os.posix_spawn` hold the interpreter lock until the child's execve(2) is done, which may be
never (a file system that hangs). glibc (2.34 or newer) blocks all signals and uses its own stack meanwhile, so it is
safe from any thread; it closes all other descriptors with one system call. Without `ctypes`: see `libc`.
"""

from __future__ import annotations

import _ctypes
import errno
import os
import struct

from ...system.permissions import may
from . import process_setup
from .forking import moves
from .libc import function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

# spawn.h
_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_TEXT = bytes.__basicsize__ - 1  # where in a bytes object, which is at `id`, its text is; a zero follows it


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Opaque(_ctypes.Array):  # type: ignore[type-arg]
    _type_ = _Byte
    _length_ = 512  # bytes; more than any C library needs for its types


class PosixSpawn:
    """Starts processes as leaders of their own sessions.

    Raises:
        OSError: this C library has not all it takes.
    """

    def __init__(self) -> None:
        actions = "posix_spawn_file_actions_"
        self._spawn = function("posix_spawn")
        self._init, self._dup2, self._open, self._close, self._chdir, self._close_from, self._destroy = (
            function(f"{actions}{one}", holds=True)
            for one in ("init", "adddup2", "addopen", "addclose", "addchdir_np", "addclosefrom_np", "destroy")
        )
        self._attributes: dict[tuple[int, bool], Any] = {}

    def __call__(
        self,
        program: bytes,
        argv: Sequence[bytes],
        variables: Sequence[bytes],
        cwd: bytes | None,
        stdio: Iterable[int | bytes | None],
        stop: int = 0,
        blocked: bool = False,
        passed: Sequence[tuple[int, int]] = (),
    ) -> int:
        """Start one; returns its pid when its execve(2) has succeeded, or it was killed before.

        Args:
            variables: its environment, as `name=value`.
            stdio: its descriptors 0, 1 and 2, each 3 or more, or its own to inherit; None is /dev/null; the path of a
                terminal, which becomes the controlling one, since a session's leader opens it (open(2), O_NOCTTY).
            stop: a signal whose disposition is the default there, beside `process_setup.DEFAULT`.
            blocked: it begins with all signals blocked; else with none.
            passed: further descriptors, each with its number there, 3 or more.

        Raises:
            OSError: as execve(2), chdir(2) or fork(2) refused it; its `filename` is the path.
        """
        actions = _Opaque()
        self._init(actions)
        try:
            for number, fd in enumerate(stdio):
                if fd is None:
                    flags = os.O_WRONLY if number else os.O_RDONLY
                    _check(self._open(actions, number, b"/dev/null", flags, 0))
                elif isinstance(fd, bytes):
                    _check(self._open(actions, number, fd, os.O_RDWR, 0))
                elif fd != number:
                    _check(self._dup2(actions, fd, number))
            for fd, number in moves(passed):
                _check(self._dup2(actions, fd, number) and errno.EMFILE)  # EBADF, of a number above the limit
            # before what may hang: it shall hold nothing of others then
            kept = {number for _, number in passed}
            top = max(kept, default=2)
            for number in range(3, top):
                if number not in kept:
                    _check(self._close(actions, number))
            if top + 1 < os.sysconf("SC_OPEN_MAX"):  # else it is EBADF, and there is none
                _check(self._close_from(actions, top + 1))
            if cwd is not None:
                _check(self._chdir(actions, cwd))
            pid = _Int()
            attributes = self._attributes_for(stop, blocked)
            words, names = _strings(argv), _strings(variables)
            code = self._spawn(_ctypes.byref(pid), program, actions, attributes, words, names)
        finally:
            self._destroy(actions)
        if code:
            lost = cwd is not None and not (os.path.isdir(cwd) and may(os.fsdecode(cwd), os.X_OK))
            raise OSError(code, os.strerror(code), os.fsdecode(cwd if lost and cwd is not None else program))
        return int(pid.value)

    def _attributes_for(self, stop: int, blocked: bool) -> Any:
        key = stop, blocked
        if key not in self._attributes:
            made, default, mask = _Opaque(), _Opaque(), _Opaque()
            call = {
                one: function(one, holds=True)
                for one in ("sigemptyset", "sigfillset", "sigaddset", *(f"posix_spawnattr_{one}" for one in _SETTERS))
            }
            call["sigemptyset"](default)
            for signum in (*process_setup.DEFAULT, stop) if stop else process_setup.DEFAULT:
                call["sigaddset"](default, int(signum))
            call["sigfillset" if blocked else "sigemptyset"](mask)
            call["posix_spawnattr_init"](made)
            call["posix_spawnattr_setsigdefault"](made, default)
            call["posix_spawnattr_setsigmask"](made, mask)
            call["posix_spawnattr_setflags"](made, _SETSIGDEF | _SETSIGMASK | _SETSID)
            self._attributes[key] = made
        return self._attributes[key]


_SETTERS = ("init", "setsigdefault", "setsigmask", "setflags")


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


def _strings(items: Sequence[bytes]) -> bytes:
    """An array of pointers to them, and a null pointer. A fifth of what an array of `_ctypes` takes."""
    return struct.pack(f"{len(items) + 1}P", *[id(one) + _TEXT for one in items], 0)
