"""What callers of an executor queue, and are told: its side of all threads but one (`owner.py`)."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import BrokenExecutor, Future
from functools import partial
from typing import Any

from . import forked
from .errors import SpecError
from .launch import importable_main, new_run_id
from .owner import Owner
from .spec import GroupSpec
from .tasks import Body, Limits, Line, Room, Task


class Pool(forked.Owned):
    """Tasks that wait, and how many workers there may be. Everything may be called from any thread: it queues, or
    changes a number, under the lock, and wakes the owner of the workers, which alone touches them.

    Attributes:
        most: how many workers there may be.
        closed: no more tasks are taken.
        stopping: what is there is to end now.
    """

    def __init__(self, spec: GroupSpec, limits: Limits) -> None:
        self.limits = limits
        self.main = importable_main()
        self.stopping = False
        self._name = spec.name
        self._room = None if limits.pending is None else Room(limits.pending)
        self._lock = threading.Lock()  # a reentrant one takes longer, and each task comes here twice
        # guarded by the lock
        self._queue = Line()
        self.most = limits.workers
        self.closed = _exiting
        self._broken: BaseException | None = None
        self._begun = False
        self._told = False  # a caller knows why
        self._owner = Owner(self, spec, new_run_id(spec.name), limits)
        forked.register(self)

    def submit(self, body: Body) -> Future[Any]:
        """See `WorkerExecutor.submit`."""
        if self._room is None:
            return self._submit(body)
        self._check_open()
        ticket = self._room.ask(at_once=threading.current_thread() is self._owner.thread)
        if ticket is not None:
            try:
                ticket.result()
            except BaseException:
                self._room.leave(ticket)
                raise
        return self._submit(body)

    async def submit_soon(self, body: Body) -> Future[Any]:
        """The same, and it is the task that waits for room. Cancelled meanwhile, it is never submitted."""
        self._check_open()
        if self._room is not None:
            ticket = self._room.ask(at_once=False)
            if ticket is not None:
                try:
                    await asyncio.wrap_future(ticket)
                except BaseException:
                    self._room.leave(ticket)
                    raise
        return self._submit(body)

    def resize(self, workers: int) -> None:
        """More of them, or fewer: those that are too many end after the task they hold."""
        self.check_ours()
        with self._lock:
            self.most = workers
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
        problem: BaseException | None = None
        for task in dropped:
            try:
                task.future.cancel()
            except BaseException as exc:  # of a callback: the others are to be cancelled all the same
                problem = problem or exc
            task.begin()
        self._owner.wake()
        if problem is not None:
            raise problem

    def stop(self) -> None:
        """End the workers by the policy, whatever they are at. Their tasks fail."""
        self.stopping = True
        self.close(True)

    def join(self) -> None:
        """Wait until nothing is left; not in a callback of a task, for which the owner would wait for itself."""
        if self._begun and threading.current_thread() is not self._owner.thread:
            self._owner.thread.join()

    def joined(self) -> asyncio.Future[None]:
        """Done when `join` has next to nothing to wait for. No task, which the end of a loop would cancel."""
        if self._begun:
            return asyncio.wrap_future(self._owner.ended)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended.set_result(None)
        return ended

    def disown(self) -> list[int]:
        """See `forked`: there is no owner in the copy, and whoever had the lock is not there."""
        self.lost = forked.error(f"executor {self._name!r}")
        self._lock, self._begun, self.closed, self._room = threading.Lock(), False, True, None
        self._queue.clear()
        return []

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        self.check_ours()
        return self._owner.pids

    # --- what the owner asks ---

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
            self._queue.appendleft(task)

    def fail_all(self, problem: Exception) -> None:
        """What waits will never be done."""
        with self._lock:
            lost = list(self._queue)
            self._queue.clear()
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
            self.closed = True
        if problem is not None:
            self.break_off(problem)
        elif self._room is not None:
            self._room.close(self._refusal)
        for task in held:
            task.fail(self._refusal())
        self.fail_all(self._refusal())
        return self._told or bool(held)

    # --- its own ---

    def _submit(self, body: Body) -> Future[Any]:
        """With its permit taken, where there are such."""
        room, task = self._room, None
        try:
            task = Task(body, self.main is not None)
            future = task.future
            if future.done():  # it cannot be pickled
                if room is not None:
                    room.back()
                return future
            future.on_cancel = partial(self._withdraw, task)
            with self._lock:
                if self.closed or self._broken is not None:
                    self._check_open()
                if not self._begun:
                    self._owner.start()
                    self._begun = True
                if room is not None:
                    future.add_done_callback(room.back)
                self._queue.append(task)
        except BaseException:
            if task is not None:
                task.drop()
            if room is not None:
                room.back()
            raise
        self._owner.offer()
        if task.making is not None:
            task.when_made(self._made)
        return future

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

    def _made(self, task: Task) -> None:
        """What a task in the line was waiting for has come."""
        with self._lock:
            problem = self._queue.made(task)
        if problem is not None:
            task.fail(problem)
        self._owner.wake()


_exiting = False  # the interpreter ends: what begins now would never be ended


def exiting() -> None:
    """No executor that is made from now on takes tasks."""
    global _exiting
    _exiting = True
