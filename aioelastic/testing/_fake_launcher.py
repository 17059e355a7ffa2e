"""A launcher that starts nothing: its processes live as they are told, so that policies are tried without real ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import field
from typing import Any

from ..launch import CallOutcome, Launcher, LiveProcess, RawExit
from ..model.errors import SpecError
from ..model.frozen import dataclass
from ..model.signal_names import parse_signal, signal_name
from ..model.validation import PID_MAX, check_seconds, check_whole, has_method
from ..planning import WorkerPlan
from ..system.descriptors import shut

# what ends no process that has no handler for it (signal(7))
HARMLESS = frozenset({signal.SIGCONT, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH})
STOPS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
MOST = 1_048_576  # bytes of output: what a pipe may hold (pipe(7), pipe-max-size)

_pids = itertools.count(PID_MAX + 1)  # no process ever has such a pid, so nobody is hit by a signal to it


@dataclass(frozen=True)
class Life:
    """What one fake process does.

    Attributes:
        lasts: seconds on the loop's clock until it ends by itself; None: until it is signalled, or told to `exit`.
        code: how it ends by itself, as `subprocess` writes it: the exit code, or minus the signal.
        stdout: what it writes as soon as it runs, at most 1 MiB.
        stderr: the same on its standard error.
        value: what its function returns.
        ignores: signals that do nothing to it. SIGKILL and SIGSTOP cannot be ignored.
        handles: signal → (seconds, code): it ends in its own way, some time after that signal.
        undying: nothing but `exit` ends it, not even SIGKILL, as one in uninterruptible sleep (state D).
        refused: the start fails with this error. An `OSError` is the system's; any other is a bug of the launcher's.

    Raises:
        SpecError: a field is not usable.

    Example::

        Life(lasts=None, ignores={signal.SIGTERM})                  # must be killed
        Life(lasts=None, handles={signal.SIGTERM: (2.0, 0)})        # saves its work for two seconds
        Life(refused=BlockingIOError(errno.EAGAIN, "no more processes"))
    """

    lasts: float | None = 0.0
    code: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    value: Any = None
    ignores: Container[int] = frozenset()
    handles: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    undying: bool = False
    refused: BaseException | None = None

    def __post_init__(self) -> None:
        if self.lasts is not None:
            check_seconds("Life.lasts", self.lasts)
        _check_code("Life.code", self.code)
        for name in ("stdout", "stderr"):
            data = getattr(self, name)
            if not isinstance(data, bytes) or len(data) > MOST:
                raise SpecError(f"Life.{name}", data, "is not at most 1 MiB of bytes", 'give bytes like b"up\\n"')
        ignores: Any = self.ignores
        if isinstance(ignores, str) or not isinstance(ignores, Container):
            raise SpecError("Life.ignores", ignores, "is no set", "give signals like {signal.SIGTERM}")
        if isinstance(ignores, Iterable):
            ignores = frozenset(parse_signal("Life.ignores", one) for one in ignores)
        if not isinstance(self.handles, Mapping):
            raise SpecError("Life.handles", self.handles, "is no mapping", "give signal → (seconds, code)")
        handles = {parse_signal("Life.handles", signum): what for signum, what in self.handles.items()}
        for signum in (signal.SIGKILL, signal.SIGSTOP):
            if signum in ignores:
                raise SpecError("Life.ignores", signum, "cannot be ignored", "take it out; see undying")
            if signum in handles:
                raise SpecError("Life.handles", signum, "cannot be handled", "take it out; see undying")
        for what in handles.values():
            if not isinstance(what, tuple) or len(what) != 2:
                raise SpecError("Life.handles", what, "is no end", "give (seconds, code), like (2.0, 0)")
            check_seconds("Life.handles", what[0])
            _check_code("Life.handles", what[1])
        object.__setattr__(self, "ignores", ignores)
        object.__setattr__(self, "handles", handles)
        if not isinstance(self.refused, BaseException | None):
            raise SpecError("Life.refused", self.refused, "is no exception", "give an OSError")


class FakeLauncher:
    """A `launcher=` for `Group` and `supervise`.

    The plan is made and checked as ever: a program must exist, and functions are pickled (and a zygote is warmed up
    for them, unless `start="spawn"`).

    Args:
        life: the `Life` of all, one per rank, or `worker plan -> Life | None`. The plan has `rank` and `attempt`.
        otherwise: starts those of which `life` says None (or that a mapping leaves out): a real launcher, so that only
            some are fake.

    Attributes:
        started: the live `FakeProcess` of each start so far, in order; `launcher[rank]` is the last one of a rank.

    Raises:
        SpecError: `life` is none of these, or `otherwise` cannot start anything; on a start, something else came of it,
            or None and there is no `otherwise`.

    Example::

        launcher = FakeLauncher({0: Life(lasts=None), 1: Life(lasts=0.5, code=3)})
        result = await supervise(Command("true"), n=2, launcher=launcher, check=False)
        assert launcher[0].signals == [signal.SIGTERM]
    """

    name = "fake"

    def __init__(
        self,
        life: Life | Mapping[int, Life] | Callable[[WorkerPlan], Life | None] | None = None,
        otherwise: Launcher | None = None,
    ) -> None:
        life = Life() if life is None else life
        if not (isinstance(life, Life | Mapping) or callable(life)):
            raise SpecError("life", life, "is no Life", "give a Life, one per rank, or a function of the plan")
        for rank, one in life.items() if isinstance(life, Mapping) else ():
            check_whole("rank of life", rank, 0)
            _check_life(f"life[{rank}]", one)
        if otherwise is not None and not has_method(otherwise, "start"):
            raise SpecError("otherwise", otherwise, "cannot start anything", "give a launcher, as DirectLauncher")
        self._life = life
        self._otherwise = otherwise
        self.started: list[FakeProcess] = []

    def __getitem__(self, rank: int) -> FakeProcess:
        """The last one of this rank. Raises `IndexError` if there is none."""
        for one in reversed(self.started):
            if one.rank == rank:
                return one
        there = ", ".join(map(str, sorted({one.rank for one in self.started}))) or "none"
        raise IndexError(f"no fake process of rank {rank!r} was started; of these ranks there are some: {there}")

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        """See `Launcher.start`.

        Raises:
            RuntimeError: there is no running event loop.
            SpecError: it is no plan of a worker.
        """
        if not isinstance(worker, WorkerPlan):
            raise SpecError("worker", worker, "is no plan", "give the launcher to Group or supervise, which makes them")
        if asyncio._get_running_loop() is None:
            raise RuntimeError("fake processes live on a running event loop: give the launcher to Group or supervise")
        life = self._of(worker)
        if life is None and self._otherwise is not None:
            return self._otherwise.start(worker)
        done: asyncio.Future[LiveProcess] = asyncio.get_running_loop().create_future()
        try:
            if life is None:
                raise SpecError("life", None, f"is all there is for rank {worker.rank}", "give otherwise=, or a Life")
            _check_life(f"life of rank {worker.rank}", life)
            if life.refused is not None:
                raise life.refused
            process = FakeProcess(life, worker)
        except BaseException as exc:  # it is the caller's
            done.set_exception(exc)
        else:
            self.started.append(process)
            done.set_result(process)
        return done

    def _of(self, worker: WorkerPlan) -> Life | None:
        if isinstance(self._life, Life):
            return self._life
        if isinstance(self._life, Mapping):
            return self._life.get(worker.rank)
        return self._life(worker)


class FakeProcess:
    """A process that is none. See `LiveProcess`.

    Attributes:
        rank (int): whose it is.
        attempt (int): in which attempt.
        pid: larger than any that a process can have.
        signals: those that it got, in order; those to its group too.
    """

    channel: socket.socket | None = None
    stdin: int | None = None
    rss_floor = 0

    def __init__(self, life: Life, worker: WorkerPlan) -> None:
        self.rank, self.attempt = worker.rank, worker.attempt
        self.pid: int | None = next(_pids)
        self.signals: list[int] = []
        self.started_ns, self.started_at = time.monotonic_ns(), time.time()
        self.answer = CallOutcome() if worker.function is not None else None
        self._life = life
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._writers: list[int] = []
        self.stdout: int | None = self._pipe(life.stdout)
        try:
            self.stderr: int | None = self._pipe(life.stderr)
        except OSError:
            shut(self.stdout or -1)
            self._close()
            raise
        self._on_exit: Callable[[RawExit], None] | None = None
        self._ended: RawExit | None = None
        self._end = ""  # the same in words
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """More on its standard output.

        Args:
            data: what it writes.

        Raises:
            BlockingIOError: nobody has read what is there; `characters_written` of it were written.
            RuntimeError: it has ended, or was given up; or this is not the thread of its loop.
            SpecError: `data` is not bytes.
        """
        self._check("write")
        if not isinstance(data, bytes | bytearray | memoryview):
            raise SpecError("data", data, "is not bytes", 'give bytes like b"up\\n"')
        written, wanted = 0, memoryview(data).nbytes
        with contextlib.suppress(BlockingIOError):
            written = os.write(self._writers[0], data)
        if written < wanted:
            words = f"nobody has read what rank {self.rank} had written: {written} of {wanted} bytes were written"
            raise BlockingIOError(errno.EAGAIN, words, written)

    def exit(self, code: int = 0) -> None:
        """It ends now.

        Args:
            code: with this exit code, or, if it is negative, by the signal `-code`.

        Raises:
            RuntimeError: it has ended, or was given up; or this is not the thread of its loop.
            SpecError: `code` is no way to end.
        """
        _check_code("code", code)
        self._check("exit")
        self._exit(code)

    def _check(self, what: str) -> None:
        """Whether it can do that."""
        who = f"the fake process of rank {self.rank} (attempt {self.attempt})"
        if self._ended is not None:
            raise RuntimeError(f"{who} cannot {what}: it has ended already, with {self._end}")
        if not self._writers:
            raise RuntimeError(f"{who} cannot {what}: its group has given it up")
        if self._loop.is_closed():
            raise RuntimeError(f"{who} cannot {what}: its event loop is closed")
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"{who} can {what} in the thread of its loop only: use loop.call_soon_threadsafe")

    def _exit(self, code: int) -> None:
        if self._ended is not None:
            return
        self._end = signal_name(-code) if code < 0 else f"exit code {code}"
        if self._timer is not None:
            self._timer.cancel()
        if self.answer is not None and code == 0:
            self.answer.value, self.answer.has_value = self._life.value, True
        status = -code if code < 0 else code << 8
        self._ended = RawExit(status, time.monotonic_ns(), time.time())
        self._close()
        on_exit, self._on_exit = self._on_exit, None  # who has us shall not be held by us
        if on_exit is not None:
            self._loop.call_soon(on_exit, self._ended)

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        if self._ended is not None:
            self._loop.call_soon(on_exit, self._ended)
            return
        self._on_exit = on_exit
        if self._life.lasts is not None and not self._life.undying:
            self._end_in(self._life.lasts, self._life.code)

    def send_signal(self, signum: int) -> bool:
        if signum != 0:  # which asks whether it runs
            signum = parse_signal("signum", signum)
        if self._ended is not None:
            return False
        self.signals.append(signum)
        life = self._life
        if life.undying or signum == 0:
            return True
        if signum in life.handles:
            self._end_in(*life.handles[signum])
        elif signum not in HARMLESS | STOPS and signum not in life.ignores:
            self._exit(-signum)
        return True

    def signal_group(self, signum: int) -> bool:
        return self.send_signal(signum)  # it has no children

    def group_alive(self) -> bool:
        return False

    def reap(self) -> resource.struct_rusage | None:
        return None

    def abandon(self) -> None:
        self._on_exit = None
        self._close()

    def _end_in(self, seconds: float, code: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._exit, code)

    def _pipe(self, data: bytes) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._writers.append(writer)
        try:
            if len(data) > 65536:
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, len(data))
            os.write(writer, data)
        except OSError:
            shut(reader)
            self._close()
            raise
        return reader

    def _close(self) -> None:
        for fd in self._writers:
            shut(fd)
        self._writers.clear()


def _check_code(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -64 <= value <= 255 or -value in HARMLESS | STOPS:
        raise SpecError(field, value, "is no way to end", "give an exit code from 0 to 255, or minus a signal")


def _check_life(field: str, value: Any) -> None:
    if not isinstance(value, Life):
        raise SpecError(field, value, "is no Life", "give one like Life(lasts=None)")
