"""posix_spawn(3) by ctypes: the one way to start a process that stops neither the loop nor the interpreter.

`subprocess.Popen` and `os.posix_spawn` hold the interpreter lock until the child's execve(2) is done: all threads of
the host stand still for a millisecond per worker. ctypes lets go of it. glibc (2.34 or newer) blocks all signals and
uses its own stack meanwhile, so it is safe from any thread; it closes all other descriptors with one system call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from ..child import _place
from ._standard import standard

# spawn.h
_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_ROOM = 1024  # bytes; more than any C library needs for the opaque types

_Fds = Sequence["int | None"]


class Spawner:
    """Starts processes as leaders of their own sessions.

    Raises:
        OSError: this C library has not all it takes.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        # these two differ in whether they let go of the interpreter lock: worth it for the spawn alone
        slow, self._libc = ctypes.CDLL(None), ctypes.PyDLL(None)
        try:
            self._spawn = slow.posix_spawn
            for name in ("addchdir_np", "addclosefrom_np"):
                getattr(self._libc, f"posix_spawn_file_actions_{name}")
        except AttributeError as exc:
            raise OSError(str(exc)) from None
        # encoded once: most of it is the same for all workers
        self._environ = {key: os.fsencode(f"{key}={value}") for key, value in environ.items()}
        self._attributes: dict[tuple[int, bool], ctypes.Array[ctypes.c_char]] = {}

    def spawn(
        self,
        program: str,
        argv: Sequence[str],
        overlay: Mapping[str, str | None],
        cwd: str | None,
        stdio: _Fds,
        stop: int = 0,
        blocked: bool = False,
    ) -> int:
        """Start one; returns its pid when its execve(2) has succeeded.

        Args:
            overlay: variables over the environ; None unsets one.
            stdio: its descriptors 0, 1 and 2, each 3 or more, or its own to inherit; None is /dev/null.
            stop: a signal whose disposition is the default there, beside `_place.DEFAULT`.
            blocked: it begins with all signals blocked; else with none.

        Raises:
            OSError: as execve(2), chdir(2) or fork(2) refused it.
        """
        libc = self._libc
        actions = ctypes.create_string_buffer(_ROOM)
        libc.posix_spawn_file_actions_init(actions)
        try:
            for number, fd in enumerate(stdio):
                if fd is None:
                    flags = os.O_WRONLY if number else os.O_RDONLY
                    _check(libc.posix_spawn_file_actions_addopen(actions, number, b"/dev/null", flags, 0))
                elif fd != number:
                    _check(libc.posix_spawn_file_actions_adddup2(actions, fd, number))
            if cwd is not None:
                _check(libc.posix_spawn_file_actions_addchdir_np(actions, os.fsencode(cwd)))
            _check(libc.posix_spawn_file_actions_addclosefrom_np(actions, 3))
            pid = ctypes.c_int()
            code = self._spawn(
                ctypes.byref(pid),
                os.fsencode(program),
                actions,
                self._attributes_for(stop, blocked),
                _strings([os.fsencode(one) for one in argv]),
                _strings(self._variables(overlay)),
            )
        finally:
            libc.posix_spawn_file_actions_destroy(actions)
        if code:
            lost = cwd is not None and not os.path.isdir(cwd)
            raise OSError(code, os.strerror(code), cwd if lost else program)
        return pid.value

    def _attributes_for(self, stop: int, blocked: bool) -> ctypes.Array[ctypes.c_char]:
        key = stop, blocked
        if key not in self._attributes:
            made, default, mask = (ctypes.create_string_buffer(_ROOM) for _ in range(3))
            libc = self._libc
            libc.sigemptyset(default)
            for signum in (*_place.DEFAULT, stop) if stop else _place.DEFAULT:
                libc.sigaddset(default, int(signum))
            (libc.sigfillset if blocked else libc.sigemptyset)(mask)
            libc.posix_spawnattr_init(made)
            libc.posix_spawnattr_setsigdefault(made, default)
            libc.posix_spawnattr_setsigmask(made, mask)
            libc.posix_spawnattr_setflags(made, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID))
            self._attributes[key] = made
        return self._attributes[key]

    def _variables(self, overlay: Mapping[str, str | None]) -> list[bytes]:
        out = dict(self._environ)
        for key, value in overlay.items():
            if value is None:
                out.pop(key, None)
            else:
                out[key] = os.fsencode(f"{key}={value}")
        return list(out.values())


def start_helper(argv: Sequence[str], environ: Mapping[str, str], stdin: int) -> int:
    """Start a process of our own for the program's sake: with that standard input, no output, our own stderr, and all
    signals blocked.

    Raises:
        OSError: the system refused it.
    """
    stderr = standard(2)
    try:
        return Spawner(environ).spawn(argv[0], argv, {}, "/", (stdin, None, stderr), blocked=True)
    except OSError as exc:
        if exc.errno is not None:
            raise
    popen = subprocess.Popen(
        list(argv),
        env=dict(environ),
        cwd="/",
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if stderr is None else stderr,
        start_new_session=True,
        preexec_fn=defaults(blocked=True),
    )
    popen.returncode = 0  # we reap it ourselves
    return popen.pid


def defaults(stop: int = 0, blocked: bool = False) -> Callable[[], None] | None:
    """What `subprocess.Popen` is to call between fork(2) and execve(2), where there is no `Spawner`; None: nothing."""
    ignored = any(one and signal.getsignal(one) is signal.SIG_IGN for one in (*_place.DEFAULT[2:], stop))
    if not ignored and not blocked and not signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return None

    def set_them() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _place.BLOCKED)
        _place.dispositions(None, stop)
        if not blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return set_them


def _strings(items: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(items) + 1))(*items, None)


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
