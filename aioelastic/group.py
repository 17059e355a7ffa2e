"""n lives: a `Group`. What users hold; all that was started is ended; then a result."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from . import forked
from .account import account
from .checks import check_choice, check_seconds
from .child import _context
from .entry import Entry
from .errors import SpecError
from .events import Drained, Event, Exited, GroupDone, Leaked, SinkTrouble
from .ground import Ground
from .hub import Hub
from .launch import By, Launcher, LaunchPlan, check_launcher, new_run_id, reap_abandoned
from .lifecycle import ALIVE, State
from .outcome import GroupResult, Reason
from .passes import Passes
from .placement import Places
from .proof import clear
from .remains import Process
from .restart import Restart
from .shown import printable, told
from .spec import GroupSpec, Logs, Start, Std, Stop
from .stacks import BOUND
from .streams import Feeds, FileSink, LineFeed, Tap
from .thread import anyio_shield
from .worker import Worker


class Group(forked.Owned):
    """A live group. Entering the block starts all workers; leaving it stops what still runs.

    Takes the arguments of `supervise` but `timeout`, or one `GroupSpec` that holds them. With `check`, `wait()` raises
    `GroupFailed` if a worker failed by itself, and so does leaving the block if nobody was told yet. A failing worker
    that is not to begin again stops the others but does not cancel the block: await `wait()`, or read `events()`.

    Example::

        async with Group(Command("serve"), n=8) as group:
            async for line in group.lines():
                print(line.rank, line.text)
    """

    def __init__(
        self,
        entry: Entry | GroupSpec,
        n: int | None = None,
        *,
        name: str = "worker",
        env: Mapping[str, str | None] | None = None,
        logs: Logs | None = None,
        stop: Stop | None = None,
        start: Start = "zygote",
        preload: Sequence[str] = (),
        ports: Sequence[int] = (),
        placement: Places | None = None,
        restart: Restart | None = None,
        check: bool = True,
        on_event: Callable[[Event], object] | None = None,
        launcher: Launcher | By = "guardian",
    ) -> None:
        spec = entry if isinstance(entry, GroupSpec) else GroupSpec.of(
            entry, n, name=name, env=env, logs=logs, stop=stop, start=start, preload=preload, ports=ports,
            restart=restart, placement=placement,
        )  # fmt: skip
        if on_event is not None and (not callable(on_event) or inspect.iscoroutinefunction(on_event)):
            remedy = "give def f(event): ..., or use `async for event in group.events()`"
            raise SpecError("on_event", on_event, "is not a plain function", remedy)
        check_launcher(launcher, spec)
        self.spec = spec
        self.logs = spec.logs
        self.stop_policy = spec.stop
        self.run_id = new_run_id(spec.name)
        self.plan: LaunchPlan | None = None
        self._check = check
        self._told = False  # the caller has seen the failures
        self._launcher = launcher
        self._passes = Passes(self, spec.restart)
        self._entered = False
        self._reading = False
        self._stopping = False
        self._reason: Reason = "done"
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._hub = Hub(on_event, len(spec.entries) * (1 + spec.restart.max))
        self._feeds = Feeds(self._passes)
        self._leaked: list[Process] = []
        self._timeout: float | None = None
        forked.register(self)
        self._outcome: asyncio.Future[GroupResult] | None = None  # made when the loop is known

    # --- what users call ---

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a Group is entered once; make a new one to start again")
        if _context.importing_main:
            words = "a worker imports your main script: put what starts workers below"
            raise RuntimeError(f'{words} if __name__ == "__main__":')
        self._entered = True
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lost is not None:
            return  # the original will
        self._feeds.relax()
        self.begin_reading()
        self.begin_stop("stopped")
        await self._until_done(int(isinstance(exc, asyncio.CancelledError)))
        result = self._end.result()
        if result.failures and self._check and not self._told:
            self._told = True
            if exc is None:
                result.raise_for_failures()
            elif isinstance(exc, Exception):
                exc.add_note(f"aioelastic group {self.spec.name!r}: {result.failures[0].headline}")

    def __len__(self) -> int:
        return len(self._workers)

    def __getitem__(self, rank: int) -> Worker:
        """The worker of this rank; a new one after a restart."""
        return self._workers[rank]

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    @property
    def pids(self) -> dict[int, int]:
        """rank → pid of the workers that run."""
        self.check_ours()
        return {w.rank: w.pid for w in self._workers if w.state in ALIVE and w.pid is not None}

    def events(self) -> AsyncIterator[Event]:
        """All events from the group's beginning on, until `GroupDone`. Late subscribers get the earlier ones too."""
        self.check_ours()
        return self._hub.read()

    def lines(self, *, ranks: Iterable[int] | None = None, when_full: Literal["block", "drop"] = "block") -> LineFeed:
        """Each `Line` of all workers from this call on (all of them, if it is the first thing in the block).

        Args:
            ranks: only these.
            when_full: once the reader is 1 MiB, or 4096 reads, behind: `"block"` lets the workers wait, `"drop"`
                forgets the oldest.
        """
        self.check_ours()
        check_choice("when_full", when_full, ("block", "drop"))
        return self._feeds.add(when_full, ranks, self._finished)

    async def as_completed(self) -> AsyncIterator[tuple[int, Any]]:
        """(rank, value) of each worker the moment it has ended well; a command's value is None.

        Raises:
            GroupFailed: as `wait` does, after the last.
        """
        late = set()  # whose values come after their exits
        async for event in self.events():
            one = None if event.rank is None else self._workers[event.rank]
            if one is not None and one.attempt == event.attempt and isinstance(event, Exited | Drained):
                if isinstance(event, Exited) and one.answer is not None and not one.answer.whole:
                    late.add(one)
                elif isinstance(event, Drained) == (one in late) and not one.cause:
                    yield one.rank, one.value
        await self.wait()

    async def wait(self) -> GroupResult:
        """Wait for the group's end; cancelling the wait changes nothing for the group.

        Raises:
            GroupFailed: `check`, and a worker failed by itself.
            RuntimeError: this is a forked copy of the program that started it.
        """
        self.check_ours()
        self.begin_reading()
        result = await asyncio.shield(self._end)
        self._told = True
        if self._check:
            result.raise_for_failures()
        return result

    async def stop(self) -> GroupResult:
        """Stop all workers, in reverse order, and wait for the end: `Stop` says how long that takes at most. They count
        as stopped by us."""
        self.check_ours()
        self.begin_stop("stopped")
        return await self.wait()

    def send_signal(self, signum: int) -> int:
        """Send a signal to each running worker (not to its children); returns how many got it."""
        self.check_ours()
        return sum(worker.send_signal(signum) for worker in self._workers)

    def forget(self) -> None:
        """The result is somebody else's now: its values shall go when they let go of it, not when we are collected."""
        self._outcome = None
        self._hub.forget()
        for worker in (*self._passes.workers, *self._passes.ended):
            if worker.replies is not None:
                worker.replies.value = None

    async def dump_stacks(self, timeout: float = BOUND) -> dict[int, str]:
        """Where is everybody? rank → the Python stacks of all threads of each worker that runs, taken in parallel.

        A function worker, and a command that called `record`, writes them by itself, whatever it hangs in; another
        Python command is looked at by py-spy, where that is installed. Who cannot be told, or does not answer within
        `timeout` seconds, has the reason instead of stacks. Texts are kept in `Result.stacks`, and in `stacks.txt`
        beside the worker's logs.
        """
        self.check_ours()
        check_seconds("timeout", timeout)
        return {} if self._end.done() else await self._passes.dump(bound=timeout)

    def hurry(self) -> None:
        """Skip every grace from now on: what is being stopped gets SIGKILL. What a second Ctrl-C does."""
        self.check_ours()
        self._passes.hurry()

    def begin_stop(self, reason: Reason = "stopped", stop: Stop | None = None) -> None:
        """Start stopping all workers, without waiting. `stop` overrides the group's own policy."""
        if self._stopping or self._finished:
            return
        self._stopping = True
        self._reason = reason
        if stop is not None:
            self.stop_policy = stop
        self._passes.stop_all()

    async def finish(self, timeout: float | None = None) -> None:
        """Wait for the end; after `timeout` seconds stop the group, then wait."""
        self._timeout = timeout
        if timeout is not None and not (await asyncio.wait({self._end}, timeout=timeout))[0]:
            self.begin_stop("timeout")
        await asyncio.shield(self._end)

    def begin_reading(self) -> None:
        """Read the workers' output from now on (it happens by itself once the block's body awaits something)."""
        if not self._reading:
            self._reading = True
            self._passes.begin_reading()

    def kill_at_exit(self) -> None:
        """SIGKILL every worker's process group, at once: the interpreter ends and nobody will wait."""
        for worker in self._workers if self.lost is None else ():
            worker.signal_group(signal.SIGKILL)

    def disown(self) -> list[int]:
        """See `forked`: nothing is told to anybody any more, and no worker started or stopped."""
        if self._outcome is None:  # the copy may enter it; whatever carries its name is the original's
            self.run_id = new_run_id(self.spec.name)
            forked.register(self)
        if self._outcome is None or self._finished:
            return []
        self.lost = forked.error(f"group {self.spec.name!r}")
        self._stopping = self._closing = True
        self._hub.fail(self.lost)
        self._feeds.fail(self.lost)
        with contextlib.suppress(RuntimeError):  # a loop in debug mode, of another thread
            self._outcome.set_exception(self.lost)
        self._outcome.exception()  # seen
        return [fd for one in (*self._passes.workers, *self._passes.ended) for fd in one.disown(self.lost)]

    # --- what its workers call ---

    def emit(self, event: Event) -> None:
        """Tell all subscribers."""
        self._hub.emit(event)

    def taps(self, worker: Worker, std: Std) -> list[Tap]:
        return self._ground.sinks.taps(worker, std)

    def file_sink(self, worker: Worker, std: Std) -> FileSink | None:
        return self._ground.sinks.file(worker.rank, std)

    def tap_trouble(self, tap: object, exc: Exception) -> None:
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

    def exited(self, worker: Worker) -> None:
        """The moment of the exit."""
        self._passes.exited(worker)

    async def before_stop(self, worker: Worker) -> None:
        """One worker is about to be stopped by itself."""
        if self.stop_policy.dump and worker.state is State.RUNNING:
            await self._passes.dump([worker])

    def settled(self, worker: Worker) -> None:
        """Nothing of the worker is left (or it was given up)."""
        self._passes.settled(worker)

    def leaked(self, process: Process, worker: Worker | None = None) -> None:
        """A process that a worker left running was found."""
        self._leaked.append(process)
        rank, attempt = (None, None) if worker is None else (worker.rank, worker.attempt)
        self.emit(Leaked(rank, process.pid, attempt, time.time(), process))

    # --- what its passes call ---

    def is_stopping(self) -> bool:
        """Whether no worker is to be started any more."""
        return self._stopping

    def started(self, worker: Worker) -> None:
        """A worker runs: let it be read as the others are."""
        self._feeds.started(worker)
        if self._reading:
            worker.begin_reading()

    def all_over(self) -> None:
        """Nothing of any worker is left, and none begins again."""
        if not self._closing:
            self._closing = True
            self.background(self._close())

    # --- its own ---

    @property
    def _workers(self) -> list[Worker]:
        return self._passes.workers

    @property
    def _finished(self) -> bool:
        return self._outcome is not None and self._outcome.done()

    @property
    def _end(self) -> asyncio.Future[GroupResult]:
        if self._outcome is None:
            raise RuntimeError("enter the Group first: async with Group(...) as group:")
        return self._outcome

    async def _start(self) -> None:
        self.loop = asyncio.get_running_loop()
        if forked.is_lost(self.loop):
            raise RuntimeError("this event loop is a forked copy of another program's: use a new one (asyncio.run)")
        self._outcome = self.loop.create_future()
        reap_abandoned()
        self._ground = Ground(self.loop, self.spec, self.sink_trouble, self._launcher)
        self.census, self.poller = self._ground.census, self._ground.poller
        try:
            self.plan = await self._ground.open(self.run_id)
        except BaseException:
            self._entered = False
            raise
        _alive.add(self)
        try:
            await self._passes.begin(self.plan, self._ground, self._ground.launcher())
        except BaseException as exc:
            self.begin_reading()
            await self._until_done(int(isinstance(exc, asyncio.CancelledError)))
            raise
        self.loop.call_soon(self.begin_reading)

    def _background_done(self, work: Coroutine[Any, Any, None], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:  # cancelled before its first step
            self.background(work)  # it must be done all the same
            return
        problem = None if task.cancelled() else task.exception()
        if problem is not None and self._outcome is not None and not self._outcome.done():
            self.kill_at_exit()
            self._end.set_exception(problem)

    async def _until_done(self, cancels: int) -> None:
        """Wait for the end through cancellations. The first is one more reason to stop; a second skips the grace."""
        cancelled: asyncio.CancelledError | None = None
        with anyio_shield():
            while not self._end.done():
                try:
                    await asyncio.wait({self._end})
                except asyncio.CancelledError as exc:
                    cancelled = exc
                    cancels += 1
                    if cancels > 1:
                        self.hurry()
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        """All workers are over: look for strays, flush the sinks, make the result."""
        passes, ground = self._passes, self._ground
        remains = await clear(self.census, self.run_id, ground.adopted, passes.patience, self.stop_policy, self.leaked)
        pids = {one.pid for one in self._leaked}
        everyone = (*passes.ended, *passes.workers)
        pids.update(one.pid for one in everyone if one.pid is not None)
        remains += await ground.left(pids, remains, passes.patience.left())
        ended_badly = [one for one in everyone if one.failed or (one.exit is not None and not one.exit.ok)]
        found = await ground.close(passes.patience, self.stop_policy.bound, ended_badly)
        _alive.discard(self)
        assert self.plan is not None
        result = await account(
            self.plan,
            passes.workers,
            passes.ended,
            passes.answered,
            found,
            reason=self._reason,
            leaked=self._leaked,
            remains=remains,
            timeout=self._timeout,
            duration=(time.monotonic_ns() - passes.started_ns) / 1e9,
        )
        self.emit(GroupDone(None, None, None, time.time(), result))
        self._feeds.end()
        passes.rest()
        del self._ground
        if passes.problem is not None:
            self._end.set_exception(passes.problem)
        else:
            self._end.set_result(result)


async def _done(work: Coroutine[Any, Any, None]) -> None:
    await work


# Groups that hold processes: an interpreter that ends without closing its loop must not leave them.
_alive: weakref.WeakSet[Group] = weakref.WeakSet()


@atexit.register
def _kill_the_rest() -> None:
    for group in _alive:
        group.kill_at_exit()
