"""What a `Group` is a handle of: the life of n workers, from their start to a result."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import inspect
import math
import re
import signal
import socket
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Literal

from ..diagnosis import Evidence
from ..events import Event, GroupDone, Leaked, SinkTrouble
from ..launch import By, Launcher, reap_abandoned
from ..model.failures import Failure
from ..model.group_spec import GroupSpec
from ..model.leftovers import Process, Remains
from ..model.logs import Std
from ..model.results import GroupResult, Reason, WorkerFailed
from ..model.states import State
from ..model.stop_policy import Stop
from ..model.text import printable, told
from ..model.validation import check_timeout
from ..planning import LaunchPlan, new_run_id, plan
from ..streams import Feeds, FileSink, LineFeed, Tap
from ..system import forked_copies
from ..system.waiting import anyio_shield, settled
from .attempts import Attempts
from .event_bus import EventBus
from .leak_check import clear
from .resources import Resources
from .result_builder import build_result, failure_of
from .worker_life import WorkerLife


class Supervisor(forked_copies.Owned):
    """Runs one group. It owns its workers (`WorkerOwner`) and their attempts (`AttemptsOwner`).

    Attributes:
        plan: what exactly runs; None before the start.
        run_id: names this run.
    """

    def __init__(self, spec: GroupSpec, on_event: Callable[[Event], object] | None, launcher: Launcher | By) -> None:
        self.spec = spec
        self.logs = spec.logs
        self.stop_policy = spec.stop
        self.run_id = new_run_id(spec.name)
        self.plan: LaunchPlan | None = None
        self._launcher = launcher
        self.attempts = Attempts(self, spec.restart, spec.on_success)
        self._reading = False
        self._stopping = False
        self._reason: Reason = "done"
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.event_bus = EventBus(on_event, len(spec.entries) * (1 + spec.restart.max))
        self._feeds = Feeds(self.attempts)
        self._leaked: list[Process] = []
        self._timeout: float | None = None
        self._timer: asyncio.TimerHandle | None = None  # that stops the group when that is over
        self._opening: asyncio.Timeout | None = None  # while all is made ready for the first start
        forked_copies.register(self)
        self._outcome: asyncio.Future[GroupResult] | None = None  # made when the loop is known

    # --- what the handle calls ---

    async def start(self) -> None:
        """Start all workers. Raises `SpecError`, and whatever a launcher does; nothing is left then."""
        self.loop = asyncio.get_running_loop()
        if forked_copies.is_lost(self.loop):
            raise RuntimeError("this event loop is a forked copy of another program's: use a new one (asyncio.run)")
        self._outcome = self.loop.create_future()
        try:
            reap_abandoned()
            self.resources = Resources(self.loop, self.spec, self.sink_trouble, self._launcher)
            self.census, self.poller = self.resources.census, self.resources.poller
            self.plan = await self._open()
        except BaseException:
            self._outcome = None
            self._end_timer()
            raise
        if self.plan is None:
            await self._none_started()
            return
        _alive.add(self)
        try:
            await self.attempts.begin(self.plan, self.resources, self.resources.launcher())
        except BaseException as exc:
            self.begin_reading()
            await self._until_done(int(isinstance(exc, asyncio.CancelledError)))
            raise
        self.loop.call_soon(self.begin_reading)

    async def leave(self, cancels: int, failed: bool) -> GroupResult:
        """Stop what still runs, and wait for the end.

        Args:
            cancels: how often the caller was cancelled before: once more skips the grace.
            failed: the caller's code has; maybe because a worker dies, which closes its files before its exit is told.
        """
        for worker in self.workers if failed else ():
            worker.look_whether_it_exits()
        self._feeds.relax()
        self.begin_reading()
        self.begin_stop("stopped")
        await self._until_done(cancels)
        return self.end.result()

    def lines(
        self, ranks: Iterable[int] | None, when_full: Literal["block", "drop"], partial: float | None
    ) -> LineFeed:
        """See `Group.lines`."""
        return self._feeds.add(when_full, ranks, partial, self.finished)

    async def line(self, pattern: re.Pattern[str], ranks: Iterable[int] | None, seconds: float) -> re.Match[str]:
        """See `Group.line`."""
        try:
            async with asyncio.timeout(seconds if seconds < math.inf else None) as limit:
                return await self._feeds.line(pattern, ranks, self.finished)
        except EOFError as exc:
            failed = [one for one in self.workers if self.has_failed(one)]
            if ranks is not None and self._reason != "failed":  # else that has ended these, too
                failed = [one for one in failed if one.rank in ranks]
            if not failed:
                raise
            failure = self.failure_of(min(failed, key=lambda one: one.exit.ended_ns if one.exit else 0))
            raise EOFError(f"{exc}: {failure.headline}") from WorkerFailed(failure)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"no line matched {pattern.pattern!r} within {seconds:g} s") from None

    def has_failed(self, worker: WorkerLife) -> bool:
        """Whether it has failed by itself, for good, as far as its exit tells."""
        return worker.failed and not self.attempts.answered(worker)

    def failure_of(self, worker: WorkerLife) -> Failure:
        """What is known of that when it has ended."""
        assert self.plan is not None
        return failure_of(worker, self.plan)

    async def dump_stacks(self, bound: float) -> dict[int, str]:
        """See `Group.dump_stacks`."""
        return {} if self.end.done() else await self.attempts.dump(bound=bound)

    def begin_stop(self, reason: Reason = "stopped", stop: Stop | None = None) -> None:
        """Start stopping all workers, without waiting. `stop` overrides the group's own policy."""
        if self._stopping or self.finished:
            return
        self._stopping = True
        self._reason = reason
        if stop is not None:
            self.stop_policy = stop
        if self._opening is not None:
            self._opening.reschedule(self.loop.time())
        self.attempts.stop_all()
        self._feeds.look()  # none restarts any more

    def hurry(self) -> None:
        """See `Group.hurry`."""
        self.attempts.hurry()

    async def finish(self, timeout: float | None = None) -> None:
        """Wait for the end; after `timeout` seconds stop the group, then wait."""
        self.limit(timeout)
        await asyncio.shield(self.end)

    def limit(self, timeout: float | None) -> None:
        """See `Group.limit`."""
        if check_timeout("timeout", timeout) < math.inf and timeout is not None:
            self._timeout = timeout
            self._timer = asyncio.get_running_loop().call_later(timeout, self.begin_stop, "timeout")

    def begin_reading(self) -> None:
        """Read the workers' output from now on (it happens by itself once the block's body awaits something)."""
        if not self._reading:
            self._reading = True
            self.attempts.begin_reading()

    def forget(self) -> None:
        """The result is somebody else's now: its values shall go when they let go of it, not when we are collected."""
        self._outcome = None
        self.event_bus.forget()
        for worker in (*self.attempts.workers, *self.attempts.ended):
            if worker.channel is not None:
                worker.channel.value = None

    def kill_at_exit(self) -> None:
        """SIGKILL every worker's process group, at once: the interpreter ends and nobody will wait."""
        for worker in self.workers if self.lost is None else ():
            worker.signal_group(signal.SIGKILL)

    def disown(self) -> list[int]:
        """See `forked_copies`: nothing is told to anybody any more, and no worker started or stopped."""
        if self._outcome is None:  # the copy may enter it; whatever carries its name is the original's
            self.run_id = new_run_id(self.spec.name)
            forked_copies.register(self)
        if self._outcome is None or self.finished:
            return []
        self.lost = forked_copies.error(f"group {self.spec.name!r}")
        self._stopping = self._closing = True
        self.event_bus.fail(self.lost)
        self._feeds.fail(self.lost)
        with contextlib.suppress(RuntimeError):  # a loop in debug mode, of another thread
            self._outcome.set_exception(self.lost)
        self._outcome.exception()  # seen
        return [fd for one in (*self.attempts.workers, *self.attempts.ended) for fd in one.disown(self.lost)]

    # --- what its workers call: see `WorkerOwner` ---

    def emit(self, event: Event) -> None:
        """Tell all subscribers."""
        self.event_bus.emit(event)

    def taps(self, worker: WorkerLife, std: Std) -> list[Tap]:
        return self.resources.sinks.taps(worker, std)

    def file_sink(self, worker: WorkerLife, std: Std) -> FileSink | None:
        return self.resources.sinks.file(worker.rank, std)

    def tap_trouble(self, tap: object, exc: BaseException) -> None:
        self.sink_trouble(getattr(tap, "name", type(tap).__name__), told(exc), 0)

    def sink_trouble(self, sink: str, problem: str, lost: int) -> None:
        self.emit(SinkTrouble(None, None, None, time.time(), sink, printable(problem), lost))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a part of the group's own work; a bug in it ends the group with that error, and never in a hang."""
        if self.lost is not None:
            work.close()
            return
        task = self.loop.create_task(_done(work))
        self._tasks.add(task)
        task.add_done_callback(partial(self._background_done, work))

    def exited(self, worker: WorkerLife) -> None:
        """The moment of the exit."""
        self.attempts.exited(worker)

    async def before_stop(self, worker: WorkerLife) -> None:
        """One worker is about to be stopped by itself."""
        if self.stop_policy.dump and worker.state is State.RUNNING:
            await self.attempts.dump([worker])

    def settled(self, worker: WorkerLife) -> None:
        """Nothing of the worker is left (or it was given up)."""
        self.attempts.settled(worker)

    def input_failed(self, problem: BaseException) -> None:
        """What a worker was to read, and is the caller's, raised that: the group ends with it."""
        self.attempts.problem = self.attempts.problem or problem
        self.begin_stop("failed")

    def leaked(self, process: Process, worker: WorkerLife | None = None) -> None:
        """A process that a worker left running was found."""
        self._leaked.append(process)
        rank, attempt = (None, None) if worker is None else (worker.rank, worker.attempt)
        self.emit(Leaked(rank, process.pid, attempt, time.time(), process))

    # --- what its attempts call: see `AttemptsOwner` ---

    def is_stopping(self) -> bool:
        """Whether no worker is to be started any more."""
        return self._stopping

    def started(self, worker: WorkerLife) -> None:
        """A worker runs: let it be read as the others are."""
        self._feeds.started(worker)
        if self._reading:
            worker.begin_reading()

    def one_over(self) -> None:
        """Nothing of some worker is left."""
        self._feeds.look()

    def all_over(self) -> None:
        """Nothing of any worker is left, and none restarts."""
        if not self._closing:
            self._closing = True
            self.background(self._close())

    # --- its own ---

    @property
    def workers(self) -> list[WorkerLife]:
        """The current one of each rank."""
        return self.attempts.workers

    @property
    def was_started(self) -> bool:
        """Whether there is something to leave."""
        return self._outcome is not None

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self._outcome is not None and self._outcome.done()

    @property
    def end(self) -> asyncio.Future[GroupResult]:
        """The result, once there is one."""
        if self._outcome is None:
            raise RuntimeError("enter the Group first: async with Group(...) as group:")
        return self._outcome

    def _background_done(self, work: Coroutine[Any, Any, None], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:  # cancelled before its first step
            self.background(work)  # it must be done all the same
            return
        problem = None if task.cancelled() else task.exception()
        if problem is not None and self._outcome is not None and not self._outcome.done():
            self.kill_at_exit()
            self.end.set_exception(problem)

    async def _open(self) -> LaunchPlan | None:
        """Make all ready for the first start. None: a stop came first, and all is closed again."""
        asked = asyncio.timeout(0 if self._stopping else None)
        try:
            async with asked as self._opening:
                return await self.resources.open(self.run_id)
        except TimeoutError:
            if not asked.expired():
                raise
            return None
        finally:
            self._opening = None

    async def _none_started(self) -> None:
        """A result of workers that have never been started."""
        self._closing = True
        self.plan = dataclasses.replace(plan(self.spec, run_id=self.run_id, host=socket.gethostname()), run_dir=None)
        try:
            await self.attempts.begin(self.plan, self.resources, self.resources.launcher())
        finally:
            await self._tell_end([], {})

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _until_done(self, cancels: int) -> None:
        """Wait for the end through cancellations. The first is one more reason to stop; a second skips the grace."""
        cancelled: asyncio.CancelledError | None = None
        with anyio_shield():
            while not self.end.done():
                try:
                    await asyncio.wait({self.end})
                except asyncio.CancelledError as exc:
                    cancelled = exc
                    cancels += 1
                    if cancels > 1:
                        self.hurry()
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        """All workers are over: look for strays, flush the sinks, make the result."""
        attempts, resources = self.attempts, self.resources
        remains = await clear(
            self.census, self.run_id, resources.adopted, attempts.deadline, self.stop_policy, self.leaked
        )
        pids = {one.pid for one in self._leaked}
        everyone = (*attempts.ended, *attempts.workers)
        pids.update(one.pid for one in everyone if one.pid is not None)
        remains += await resources.left(pids, remains, attempts.deadline.left())
        feeding = [one.input.feeding for one in everyone if one.input is not None and one.input.feeding is not None]
        if feeding:  # they are cancelled; an iterable of the caller's may have something to tidy up
            await settled(asyncio.gather(*feeding, return_exceptions=True), self.stop_policy.bound)
        ended_badly = [one for one in everyone if one.failed or (one.exit is not None and not one.exit.ok)]
        found = await resources.close(attempts.deadline, self.stop_policy.bound, ended_badly)
        _alive.discard(self)
        await self._tell_end(remains, found)

    async def _tell_end(self, remains: list[Remains], found: dict[WorkerLife, Evidence]) -> None:
        self._end_timer()
        attempts = self.attempts
        assert self.plan is not None
        result = await build_result(
            self.plan,
            attempts.workers,
            attempts.ended,
            attempts.answered,
            found,
            reason=self._reason,
            leaked=self._leaked,
            remains=remains,
            timeout=self._timeout,
            duration=(time.monotonic_ns() - attempts.started_ns) / 1e9,
        )
        self.emit(GroupDone(None, None, None, time.time(), result))
        self._feeds.end()
        attempts.rest()
        del self.resources
        if attempts.problem is not None:
            self.end.set_exception(attempts.problem)
        else:
            self.end.set_result(result)


async def _done(work: Coroutine[Any, Any, None]) -> None:
    await work


# Groups that hold processes: an interpreter that ends without closing its loop must not leave them.
_alive: weakref.WeakSet[Supervisor] = weakref.WeakSet()


def hurry_all(loop: asyncio.AbstractEventLoop) -> None:
    """Skip every grace of the groups that run on that loop."""
    for group in list(_alive):
        if group.loop is loop:
            group.hurry()


@atexit.register
def _kill_the_rest() -> None:
    for group in _alive:
        group.kill_at_exit()
