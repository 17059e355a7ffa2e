"""One worker's life: from its plan to its result, driven by the table in `model/states.py`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..diagnosis import Moment
from ..events import Drained, Exited, Killed, Ready, Spawned, Stopping
from ..launch import CallOutcome, Launcher, LiveProcess, RawExit, begin
from ..model.errors import LaunchFailed, RemoteError, refusal
from ..model.exits import Exit, Usage
from ..model.leftovers import Process, Unkillable
from ..model.logs import Std
from ..model.states import ALIVE, FINAL, State, Trigger, step
from ..model.text import shown
from ..planning import WorkerPlan
from ..processes import cgroups
from ..processes.census import ticks_now
from ..processes.proc_files import is_exiting
from ..processes.strays import protect, unprotect
from ..streams import LineSearch
from ..system import forked_copies
from ..system.deadlines import Deadline
from .cascade import cascade, strays_of, sweep
from .protocols import StopProgress, WorkerOwner
from .worker import Worker
from .worker_output import WorkerOutput

if TYPE_CHECKING:
    from ..launch import FunctionChannel
    from .worker_input import WorkerInput


class WorkerLife(forked_copies.Owned):
    """One worker, from its plan to its end. Users hold a `Worker`.

    Attributes:
        state: where it is in its life (`model/states.py`).
        pid, exit: None before the start, and before the end.
        stacks: see `Worker`.
        refused: why it could not be started.
        ended_ns: monotonic, of the exit or the refusal.
        parent: what ended it with its parent.
        first_signal: just before the first signal to stop it was sent.
        starting: while its launcher is at work.
        answer, channel: of a function worker; the channel where it has one.
        on_task: takes the replies of an executor's worker.
    """

    def __init__(self, plan: WorkerPlan, supervisor: WorkerOwner[WorkerLife]) -> None:
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
        self.deadline = Deadline()
        self.stop_progress = StopProgress()
        self.owner = plan.identity.owner
        self.supervisor = supervisor
        supervisor.census.know(plan.mark, self.owner)
        self.starting: asyncio.Future[Any] | None = None  # while its launcher is at work
        self._process: LiveProcess | None = None
        self._stopped_by: int | None = None
        self.first_signal: Moment | None = None  # just before the first signal to stop it was sent
        self._to_stop = False
        self._exiting = False  # by itself, though its exit is not known yet
        self._ended_ticks = 0
        self._left_group = False  # somebody of its process group outlived it
        self._reading = False
        self.answer: CallOutcome | None = None  # of a function worker
        self.channel: FunctionChannel | None = None  # the same, where it has a channel
        self.on_task: Callable[[bytes, list[int]], None] | None = None  # takes those of an executor's worker
        self.output = WorkerOutput(plan)
        self.input: WorkerInput | None = None
        self._handle: weakref.ref[Worker] | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<Worker rank={self.rank} pid={self.pid} {self.state.value}>"

    def handle(self) -> Worker:
        """What users hold; it is not held by this, or both would be garbage together."""
        handle = None if self._handle is None else self._handle()
        if handle is None:
            handle = Worker(self)
            self._handle = weakref.ref(handle)
        return handle

    # --- what users call, by the handle ---

    def send_signal(self, signum: int) -> bool:
        """See `Worker`."""
        self.check_ours()
        sent = self.state in ALIVE and self._process is not None and self._process.send_signal(signum)
        return self.stop_progress.sending(signum, sent)

    def signal_group(self, signum: int) -> bool:
        """See `Worker`."""
        self.check_ours()
        sent = self.state in ALIVE and self._process is not None and self._process.signal_group(signum)
        return self.stop_progress.sending(signum, sent)

    async def wait(self) -> Exit | None:
        """See `Worker`."""
        while self.exit is None and self.state not in FINAL:
            self.check_ours()
            waiter = self.supervisor.loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self.exit

    async def stop(self) -> Exit | None:
        """See `Worker`."""
        self.check_ours()
        try:
            await self.supervisor.before_stop(self)
        finally:
            self.begin_stop()
        return await self.wait()

    # --- what its group calls ---

    def disown(self, problem: RuntimeError) -> list[int]:
        """See `forked_copies`."""
        self.lost = problem
        parts: list[Any] = [self._process, self.channel, self.output]  # a process may be the caller's
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
        self._process, self.pid, supervisor = process, process.pid, self.supervisor
        protect(self.pid)
        self._to(Trigger.SPAWNED)
        process.watch(self._on_exit)  # before anything that could go wrong: from here on its end is known
        self.output.open({Std.OUT: process.stdout, Std.ERR: process.stderr}, supervisor, self._one_eof)
        if process.stdin is not None:
            from .worker_input import WorkerInput  # for start-up time: see there

            self.input = WorkerInput(self.plan, supervisor, process.stdin)
        self.answer = process.answer
        if process.channel is not None:
            from ..launch import FunctionChannel  # for start-up time: see `function_parts.py`

            channel, ready = process.channel, self._is_ready
            self.channel = self.answer = FunctionChannel(supervisor.poller, channel, ready, self.on_task, self._one_eof)
        self.output.connect(partial(supervisor.file_sink, self), partial(supervisor.taps, self))
        supervisor.emit(Spawned(self.rank, self.pid, self.attempt, time.time()))
        if self.channel is None and self.answer is not None:
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
            self.output.start()

    def split_lines(self, partial: float | None, deliver: Callable[..., None]) -> None:
        """See `WorkerOutput`."""
        self.output.split_lines(partial, deliver)

    def stop_splitting(self, partial: float | None) -> None:
        """See `WorkerOutput`."""
        self.output.stop_splitting(partial)

    def search(self, search: LineSearch) -> None:
        """See `WorkerOutput`."""
        self.output.search(search)

    def stop_searching(self, search: LineSearch) -> None:
        """See `WorkerOutput`."""
        self.output.stop_searching(search)

    def begin_stop(self) -> None:
        """Start the cascade, unless it is under way or there is nothing to stop."""
        if self.ask_to_stop():
            self.tell_stopping()
            self.follow_up()

    def look_whether_it_exits(self) -> None:
        """Is it ending by itself just now? A stop then changes nothing: it is not by us that it ends."""
        self._exiting = self.state is State.RUNNING and self.pid is not None and is_exiting(self.pid)

    def ask_to_stop(self) -> bool:
        """Send the stop signal, and no more: many workers get theirs before anything else is done. False: there is
        nothing to stop, or it was asked before."""
        if self.state is not State.RUNNING or self._to_stop or self.lost is not None:
            return False
        assert self._process is not None
        self._to_stop = True
        policy = self.supervisor.stop_policy
        self.deadline.limit(self.supervisor.loop.time() + policy.grace + policy.bound)
        before = Moment(time.monotonic_ns(), time.time())
        # the worker is in its group: it gets one signal, since many programs take a second one for impatience
        whole = policy.scope == "group" and self.pid is not None
        try:
            sent = self._process.send_signal(0 if whole else policy.signum)
            self._stopped_by = policy.signum if sent and not self._exiting else None
        except PermissionError:
            sent = True  # it changed its user: SIGKILL to its group may still work, and how it ends is its own doing
        if sent and whole:
            self._process.signal_group(policy.signum)
        if sent:  # else it had already ended by itself, which its exit event will tell
            self.first_signal = before
            self._to(Trigger.STOP)
        return True

    def tell_stopping(self) -> None:
        """Tell what `ask_to_stop` has done."""
        if self.state is State.STOPPING and self.first_signal is not None:
            signum = self.supervisor.stop_policy.signum
            self.supervisor.emit(Stopping(self.rank, self.pid, self.attempt, self.first_signal.at, signum))

    def follow_up(self) -> None:
        """The rest of the cascade, after `ask_to_stop`."""
        assert self._process is not None
        policy = self.supervisor.stop_policy
        if self.state is State.STOPPING:
            with contextlib.suppress(PermissionError):
                self._process.send_signal(signal.SIGCONT)  # a stopped worker could not obey
        self.supervisor.background(cascade(self, policy, self.supervisor.census))

    def has_exited(self) -> bool:
        """Whether its exit is known."""
        return self.exit is not None

    def lost_its_reader(self) -> bool:
        """Whether it was ended by SIGPIPE, as far as its exit tells: by the end of whoever read what it wrote."""
        return self.exit is not None and self.exit.status == 128 + signal.SIGPIPE

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
            whose = "" if self.plan.user is None else f" as user {shown(self.plan.user)}"
            return f"could not start{whose}: {refusal(self.refused.cause)}" if self.refused else ""
        words = self.answer.cause(self.exit) if self.answer else "" if self.exit.ok else str(self.exit)
        return f"{words}: {self.parent}" if words and self.parent else words

    @property
    def error(self) -> RemoteError | None:
        """What its function raised."""
        return None if self.answer is None else self.answer.error

    @property
    def value(self) -> Any:
        """What its function returned, as soon as that is here; None before, and for a command."""
        return None if self.answer is None else self.answer.value

    # --- what the cascade calls ---

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
            self._stopped_by, self.first_signal = signal.SIGKILL if reached else None, self.first_signal or before
            self._to(Trigger.KILL)
            self.supervisor.emit(Killed(self.rank, self.pid, self.attempt, time.time()))

    def give_up(self, state: str, wchan: str) -> None:
        """SIGKILL did not end it within the bound: say so, let go, go on."""
        assert self._process is not None
        if self.state in (State.RUNNING, State.STOPPING):  # it has ended, and who has started it does not tell how
            self._on_exit(RawExit(None, time.monotonic_ns(), time.time(), "whoever had started it does not answer"))
        if self.state is not State.KILLING or self.lost is not None:
            return
        self.unkillable = Unkillable(self.rank, self.pid, state, wchan)
        unprotect(self.pid)
        self._process.abandon()
        self._hear_the_rest()
        self._to(Trigger.GIVE_UP)
        self.output.finish()  # what it had written is there, though somebody may have held it up so far
        self.output.close()
        self._end_input()
        self._tell_waiters()
        self.supervisor.settled(self)

    async def settle(self) -> None:
        """After the exit: end what it left running, see its streams to their end, within bounds."""
        supervisor = self.supervisor
        if supervisor.stop_policy.scope != "leader":
            policy = supervisor.stop_policy
            if self.exit is not None and self.exit.stopped_by == signal.SIGKILL:
                policy = replace(policy, grace=0)  # their leader used it up
            find = partial(strays_of, supervisor.census, self.deadline, self.owner, self.pid, self._ended_ticks)
            await sweep(find, self.deadline, policy, self._found)
            if self.plan.cgroup is not None:  # what could not be found by anything else
                for one in cgroups.members(self.plan.cgroup):
                    self._found(one)
                await cgroups.end(self.plan.cgroup, self.deadline, policy.bound)
        if not await self.deadline.until(self._all_over, supervisor.logs.drain, grace=False, late=self.deadline.SWEPT):
            still_open = self.output.still_open()
            if still_open:
                held = await supervisor.census.holders([*still_open.values()], self.deadline.left(self.deadline.SWEPT))
                self.output.give_up(still_open, held)
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
            if (rusage := process.reap()) is not None:
                self._usage = Usage.of(rusage, process.rss_floor)

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
        # its parent may have seen it before us: the earliest makes the order of exits
        follow = partial(self._follow_exit, self.exit, min(raw.ended_ns, self.exit.ended_ns))
        if raw.early:  # its parent may be stopped, and never tell
            self.deadline.unless(process.abandon, follow)
        else:
            self.deadline.came()
            self.supervisor.loop.call_soon(follow)

    def _follow_exit(self, exit: Exit, at_ns: int) -> None:
        if self.ended_ns:
            return
        assert self._process is not None
        self.ended_ns = at_ns
        self._reap()
        self._end_input()
        self._hear_the_rest()
        self._ended_ticks = ticks_now()
        self._left_group = self._process.group_alive() or (
            self.plan.cgroup is not None and cgroups.is_populated(self.plan.cgroup)
        )
        supervisor = self.supervisor
        supervisor.emit(Exited(self.rank, self.pid, self.attempt, exit.ended_at, exit))
        self.deadline.notice()
        supervisor.exited(self)
        if self._reading:
            self._after_exit()

    def _end_input(self) -> None:
        if self.input is not None:
            self.input.end()

    def _hear_the_rest(self) -> None:
        if self.answer is not None:
            try:
                self.answer.finish()
            except Exception as exc:  # its exit is told all the same
                self.answer.invalid = self.answer.invalid or f"what it had sent could not be read: {exc}"

    def _after_exit(self) -> None:
        self.output.finish()
        if self._all_over() and (self.supervisor.stop_policy.scope == "leader" or not self._left_group):
            self._end()
        else:
            self.supervisor.background(self.settle())

    def _is_ready(self) -> None:
        self.supervisor.emit(Ready(self.rank, self.pid, self.attempt, time.time()))

    def _one_eof(self) -> None:
        if self._all_over():
            self.deadline.notice()

    def _all_over(self) -> bool:
        return (self.answer is None or self.answer.whole) and self.output.over

    def _end(self) -> None:
        holders = tuple(sorted({pid for pids in self.output.holders.values() for pid in pids}))
        self.supervisor.emit(Drained(self.rank, self.pid, self.attempt, time.time(), holders))
        assert self.exit is not None
        stopped = self.exit.stopped_by is not None
        self._to(Trigger.STOPPED if stopped else Trigger.FAILURE if self.failed else Trigger.SUCCESS)
        self.supervisor.settled(self)

    def _found(self, process: Process) -> None:
        # the children of a worker that we stopped are on their way out: only what outlives a free end is a leak
        if self.exit is not None and self.exit.stopped_by is None:
            self.supervisor.leaked(process, self)

    def _to(self, trigger: Trigger) -> None:
        self.state = step(self.state, trigger)

    def _tell_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
