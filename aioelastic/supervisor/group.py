"""n lives: a `Group`. What users hold; all that was started is ended; then a result."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from ..child.worker import context
from ..diagnosis.stacks import BOUND
from ..events import Drained, Event, Exited
from ..launch import By, Launcher, check_launcher
from ..model.entries import Entry
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec, OnFailures, OnSuccess, Start
from ..model.logs import Logs
from ..model.placement import Places
from ..model.restart_policy import Restart
from ..model.results import GroupResult, Reason, WorkerFailed
from ..model.states import ALIVE
from ..model.stop_policy import Stop
from ..model.validation import (
    check_choice,
    check_items,
    check_line_pattern,
    check_pattern,
    check_seconds,
    check_timeout,
)
from ..planning import LaunchPlan
from ..streams import LineFeed
from .event_bus import EventFeed
from .supervisor import Supervisor
from .worker import Worker


class Group:
    """A live group. Entering the block starts all workers; leaving it stops what still runs.

    Takes the arguments of `supervise` but `timeout`, or one `GroupSpec` that holds them. With `check`, `wait()` raises
    `GroupFailed` if a worker failed by itself, and so does leaving the block if nobody was told yet. A failing worker
    that is not to be restarted stops the others but does not cancel the block: await `wait()`, or read `events()`.

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
        on_failure: OnFailures = "stop",
        on_success: OnSuccess = "continue",
        check: bool = True,
        on_event: Callable[[Event], object] | None = None,
        launcher: Launcher | By = "guardian",
    ) -> None:
        spec = entry if isinstance(entry, GroupSpec) else GroupSpec.of(
            entry, n, name=name, env=env, logs=logs, stop=stop, start=start, preload=preload, ports=ports,
            restart=restart, placement=placement, on_failure=on_failure, on_success=on_success,
        )  # fmt: skip
        if on_event is not None and (not callable(on_event) or inspect.iscoroutinefunction(on_event)):
            remedy = "give def f(event): ..., or use `async for event in group.events()`"
            raise SpecError("on_event", on_event, "is not a plain function", remedy)
        check_launcher(launcher, spec)
        self._supervisor = Supervisor(spec, on_event, launcher)
        self._check = check
        self._told = False  # the caller has seen the failures
        self._entered = False

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a Group is entered once; make a new one to start again")
        if context.importing_main:
            raise RuntimeError(context.NO_GUARD)
        self._entered = True
        try:
            await self._supervisor.start()
        finally:
            self._entered = self._supervisor.was_started
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._supervisor.lost is not None:
            return  # the original will
        cancels = int(isinstance(exc, asyncio.CancelledError))
        result = await self._supervisor.leave(cancels, isinstance(exc, Exception))
        if result.failures and self._check and not self._told:
            self._told = True
            if exc is None:
                result.raise_for_failures()
            elif isinstance(exc, Exception):
                exc.add_note(f"aioelastic group {result.name!r}: {result.failures[0].headline}")

    def __repr__(self) -> str:
        spec, run_id, workers = self._supervisor.spec, self._supervisor.run_id, self._supervisor.workers
        if not self._supervisor.was_started:
            words = "not started;"
        elif not self._supervisor.finished:
            words = "running,"
        else:
            counts = Counter(one.state.value for one in workers)
            words = f"ended: {', '.join(f'{counts[name]} {name}' for name in sorted(counts))};"
        return f"<Group {spec.name!r}: {len(spec.entries)} workers, {words} run id {run_id}>"

    def __len__(self) -> int:
        return len(self._supervisor.workers)

    def __getitem__(self, rank: int) -> Worker:
        """The worker of this rank; a new one after a restart."""
        return self._supervisor.workers[rank].handle()

    def __iter__(self) -> Iterator[Worker]:
        return iter([one.handle() for one in self._supervisor.workers])

    @property
    def plan(self) -> LaunchPlan | None:
        """What exactly runs; None before the start."""
        return self._supervisor.plan

    @property
    def run_id(self) -> str:
        """Names this run, its directory of logs, and its processes."""
        return self._supervisor.run_id

    @property
    def pids(self) -> dict[int, int]:
        """rank → pid of the workers that run."""
        self._supervisor.check_ours()
        running = [one for one in self._supervisor.workers if one.state in ALIVE]
        return {one.rank: one.pid for one in running if one.pid is not None}

    def events(self) -> EventFeed:
        """All events from the group's beginning on, until `GroupDone`. Late subscribers get the earlier ones too."""
        self._supervisor.check_ours()
        return self._supervisor.event_bus.read()

    def lines(
        self,
        *,
        ranks: Iterable[int] | None = None,
        when_full: Literal["block", "drop"] = "block",
        partial: float | None = None,
    ) -> LineFeed:
        """Each `Line` of all workers from this call on (all of them, if it is the first thing in the block), until they
        have ended; it stops when nobody refers to it any more.

        Args:
            ranks: only these.
            when_full: once the reader is 1 MiB, or 4096 reads, behind: `"block"` lets the workers wait, `"drop"`
                forgets the oldest.
            partial: after so many seconds an unfinished line is passed on, too (a prompt), as a part that goes on
                (`Line.continued`); its rest is a `Line` of its own then. None: only what a newline or the end of the
                stream has finished.

        Raises:
            SpecError: one of the ranks is none of the group's, or another argument is wrong.
        """
        self._supervisor.check_ours()
        check_choice("when_full", when_full, ("block", "drop"))
        if partial is not None:
            check_seconds("partial", partial)
        return self._supervisor.lines(self._ranks(ranks), when_full, partial)

    async def line(
        self, pattern: str | re.Pattern[str], *, ranks: Iterable[int] | None = None, timeout: float | None = None
    ) -> re.Match[str]:
        r"""Wait for the first line in which a regular expression is found; returns the match.

        The last 16 KiB of each stream are looked at, too, but not what stands before the line that an earlier call has
        found there: calls one after the other miss nothing that the workers print in between.

        Args:
            pattern: it is searched for in each line (`re.search`).
            ranks: only in the output of these.
            timeout: seconds; None: no limit.

        Raises:
            EOFError: these ranks have ended, and there was no such line. Where one has failed it says so, and its
                `__cause__` is the `WorkerFailed`.
            TimeoutError: it took longer.
            SpecError: an argument is wrong.

        Example::

            async with Group(Command("serve", "--port", "0")) as group:
                port = int((await group.line(r"listening on port (\d+)", timeout=30))[1])
        """
        self._supervisor.check_ours()
        seconds = check_timeout("timeout", timeout)
        if not isinstance(self._supervisor.spec.start, str):
            raise SpecError("pattern", pattern, "is found in no stream", "functions in an executor of yours have none")
        wanted = check_pattern("pattern", pattern)
        check_line_pattern("pattern", wanted)
        return await self._supervisor.line(wanted, self._ranks(ranks), seconds)

    async def as_completed(
        self, *, errors: Literal["raise", "value"] = "raise"
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """(rank, value) of each worker the moment it has ended well; a command's value is None.

        Args:
            errors: `"value"`: also (rank, `WorkerFailed`) of each that has failed by itself, for good, and nothing is
                raised at the end; its `__cause__` is what its function raised.

        Raises:
            GroupFailed: as `wait` does, after the last.

        Example::

            async with Group(trials, on_failure="continue") as group:
                async for rank, value in group.as_completed(errors="value"):
                    print(rank, "failed" if isinstance(value, WorkerFailed) else value)
        """
        check_choice("errors", errors, ("raise", "value"))
        late = set()  # whose values come after their exits
        told = set()
        async for event in self.events():
            one = None if event.rank is None else self._supervisor.workers[event.rank]
            if one is not None and one.attempt == event.attempt and isinstance(event, Exited | Drained):
                if isinstance(event, Exited) and one.answer is not None and not one.answer.whole:
                    late.add(one)
                elif isinstance(event, Drained) == (one in late) and not one.cause:
                    yield one.rank, one.value
                elif isinstance(event, Drained) and errors == "value" and self._supervisor.has_failed(one):
                    told.add(one.rank)
                    yield one.rank, WorkerFailed(self._supervisor.failure_of(one))
        if errors == "raise":
            await self.wait()
            return
        self._told = True
        for failure in (await asyncio.shield(self._supervisor.end)).failures:
            if failure.rank not in told:
                yield failure.rank, WorkerFailed(failure)

    async def wait(self) -> GroupResult:
        """Wait for the group's end; cancelling the wait changes nothing for the group.

        Raises:
            GroupFailed: `check`, and a worker failed by itself.
            RuntimeError: this is a forked copy of the program that started it.
        """
        self._supervisor.check_ours()
        self._supervisor.begin_reading()
        result = await asyncio.shield(self._supervisor.end)
        self._told = True
        if self._check:
            result.raise_for_failures()
        return result

    async def stop(self) -> GroupResult:
        """Stop all workers, in reverse order, and wait for the end: `Stop` says how long that takes at most. They count
        as stopped by us."""
        self._supervisor.check_ours()
        self._supervisor.begin_stop("stopped")
        return await self.wait()

    def send_signal(self, signum: int) -> int:
        """Send a signal to each running worker (not to its children); returns how many got it. One that has changed its
        user may not get it; the others do.

        Args:
            signum: its number, or a member of `signal.Signals`.
        """
        self._supervisor.check_ours()
        count = 0
        for worker in self._supervisor.workers:
            with contextlib.suppress(PermissionError):
                count += worker.send_signal(signum)
        return count

    async def dump_stacks(self, timeout: float | None = BOUND) -> dict[int, str]:
        """Where is everybody? rank → the Python stacks of all threads of each worker that runs, taken in parallel.

        A function worker, and a command that called `record`, writes them by itself, whatever it hangs in; another
        Python command is looked at by py-spy, where that is installed. Who cannot be told, or does not answer within
        `timeout` seconds, has the reason instead of stacks. Texts are kept in `Result.stacks`, and in `stacks.txt`
        beside the worker's logs.

        Args:
            timeout: seconds to wait for who does not answer; None, or infinity, for no limit.

        Raises:
            SpecError: `timeout` is no time-out.
            RuntimeError: this is a forked copy of the program that started it.
        """
        self._supervisor.check_ours()
        return await self._supervisor.dump_stacks(check_timeout("timeout", timeout))

    def limit(self, timeout: float | None) -> None:
        """Stop the group so many seconds from now, also if it is only being entered then.

        Args:
            timeout: seconds; None, or infinity, for no limit.
        """
        self._supervisor.limit(timeout)

    async def finish(self, timeout: float | None = None) -> None:
        """Wait for the end; after `timeout` seconds stop the group, then wait.

        Args:
            timeout: seconds; None, or infinity, for no limit.
        """
        await self._supervisor.finish(timeout)

    def _ranks(self, ranks: Iterable[int] | None) -> tuple[int, ...] | None:
        if ranks is None:
            return None
        remedy = f"give ranks from 0 to {len(self._supervisor.spec.entries) - 1} in a list"
        given = check_items("ranks", ranks, "a list of ranks", remedy)
        for rank in given:
            if type(rank) is not int or not 0 <= rank < len(self._supervisor.spec.entries):
                raise SpecError("ranks", rank, "is no rank of this group", remedy)
        return given

    def hurry(self) -> None:
        """Skip every grace from now on: what is being stopped gets SIGKILL. What a second Ctrl-C does."""
        self._supervisor.check_ours()
        self._supervisor.hurry()

    def begin_stop(self, reason: Reason = "stopped", stop: Stop | None = None) -> None:
        """Start stopping all workers, without waiting.

        Args:
            reason: what `GroupResult.reason` will say.
            stop: how; by the group's own `Stop` when not given.
        """
        self._supervisor.begin_stop(reason, stop)
