"""The attempts of a group's workers: start them; when one fails, restart as the policy says, or let the group end.

A new attempt of a rank is a new `WorkerLife`. It begins when the old one has settled: the exit sets all of it off.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from ..diagnosis.stacks import BOUND
from ..events import GaveUp, Restarting
from ..launch import Launcher, withdraw
from ..model.errors import LaunchFailed
from ..model.group_spec import OnSuccess
from ..model.leftovers import Process
from ..model.restart_policy import Restart, Verdict, decide
from ..model.results import Reason
from ..model.states import ALIVE, FINAL, State
from ..model.text import printable
from ..planning import LaunchPlan
from ..processes.strays import Stray
from ..system import forked_copies
from ..system.deadlines import Deadline
from ..system.time_slices import TimeSlices
from .cascade import strays_of, sweep
from .protocols import WorkerOwner
from .resources import Resources
from .worker_life import WorkerLife

# Starts that are under way at a time.
AHEAD = 16


class AttemptsOwner(WorkerOwner[WorkerLife], Protocol):
    """What the attempts need of their group, besides what a worker needs."""

    def is_stopping(self) -> bool: ...

    def begin_stop(self, reason: Reason) -> None: ...

    def started(self, worker: WorkerLife) -> None: ...

    def one_over(self) -> None: ...

    def all_over(self) -> None: ...


class Attempts:
    """All workers of a group, over all attempts.

    Attributes:
        workers: the current one of each rank.
        ended: those of earlier attempts.
        deadline: of the looks for what all workers together have left running.
        problem: an error of ours, or of a launcher, that ended the group.
    """

    def __init__(self, owner: AttemptsOwner, policy: Restart, on_success: OnSuccess = "continue") -> None:
        self.workers: list[WorkerLife] = []
        self.ended: list[WorkerLife] = []
        self.deadline = Deadline()
        self.problem: BaseException | None = None
        self.started_ns = 0  # monotonic, of the first attempt
        self._owner = owner
        self._policy = policy
        self._on_success = on_success
        self._reasons: dict[WorkerLife, str] = {}  # whose rank restarts, and why
        self._ending = False  # this attempt of all ranks is over; the next one follows
        self._blocked = False  # ... and could not
        self._busy = 0  # launches and restarts under way
        self._unsettled = 0  # workers of which something is left
        self._tasks: set[asyncio.Task[None]] = set()
        self._halted: asyncio.Future[None] | None = None  # the group is being stopped
        self._starts_until = math.inf  # on the loop's clock: how long starts that are under way are waited for then
        self._dump: asyncio.Task[dict[int, str]] | None = None  # of those that are about to be stopped

    # --- what the group calls ---

    def rest(self) -> None:
        """All is over: the group goes with the last who has it, and is not held by us."""
        self._owner = weakref.proxy(self._owner)
        del self._resources
        for worker in (*self.workers, *self.ended):
            worker.supervisor = self._owner

    async def begin(self, plan: LaunchPlan, resources: Resources, launcher: Launcher) -> None:
        """The first attempt."""
        self._resources, self._launcher = resources, launcher
        self._halted = self._owner.loop.create_future()
        self.started_ns = time.monotonic_ns()
        self._busy += 1
        try:
            slices, cancelled = TimeSlices(), None
            for one in plan.workers:
                self.workers.append(WorkerLife(one, self._owner))
                if slices.due():
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError as exc:
                        cancelled = exc  # the caller's wish, raised below: a result has all ranks
                        self._owner.begin_stop("stopped")
                    slices.begin()
            await self._launch(self.workers)
            if not self._policy.max and not self._over():  # else a start that is not waited for may need them
                resources.give_up_passed()
            if cancelled is not None:
                raise cancelled
        except BaseException:
            self._owner.begin_stop("stopped")
            raise
        finally:
            self._busy -= 1
            self._look()

    def stop_all(self) -> None:
        """Start to stop all workers, in reverse order; no new attempt begins once the group says it is stopping."""
        running = [one for one in self.workers if one.state is State.RUNNING]
        policy = self._owner.stop_policy
        if self._halted is not None and not self._halted.done() and self._owner.is_stopping():
            self._halted.set_result(None)
            dump = BOUND if policy.dump and running else 0.0
            ends_at = self._owner.loop.time() + dump + policy.grace + policy.bound
            for deadline in (self.deadline, *(one.deadline for one in self.workers)):
                deadline.limit(ends_at)
        if not running or not policy.dump:
            self._stop_now()
        elif self._dump is None:
            self._busy += 1
            self._dump = self._owner.loop.create_task(self.dump(running))
            self._dump.add_done_callback(self._dumped)

    async def dump(self, workers: Sequence[WorkerLife] | None = None, bound: float | None = None) -> dict[int, str]:
        """Take the Python stacks of these, or of all that run."""
        asked = [one for one in self.workers if one.state in ALIVE] if workers is None else workers
        return await self._resources.stacks.take(asked, BOUND if bound is None else bound) if asked else {}

    def begin_reading(self) -> None:
        """Read all that run, or have ended and are still to be read."""
        self._read(iter(self.workers))

    def hurry(self) -> None:
        """Skip every grace from now on, and a dump that is under way."""
        for deadline in (self.deadline, *(one.deadline for one in self.workers)):
            deadline.hurry()
        if self._dump is not None:
            self._dump.cancel()

    def exited(self, worker: WorkerLife) -> None:
        """The moment of an exit, or of a refusal: what it means for the others is decided now."""
        self._decide(worker)
        if worker.failed and worker.exit is not None:
            self._resources.collector.note(worker)  # in a thread, which would have taken turns with the decision

    def _decide(self, worker: WorkerLife) -> None:
        if self._owner.is_stopping() or worker in self._reasons:
            return
        if not worker.failed:
            by_itself = worker.exit is not None and worker.exit.stopped_by is None
            if by_itself and self._on_success == "stop":
                self._owner.begin_stop("done")
            return
        verdict = self._verdict(worker)
        if verdict is Verdict.AGAIN:
            reason = printable(f"{worker.plan.words}: {worker.cause}")
            if self._policy.scope == "one":
                self._reasons[worker] = reason
            else:  # the others, whatever comes of them now, share the answer
                self._reasons.update(dict.fromkeys(self.workers, reason))
                self._ending = True
                self._look_for_readers(worker)
                self.stop_all()
            return
        if verdict is Verdict.GIVE_UP:
            self._owner.emit(GaveUp(worker.rank, worker.pid, worker.attempt, time.time(), worker.attempt + 1))
        if worker.plan.on_failure == "stop":
            self._look_for_readers(worker)
            self._owner.begin_stop("failed")

    def settled(self, worker: WorkerLife) -> None:
        """Nothing of the worker is left (or it was given up)."""
        self._unsettled -= 1
        if worker.unkillable is None:
            self._owner.census.over(worker.plan.mark)
        if self._policy.scope == "one" and worker in self._reasons and not self._owner.is_stopping():
            self._start(partial(self._one_again, worker))
        self._owner.one_over()
        self._look()

    def is_over(self, rank: int) -> bool:
        """Whether nothing is left of the worker of that rank, and none restarts there."""
        worker = self.workers[rank] if rank < len(self.workers) else None
        if worker is None or worker.state not in FINAL:
            return False
        restarts = self._policy.max and (self._policy.scope == "all" or worker in self._reasons)
        return not restarts or self._owner.is_stopping()

    def answered(self, worker: WorkerLife) -> bool:
        """Whether its failure, if it has failed, is within the limits: its rank restarts, unless we are stopped."""
        return self._verdict(worker) is Verdict.AGAIN and not (self._blocked and worker in self.workers)

    # --- its own ---

    def _read(self, workers: Iterator[WorkerLife]) -> None:
        slices = TimeSlices()
        for worker in workers:
            if worker.state not in FINAL:
                worker.begin_reading()
            if slices.due():
                self._owner.loop.call_soon(self._read, workers)
                return

    def _verdict(self, worker: WorkerLife) -> Verdict:
        return decide(self._policy, worker.attempt, refused=worker.exit is None)

    def _look_for_readers(self, worker: WorkerLife) -> None:
        """Before the others are stopped because of it: whose end was it? A process closes its files before its exit is
        told, so one that has written to it may have ended by SIGPIPE before."""
        for one in self.workers if worker.lost_its_reader() else ():
            one.look_whether_it_exits()

    def _dumped(self, task: asyncio.Task[dict[int, str]]) -> None:
        # told by the task, as in `_stepped`
        self._dump = None
        self._busy -= 1
        if not task.cancelled() and (problem := task.exception()) is not None:
            self.problem = self.problem or problem
        self._stop_now()
        self._look()

    def _stop_now(self) -> None:
        asked = [one for one in reversed(self.workers) if one.ask_to_stop()]
        for worker in asked:
            worker.tell_stopping()
        for worker in asked:
            worker.follow_up()

    def _look(self) -> None:
        """Is this attempt over, and the group with it?"""
        if self._busy or self._unsettled:
            return
        if self._ending and not self._owner.is_stopping():
            self._start(self._all_again)
        else:
            self._owner.all_over()

    def _start(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._busy += 1
        task = self._owner.loop.create_task(step())
        self._tasks.add(task)
        task.add_done_callback(self._stepped)

    def _stepped(self, task: asyncio.Task[None]) -> None:
        # told by the task and not in it: one that is cancelled before its first step does nothing at all
        self._tasks.discard(task)
        self._busy -= 1
        if task.cancelled():
            self._owner.begin_stop("stopped")  # the loop shuts down
        elif (problem := task.exception()) is not None:
            self.problem = self.problem or problem
            self._owner.begin_stop("failed")
        self._look()

    async def _one_again(self, old: WorkerLife) -> None:
        find = partial(strays_of, self._owner.census, old.deadline, old.owner)
        await self._sweep(find, old.deadline, partial(self._owner.leaked, worker=old))
        plan = await self._prepare(old.attempt + 1, (old.rank,))
        if plan is not None:
            await self._replace([old], plan)

    async def _all_again(self) -> None:
        old = [*self.workers]
        if any(one.unkillable for one in old):  # it may hold what a new attempt needs
            self._blocked = True
            self._owner.begin_stop("failed")
            return
        find = partial(strays_of, self._owner.census, self.deadline, self._owner.run_id)
        await self._sweep(find, self.deadline, partial(self._owner.leaked, worker=None))
        plan = await self._prepare(old[0].attempt + 1, None)
        if plan is not None:
            await self._replace(old, plan)

    async def _sweep(
        self,
        find: Callable[[], Awaitable[list[Stray]]],
        deadline: Deadline,
        on_found: Callable[[Process], None],
    ) -> None:
        """End what the old attempt left running out of its process group: it may hold a port that the new one needs."""
        if self._owner.stop_policy.scope != "leader":
            await sweep(find, deadline, self._owner.stop_policy, on_found)

    async def _prepare(self, attempt: int, ranks: Container[int] | None) -> LaunchPlan | None:
        """The plan and the files of a new attempt. None: the group is being stopped."""
        if self._owner.is_stopping():
            return None
        # a file system that hangs must not keep us from stopping
        planned = self._resources.again(attempt, ranks)
        await self._or_halted(planned)
        if self._owner.is_stopping():
            return None
        plan = planned.result()
        files = self._resources.sinks.again(plan)
        if files is not None:
            await self._or_halted(files)
        return None if self._owner.is_stopping() else plan

    async def _or_halted(self, work: asyncio.Future[Any]) -> None:
        assert self._halted is not None
        await asyncio.wait({work, self._halted}, return_when=asyncio.FIRST_COMPLETED)

    async def _replace(self, old: list[WorkerLife], plan: LaunchPlan) -> None:
        for one in old:
            reason = self._reasons[one]  # it restarts until the next one is there: a subscriber may ask
            self._owner.emit(Restarting(one.rank, one.pid, one.attempt, time.time(), plan.attempt, reason))
            if self._owner.is_stopping():  # a subscriber has had enough
                return
        self._ending = False
        fresh = [WorkerLife(one, self._owner) for one in plan.workers]
        for one in old:
            del self._reasons[one]
        for one in fresh:
            self.workers[one.rank] = one
            if self.deadline.hurried:
                one.deadline.hurry()
        self.ended += old
        await self._launch(fresh)

    async def _launch(self, workers: list[WorkerLife]) -> None:
        """Start them, a few at a time, adopt them in order; whatever happens, adopt all that were begun."""
        slices = TimeSlices()
        waiting = deque(workers)
        begun: deque[WorkerLife] = deque()
        problem: BaseException | None = None
        while begun or (waiting and not self._over()):
            if len(begun) <= AHEAD // 2:  # several at a time, since they share what has to be looked at before
                with self._resources.at_once():
                    while waiting and len(begun) < AHEAD and not self._over():
                        begun.append(waiting.popleft())
                        begun[-1].launch(self._launcher)
                        self._unsettled += 1
                        if slices.due():
                            break
            worker = begun.popleft()
            try:
                if worker.starting is not None and not worker.starting.done():
                    problem = await self._begun(worker) or problem
                try:
                    worker.adopt()
                finally:
                    self._owner.started(worker)  # whatever happened, if it runs it is to be read
                if slices.due():
                    await asyncio.sleep(0)
                    slices.begin()
            except LaunchFailed:
                self.exited(worker)
            except BaseException as exc:
                problem = problem or exc
                if forked_copies.is_lost(self._owner.loop):
                    raise
                self._owner.begin_stop("stopped")
            if worker.state is State.UNSTARTED:
                self.settled(worker)
            elif self._over():  # somebody stopped us while it was started
                worker.begin_stop()
        for worker in waiting:
            worker.never_start()
        if problem is not None:
            raise problem

    async def _begun(self, worker: WorkerLife) -> BaseException | None:
        """Wait until it has started, or was refused; once the group is being stopped, not longer than its bound.
        Returns the cancellation by which the group is being stopped."""
        assert worker.starting is not None
        assert self._halted is not None
        loop = self._owner.loop
        cancelled: asyncio.CancelledError | None = None
        while not worker.starting.done():
            if self._halted.done():
                self._starts_until = min(self._starts_until, loop.time() + self._owner.stop_policy.bound)
            if loop.time() >= self._starts_until:
                worker.starting = withdraw(self._launcher, worker.plan, worker.starting)
                break
            waiter: asyncio.Future[None] = loop.create_future()
            wake = partial(_wake, waiter)
            timer = None
            worker.starting.add_done_callback(wake)
            if self._halted.done():
                timer = loop.call_at(self._starts_until, wake, worker.starting)
            else:
                self._halted.add_done_callback(wake)
            try:
                await waiter
            except asyncio.CancelledError as exc:
                if forked_copies.is_lost(loop):
                    raise
                cancelled = exc
                self._owner.begin_stop("stopped")
            finally:
                worker.starting.remove_done_callback(wake)
                self._halted.remove_done_callback(wake)
                if timer is not None:
                    timer.cancel()
        return cancelled

    def _over(self) -> bool:
        return self._ending or self._owner.is_stopping()


def _wake(waiter: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)
