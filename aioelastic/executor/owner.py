"""The thread that owns an executor's workers: it hands out what callers have queued, and keeps the workers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import BrokenExecutor, CancelledError, Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..child.wire import messages, untrusted
from ..diagnosis import Evidence
from ..events import Event, Ready
from ..launch import Rights, exceed, hard_limits, reap_abandoned, withdraw
from ..model.errors import LaunchFailed, TaskTimeout, is_lack
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
from ..system import forked_copies
from ..system.deadlines import Deadline
from ..system.waiting import all_over, is_short, settled
from .slots import Slot, Slots, State, Trigger
from .tasks import Called, Limits, Task, here, opened, opened_aside

if TYPE_CHECKING:
    from ..planning import WorkerPlan

_log = logging.getLogger("aioelastic")

REST = 0.1  # seconds until another worker is started, where one could not be for lack of descriptors or memory
FALSE_STARTS = 3  # workers in a row that ended before they were ready, or had taken a task: then the next one will too


class TaskQueue(Protocol):
    """Whoever has the tasks: what the owner of the workers asks it, and tells it."""

    most: int
    closed: bool
    stopping: bool
    killing: bool
    needs_main: bool

    @property
    def is_broken(self) -> bool: ...

    @property
    def is_quiet(self) -> bool: ...

    def run(self, owner: Owner, work: Callable[[], None]) -> None: ...

    def wanted(self) -> tuple[int, int, bool]: ...

    def next(self) -> Task | None: ...

    def put_back(self, task: Task) -> None: ...

    def drop_abandoned(self) -> None: ...

    def fail_all(self, problem: Exception) -> None: ...

    def break_off(self, why: BaseException) -> None: ...

    def end(self, problem: BaseException | None, held: list[Task]) -> bool: ...

    def like(self, plan: LaunchPlan, rank: int) -> WorkerPlan: ...


def _ended_with_parent(worker: WorkerLife | None, why: BaseException) -> bool:
    """Whether it was not itself that ended, but the zygote or the guardian that had started it, or was about to."""
    refused = isinstance(why, LaunchFailed) and why.cause.errno == errno.ESRCH
    return refused or (worker is not None and worker.parent != "")


class Owner:
    """Called in other threads: `thread`, `wake`, `offer`, `abandon`, `disown`, `workers` and `pids`; nothing else.

    Each worker holds one task at a time, so one that dies loses exactly that.

    Attributes:
        thread: where all of it happens.
        ended: done when that has nothing left to do.
    """

    def __init__(self, pool: TaskQueue, spec: GroupSpec, run_id: str, limits: Limits) -> None:
        self.logs, self.stop_policy = spec.logs, spec.stop
        self.run_id = run_id
        self.thread = threading.Thread(target=pool.run, args=(self, self._run), name=f"aioelastic-{spec.name}")
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()
        self._pool = pool
        self._spec, self._limits = spec, limits
        self._is_up = self._woken = False  # woken: it is about to look
        self._plan: LaunchPlan | None = None
        self._slots = Slots()
        self._rights = Rights()
        self._false_starts = self._lacks = 0
        self._blamed = 0  # those before this number that ended with whoever had started them are one false start
        self._rest: asyncio.TimerHandle | None = None  # until another start is tried
        self._bug: BaseException | None = None
        self._deadline = Deadline()  # of the end
        self._background: set[asyncio.Task[None]] = set()
        self._over: asyncio.Event | None = None
        self._opening: asyncio.Task[Any] | None = None  # while the plan is made
        self._closing: asyncio.Future[None] | None = None  # done when the executor is closed: no start hangs for ever
        forked_copies.register(self)

    # --- from any thread ---

    def wake(self) -> None:
        """Have the owner look at what there is to do, once for all that has come by then."""
        if self._is_up and not self._woken:  # it looks, too, when it is up
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._look)
            except BaseException as exc:
                self._woken = False  # a signal's handler that interrupts us here does not make us deaf
                if not (isinstance(exc, RuntimeError) and self.loop.is_closed()):  # then all is over
                    raise

    def offer(self) -> None:
        """There is a task more: wake it, if a worker for it is idle, or may be started."""
        if self._slots.idle or self._slots.alive < self._pool.most:  # else one that becomes so looks by itself
            self.wake()

    def abandon(self, future: Called) -> None:
        """Nobody waits for that task any more: a worker that has it is killed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            if self._is_up:  # else there is none that has begun
                self.loop.call_soon_threadsafe(self._abandon, future)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        self._is_up, lost = False, forked_copies.error(f"executor {self._spec.name!r}")
        return [fd for worker in self.workers for fd in worker.disown(lost)]

    @property
    def workers(self) -> list[WorkerLife]:
        """Those that there are at the moment."""
        return [slot.worker for slot in list(self._slots.all.values()) if slot.worker is not None]

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [one.pid for one in self.workers if one.pid is not None and one.exit is None]

    # --- tasks ---

    def _look(self) -> None:
        """Hand out what waits, start workers for the rest, and let those go that are too many."""
        self._woken = False
        pool, slots = self._pool, self._slots
        if pool.closed:
            self._close()
        if self._plan is None:
            if self._opening is not None and (pool.stopping or pool.wanted()[2]):
                self._opening.cancel()  # a file system, or what is preloaded, may hang
            return
        try:
            if pool.stopping:
                self._stop_all()
            self._hand_out()
            waiting, most, ending = pool.wanted()
            for slot in list(slots.idle):
                if ending or slots.alive > most:
                    self._retire(slot)
            wanted = min(waiting - slots.starting - len(slots.idle), most - slots.alive)
            if wanted > 0 and not pool.is_broken and self._rest is None:
                running = sum(one.state is not State.DEAD for one in slots.all.values())
                for _ in range(min(wanted, 2 * most - running)):  # as many again may be on their way out
                    self._start(self._start_worker(slots.add()))
            if ending and not slots.all and self._over is not None:
                self._over.set()
        except BaseException as exc:  # all that wait are told
            self._crash(exc)

    def _hand_out(self) -> None:
        idle = self._slots.idle
        if not idle:
            return
        rights, limits = self._rights.now(), hard_limits()
        while idle:
            slot = next(reversed(idle))
            has_ended = slot.worker is not None and slot.worker.exit is not None  # what it was is told in a moment
            if has_ended or slot.rights != rights or exceed(slot.limits, limits):
                self._retire(slot)
                continue
            task = self._pool.next()
            if task is None:
                return
            if self._give(slot, task):
                self._slots.move(slot, Trigger.GIVE)
            elif slot.is_spent:
                self._retire(slot)

    def _give(self, slot: Slot, task: Task) -> bool:
        """Send it to a worker that has none. False: that gets no more, or this one cannot be sent."""
        worker = slot.worker
        assert worker is not None
        assert worker.channel is not None
        try:
            task.take_out()
            worker.channel.send(task.packet, task.fds)
        except ConnectionError:  # it has just died: another shall have it
            task.untaken += 1
            slot.is_spent = True
            if task.untaken < FALSE_STARTS:
                self._pool.put_back(task)
                return False
            self._kill(slot)  # whose end tells why
        except BaseException as exc:
            task.fail(exc)
            if not isinstance(exc, OSError | MemoryError):  # no descriptors left, or no memory
                raise
            return False
        slot.task = task
        task.given_ns = time.monotonic_ns()
        if task.fds:
            task.with_fds = True
            task.drop()
        if task.timeout is not None:
            slot.timer = self.loop.call_later(task.timeout, self._expire, slot)
        return True

    def _reply(self, slot: Slot, packet: bytes, fds: list[int]) -> None:
        """First the next task for that worker, then what came of this one."""
        task, slot.task = slot.task, None
        if task is None:
            return  # it has none
        slot.done += 1
        if slot.timer is not None:
            slot.stop_timer()
        try:
            if slot.state is State.BUSY and not self._goes_on(slot, packet):  # else it gets no more, whatever it says
                self._slots.move(slot, Trigger.REPLY)
                if slot.is_spent:
                    self._retire(slot)
                elif not self._pool.is_quiet:  # asked after it is idle: what comes from now on wakes us
                    self.wake()
        except BaseException as exc:  # as above
            self._crash(exc)
        packet = packet[:2] + packet[10:]
        if messages.is_slow(packet):
            mine = list(fds)
            fds.clear()
            self._start(self._settle(task, packet, mine))
        else:
            task.settle(*opened(packet, fds, task))

    def _goes_on(self, slot: Slot, packet: bytes) -> bool:
        """Give it the next task at once, if there is one, and it may have it: then it is as busy as before."""
        limits = self._limits
        slot.is_spent = (
            (limits.tasks is not None and slot.done >= limits.tasks)
            or (limits.memory is not None and int.from_bytes(packet[2:10], "little") > limits.memory)
            or self._slots.alive > self._pool.most
            or slot.worker.exit is not None  # type: ignore[union-attr]
            or slot.rights != self._rights.now()
        )
        task = None if slot.is_spent else self._pool.next()
        return task is not None and self._give(slot, task)

    async def _settle(self, task: Task, packet: bytes, fds: list[int]) -> None:
        task.settle(*await opened_aside(packet, fds, task))  # here and not in that thread: a callback may call `join`

    def _expire(self, slot: Slot) -> None:
        slot.timer = None
        task = slot.task
        assert task is not None
        self._abort(slot, TaskTimeout(task.timeout or 0, task.text))

    def _abandon(self, future: Called) -> None:
        for slot in self._slots.all.values():
            if slot.task is not None and slot.task.future is future and slot.state is State.BUSY:
                slot.stop_timer()
                self._abort(slot, CancelledError())
                return
        self._pool.drop_abandoned()

    def _abort(self, slot: Slot, why: BaseException) -> None:
        """Its worker is killed for the sake of its task, which is told so when that is dead."""
        try:
            slot.abortion = why
            self._slots.move(slot, Trigger.ABORT)
            self._kill(slot)
        except BaseException as exc:  # as above
            self._crash(exc)

    def _kill(self, slot: Slot) -> None:
        """End it at once, and let go of it if it does not end within the bound."""
        worker = slot.worker
        if worker is None or worker.pid is None:
            return  # it does not run yet, and comes here when it does
        looked_after = worker.state is not Life.RUNNING  # it is being stopped already, and that is bounded
        worker.kill(leader_only=False)
        if worker.state is Life.KILLING and not looked_after:
            self._start(cascade(worker, replace(self.stop_policy, grace=0), self.census))

    def _retire(self, slot: Slot) -> None:
        """An idle one ends by itself now; another takes its place when there is work."""
        self._slots.move(slot, Trigger.RETIRE)
        worker, policy = slot.worker, self.stop_policy
        assert worker is not None
        assert worker.channel is not None
        # a task may have left a thread that never ends
        slot.timer = self.loop.call_later(policy.grace + policy.bound, worker.begin_stop)
        worker.channel.no_more()
        self.wake()

    def _stop_all(self) -> None:
        """All is to end: what waits, too, though it was told to run once."""
        self._pool.fail_all(BrokenExecutor("the executor was stopped before a worker could run it"))
        for slot in list(self._slots.all.values()):
            if self._pool.killing:
                self._kill(slot)
            elif slot.worker is not None:
                slot.worker.begin_stop()

    def _close(self) -> None:
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    # --- workers ---

    def _run(self) -> None:
        problem: BaseException | None = None
        here.owns = True
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # a policy may be the main thread's
                self.loop = runner.get_loop()
                self._is_up = True
                runner.run(self._live())
        except BaseException as exc:  # it is told by `_end`
            problem = exc
        self._end(problem)

    async def _live(self) -> None:
        self._over, self._closing = asyncio.Event(), self.loop.create_future()
        try:
            reap_abandoned()
            self._resources = Resources(self.loop, self._spec, self.sink_trouble)
            self.census, self.poller = self._resources.census, self._resources.poller
            self._resources.needs_main = self._pool.needs_main
            self._opening = asyncio.current_task()
            self._look()  # what came before we were up has woken nobody
            self._plan = await self._resources.open(self.run_id)
        except asyncio.CancelledError:
            return  # nobody wants it any more
        except Exception as exc:
            if is_lack(exc):
                raise  # it may pass
            self._pool.break_off(exc)
            return
        finally:
            self._opening = None
        try:
            self._look()
            await self._over.wait()
            if self._bug is not None:
                raise self._bug
        finally:
            for slot in list(self._slots.all.values()):  # of which there are some after a bug, and none else
                self._kill(slot)
            await self._deadline.until(lambda: not self._slots.all, self.stop_policy.bound + 1, grace=False)
            await all_over(self._background, self.stop_policy.bound)  # else only a GPU's driver has no bound of its own
            adopted = self._resources.adopted
            for one in await clear(self.census, self.run_id, adopted, Deadline(), self.stop_policy, self.leaked):
                self._tell(logging.INFO if one.kind == "unproven" else logging.WARNING, one.words)
            await self._resources.close(Deadline(), self.stop_policy.bound, [])

    def _end(self, problem: BaseException | None) -> None:
        """The thread has nothing left to do. Whatever was wrong: nobody waits for it in vain."""
        held = [slot.task for slot in self._slots.all.values() if slot.task is not None]
        told = self._pool.end(problem, held)
        self.ended.set_result(None)
        if problem is not None and not told:
            raise problem  # nobody else knows

    async def _start_worker(self, slot: Slot) -> None:
        """Start the worker of that slot."""
        assert self._plan is not None
        try:
            like, most = self._pool.like(self._plan, slot.rank), max(self._pool.most, slot.rank + 1)
            plan = await self._resources.another(like, slot.rank, slot.attempt, most)
            self._rights.give_up()
            slot.rights, slot.limits = self._rights.now(), hard_limits()
            worker = slot.worker = WorkerLife(plan.without_error_file(), self)  # a task tells its error itself
            worker.on_task = partial(self._reply, slot)
            worker.launch(self._resources.launcher())
            await self._begun(worker)
            worker.adopt()
        except BaseException as exc:  # of the launcher, the cancellation too: its task is told
            if slot.worker is None or slot.worker.pid is None:
                self._gone(slot, exc)
                return
            slot.problem = exc  # it runs, and is not as it should be
            self._kill(slot)
        worker.begin_reading()
        if self._bug is not None:
            self._kill(slot)
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
            worker.starting = withdraw(self._resources.launcher(), worker.plan, starting)

    def _gone(self, slot: Slot, problem: BaseException | None = None, found: Evidence | None = None) -> None:
        """Nothing is left of that worker."""
        was_starting = slot.state is State.STARTING
        self._slots.remove(slot)
        worker, task = slot.worker, slot.task
        if worker is not None:
            self._resources.forget(worker.plan)
            if worker.unkillable is None:
                self.census.over(worker.plan.mark)
        why: BaseException | None = problem or slot.problem
        if (task is not None or was_starting) and why is None:
            assert worker is not None
            assert self._plan is not None
            try:
                failure = failure_of(worker, self._plan, found)
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
        self.wake()

    def _not_started(self, slot: Slot, why: BaseException) -> None:
        """One that was to be a worker is none: whether another is to be tried, and when."""
        worker = slot.worker
        crashed = isinstance(why, WorkerFailed)  # perhaps as a copy of a program that lacks something
        if isinstance(why, Exception) and (is_short() if crashed else is_lack(why)):
            self._lacks += 1
            if self._slots.alive == 0 and self._lacks >= FALSE_STARTS:  # nobody else will do it
                self._pool.fail_all(why.cause if isinstance(why, LaunchFailed) else why)
            self._rest = self._rest or self.loop.call_later(REST, self._rested)
            return
        if _ended_with_parent(worker, why):
            if slot.number < self._blamed:
                return
            self._blamed = self._slots.count
        self._false_starts += 1
        known = crashed or isinstance(why, LaunchFailed)  # else it is no matter of luck
        if not known or (worker is not None and worker.error) or self._false_starts >= FALSE_STARTS:
            self._pool.break_off(why)

    def _rested(self) -> None:
        self._rest = None
        self._look()

    def _crash(self, bug: BaseException) -> None:
        """An error of ours: all ends, and nothing hangs."""
        self._bug = self._bug or bug
        self._pool.break_off(bug)
        self._close()
        if self._over is not None:
            self._over.set()

    def _tell(self, level: int, words: str) -> None:
        """There is nobody who waits for a result of the whole: it is logged. A handler of the program's may raise."""
        untrusted.attempt(_log.log, level, "executor %r: %s", self._spec.name, words)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            self._crash(problem)

    # --- what its workers call: see `WorkerOwner` ---

    def emit(self, event: Event) -> None:
        slot = self._slots.all.get((event.rank, event.attempt)) if isinstance(event, Ready) else None  # type: ignore[arg-type]
        if slot is None or slot.problem is not None:  # one that is being ended for it gets no task
            return
        if slot.state is State.STARTING and slot.worker is not None and slot.worker.exit is None:
            self._false_starts = self._lacks = 0
            self._slots.move(slot, Trigger.READY)
            self._look()

    def taps(self, worker: WorkerLife, std: Std) -> list[Tap]:
        return self._resources.sinks.taps(worker, std)

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
        slot = self._slots.all[worker.rank, worker.attempt]
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
        self._slots.move(slot, Trigger.EXIT)
        self.wake()

    def settled(self, worker: WorkerLife) -> None:
        slot = self._slots.all[worker.rank, worker.attempt]
        if slot.task is not None and slot.abortion is not None:  # it was given up
            slot.problem = slot.abortion
        if worker.failed and worker.exit is not None:
            self._start(self._examine(worker, slot))
        else:
            self._gone(slot)

    async def _examine(self, worker: WorkerLife, slot: Slot) -> None:
        found: dict[WorkerLife, Evidence] = {}
        with contextlib.suppress(Exception):  # then it is told without
            found = await self._resources.evidence([worker])
        self._gone(slot, found=found.get(worker))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(work)
