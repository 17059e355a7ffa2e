"""What callers of an executor queue, and are told: its side of all threads but one (`executor/owner.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future
from functools import partial

from ..child.worker import context
from ..model.errors import SpecError, is_lack
from ..model.group_spec import GroupSpec
from ..model.placement import Placement
from ..planning import LaunchPlan, WorkerPlan, new_run_id
from ..system import forked_copies
from ..system.waiting import anyio_shield, check_loop, insist
from .owner import Owner
from .tasks import Body, Called, Limits, Line, Room, Task

NEAR = 8  # tasks in front that may hold descriptors while they wait; how many wait is up to the caller


class Pool(forked_copies.Owned):
    """Tasks that wait, and how many workers there may be. Everything may be called from any thread: it queues, or
    changes a number, under the lock, and wakes the owner of the workers, which alone touches them.

    Attributes:
        most: how many workers there may be.
        closed: no more tasks are taken.
        stopping: what is there is to end now.
        killing: without grace.
    """

    def __init__(self, spec: GroupSpec, limits: Limits) -> None:
        self.limits = limits
        self.needs_main = False  # a task that waits when the workers are begun does
        self.stopping = self.killing = False
        self._spec = spec
        self._forked = spec.start == "fork"
        self._room = None if limits.pending is None else Room(limits.pending)
        # reentrant: a signal's handler may submit, cancel or shut down in a thread that has it. So what is done under
        # it is right after each step: one look, or one change of the queue
        self._lock = threading.RLock()
        # guarded by the lock
        self._queue = Line()
        self._undone: set[Called] = set()  # those that a forked copy would wait for in vain
        self.most, self.places = limits.workers, spec.places
        self.closed = _exiting
        self._broken: BaseException | None = None
        self._begun = False
        self._told = False  # a caller knows why
        self._owner = Owner(self, spec, new_run_id(spec.name), limits)
        self._past: list[Owner] = []  # those that lacked something, or whose start was interrupted
        forked_copies.register(self)

    def submit(self, body: Body, timeout: float | None = None) -> Called:
        """See `WorkerExecutor.submit`. `timeout`: seconds that it may run on a worker."""
        room, future = self._room, Called()
        if room is None:
            return self._submit(body, future, timeout)
        self._check_open()
        # where a loop runs, all that is in it would wait, too; and the owner makes room
        mine = asyncio._get_running_loop() is not None or self._is_in_owner()
        try:
            ticket = room.ask(mine, future)
            if ticket is not None:
                ticket.result()
            return self._submit(body, future, timeout)
        except BaseException:
            if not future.running():
                room.leave(future)
            raise

    async def submit_soon(self, body: Body, timeout: float | None = None) -> Called:
        """The same, and it is the task that waits for room. Cancelled meanwhile, it is never submitted."""
        self._check_open()
        room, future = self._room, Called()
        if room is None:
            return self._submit(body, future, timeout)
        try:
            ticket = room.ask(False, future)
            if ticket is not None:
                await asyncio.wrap_future(ticket)
            return self._submit(body, future, timeout)
        except BaseException:
            if not future.running():
                room.leave(future)
            raise

    def abandon(self, future: Called) -> None:
        """Nobody waits any more for a task that cannot be cancelled: its worker is killed, unless it is done."""
        future.is_abandoned = True
        self._owner.abandon(future)

    async def leave(self, futures: Iterable[Called], kill: bool) -> None:
        """Nobody awaits these any more: what has not begun is cancelled, and the workers of the others are killed, if
        they are to be; that is over then."""
        running = [one for one in futures if not one.cancel() and not one.done()]
        if not running or not kill:
            return
        for one in running:
            self.abandon(one)
        with anyio_shield():
            for one in running:
                with contextlib.suppress(Exception, asyncio.CancelledError):  # whatever came of it
                    await insist(asyncio.wrap_future(one))

    def resize(self, workers: int, places: tuple[Placement | None, ...]) -> None:
        """More of them, or fewer: those that are too many end after the task they hold.

        Args:
            places: one for each rank, unless all are in the same.
        """
        self.check_ours()
        with self._lock:
            self.most, self.places = workers, places
        self._owner.wake()

    def close(self, cancel: bool) -> None:
        """No more tasks; those that wait are still done, unless they are to be cancelled."""
        # not under the lock: an executor is closed by a collection, too, perhaps in a thread that has it. Whoever asks
        # under the lock, as who submits and the owner do, has the same answer
        self.closed = True
        dropped: list[Task] = []
        if cancel:
            with self._lock:
                dropped = self._queue.clear_unbegun()
        if self._room is not None:
            self._room.close(self._refusal)
        heard: BaseException | None = None
        for task in dropped:
            try:
                task.future.cancel()
            except BaseException as exc:  # of a signal's handler: the others are in no line any more
                heard = exc
            task.begin()
        self._owner.wake()
        if heard is not None:
            raise heard

    def stop(self, kill: bool = False) -> None:
        """End the workers by the policy, or without grace, whatever they are at. Their tasks fail."""
        self.killing = self.killing or kill
        self.stopping = True
        self.close(True)

    def join(self) -> None:
        """Wait until nothing is left; not in a callback of a task, for which the owner would wait for itself."""
        with self._lock:  # whoever is about to start one has done so
            owners = [*self._past, self._owner]
        if not self._is_in_owner():
            for one in owners:
                if one.thread.is_alive():
                    one.thread.join()

    def joined(self) -> asyncio.Future[None]:
        """Done when `join` has next to nothing to wait for. No task, which the end of a loop would cancel."""
        if self._begun:
            return asyncio.wrap_future(self._owner.ended)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended.set_result(None)
        return ended

    def disown(self) -> list[int]:
        """See `forked_copies`: there is no owner in the copy, and whoever had the lock is not there."""
        self.lost = forked_copies.error(f"executor {self._spec.name!r}")
        self._lock, self._begun, self.closed, self._room = threading.RLock(), False, True, None
        fds = [fd for task in self._queue for fd in task.fds]
        self._queue.clear()
        undone, self._undone = self._undone, set()
        for future in undone:
            future.lose(self.lost)
        return fds

    def like(self, plan: LaunchPlan, rank: int) -> WorkerPlan:
        """What a worker of that rank is like (`Slot.rank`)."""
        if rank < len(plan.workers):
            return plan.workers[rank]
        return plan.workers[0] if rank >= len(self.places) else plan.workers[0].placed(self.places[rank])

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        self.check_ours()
        return self._owner.pids

    # --- what the owner asks ---

    def run(self, owner: object, work: Callable[[], None]) -> None:
        """In an owner's thread: its work, unless the start of the thread was interrupted, so that there is another."""
        with self._lock:
            mine = self._owner is owner
        if mine:
            work()

    @property
    def is_broken(self) -> bool:
        """Whether no worker can be had."""
        return self._broken is not None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits, and more may come."""
        return not (self._queue or self.closed or self._broken is not None)

    def wanted(self) -> tuple[int, int, bool]:
        """How many tasks wait, how many workers there may be, and whether nothing will come any more."""
        with self._lock:
            waiting = len(self._queue)
            return waiting, self.most, not waiting and (self.closed or self.is_broken)

    def next(self) -> Task | None:
        """The next task that is still wanted, and from now on cannot be cancelled."""
        while True:
            with self._lock:
                task = self._queue.next()
            if task is None or task.begin():
                return task

    def put_back(self, task: Task) -> None:
        """It could not be given to a worker: it is the next again."""
        with self._lock:
            broken = self._broken is not None
            if not broken:
                self._queue.appendleft(task)
        if broken:  # and what waited was told so
            task.fail(self._refusal())

    def drop_abandoned(self) -> None:
        """Those that were put back, and nobody waits for any more, wait for no worker."""
        with self._lock:
            back = itertools.takewhile(lambda task: task.begun, list(self._queue))
            dropped = [task for task in back if task.future.is_abandoned and self._queue.take_out(task)]
        for task in dropped:
            task.begin()

    def fail_all(self, problem: Exception) -> None:
        """What waits will never be done."""
        with self._lock:
            lost = self._queue.clear_all()
        for task in lost:
            task.fail(problem)
            self._told = True

    def break_off(self, why: BaseException) -> None:
        """No worker can be had."""
        with self._lock:
            self._broken = self._broken or why
        if self._room is not None:
            self._room.close(self._refusal)
        self.fail_all(why if isinstance(why, SpecError) else self._refusal())
        self._owner.wake()

    def end(self, problem: BaseException | None, held: list[Task]) -> bool:
        """The owner is gone, and with it those that had these tasks. Whether anybody was told so."""
        with self._lock:
            again = is_lack(problem) and not self.closed and self._broken is None
            if again:  # the next task may have more luck, with another owner
                self._replace_owner()
                held += self._queue.clear_all()
            self.closed = self.closed or not again
        if again and problem is not None:
            for task in held:
                task.fail(problem)
            return True
        if problem is not None:
            self.break_off(problem)
        elif self._room is not None:
            self._room.close(self._refusal)
        for task in held:
            task.fail(self._refusal())
        self.fail_all(self._refusal())
        return self._told or bool(held)

    # --- its own ---

    def _submit(self, body: Body, future: Called, timeout: float | None) -> Called:
        """With its permit taken, where there are such: whoever has it gives it back if this raises."""
        task = None
        try:
            task = Task(body, self._forked, future, timeout)
            if future.has_permit and self._room is not None:
                future.add_done_callback(self._room.back)
            if future.done():  # it cannot be pickled
                return future
            future.on_cancel = partial(self._withdraw, task)
            is_far = len(self._queue) >= NEAR
            if is_far:
                task.put_away()
            with self._lock:
                if self.closed or self._broken is not None:
                    self._check_open()
                if not self._begun:
                    if context.importing_main:
                        raise RuntimeError(context.NO_GUARD)
                    self.needs_main = task.needs_main
                    self._begin()
                Future.add_done_callback(future, self._undone.discard)  # that of `Called` is for the code of others
                self._undone.add(future)
                self._queue.append(task)
            self._owner.offer()
            if task.making is not None:
                task.when_made(partial(self._made, is_far))
            return future
        except BaseException:
            # refused, or interrupted at any line: it is not run, unless a worker is told to already
            if task is not None and future.cancel():
                task.drop()
            raise

    def _is_in_owner(self) -> bool:
        """Whether this is the thread of an owner, and so, perhaps, a callback of a task."""
        me = threading.current_thread()
        return any(one.thread is me for one in (self._owner, *self._past))

    def _begin(self) -> None:
        self._begun = True  # before it is: who interrupts us shall not do it again
        try:
            check_loop()
            self._owner.thread.start()  # raises RuntimeError: this process may have no more threads
        except BaseException:
            self._replace_owner()  # a thread whose start is interrupted may run or not, and cannot be started again
            raise

    def _replace_owner(self) -> None:
        self._past = [one for one in self._past if one.thread.is_alive()] + [self._owner]
        self._owner = Owner(self, self._spec, new_run_id(self._spec.name), self.limits)
        self._begun = False

    def _check_open(self) -> None:
        if self.lost is not None or self.closed or self._broken is not None:
            self.check_ours()
            raise self._refusal()

    def _refusal(self) -> Exception:
        why = self._broken
        if why is None:
            return RuntimeError("cannot schedule new futures after shutdown")
        broken = BrokenExecutor(f"no worker can be started: {why}")
        broken.__cause__ = why
        return broken

    def _withdraw(self, task: Task) -> None:
        """It was cancelled."""
        with self._lock:
            mine = self._queue.take_out(task)
        if mine:  # else the owner has it, or whoever closes
            task.begin()
            self._owner.wake()

    def _made(self, is_far: bool, task: Task) -> None:
        """What a task in the line was waiting for has come."""
        problem: BaseException | None = None
        try:
            task.made(is_far)  # not under the lock: it may be copied once more
        except BaseException as exc:  # it is raised below, once the line goes on
            problem = exc
        with self._lock:
            is_here = task in self._queue
            if problem is None:
                task.making = None
            elif is_here:
                self._queue.take_out(task)
        if not is_here:  # it was cancelled meanwhile
            task.drop()
        elif problem is not None:
            task.fail(problem)
        self._owner.wake()


_exiting = False  # the interpreter ends: what begins now would never be ended


def exiting() -> None:
    """No executor that is made from now on takes tasks."""
    global _exiting
    _exiting = True
