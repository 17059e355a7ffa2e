"""The thread that owns an executor's workers: it hands out what callers have queued, and keeps the workers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import forked
from .account import failure_of
from .child import _wire
from .errors import LaunchFailed, TaskTimeout, WorkerFailed
from .events import Event, Ready
from .ground import Ground
from .launch import ERROR_FILES, LaunchPlan, reap_abandoned
from .lifecycle import State as Life
from .proof import clear
from .remains import Process
from .slots import Slot, Slots, State, Trigger
from .spec import GroupSpec, Std
from .stop import Patience, cascade
from .streams import FileSink, Tap
from .tasks import Limits, Task, opened, opened_aside
from .thread import finished
from .why import Evidence
from .worker import Worker

if TYPE_CHECKING:
    from .pool import Pool

FALSE_STARTS = 3  # workers in a row that ended before they were ready: then the next one will too


class Owner:
    """Nothing here but `start`, `wake`, `offer`, `disown` and `pids` is called in another thread.

    Each worker holds one task at a time, so one that dies loses exactly that.

    Attributes:
        thread: where all of it happens.
        ended: done when that has nothing left to do.
    """

    def __init__(self, pool: Pool, spec: GroupSpec, run_id: str, limits: Limits) -> None:
        self.logs, self.stop_policy = spec.logs, spec.stop
        self.run_id = run_id
        self.thread = threading.Thread(target=self._run, name=f"aioelastic-{spec.name}")
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()
        self._pool = pool
        self._spec = spec
        self._limits = limits
        self._is_up = False
        self._woken = False  # it is about to look
        self._plan: LaunchPlan | None = None
        self._slots = Slots()
        self._false_starts = 0
        self._bug: BaseException | None = None
        self._patience = Patience()  # of the end
        self._background: set[asyncio.Task[None]] = set()
        self._over: asyncio.Event | None = None
        forked.register(self)

    # --- from any thread ---

    def start(self) -> None:
        """Begin. Raises `RuntimeError`: this process may have no more threads."""
        self.thread.start()

    def wake(self) -> None:
        """Have the owner look at what there is to do, once for all that has come by then."""
        if self._is_up and not self._woken:  # it looks, too, when it is up
            self._woken = True
            with contextlib.suppress(RuntimeError):  # its loop is closed: all is over
                self.loop.call_soon_threadsafe(self._look)

    def offer(self) -> None:
        """There is a task more: wake it, if a worker for it is idle, or may be hired."""
        if self._slots.idle or self._slots.alive < self._pool.most:  # else one that becomes so looks by itself
            self.wake()

    def disown(self) -> list[int]:
        """See `forked`."""
        self._is_up = False
        workers = [slot.worker for slot in self._slots.all.values() if slot.worker is not None]
        lost = forked.error(f"executor {self._spec.name!r}")
        return [fd for worker in workers for fd in worker.disown(lost)]

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        workers = [slot.worker for slot in list(self._slots.all.values())]
        return [one.pid for one in workers if one is not None and one.pid is not None and one.exit is None]

    # --- tasks ---

    def _look(self) -> None:
        """Hand out what waits, hire for the rest, and let those go that are too many."""
        self._woken = False
        if self._plan is None:
            return
        try:
            pool, slots = self._pool, self._slots
            if pool.stopping:
                self._stop_all()
            self._hand_out()
            waiting, most, ending = pool.wanted()
            for slot in list(slots.idle):
                if ending or slots.alive > most:
                    self._retire(slot)
            if not pool.is_broken:
                for _ in range(min(waiting - slots.hiring - len(slots.idle), most - slots.alive)):
                    self._start(self._hire(slots.hire()))
            if ending and not slots.all and self._over is not None:
                self._over.set()
        except BaseException as exc:
            self._crash(exc)

    def _hand_out(self) -> None:
        idle = self._slots.idle
        while idle:
            slot = next(reversed(idle))
            assert slot.worker is not None
            if slot.worker.exit is not None:
                self._retire(slot)  # what it was is told in a moment
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
        assert worker.replies is not None
        try:
            worker.replies.send(task.packet, task.fds)
        except ConnectionError:  # it has just died: another shall have it
            self._pool.put_back(task)
            slot.is_spent = True
            return False
        except BaseException as exc:
            task.fail(exc)
            if not isinstance(exc, OSError):  # this process has no descriptors left, or the kernel no memory
                raise
            return False
        slot.task = task
        if task.fds:
            task.drop()
        if self._limits.timeout is not None:
            slot.timer = self.loop.call_later(self._limits.timeout, self._expire, slot)
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
        except BaseException as exc:
            self._crash(exc)
        packet = packet[:2] + packet[10:]
        if _wire.is_slow(packet):
            mine = list(fds)
            fds.clear()
            self._start(self._settle(task, packet, mine))
        else:
            task.settle(*opened(packet, fds))

    def _goes_on(self, slot: Slot, packet: bytes) -> bool:
        """Give it the next task at once, if there is one, and it may have it: then it is as busy as before."""
        limits = self._limits
        slot.is_spent = (
            (limits.tasks is not None and slot.done >= limits.tasks)
            or (limits.memory is not None and int.from_bytes(packet[2:10], "little") > limits.memory)
            or self._slots.alive > self._pool.most
            or slot.worker.exit is not None  # type: ignore[union-attr]
        )
        task = None if slot.is_spent else self._pool.next()
        return task is not None and self._give(slot, task)

    async def _settle(self, task: Task, packet: bytes, fds: list[int]) -> None:
        value, problem = None, None
        try:
            value, problem = await opened_aside(packet, fds)
        except BaseException as exc:  # no thread can be started; or the loop shuts down
            problem = exc
        task.settle(value, problem)  # here and not in that thread: a callback may call `join`

    def _expire(self, slot: Slot) -> None:
        slot.timer = None
        try:
            self._slots.move(slot, Trigger.LATE)
            self._kill(slot)
        except BaseException as exc:
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
        assert slot.worker is not None
        assert slot.worker.replies is not None
        slot.worker.replies.no_more()
        self.wake()

    def _stop_all(self) -> None:
        """All is to end: what waits, too, though it was told to run once."""
        self._pool.fail_all(BrokenExecutor("the executor was stopped before a worker could run it"))
        for slot in list(self._slots.all.values()):
            if slot.worker is not None:
                slot.worker.begin_stop()

    # --- workers ---

    def _run(self) -> None:
        problem: BaseException | None = None
        try:
            with asyncio.Runner() as runner:
                self.loop = runner.get_loop()
                self._is_up = True
                runner.run(self._live())
        except BaseException as exc:
            problem = exc
        self._end(problem)

    async def _live(self) -> None:
        self._over = asyncio.Event()
        try:
            reap_abandoned()
            self._ground = Ground(self.loop, self._spec, self.sink_trouble)
            self.census, self.poller = self._ground.census, self._ground.poller
            self._plan = await self._ground.open(self.run_id)
        except Exception as exc:
            self._pool.break_off(exc)
            return
        try:
            self._look()
            await self._over.wait()
            if self._bug is not None:
                raise self._bug
        finally:
            for slot in list(self._slots.all.values()):  # of which there are some after a bug, and none else
                self._kill(slot)
            await self._patience.until(lambda: not self._slots.all, self.stop_policy.bound + 1, grace=False)
            while self._background:
                await asyncio.wait(self._background)
            await clear(self.census, self.run_id, self._ground.adopted, Patience(), self.stop_policy, lambda _: None)
            await self._ground.close(Patience(), self.stop_policy.bound, [])

    def _end(self, problem: BaseException | None) -> None:
        """The thread has nothing left to do. Whatever was wrong: nobody waits for it in vain."""
        held = [slot.task for slot in self._slots.all.values() if slot.task is not None]
        told = self._pool.end(problem, held)
        self.ended.set_result(None)
        if problem is not None and not told:
            raise problem  # nobody else knows

    async def _hire(self, slot: Slot) -> None:
        """Start the worker of that slot."""
        assert self._plan is not None
        first = self._plan.workers[0]
        try:
            plan = first if slot.rank == first.rank else await self._ground.another(first, slot.rank)
            overlay = {**plan.overlay, **dict.fromkeys(ERROR_FILES)}  # a task tells its error itself
            worker = Worker(replace(plan, overlay=overlay, error_file=None), self)
            slot.worker = worker
            worker.on_task = lambda packet, fds: self._reply(slot, packet, fds)
            worker.launch(self._ground.launcher())
            assert worker.starting is not None
            with contextlib.suppress(asyncio.CancelledError):  # the loop shuts down: it is adopted all the same
                await finished(worker.starting)
            worker.adopt()
        except BaseException as exc:
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

    def _gone(self, slot: Slot, problem: BaseException | None = None, found: Evidence | None = None) -> None:
        """Nothing is left of that worker."""
        was_hiring = slot.state is State.HIRING
        self._slots.remove(slot)
        worker, task = slot.worker, slot.task
        if worker is not None:
            self._ground.forget(worker.plan)
        why: BaseException | None = problem or slot.problem
        if (task is not None or was_hiring) and why is None:
            assert worker is not None
            assert self._plan is not None
            try:
                why = WorkerFailed(failure_of(worker, self._plan, found))
            except Exception as exc:
                why = exc
        if was_hiring and why is not None and not self._pool.stopping:
            self._false_starts += 1
            known = isinstance(why, WorkerFailed | LaunchFailed)  # else it is no matter of luck
            if not known or (worker is not None and worker.error) or self._false_starts >= FALSE_STARTS:
                self._pool.break_off(why)
        if task is not None and why is not None:
            slot.task = None
            task.settle(None, why)
        self._patience.notice()
        self.wake()

    def _crash(self, bug: BaseException) -> None:
        """An error of ours: all ends, and nothing hangs."""
        self._bug = self._bug or bug
        self._pool.break_off(bug)
        if self._over is not None:
            self._over.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:
            self._crash(problem)

    # --- what its workers call: see `Keeper` ---

    def emit(self, event: Event) -> None:
        slot = self._slots.all.get(event.rank) if isinstance(event, Ready) and event.rank is not None else None
        if slot is None or slot.problem is not None:  # one that is being ended for it gets no task
            return
        if slot.state is State.HIRING and slot.worker is not None and slot.worker.exit is None:
            self._false_starts = 0
            self._slots.move(slot, Trigger.READY)
            self._look()

    def taps(self, worker: Worker, std: Std) -> list[Tap]:
        return self._ground.sinks.taps(worker, std)

    def file_sink(self, worker: Worker, std: Std) -> FileSink | None:
        return None

    def tap_trouble(self, tap: object, exc: Exception) -> None:
        pass  # there is nobody to tell; the tasks go on

    def sink_trouble(self, sink: str, problem: str, lost: int) -> None:
        pass

    def exited(self, worker: Worker) -> None:
        slot = self._slots.all[worker.rank]
        if slot.state is State.HIRING:
            return  # whether another is to be hired depends on why it has ended
        if slot.state is State.EXPIRED and slot.task is not None:
            assert self._limits.timeout is not None
            task, slot.task = slot.task, None
            task.settle(None, TaskTimeout(self._limits.timeout))
        slot.stop_timer()
        self._slots.move(slot, Trigger.EXIT)
        self.wake()

    async def before_stop(self, worker: Worker) -> None:
        pass

    def settled(self, worker: Worker) -> None:
        slot = self._slots.all[worker.rank]
        if slot.state is State.EXPIRED and slot.task is not None:  # it was given up
            slot.problem = TaskTimeout(self._limits.timeout or 0)
        if worker.failed and worker.exit is not None:
            self._start(self._examine(worker, slot))
        elif worker.state is not Life.UNSTARTED:
            self._gone(slot)

    async def _examine(self, worker: Worker, slot: Slot) -> None:
        found: dict[Worker, Evidence] = {}
        with contextlib.suppress(Exception):  # then it is told without
            found = await self._ground.evidence([worker])
        self._gone(slot, found=found.get(worker))

    def leaked(self, process: Process, worker: Worker | None) -> None:
        pass

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(work)
