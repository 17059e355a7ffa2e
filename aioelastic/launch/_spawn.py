"""Processes from this very process: by posix_spawn(3), which stops neither the loop nor the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from ..child import _place
from ..child._spawn import PosixSpawn
from ._standard import standard


class Spawner:
    """Starts processes as leaders of their own sessions, under one environ.

    Raises:
        OSError: this C library has not all it takes.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._by = PosixSpawn()
        # encoded once: most of it is the same for all workers
        self._environ = {key: os.fsencode(f"{key}={value}") for key, value in environ.items()}

    def spawn(
        self,
        program: str,
        argv: Sequence[str],
        overlay: Mapping[str, str | None],
        cwd: str | None,
        stdio: Sequence[int | None],
        stop: int = 0,
        blocked: bool = False,
    ) -> int:
        """See `PosixSpawn`. `overlay`: variables over the environ; None unsets one."""
        words, where = [os.fsencode(one) for one in argv], None if cwd is None else os.fsencode(cwd)
        return self._by(os.fsencode(program), words, self._variables(overlay), where, stdio, stop, blocked)

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
