"""The workers of an executor: how they are started, end, and are told of. All on the loop of their own thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from ..child.wire import untrusted
from ..diagnosis import Evidence
from ..events import Event, Ready
from ..launch import Rights, hard_limits, withdraw
from ..model.errors import LaunchFailed, is_lack
from ..model.group_spec import GroupSpec
from ..model.leftovers import Process
from ..model.logs import Std
from ..model.results import WorkerFailed
from ..model.states import State as Life
from ..planning import LaunchPlan
from ..processes.proc_files import in_words
from ..streams import FileSink, Tap
from ..supervisor import function_parts  # noqa: F401  # now: see there
from ..supervisor.cascade import cascade
from ..supervisor.leak_check import clear
from ..supervisor.resources import Resources
from ..supervisor.result_builder import failure_of
from ..supervisor.worker_life import WorkerLife
from ..system.deadlines import Deadline
from ..system.waiting import all_over, is_short, settled
from .protocols import TaskGiver, TaskQueue
from .slots import Slot, Slots, State, Trigger

_log = logging.getLogger("aioelastic")

REST = 0.1  # seconds until another worker is started, where one could not be for lack of descriptors or memory
FALSE_STARTS = 3  # workers in a row that ended before they were ready, or had taken a task: then the next one will too


def _ended_with_parent(worker: WorkerLife | None, why: BaseException) -> bool:
    """Whether it was not itself that ended, but the zygote or the guardian that had started it, or was about to."""
    refused = isinstance(why, LaunchFailed) and why.cause.errno == errno.ESRCH
    return refused or (worker is not None and worker.parent != "")


class Workers:
    """They are `WorkerLife`s, whose owner this is (`WorkerOwner`).

    Attributes:
        slots: one for each.
        plan: what they are like; None until it is made.
        rights: what the program may do.
        rest: until another start is tried.
    """

    def __init__(self, giver: TaskGiver, pool: TaskQueue, spec: GroupSpec, run_id: str) -> None:
        self.logs, self.stop_policy = spec.logs, spec.stop
        self.run_id = run_id
        self.slots = Slots()
        self.plan: LaunchPlan | None = None
        self.rights = Rights()
        self.rest: asyncio.TimerHandle | None = None
        self._giver, self._pool, self._spec = giver, pool, spec
        self._false_starts = self._lacks = 0
        self._blamed = 0  # those before this number that ended with whoever had started them are one false start
        self._deadline = Deadline()  # of the end
        self._ending = False  # after an error of ours
        self._background: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Future[None] | None = None  # done when the executor is closed: no start hangs for ever

    # --- what the owner of the thread calls ---

    def begin(self) -> None:
        """On the loop that they will live on."""
        self.loop = asyncio.get_running_loop()
        self._closing = self.loop.create_future()
        self.resources = Resources(self.loop, self._spec, self.sink_trouble)
        self.census, self.poller = self.resources.census, self.resources.poller
        self.resources.needs_main = self._pool.needs_main

    async def open(self) -> None:
        """Make the plan of them. Raises what `Resources.open` does."""
        self.plan = await self.resources.open(self.run_id)

    def start(self, slot: Slot) -> None:
        """Start the worker of that slot."""
        self.background(self._start(slot))

    def kill(self, slot: Slot) -> None:
        """End it at once, and let go of it if it does not end within the bound."""
        worker = slot.worker
        if worker is None or worker.pid is None:
            return  # it does not run yet, and comes here when it does
        looked_after = worker.state is not Life.RUNNING  # it is being stopped already, and that is bounded
        worker.kill(leader_only=False)
        if worker.state is Life.KILLING and not looked_after:
            self.background(cascade(worker, replace(self.stop_policy, grace=0), self.census))

    def hurry(self) -> None:
        """Nothing has a grace any more."""
        self._deadline.hurry()

    def no_more(self) -> None:
        """The executor is closed."""
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    def end_all(self) -> None:
        """After an error of ours: all that come are ended."""
        self._ending = True
        self.no_more()

    async def close(self) -> None:
        """End what there still is (after a bug, and else nothing), and what tasks have left running."""
        deadline, bound = self._deadline, self.stop_policy.bound
        for slot in list(self.slots.all.values()):
            self.kill(slot)
        await deadline.until(lambda: not self.slots.all, bound + 1, grace=False)
        await all_over(self._background, bound)  # else only a GPU's driver has no bound of its own
        left = await clear(self.census, self.run_id, self.resources.adopted, deadline, self.stop_policy, self.leaked)
        for one in left:
            self._tell(logging.INFO if one.kind == "unproven" else logging.WARNING, one.words)
        await self.resources.close(deadline, bound, [])

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """A part of the executor's own work; a bug in it ends the executor, and never in a hang."""
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    # --- its own ---

    async def _start(self, slot: Slot) -> None:
        assert self.plan is not None
        try:
            like, most = self._pool.like(self.plan, slot.rank), max(self._pool.most, slot.rank + 1)
            plan = await self.resources.another(like, slot.rank, slot.attempt, most)
            self.rights.give_up()
            slot.rights, slot.limits = self.rights.now(), hard_limits()
            worker = slot.worker = WorkerLife(plan.without_error_file(), self)  # a task tells its error itself
            worker.on_task = partial(self._giver.reply, slot)
            worker.launch(self.resources.launcher())
            await self._begun(worker)
            worker.adopt()
        except BaseException as exc:  # of the launcher, the cancellation too: its task is told
            if slot.worker is None or slot.worker.pid is None:
                self._gone(slot, exc)
                return
            slot.problem = exc  # it runs, and is not as it should be
            self.kill(slot)
        worker.begin_reading()
        if self._ending:
            self.kill(slot)
        elif self._pool.stopping:
            worker.begin_stop()

    async def _begun(self, worker: WorkerLife) -> None:
        """Wait until it has started, or was refused; once the executor is closed, for the bound of a stop. No
        cancellation ends it: what comes is adopted all the same."""
        starting = worker.starting
        assert starting is not None
        assert self._closing is not None
        while not (starting.done() or self._closing.done()):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({starting, self._closing}, return_when=asyncio.FIRST_COMPLETED)
        if not await settled(starting, self.stop_policy.bound):
            worker.starting = withdraw(self.resources.launcher(), worker.plan, starting)

    def _gone(self, slot: Slot, problem: BaseException | None = None, found: Evidence | None = None) -> None:
        """Nothing is left of that worker."""
        was_starting = slot.state is State.STARTING
        self.slots.remove(slot)
        worker, task = slot.worker, slot.task
        if worker is not None:
            self.resources.forget(worker.plan)
            if worker.unkillable is None:
                self.census.over(worker.plan.mark)
        why: BaseException | None = problem or slot.problem
        if (task is not None or was_starting) and why is None:
            assert worker is not None
            assert self.plan is not None
            try:
                failure = failure_of(worker, self.plan, found)
                if task is not None:
                    failure = replace(failure, task=task.told(worker.exit.ended_ns if worker.exit else None))
                why = WorkerFailed(failure)
            except Exception as exc:  # its task is told in any case
                why = exc
        if was_starting and why is not None and not self._pool.stopping:
            self._not_started(slot, why)
        if task is not None and why is not None:
            slot.task = None
            task.settle(None, why)
        self._deadline.notice()
        self._giver.wake()

    def _not_started(self, slot: Slot, why: BaseException) -> None:
        """One that was to be a worker is none: whether another is to be tried, and when."""
        worker = slot.worker
        crashed = isinstance(why, WorkerFailed)  # perhaps as a copy of a program that lacks something
        if isinstance(why, Exception) and (is_short() if crashed else is_lack(why)):
            self._lacks += 1
            if self.slots.alive == 0 and self._lacks >= FALSE_STARTS:  # nobody else will do it
                self._pool.fail_all(why.cause if isinstance(why, LaunchFailed) else why)
            self.rest = self.rest or self.loop.call_later(REST, self._rested)
            return
        if _ended_with_parent(worker, why):
            if slot.number < self._blamed:
                return
            self._blamed = self.slots.count
        self._false_starts += 1
        known = crashed or isinstance(why, LaunchFailed)  # else it is no matter of luck
        if not known or (worker is not None and worker.error) or self._false_starts >= FALSE_STARTS:
            self._pool.break_off(why)

    def _rested(self) -> None:
        self.rest = None
        self._giver.look()

    def _tell(self, level: int, words: str) -> None:
        """There is nobody who waits for a result of the whole: it is logged. A handler of the program's may raise."""
        untrusted.attempt(_log.log, level, "executor %r: %s", self._spec.name, words)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            self._giver.crash(problem)

    # --- what its workers call: see `WorkerOwner` ---

    def emit(self, event: Event) -> None:
        slot = self.slots.all.get((event.rank, event.attempt)) if isinstance(event, Ready) else None  # type: ignore[arg-type]
        if slot is None or slot.problem is not None:  # one that is being ended for it gets no task
            return
        if slot.state is State.STARTING and slot.worker is not None and slot.worker.exit is None:
            self._false_starts = self._lacks = 0
            self.slots.move(slot, Trigger.READY)
            self._giver.look()

    def taps(self, worker: WorkerLife, std: Std) -> list[Tap]:
        return self.resources.sinks.taps(worker, std)

    def file_sink(self, worker: WorkerLife, std: Std) -> FileSink | None:
        return None

    # trouble with what is printed is not logged: that may go to the very stream that nobody reads, and wait for it

    def tap_trouble(self, tap: object, exc: BaseException) -> None:
        pass

    def sink_trouble(self, sink: str, problem: str, lost: int) -> None:
        pass

    def leaked(self, process: Process, worker: WorkerLife | None = None) -> None:
        self._tell(logging.WARNING, f"{in_words(process)} was left running by a task, and is ended")

    async def before_stop(self, worker: WorkerLife) -> None:
        pass  # its workers' stacks are nobody's

    def input_failed(self, problem: BaseException) -> None:
        pass  # its workers read nothing

    def exited(self, worker: WorkerLife) -> None:
        slot = self.slots.all[worker.rank, worker.attempt]
        if slot.state is State.STARTING:
            return  # whether another is to be started depends on why it has ended
        if slot.abortion is not None and slot.task is not None:
            aborted, slot.task = slot.task, None
            aborted.settle(None, slot.abortion)
        slot.stop_timer()
        task = slot.untaken()
        if task is not None and task.untaken < FALSE_STARTS:
            slot.task = None
            self._pool.put_back(task)
        self.slots.move(slot, Trigger.EXIT)
        self._giver.wake()

    def settled(self, worker: WorkerLife) -> None:
        slot = self.slots.all[worker.rank, worker.attempt]
        if slot.task is not None and slot.abortion is not None:  # it was given up
            slot.problem = slot.abortion
        if worker.failed and worker.exit is not None:
            self.background(self._examine(worker, slot))
        else:
            self._gone(slot)

    async def _examine(self, worker: WorkerLife, slot: Slot) -> None:
        found: dict[WorkerLife, Evidence] = {}
        with contextlib.suppress(Exception):  # then it is told without
            found = await self.resources.evidence([worker])
        self._gone(slot, found=found.get(worker))
