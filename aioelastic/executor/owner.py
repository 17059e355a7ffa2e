"""The thread of an executor: it hands out what callers have queued, to as many workers as that needs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import BrokenExecutor, CancelledError, Future

from ..child.wire import messages
from ..launch import exceed, hard_limits, reap_abandoned
from ..model.errors import TaskTimeout, is_lack
from ..model.group_spec import GroupSpec
from ..supervisor.worker_life import WorkerLife
from ..system import forked_copies
from .protocols import TaskQueue
from .slots import Slot, State, Trigger
from .tasks import Called, Limits, Task, here, opened, opened_aside
from .workers import FALSE_STARTS, Workers


class Owner:
    """Called in other threads: `thread`, `wake`, `offer`, `abandon`, `disown`, `workers` and `pids`; nothing else.

    Each worker holds one task at a time, so one that dies loses exactly that.

    Attributes:
        thread: where all of it happens.
        ended: done when that has nothing left to do.
    """

    def __init__(self, pool: TaskQueue, spec: GroupSpec, run_id: str, limits: Limits) -> None:
        self.thread = threading.Thread(target=pool.run, args=(self, self._run), name=f"aioelastic-{spec.name}")
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()
        self._pool = pool
        self._name, self._limits = spec.name, limits
        self._workers = Workers(self, pool, spec, run_id)
        self._slots = self._workers.slots
        self._is_up = self._woken = False  # woken: it is about to look
        self._bug: BaseException | None = None
        self._over: asyncio.Event | None = None
        self._opening: asyncio.Task[None] | None = None  # while the plan is made
        forked_copies.register(self)

    # --- from any thread ---

    def wake(self) -> None:
        """Have the owner look at what there is to do, once for all that has come by then."""
        if self._is_up and not self._woken:  # it looks, too, when it is up
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self.look)
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
        self._is_up, lost = False, forked_copies.error(f"executor {self._name!r}")
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

    def look(self) -> None:
        """Hand out what waits, start workers for the rest, and let those go that are too many."""
        self._woken = False
        pool, slots = self._pool, self._slots
        if pool.closed:
            self._workers.no_more()
        if self._workers.plan is None:
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
            if wanted > 0 and not pool.is_broken and self._workers.rest is None:
                running = sum(one.state is not State.DEAD for one in slots.all.values())
                for _ in range(min(wanted, 2 * most - running)):  # as many again may be on their way out
                    self._workers.start(slots.add())
            if ending and not slots.all and self._over is not None:
                self._over.set()
        except BaseException as exc:  # all that wait are told
            self.crash(exc)

    def _hand_out(self) -> None:
        idle = self._slots.idle
        if not idle:
            return
        rights, limits = self._workers.rights.now(), hard_limits()
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
            self._workers.kill(slot)  # whose end tells why
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

    def reply(self, slot: Slot, packet: bytes, fds: list[int]) -> None:
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
            self.crash(exc)
        packet = packet[:2] + packet[10:]
        if messages.is_slow(packet):
            mine = list(fds)
            fds.clear()
            self._workers.background(self._settle(task, packet, mine))
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
            or slot.rights != self._workers.rights.now()
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
            self._workers.kill(slot)
        except BaseException as exc:  # as above
            self.crash(exc)

    def _retire(self, slot: Slot) -> None:
        """An idle one ends by itself now; another takes its place when there is work."""
        self._slots.move(slot, Trigger.RETIRE)
        worker, policy = slot.worker, self._workers.stop_policy
        assert worker is not None
        assert worker.channel is not None
        # a task may have left a thread that never ends
        slot.timer = self.loop.call_later(policy.grace + policy.bound, worker.begin_stop)
        worker.channel.no_more()
        self.wake()

    def _stop_all(self) -> None:
        """All is to end: what waits, too, though it was told to run once."""
        self._pool.fail_all(BrokenExecutor("the executor was stopped before a worker could run it"))
        if self._pool.killing:
            self._workers.hurry()
        for slot in list(self._slots.all.values()):
            if self._pool.killing:
                self._workers.kill(slot)
            elif slot.worker is not None:
                slot.worker.begin_stop()

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
        self._over = asyncio.Event()
        try:
            reap_abandoned()
            self._workers.begin()
            self._opening = asyncio.current_task()
            self.look()  # what came before we were up has woken nobody
            await self._workers.open()
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
            self.look()
            await self._over.wait()
            if self._bug is not None:
                raise self._bug
        finally:
            await self._workers.close()

    def _end(self, problem: BaseException | None) -> None:
        """The thread has nothing left to do. Whatever was wrong: nobody waits for it in vain."""
        held = [slot.task for slot in self._slots.all.values() if slot.task is not None]
        told = self._pool.end(problem, held)
        self.ended.set_result(None)
        if problem is not None and not told:
            raise problem  # nobody else knows

    def crash(self, bug: BaseException) -> None:
        """An error of ours: all ends, and nothing hangs."""
        self._bug = self._bug or bug
        self._workers.end_all()
        self._pool.break_off(bug)
        if self._over is not None:
            self._over.set()
