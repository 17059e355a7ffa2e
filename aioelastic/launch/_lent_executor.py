"""`start=<an executor>`: function workers in an executor that the caller lends. It is never shut down by us."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

from ..child.wire import datagrams, messages, untrusted
from ..child.worker import exceptions, lent_run
from ..model.entries import Function
from ..model.errors import RemoteError, SpecError
from ..model.lent_executors import kind_of
from ..model.text import shown, told
from ..planning import WorkerPlan, explain
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.helper_thread import HelperThread
from ._call_outcome import CallOutcome
from ._contract import RawExit
from ._descriptor_exchange import Exchange

# what asks a function to stop; no other signal can reach it
_ASKING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_FAILED = 1 << 8  # a wait status: exit code 1


def check_open(executor: Executor) -> None:
    """Whether it takes work: by a question that is taken back at once.

    Raises:
        SpecError: it is shut down, or broken, or no executor.
    """
    try:
        asked = executor.submit(int)
        asked.add_done_callback(lambda _: None)
        asked.cancel()
    except Exception as exc:  # an executor may be anybody's
        problem = f"takes no work ({told(exc)})"
        raise SpecError("start", executor, problem, "give an executor that is open and works") from exc


class ExecutorLauncher:
    """Submits calls in a helper thread, since some executors start processes in `submit`.

    Attributes:
        broken: the executor of these calls is failing them all: one of them was told so already.
    """

    name = "executor"

    def __init__(self, thread: HelperThread) -> None:
        self.broken = False
        self._thread = thread
        self._exchanged: Exchange | None = None
        self._loads: dict[int, tuple[Function, lent_run.Load]] = {}

    def pack(self, worker: WorkerPlan) -> None:
        """Pickle its function, once for all ranks, if its executor is one that will.

        Raises:
            SpecError: names what cannot be pickled.
        """
        assert worker.function is not None
        assert worker.executor is not None
        if kind_of(worker.executor).processes:
            try:
                self._load(worker.function).pack(self._exchange().place)
            except pickle.PicklingError as exc:
                explain(worker.function, f"of rank {worker.rank}", exc.__cause__ or exc)

    def start(self, worker: WorkerPlan) -> asyncio.Future[ExecutorProcess]:
        """See `Launcher.start`."""
        loop = asyncio.get_running_loop()
        return self._thread.submit(lambda: self._start(worker, loop))

    def close(self) -> None:
        """The group needs it no more."""
        if self._exchanged is not None:
            self._exchanged.close()
            self._exchanged = None

    def _exchange(self) -> Exchange:
        if self._exchanged is None:
            self._exchanged = Exchange()
        return self._exchanged

    def _start(self, worker: WorkerPlan, loop: asyncio.AbstractEventLoop) -> ExecutorProcess:
        assert worker.function is not None
        return ExecutorProcess(self, worker, self._load(worker.function), loop, self._exchanged)

    def _load(self, function: Function) -> lent_run.Load:
        if id(function) not in self._loads:
            load = lent_run.Load(function.name, function.fn, function.args, dict(function.kwargs))
            self._loads[id(function)] = (function, load)
        return self._loads[id(function)][1]


class ExecutorProcess:
    """A call in an executor: no process of ours. See `LiveProcess`.

    Raises:
        OSError: the executor takes no more work, or we are out of descriptors.
    """

    pid = None
    channel = None
    stdin = None
    stdout = None
    stderr = None
    rss_floor = 0

    def __init__(
        self,
        launcher: ExecutorLauncher,
        worker: WorkerPlan,
        load: lent_run.Load,
        loop: asyncio.AbstractEventLoop,
        exchange: Exchange | None,
    ) -> None:
        assert worker.function is not None
        assert worker.executor is not None
        self._launcher = launcher
        self.answer = _FromThere(exchange)
        self._loop = loop
        self._on_exit: Callable[[RawExit], None] | None = None
        self._told: RawExit | None = None  # its end, known before anybody watched
        self._stopped_by = 0
        self._asking = {*_ASKING, int(worker.overlay.get("AIOELASTIC_STOP_SIGNAL") or 0)}
        self._pipe = -1  # to ask it in another process
        self._lost = False
        stop_at = None
        lent = kind_of(worker.executor).processes
        if lent:
            self._pipe = _pipe()
            stop_at = (os.getpid(), self._pipe, os.fstat(self._pipe).st_ino)
        about = lent_run.About(
            dict(worker.overlay),
            lent,
            worker.cwd,
            None if worker.error_file is None else str(worker.error_file),
            worker.function.show_locals,
            stop_at,
            exchange.place() if lent and exchange is not None else None,
        )
        self._job = lent_run.Hosted(load, about, self._is_ready)
        self.started_at, self.started_ns = time.time(), time.monotonic_ns()
        try:
            self._future: Future[lent_run.Answer] = worker.executor.submit(self._job)
        except Exception as exc:  # an executor may be anybody's
            self._let_go()
            words = f"its executor takes no more work ({told(exc)})"
            raise OSError(errno.ESHUTDOWN, words) from exc
        self._future.add_done_callback(self._ended)
        forked_copies.register(self)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        pipe, self._pipe = self._pipe, -1
        self._on_exit, self._lost = None, True
        return [pipe] if pipe >= 0 else []

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        if self._told is None:
            self._on_exit = on_exit
        else:
            self._loop.call_soon(on_exit, self._told)

    def send_signal(self, signum: int) -> bool:
        if self._lost or self._future.done() or (signum != signal.SIGKILL and signum not in self._asking):
            return False
        self._stopped_by = self._stopped_by or signum
        # a ProcessPoolExecutor that finds a cancelled future while it fails all it has loses its own thread of that
        if self._launcher.broken or not self._future.cancel():
            self._ask()
        return True

    def signal_group(self, signum: int) -> bool:
        return False

    def group_alive(self) -> bool:
        return False

    def reap(self) -> None:
        self._let_go()

    def abandon(self) -> None:
        self._on_exit = None
        if self._lost:
            return
        self._job.forget()
        self._ask()
        self._let_go()

    def _ask(self) -> None:
        self._job.stopping.ask()
        if self._pipe >= 0:
            os.write(self._pipe, b"!")

    def _let_go(self) -> None:
        if self._pipe >= 0:
            shut(self._pipe)
            self._pipe = -1

    def _is_ready(self) -> None:
        self._soon(self.answer.ready)

    def _ended(self, future: Future[lent_run.Answer]) -> None:
        """In whatever thread."""
        ended_ns, ended_at = time.monotonic_ns(), time.time()
        if not future.cancelled() and isinstance(future.exception(), BrokenExecutor):
            self._launcher.broken = True
        status: int | None = _FAILED
        try:
            status, problem = untrusted.attempt(self.answer.read, future, self._stopped_by)
            if problem is not None:
                self.answer.invalid = f"its result could not be unpickled here: {told(problem)}"
                status = _FAILED
        finally:
            self._soon(self._tell, RawExit(status, ended_ns, ended_at))

    def _tell(self, raw: RawExit) -> None:
        self._told = raw
        if self._on_exit is not None:
            self._on_exit(raw)
            self._on_exit = None

    def _soon(self, callback: Callable[..., object], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # the loop was closed: nobody is left to tell


class _FromThere(CallOutcome):
    """From the future of an executor."""

    def __init__(self, exchange: Exchange | None) -> None:
        super().__init__()
        self._exchange = exchange
        self._on_ready: Callable[[], None] | None = None
        self._is_ready = False

    def hear(self, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready
        if self._is_ready:
            on_ready()

    def ready(self) -> None:
        """It has set itself up."""
        self._is_ready = True
        if self._on_ready is not None:
            self._on_ready()

    def read(self, future: Future[lent_run.Answer], stopped_by: int) -> int | None:
        """What has come of it; returns a wait status as a process of its own would have had it, None if unknown.

        Raises:
            Exception: whatever unpickling its value raises.
        """
        if future.cancelled():
            if stopped_by:
                return stopped_by
            self.invalid = "its executor cancelled it before it began"
            return _FAILED
        exc = future.exception()
        if exc is not None:
            told = exceptions.describe(exc, pack=False)
            self.error = RemoteError("executor", told["type"], told["message"], told["traceback"], exc)
            return None if isinstance(exc, BrokenExecutor) else _FAILED
        answer: Any = future.result()
        if not isinstance(answer, lent_run.Answer):
            self.invalid = f"its executor returned {shown(answer)} instead of what the call has returned"
            return _FAILED
        if answer.kind == lent_run.UNBEGUN:
            return stopped_by or int(signal.SIGTERM)
        if answer.kind == lent_run.ERROR:
            phase, told, exc = answer.body
            self.raised_ns = exceptions.raised_ns(told)
            exc, why = (exc, "") if told["packed"] is None else exceptions.rebuild(told["packed"])
            self.error = RemoteError(phase, told["type"], told["message"], told["traceback"], exc, why)
        elif answer.kind != lent_run.EXIT:
            self.value = self._value(answer)
            self.has_value = True
        return answer.code << 8

    def _value(self, answer: lent_run.Answer) -> Any:
        if answer.kind == lent_run.VALUE:
            return answer.body
        if answer.kind == lent_run.PICKLED:
            return pickle.loads(answer.body)
        packet, fds = answer.body, list[int]()
        if answer.kind == lent_run.LEFT:
            assert self._exchange is not None
            packet, fds = self._exchange.take(answer.body)
        try:
            (value,) = messages.decode(packet, fds)
        finally:
            datagrams.close(fds)
        return value


def _pipe() -> int:
    """Both ends of a pipe in one descriptor: what is written stays there until somebody opens it to look."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        return os.open(f"/proc/self/fd/{reader}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        shut(reader)
        shut(writer)
