"""Processes from this very process: by posix_spawn(3), which stops neither the loop nor the interpreter."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from ..child.guardian import process_start
from ..child.kernel import process_setup
from ..child.kernel.posix_spawn import PosixSpawn
from ._standard_streams import standard

_TIOCSCTTY = 0x540E  # tty_ioctl(2); `termios` is a library of its own


class Spawner:
    """Starts processes as leaders of their own sessions, under one environ.

    Raises:
        OSError: this C library has not all it takes.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._by = PosixSpawn()
        self._environ = process_start.variables(process_start.packed(environ), {})

    def spawn(
        self,
        program: str,
        argv: Sequence[str],
        overlay: Mapping[str, str | None],
        cwd: str | None,
        stdio: Sequence[int | bytes | None],
        stop: int = 0,
        blocked: bool = False,
        passed: Sequence[tuple[int, int]] = (),
    ) -> int:
        """See `PosixSpawn`. `overlay`: variables over the environ; None unsets one."""
        words, where = [os.fsencode(one) for one in argv], None if cwd is None else os.fsencode(cwd)
        variables = list(process_start.variables(process_start.packed(overlay), self._environ).values())
        return self._by(os.fsencode(program), words, variables, where, stdio, stop, blocked, passed)


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
        preexec_fn=defaults(blocked=True),  # noqa: PLW1509  # C calls that take no lock
    )
    popen.returncode = 0  # we reap it ourselves
    return popen.pid


def defaults(stop: int = 0, blocked: bool = False, terminal: bool = False) -> Callable[[], None] | None:
    """What `subprocess.Popen` is to call between fork(2) and execve(2), where there is no `Spawner`; None: nothing."""
    ignored = any(one and signal.getsignal(one) is signal.SIG_IGN for one in (*process_setup.DEFAULT[2:], stop))
    if not ignored and not blocked and not terminal and not signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return None

    def set_them() -> None:
        if terminal:
            fcntl.ioctl(0, _TIOCSCTTY, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, process_setup.BLOCKED)
        process_setup.dispositions(None, stop)
        if not blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return set_them
