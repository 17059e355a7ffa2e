"""One worker's life: from its plan to its result, driven by the table in `lifecycle.py`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from . import cgroups
from . import stop as _stop
from .blame import Moment, raised_ns
from .errors import LaunchFailed, RemoteError, refusal
from .events import Drained, Exited, Killed, Ready, Spawned, Stopping
from .keeper import Keeper
from .launch import Answer, Launcher, LiveProcess, RawExit, WorkerPlan, begin
from .lifecycle import ALIVE, FINAL, State, Trigger, step
from .outcome import ErrorReport, Exit, Output, Usage
from .remains import Process, Unkillable
from .replies import Correspondent, Replies
from .spec import STREAM, Std
from .streams import FileSink, LineTap, Pump, Tail
from .watch import protect, ticks_now, unprotect


class Worker(Correspondent):
    """One worker of a group, as `group[rank]` shows it.

    Attributes:
        rank: its rank.
        attempt: 0 for the first start.
        state: where it is in its life (`lifecycle.State`).
        pid: its process id; None before the start, and in an executor of the caller's.
        exit: its `Exit`, once it has ended.
        stacks: its Python stacks, or why there are none, when they were last taken.
    """

    def __init__(self, plan: WorkerPlan, keeper: Keeper) -> None:
        self.plan = plan
        self.rank = plan.rank
        self.attempt = plan.attempt
        self.state = State.PLANNED
        self.pid: int | None = None
        self.exit: Exit | None = None
        self.stacks: str | None = None
        self._usage: Usage | None = None
        self._reaped = False
        self.refused: LaunchFailed | None = None
        self.ended_ns = 0  # monotonic, of the exit or the refusal
        self.unkillable: Unkillable | None = None
        self.parent = ""  # what ended it with its parent
        self.patience = _stop.Patience()
        self.trail = _stop.Trail()
        self.owner = plan.identity.owner
        self.keeper = keeper
        keeper.census.know(plan.mark, self.owner)
        self.starting: asyncio.Future[Any] | None = None  # while its launcher is at work
        self._process: LiveProcess | None = None
        self._stopped_by: int | None = None
        self._stopped: Moment | None = None  # just before the first signal to stop it was sent
        self._to_stop = False
        self._ended_ticks = 0
        self._left_group = False  # somebody of its process group outlived it
        self._reading = False
        self.answer: Answer | None = None  # of a function worker
        self.replies: Replies | None = None  # the same, where it has a channel
        self.on_task: Callable[[bytes, list[int]], None] | None = None  # takes those of an executor's worker
        self._pumps: dict[Std, Pump] = {}
        self._line_taps: dict[Std, LineTap] = {}
        self._tails: dict[Std, Tail] = {}
        self._sinks: dict[Std, FileSink | None] = {}
        self._holders: dict[Std, tuple[int, ...]] = {}
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<Worker rank={self.rank} pid={self.pid} {self.state.value}>"

    # --- what users call ---

    def send_signal(self, signum: int) -> bool:
        """Send a signal to the worker itself. False: it does not run. Never reaches a stranger's pid.

        In an executor of the caller's the stop signal, SIGTERM and its like become true in `stopping()`, and others
        cannot be sent (False).

        Raises:
            PermissionError: it has changed its user.
            RuntimeError: this is a forked copy of the program that started it.
        """
        self.check_ours()
        sent = self.state in ALIVE and self._process is not None and self._process.send_signal(signum)
        return self.trail.sending(signum, sent)

    def signal_group(self, signum: int) -> bool:
        """Send a signal to the worker's whole process group. False: it does not run."""
        self.check_ours()
        sent = self.state in ALIVE and self._process is not None and self._process.signal_group(signum)
        return self.trail.sending(signum, sent)

    async def wait(self) -> Exit | None:
        """Wait until it has ended; returns its `Exit` within a millisecond, however long its output still flows.

        None: it never started, or could not be killed. Cancelling the wait changes nothing for the worker.
        """
        while self.exit is None and self.state not in FINAL:
            self.check_ours()
            waiter = self.keeper.loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self.exit

    async def stop(self) -> Exit | None:
        """Stop this worker by the group's `Stop` and wait until it has ended. It then counts as stopped by us."""
        self.check_ours()
        try:
            await self.keeper.before_stop(self)
        finally:
            self.begin_stop()
        return await self.wait()

    # --- what its group calls ---

    def disown(self, problem: RuntimeError) -> list[int]:
        """See `forked`."""
        self.lost = problem
        parts: list[Any] = [self._process, self.replies, *self._pumps.values()]  # a process may be the caller's
        return [fd for one in parts if hasattr(one, "disown") for fd in one.disown()]

    def launch(self, launcher: Launcher) -> None:
        """Begin to start it; `adopt` when `starting` is done."""
        self._to(Trigger.LAUNCH)
        self.starting = begin(launcher, self.plan)

    def adopt(self) -> None:
        """It was started: watch it, make its sinks. Raises `LaunchFailed` if it was refused."""
        assert self.starting is not None
        starting, self.starting = self.starting, None
        try:
            process: LiveProcess = starting.result()
        except BaseException as exc:
            self.ended_ns = time.monotonic_ns()
            self.never_start()
            if isinstance(exc, OSError):
                self.refused = LaunchFailed(self.rank, self.plan.argv, exc)
                raise self.refused from exc
            raise
        self._process, self.pid = process, process.pid
        protect(self.pid)
        keeper = self.keeper
        self._to(Trigger.SPAWNED)
        process.watch(self._on_exit)  # before anything that could go wrong: from here on its end is known
        for std, fd in ((Std.OUT, process.stdout), (Std.ERR, process.stderr)):
            self._tails[std] = Tail()
            if fd is not None:
                self._pumps[std] = Pump(keeper.poller, fd, [self._tails[std]], self._one_eof, keeper.tap_trouble)
        self.answer = process.answer
        if process.channel is not None:
            channel, ready = process.channel, self._is_ready
            self.replies = self.answer = Replies(keeper.poller, channel, ready, self.on_task, self._one_eof)
        for std, pump in self._pumps.items():
            self._sinks[std] = keeper.file_sink(self, std)
            pump.taps += keeper.taps(self, std)
        keeper.emit(Spawned(self.rank, self.pid, self.attempt, time.time()))
        if self.replies is None and self.answer is not None:
            self.answer.hear(self._is_ready)

    def never_start(self) -> None:
        """Its group ended before its turn came."""
        self._to(Trigger.REFUSED)
        self._tell_waiters()

    def begin_reading(self) -> None:
        """Read its output from now on; until then it waits in the pipes, even after the exit."""
        if self._reading or self._process is None:
            return
        self._reading = True
        if self.ended_ns:
            self._after_exit()
        elif self.exit is None:  # else its exit is just being told, and what follows finds us reading
            for pump in self._pumps.values():
                pump.start()

    def split_lines(self, deliver: Callable[..., None]) -> None:
        """Hand each line from now on to `deliver(rank, stream, lines, time, pump)`; an unfinished one comes whole."""
        for std, pump in self._pumps.items():
            if not pump.over and std not in self._line_taps:
                tap = self._line_taps[std] = LineTap(partial(deliver, self.rank, STREAM[std]))
                tap.begin(self._tails[std].unfinished())
                pump.taps = [*pump.taps, tap]

    def stop_splitting(self) -> None:
        """Undo that."""
        for std, tap in self._line_taps.items():
            pump = self._pumps[std]
            pump.taps = [one for one in pump.taps if one is not tap]
        self._line_taps.clear()

    def begin_stop(self) -> None:
        """Start the cascade, unless it is under way or there is nothing to stop."""
        if self.ask_to_stop():
            self.tell_stopping()
            self.follow_up()

    def ask_to_stop(self) -> bool:
        """Send the stop signal, and no more: many workers get theirs before anything else is done. False: there is
        nothing to stop, or it was asked before."""
        if self.state is not State.RUNNING or self._to_stop or self.lost is not None:
            return False
        assert self._process is not None
        self._to_stop = True
        policy = self.keeper.stop_policy
        self.patience.limit(self.keeper.loop.time() + policy.grace + policy.bound)
        before = Moment(time.monotonic_ns(), time.time())
        try:
            sent = self._process.send_signal(policy.signum)
            self._stopped_by = policy.signum if sent else None
        except PermissionError:
            sent = True  # it changed its user: SIGKILL to its group may still work, and how it ends is its own doing
        if sent:  # else it had already ended by itself, which its exit event will tell
            self._stopped = before
            self._to(Trigger.STOP)
        return True

    def tell_stopping(self) -> None:
        """Tell what `ask_to_stop` has done."""
        if self.state is State.STOPPING and self._stopped is not None:
            signum = self.keeper.stop_policy.signum
            self.keeper.emit(Stopping(self.rank, self.pid, self.attempt, self._stopped.at, signum))

    def follow_up(self) -> None:
        """The rest of the cascade, after `ask_to_stop`."""
        assert self._process is not None
        policy = self.keeper.stop_policy
        if self.state is State.STOPPING:
            if policy.scope == "group":
                self._process.signal_group(policy.signum)
            with contextlib.suppress(PermissionError):
                self._process.send_signal(signal.SIGCONT)  # a stopped worker could not obey
        self.keeper.background(_stop.cascade(self, policy, self.keeper.census))

    def has_exited(self) -> bool:
        """Whether its exit is known."""
        return self.exit is not None

    @property
    def failed(self) -> bool:
        """Whether it failed by itself, or could not start, as far as its exit tells."""
        if self.exit is None:
            return self.refused is not None
        return self.exit.stopped_by is None and self.cause != ""

    @property
    def cause(self) -> str:
        """Why it did not do what it was to do, in words; empty when it did, or still runs."""
        if self.exit is None:
            return f"could not start: {refusal(self.refused.cause)}" if self.refused else ""
        own = "" if self.exit.ok else str(self.exit)
        words = self.answer.cause(self.exit) if self.answer else own
        return f"{words}: {self.parent}" if words and self.parent else words

    @property
    def error(self) -> RemoteError | None:
        """What its function raised."""
        return None if self.answer is None else self.answer.error

    @property
    def value(self) -> Any:
        """What its function returned, as soon as that is here; None before, and for a command."""
        return None if self.answer is None else self.answer.value

    def failed_at(self, report: ErrorReport | None) -> int | None:
        """When it failed by itself (monotonic, ns), or None if it did not.

        Its own report counts for more than its exit: who raised first may well end last, after it has broken the
        connections of others; and one that had raised before we came to stop it has failed by itself.
        """
        exit = self.exit
        if exit is not None and not exit.ok:
            told = None if self.answer is None else self.answer.raised_ns
            if report is not None and not report.is_of(self.pid, exit):
                report = None
            raised = raised_ns(exit, told, report, None if exit.stopped_by is None else self._stopped)
            if raised is not None:
                return min(raised, self.ended_ns)
        return self.ended_ns if self.failed else None

    # --- what the cascade in stop.py calls ---

    def kill(self, leader_only: bool) -> None:
        """SIGKILL it and its process group."""
        assert self._process is not None
        if self.state not in (State.RUNNING, State.STOPPING) or self.lost is not None:
            return
        before = Moment(time.monotonic_ns(), time.time())
        try:
            alive = reached = self._process.send_signal(signal.SIGKILL)
        except PermissionError:
            alive, reached = True, self.plan.cgroup is not None
        if not leader_only:
            self._process.signal_group(signal.SIGKILL)
            if self.plan.cgroup is not None:
                cgroups.kill(self.plan.cgroup)
        if alive:
            self._stopped_by, self._stopped = signal.SIGKILL if reached else None, self._stopped or before
            self._to(Trigger.KILL)
            self.keeper.emit(Killed(self.rank, self.pid, self.attempt, time.time()))

    def give_up(self, state: str, wchan: str) -> None:
        """SIGKILL did not end it within the bound: say so, let go, go on."""
        assert self._process is not None
        if self.state is not State.KILLING or self.lost is not None:
            return
        self.unkillable = Unkillable(self.rank, self.pid, state, wchan)
        unprotect(self.pid)
        self._process.abandon()
        if self.answer is not None:
            self.answer.finish()
        self._to(Trigger.GIVE_UP)
        for pump in self._pumps.values():
            pump.close()
        self._tell_waiters()
        self.keeper.settled(self)

    async def settle(self) -> None:
        """After the exit: end what it left running, see its streams to their end, within bounds."""
        keeper = self.keeper
        if keeper.stop_policy.scope != "leader":
            policy = keeper.stop_policy
            if self.exit is not None and self.exit.stopped_by == signal.SIGKILL:
                policy = replace(policy, grace=0)  # their leader used it up
            find = partial(_stop.strays_of, keeper.census, self.patience, self.owner, self.pid, self._ended_ticks)
            await _stop.sweep(find, self.patience, policy, self._found)
            if self.plan.cgroup is not None:  # what could not be found by anything else
                for one in cgroups.members(self.plan.cgroup):
                    self._found(one)
                await cgroups.end(self.plan.cgroup, self.patience, policy.bound)
        if not await self.patience.until(self._all_over, keeper.logs.drain, grace=False, late=self.patience.SWEPT):
            still_open = {std: pump for std, pump in self._pumps.items() if not pump.finish()}
            if still_open:
                pipes = [pump.fd for pump in still_open.values()]
                held = await keeper.census.holders(pipes, self.patience.left(self.patience.SWEPT))
                for std, pump in still_open.items():
                    self._holders[std] = held.get(pump.fd, ())
                    pump.close()
            if self.answer is not None:
                self.answer.too_late()
        self._end()

    # --- its own ---

    @property
    def usage(self) -> Usage | None:
        """What it used, once it has ended, as far as the kernel told."""
        if self.exit is not None and self.ended_ns:
            self._reap()
        return self._usage

    def _reap(self) -> None:
        process = self._process
        if process is not None and not self._reaped:
            self._reaped = True
            rusage = process.reap()
            if rusage is not None:
                self._usage = Usage.of(rusage, process.rss_floor)

    def output(self, std: Std) -> Output:
        """What has come of one stream so far."""
        tail, sink = self._tails.get(std), self._sinks.get(std)
        path = self.plan.stdout_log if std is Std.OUT else self.plan.stderr_log
        if tail is None:
            return Output(path)
        return Output(path, tail.last(), tail.total, sink.lost if sink else 0, self._holders.get(std, ()))

    def _on_exit(self, raw: RawExit) -> None:
        process = self._process
        assert process is not None
        self.parent = raw.reason
        if self.exit is None:
            unprotect(self.pid)
            code, signum, core = raw.how
            times = process.started_ns, raw.ended_ns, process.started_at, raw.ended_at
            self.exit = Exit(code, signum, core, *times, self._stopped_by)
            self._to(Trigger.EXIT)
            self._tell_waiters()  # first: somebody may be counting microseconds
        if not raw.early:
            # its parent may have seen it before us: the earliest makes the order of exits
            at_ns = min(raw.ended_ns, self.exit.ended_ns)
            self.keeper.loop.call_soon(self._follow_exit, self.exit, at_ns)

    def _follow_exit(self, exit: Exit, at_ns: int) -> None:
        assert self._process is not None
        self.ended_ns = at_ns
        self._reap()
        if self.answer is not None:
            self.answer.finish()
        self._ended_ticks = ticks_now()
        self._left_group = self._process.group_alive() or (
            self.plan.cgroup is not None and cgroups.is_populated(self.plan.cgroup)
        )
        keeper = self.keeper
        keeper.emit(Exited(self.rank, self.pid, self.attempt, exit.ended_at, exit))
        self.patience.notice()
        keeper.exited(self)
        if self._reading:
            self._after_exit()

    def _after_exit(self) -> None:
        for pump in self._pumps.values():
            pump.finish()
        if self._all_over() and (self.keeper.stop_policy.scope == "leader" or not self._left_group):
            self._end()
        else:
            self.keeper.background(self.settle())

    def _is_ready(self) -> None:
        self.keeper.emit(Ready(self.rank, self.pid, self.attempt, time.time()))

    def _one_eof(self) -> None:
        if self._all_over():
            self.patience.notice()

    def _all_over(self) -> bool:
        whole = self.answer is None or self.answer.whole
        return whole and all(pump.over for pump in self._pumps.values())

    def _end(self) -> None:
        holders = tuple(sorted({pid for pids in self._holders.values() for pid in pids}))
        self.keeper.emit(Drained(self.rank, self.pid, self.attempt, time.time(), holders))
        self._to(Trigger.SETTLED)
        self.keeper.settled(self)

    def _found(self, process: Process) -> None:
        # the children of a worker that we stopped are on their way out: only what outlives a free end is a leak
        if self.exit is not None and self.exit.stopped_by is None:
            self.keeper.leaked(process, self)

    def _to(self, trigger: Trigger) -> None:
        self.state = step(self.state, trigger)

    def _tell_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
