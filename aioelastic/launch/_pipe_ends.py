"""Both ends of what a worker is given: two pipes, and a function worker's channel with its function in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import termios
import threading
from typing import IO, Any, cast

from ..child.wire import datagrams
from ..model.entries import is_file
from ..model.logs import Std
from ..planning import WorkerPlan
from ..system.descriptors import shut
from ._standard_streams import above_two, hold_standard

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Ends:
    """Ours are non-blocking; all are close-on-exec, and none of the worker's is 0, 1 or 2.

    Attributes:
        passed: further ones for the worker, as `WorkerPlan.numbers` has them.

    Raises:
        OSError: out of descriptors; nothing stays open.
    """

    def __init__(self, worker: WorkerPlan) -> None:
        self.stdin: int | None = None
        self.stdout: int | None = None
        self.stderr: int | None = None
        self.channel: socket.socket | None = None
        self.their_stdin: int | None = None
        self.their_stdout: int | None = None
        self.their_stderr: int | None = None
        self.their_channel: int | None = None
        self.passed: list[int] = []
        self.forked_by: int | None = None  # the thread whose next copy becomes the worker
        hold_standard()
        try:
            if worker.tty is not None:
                self._open_terminal(worker.tty)
            elif worker.stdin == "pipe":
                self.stdin, self.their_stdin = _input(worker)
            if Std.OUT in worker.pipes and self.their_stdout is None:
                self.stdout, self.their_stdout = _pipe()
            if Std.ERR in worker.pipes:
                self.stderr, self.their_stderr = _pipe()
            elif worker.stderr == "stdout" and worker.tty is None and self.their_stdout is not None:
                self.their_stderr = above_two(os.dup(self.their_stdout))
            uid = worker.who[-1] if worker.who is not None else None
            for value in worker.secrets.values():
                self.passed.append(_sealed(value))
            if uid is not None:
                stdin = None if self.stdin is None else self.their_stdin  # else it is a file of the caller's
                for fd in (stdin, self.their_stdout, self.their_stderr, *self.passed):
                    if fd is not None:
                        with contextlib.suppress(OSError):  # without CAP_CHOWN
                            os.fchown(fd, uid, -1)  # or it could not open them by name, as /dev/stdout (proc(5))
            for _, fd in worker.pass_fds:
                self.passed.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            if worker.function is not None:
                self.channel, theirs = datagrams.pair()
                datagrams.ask_who(self.channel)
                self.their_channel = above_two(theirs.detach())
                if worker.call is not None:
                    from ..child.wire import messages  # for start-up time: see `supervisor/function_parts.py`
                    from ..child.worker import host_program, main_module, multiprocessing_state  # the same

                    call = worker.call
                    # another user gets nothing by which to act as this one
                    key, tracker = multiprocessing_state.own() if uid is None else (None, [])
                    setup = (host_program.own(), main_module.importable(), call.show_locals, key, len(tracker))
                    packet, fds = messages.encode(messages.SETUP, setup)
                    try:
                        datagrams.send(self.channel, packet, [*tracker, *fds])
                    finally:
                        datagrams.close(fds)
                    datagrams.send(self.channel, call.packet, call.fds)
                self.channel.setblocking(False)
        except BaseException:
            self.close_ours()
            self.close_theirs()
            raise

    def _open_terminal(self, size: tuple[int, int]) -> None:
        """A pseudo-terminal (pty(7)): what is sent does not come back as output, and lines end as in a file."""
        self.stdout, slave = os.openpty()
        self.their_stdin = above_two(slave)
        self.stdin = os.dup(self.stdout)
        os.set_blocking(self.stdout, False)
        mode = termios.tcgetattr(self.their_stdin)
        mode[1] &= ~termios.ONLCR
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(self.their_stdin, termios.TCSANOW, mode)
        termios.tcsetwinsize(self.their_stdin, size)
        self.their_stdout = above_two(os.dup(self.their_stdin))
        self.their_stderr = above_two(os.dup(self.their_stdin))

    def disown(self) -> list[int]:
        """In a forked copy (see `forked_copies`): the descriptors, which are not ours to close any more."""
        fds = disowned(self)
        if self.forked_by == threading.get_ident():
            self.forget()
            return fds  # this copy needs the worker's
        self.forget()
        return fds + self._take_theirs()

    def forget(self) -> None:
        """Ours are another's now."""
        self.stdin = self.stdout = self.stderr = self.channel = None

    def close_ours(self) -> None:
        """It was not started."""
        shut_ends(self)
        self.forget()

    def close_theirs(self) -> None:
        """It has its copies, or never will."""
        shut(*self._take_theirs())

    def _take_theirs(self) -> list[int]:
        """The worker's, which are not in here any more."""
        fds = (self.their_stdin, self.their_stdout, self.their_stderr, self.their_channel, *self.passed)
        self.their_stdin = self.their_stdout = self.their_stderr = self.their_channel = None
        self.passed = []
        return [fd for fd in fds if fd is not None]


def shut_ends(one: Any) -> None:
    """Close our ends of a process's, or that were made for one."""
    for fd in (one.stdin, one.stdout, one.stderr):
        if fd is not None:
            shut(fd)
    if one.channel is not None:
        one.channel.close()


def disowned(one: Any, read: bool = False) -> list[int]:
    """The descriptors of our ends, in a forked copy; those of pipes are another's once somebody `read` there."""
    fds = [fd for fd in (one.stdin, one.stdout, one.stderr) if fd is not None and not read]
    if one.channel is not None and one.channel.fileno() >= 0:
        fds.append(one.channel.detach())
    return fds


def _input(worker: WorkerPlan) -> tuple[int | None, int]:
    """Our end of its standard input, None for a file, and its own."""
    given = worker.input
    if is_file(given):
        how = os.O_RDONLY | os.O_CLOEXEC
        fd = os.open(given, how) if isinstance(given, os.PathLike) else os.dup(cast("IO[bytes]", given).fileno())
        return None, above_two(fd)
    return _pipe(written=True)


def _sealed(value: bytes) -> int:
    """A file in memory that holds it, for its owner alone, and that nobody can change any more (memfd_create(2))."""
    fd = above_two(os.memfd_create("secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.fchmod(fd, 0o400)
        with open(fd, "wb", buffering=0, closefd=False) as file:
            rest = memoryview(value)
            while rest:
                rest = rest[file.write(rest) :]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd
    except BaseException:
        shut(fd)
        raise


def _pipe(written: bool = False) -> tuple[int, int]:
    """Our end, which we read, or else write, and its own."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    if written:
        ours, theirs = theirs, ours
    os.set_blocking(ours, False)
    try:
        return ours, above_two(theirs)
    except OSError:
        shut(ours)
        raise
