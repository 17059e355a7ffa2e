"""What every way of starting a process must offer. `tests/launch/test_launchers.py` holds each one to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..planning import WorkerPlan
from ._call_outcome import CallOutcome
from ._pipe_ends import shut_ends


class RawExit(NamedTuple):
    """What the kernel told of the end of a process, and when.

    Attributes:
        status: a wait status (wait(2)); None where somebody else took it.
        ended_ns: when, on the monotonic clock, in nanoseconds.
        ended_at: the same on the wall clock, in seconds since the epoch.
        reason: what ended it, where the status alone does not say it.
        early: it will be told once more, when it can be reaped.
    """

    status: int | None
    ended_ns: int
    ended_at: float
    reason: str = ""
    early: bool = False

    @property
    def how(self) -> tuple[int | None, int | None, bool]:
        """Exit code, signal, and whether there is a core dump, as `Exit` has them."""
        if self.status is None:
            return None, None, False
        if os.WIFSIGNALED(self.status):
            return None, os.WTERMSIG(self.status), os.WCOREDUMP(self.status)
        return os.WEXITSTATUS(self.status), None, False


class LiveProcess(Protocol):
    """A started process, or a call in an executor of the caller's, which has no pid, streams or group.

    Descriptors are non-blocking; the receiver owns and closes them.

    Attributes:
        pid: its process id; None: it has none.
        channel: our end of a function worker's own socket, the receiver's too; None for a command.
        answer: what its call has come to where there is no channel: it is filled in before `on_exit`.
        stdin: the write end of the pipe to its standard input; None: there is none.
        stdout: the read end of the pipe from its standard output; None: there is none.
        stderr: the same of its standard error.
        started_ns: when it was started, taken just before that: the monotonic clock in nanoseconds.
        started_at: the same on the wall clock, in seconds since the epoch.
        rss_floor: the launcher's own peak resident size at that time, in bytes (see `Usage.max_rss_exact`).
    """

    pid: int | None
    channel: socket.socket | None
    answer: CallOutcome | None
    stdin: int | None
    stdout: int | None
    stderr: int | None
    started_ns: int
    started_at: float
    rss_floor: int

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        """Call `on_exit` once, on the loop's thread, when the process has ended. It is to be reaped then, soon.

        A launcher that knows the end before its process can be reaped may tell it `early`, and once more then.

        Args:
            on_exit: what is called.
        """

    def send_signal(self, signum: int) -> bool:
        """Signal this process alone. False: it had already ended by itself, and was not signalled.

        In an executor, signals that ask to stop are `stopping()` there, and no other can be sent (False). SIGKILL only
        cancels what has not begun.

        Args:
            signum: its number (signal(7)).
        """

    def signal_group(self, signum: int) -> bool:
        """Signal its whole process group. False: nobody is left in it. Only valid until it was reaped.

        Args:
            signum: its number (signal(7)).
        """

    def group_alive(self) -> bool:
        """Whether anybody is left in its process group, asked right after it was reaped."""

    def reap(self) -> resource.struct_rusage | None:
        """Let go of it after `on_exit`, before the loop looks for events again. Returns what it used, if known."""

    def abandon(self) -> None:
        """Let go of a process that does not die: close what we hold; it is reaped at some later launch."""


class Launcher(Protocol):
    """Starts processes, each as the leader of its own session.

    Attributes:
        name: of the way in which it starts them, for plans and errors.
    """

    name: str

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        """Begin to start one, and return at once; several may be under way. Called on the loop's thread.

        Args:
            worker: what is to run.

        Returns:
            A future of a `LiveProcess`. It must not be cancelled; a launcher that can take a start back has a method
            `withdraw`, which is called with that future. Its exception is an `OSError` where the system refused, with
            errno and path as execve(2) or fork(2) gave them; nothing is left of that process then.
        """


def withdraw(launcher: Launcher, worker: WorkerPlan, starting: asyncio.Future[Any]) -> asyncio.Future[Any]:
    """Nobody waits any more for that start: should it come, it is killed. Returns what to have instead: a refusal.

    A launcher that can take a start back has a method of that name and argument; its future is done all the same, soon.
    """
    taken_back = getattr(launcher, "withdraw", None)
    if taken_back is not None:
        taken_back(starting)
    starting.add_done_callback(_end_late)
    refused: asyncio.Future[Any] = starting.get_loop().create_future()
    words = "its start had not come when the time to stop was over"
    refused.set_exception(OSError(errno.ETIMEDOUT, words, worker.program))
    return refused


def _end_late(starting: asyncio.Future[Any]) -> None:
    if starting.cancelled() or starting.exception() is not None:
        return
    process: LiveProcess = starting.result()
    with contextlib.suppress(PermissionError):
        process.send_signal(signal.SIGKILL)
        process.signal_group(signal.SIGKILL)
    process.abandon()
    shut_ends(process)


def begin(launcher: Launcher, worker: WorkerPlan) -> asyncio.Future[Any]:
    """`launcher.start`; what it raises itself, against the contract, is in the future too."""
    try:
        return launcher.start(worker)
    except Exception as exc:  # a launcher may be the user's
        failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        failed.set_exception(exc)
        return failed
