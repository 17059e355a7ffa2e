"""Workers that take one task after another, kept alive by an event loop in a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from typing import Any

from . import forked
from .account import failure_of
from .errors import LaunchFailed, SpecError, TaskTimeout, WorkerFailed
from .events import Event, Ready
from .ground import Ground
from .launch import ERROR_FILES, LaunchPlan, importable_main, new_run_id, reap_abandoned
from .lifecycle import State
from .proof import clear
from .remains import Process
from .spec import GroupSpec, Std
from .stop import Patience
from .streams import FileSink, Tap
from .tasks import Body, Limits, Line, Slot, Task, settle
from .thread import finished
from .why import Evidence
from .worker import Worker

FALSE_STARTS = 3  # workers in a row that ended before their first task: then the next one will too


class Pool(forked.Owned):
    """The keeper of an executor's workers. `submit`, `resize` and `close` may be called from any thread.

    A task goes straight from the caller's thread into the socket of an idle worker, if there is one; the pool's own
    thread hands out what waits. Each worker holds one task at a time, so one that dies loses exactly that.
    """

    def __init__(self, spec: GroupSpec, limits: Limits) -> None:
        self.logs, self.stop_policy = spec.logs, spec.stop
        self.run_id = new_run_id(spec.name)
        self.limits = limits
        self._spec = spec
        self.main = importable_main()
        self._lock = threading.Lock()
        # guarded by the lock
        self._queue = Line()
        self._idle: list[Slot] = []
        self._most = limits.workers
        self._alive = 0  # workers that are, or are being started, and are not retired
        self._closed = False
        self._broken: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._room = None if limits.pending is None else threading.BoundedSemaphore(limits.pending)
        self._up = threading.Event()
        # the pool thread's own
        self._slots: dict[Worker, Slot] = {}
        self._count = 0
        self._starting = 0  # hired, and not ready yet
        self._false_starts = 0
        self._background: set[asyncio.Task[None]] = set()
        self._over: asyncio.Event | None = None
        forked.register(self)

    # --- from any thread ---

    def submit(self, body: Body) -> Future[Any]:
        """See `WorkerExecutor.submit`."""
        self._check_open()
        task = Task(body, self.main is not None)
        if task.future.done():
            return task.future
        if self._room is not None:
            self._room.acquire()
            task.future.add_done_callback(self._make_room)
        slot = None
        with self._lock:
            try:
                self._check_open()
            except BaseException:
                task.drop()
                raise
            if self._idle and self.limits.timeout is None and not self._queue and task.making is None:
                slot = self._idle.pop()
            else:
                self._queue.append(task)
            if self._thread is None:
                self._begin()
            wake = slot is None and (bool(self._idle) or self._alive < self._most)
        if slot is not None:
            self._give(slot, task)
        elif wake:
            self._call(self._feed)
        task.when_made(self._made)
        return task.future

    def resize(self, workers: int) -> None:
        """More of them, or fewer: those that are too many end after the task they hold."""
        self.check_ours()
        with self._lock:
            self._most = workers
            begun = self._thread is not None
        if begun:
            self._call(self._fit)

    def close(self, cancel: bool) -> None:
        """No more tasks; those that wait are still done, unless they are to be cancelled."""
        with self._lock:
            self._closed = True
            dropped = list(self._queue) if cancel else []
            if cancel:
                self._queue.clear()
            begun = self._thread is not None
        for task in dropped:
            task.future.cancel()
            task.begin()
        if begun:
            self._call(self._fit)

    def stop(self) -> None:
        """End the workers by the policy, whatever they are at. Their tasks fail."""

        def end() -> None:
            for worker in list(self._slots):
                worker.begin_stop()

        self.close(True)
        if self._thread is not None:
            self._call(end)

    def join(self) -> None:
        """Wait until nothing is left."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def disown(self) -> list[int]:
        """See `forked`: there is no thread in the copy, and whoever had the lock is not there."""
        self.lost = forked.error(f"executor {self._spec.name!r}")
        self._lock, self._thread, self._closed = threading.Lock(), None, True
        self._queue.clear()
        self._idle.clear()
        return [fd for worker in self._slots for fd in worker.disown(self.lost)]

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        self.check_ours()
        return [one.pid for one in list(self._slots) if one.pid is not None and one.exit is None]

    def _check_open(self) -> None:
        self.check_ours()
        if self._broken is not None:
            raise BrokenExecutor(f"no worker can be started: {self._broken}") from self._broken
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _make_room(self, _: Future[Any]) -> None:
        assert self._room is not None
        self._room.release()

    def _made(self, task: Task) -> None:
        """What a task in the line was waiting for has come, in whatever thread."""
        with self._lock:
            problem = self._queue.made(task)
        if problem is not None and task.begin():
            task.future.set_exception(problem)
        self._call(self._feed)
        self._call(self._fit)

    def _give(self, slot: Slot, task: Task) -> None:
        """Send it. The slot is ours alone: it is neither idle nor busy."""
        while not task.begin():
            with self._lock:
                following = self._queue.next()
                if following is None:
                    self._idle.append(slot)
            if following is None:
                self._call(self._fit)  # it may have been the last
                return
            task = following
        slot.task = task
        replies = slot.worker.replies
        try:
            assert replies is not None
            replies.send(task.packet, task.fds)
            task.drop()
        except OSError:  # it has just died: somebody else shall have it
            slot.task = None
            slot.retired = True
            with self._lock:
                self._queue.appendleft(task)
            self._call(self._feed)

    def _call(self, callback: Callable[[], None]) -> None:
        self._up.wait()
        with contextlib.suppress(RuntimeError):  # its loop is closed: all is over
            self.loop.call_soon_threadsafe(callback)

    # --- the pool's thread ---

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"aioelastic-{self._spec.name}")
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            self.loop = runner.get_loop()
            self._over = asyncio.Event()
            self._up.set()
            runner.run(self._live())

    async def _live(self) -> None:
        reap_abandoned()
        assert self._over is not None
        self._ground = Ground(self.loop, self._spec, self.sink_trouble)
        self.census, self.poller = self._ground.census, self._ground.poller
        try:
            self._plan: LaunchPlan = await self._ground.open(self.run_id)
        except Exception as exc:
            self._break(exc)
            return
        try:
            self._feed()
            self._fit()
            await self._over.wait()
        finally:
            while self._background:
                await asyncio.wait(self._background)
            await clear(self.census, self.run_id, self._ground.adopted, Patience(), self.stop_policy, lambda _: None)
            await self._ground.close(Patience(), self.stop_policy.bound, [])

    def _feed(self) -> None:
        """Hand out what waits; start workers for the rest."""
        if self._over is None or not hasattr(self, "_plan"):
            return  # not yet
        while True:
            with self._lock:
                task = self._queue.next() if self._idle else None
                if task is None:
                    break
                slot = self._idle.pop()
            self._give(slot, task)
            self._watch_time(slot)
        with self._lock:
            wanted = min(len(self._queue) - self._starting, self._most - self._alive)
            if wanted <= 0 or self._broken is not None:
                return
            self._alive += wanted
        self._starting += wanted
        for _ in range(wanted):
            self._start(self._hire())

    async def _hire(self) -> None:
        number, self._count = self._count, self._count + 1
        template = self._plan.workers[0]
        rank = {f"{ours}{key}": str(number) for ours in ("", "AIOELASTIC_") for key in ("RANK", "LOCAL_RANK")}
        overlay = {**template.overlay, **rank, **dict.fromkeys(ERROR_FILES)}  # a task tells its error itself
        worker = Worker(replace(template, rank=number, overlay=overlay, error_file=None), self)
        slot = self._slots[worker] = Slot(worker)
        worker.on_task = lambda packet, fds: self._done(slot, packet, fds)
        worker.launch(self._ground.launcher())
        try:
            assert worker.starting is not None
            await finished(worker.starting)
        finally:
            try:
                worker.adopt()
                worker.begin_reading()
            except LaunchFailed as exc:
                self._gone(slot, exc)

    def _done(self, slot: Slot, packet: bytes, fds: list[int]) -> None:
        """A reply: first the next task for that worker, then what came of this one."""
        task, slot.task = slot.task, None
        if task is None:
            return  # its time was over
        slot.done += 1
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
        size = int.from_bytes(packet[2:10], "little")
        limits = self.limits
        if (limits.tasks is not None and slot.done >= limits.tasks) or (limits.memory and size > limits.memory):
            self._retire(slot)
        else:
            self._next(slot)
        rest = settle(task.future, packet[:2] + packet[10:], fds)
        if rest is not None:
            self._start(rest)

    def _next(self, slot: Slot) -> None:
        with self._lock:
            over = self._alive > self._most or (self._closed and not self._queue)
            task = None if over else self._queue.next()
            if task is None and not over:
                self._idle.append(slot)
                return
        if task is None:
            self._retire(slot)
        else:
            self._give(slot, task)
            self._watch_time(slot)

    def _retire(self, slot: Slot) -> None:
        """It ends by itself now; another takes its place when there is work."""
        if slot.retired:
            return
        slot.retired = True
        with self._lock:
            self._alive -= 1
        assert slot.worker.replies is not None
        slot.worker.replies.no_more()
        self._feed()

    def _fit(self) -> None:
        """After a resize, or at the end."""
        spare: list[Slot] = []
        with self._lock:
            ending = self._closed and not self._queue
            while self._idle and (ending or self._alive - len(spare) > self._most):
                spare.append(self._idle.pop())
        for slot in spare:
            self._retire(slot)
        self._feed()
        if ending:
            for slot in self._slots.values():
                if slot.ready and slot.task is None:
                    self._retire(slot)
        if ending and not self._slots and self._over is not None:
            self._over.set()

    def _watch_time(self, slot: Slot) -> None:
        if self.limits.timeout is not None and slot.task is not None:
            slot.timer = self.loop.call_later(self.limits.timeout, self._expire, slot)

    def _expire(self, slot: Slot) -> None:
        slot.expired = True
        slot.worker.kill(leader_only=False)

    def _gone(self, slot: Slot, refused: LaunchFailed | None = None, found: Evidence | None = None) -> None:
        """Nothing is left of that worker."""
        self._slots.pop(slot.worker, None)
        with self._lock:
            if slot in self._idle:
                self._idle.remove(slot)
            if not slot.retired:
                slot.retired = True
                self._alive -= 1
        if slot.timer is not None:
            slot.timer.cancel()
        worker, task = slot.worker, slot.task
        if not slot.ready:
            self._starting -= 1
            self._false_starts += 1
            if worker.error is not None or self._false_starts >= FALSE_STARTS:
                self._break(refused or WorkerFailed(failure_of(worker, self._plan, found)))
        if task is not None and slot.expired:
            assert self.limits.timeout is not None
            task.future.set_exception(TaskTimeout(self.limits.timeout))
        elif task is not None:
            task.future.set_exception(WorkerFailed(failure_of(worker, self._plan, found)))
        self._feed()
        self._fit()

    def _break(self, why: BaseException) -> None:
        """No worker can be had: nothing that waits will ever be done."""
        with self._lock:
            self._broken = why
            lost = list(self._queue)
            self._queue.clear()
        for task in lost:
            if task.begin():
                broken: BaseException = why
                if not isinstance(why, SpecError):
                    broken = BrokenExecutor(f"no worker can be started: {why}")
                    broken.__cause__ = why
                task.future.set_exception(broken)
                task.drop()
        with self._lock:
            self._closed = self._closed or not self._slots
        self._fit()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:
            self.loop.call_exception_handler({"message": "an executor's worker", "exception": problem})
            self._break(problem)

    # --- what its workers call: see `Keeper` ---

    def emit(self, event: Event) -> None:
        if isinstance(event, Ready):
            for worker, slot in self._slots.items():
                if worker.rank == event.rank:
                    slot.ready = True
                    self._starting -= 1
                    self._false_starts = 0
                    self._next(slot)
                    return

    def taps(self, worker: Worker, std: Std) -> list[Tap]:
        return self._ground.sinks.taps(worker, std)

    def file_sink(self, worker: Worker, std: Std) -> FileSink | None:
        return None

    def tap_trouble(self, tap: object, exc: Exception) -> None:
        pass  # there is nobody to tell; the tasks go on

    def sink_trouble(self, sink: str, problem: str, lost: int) -> None:
        pass

    def exited(self, worker: Worker) -> None:
        slot = self._slots[worker]
        with self._lock:
            if slot in self._idle:
                self._idle.remove(slot)

    async def before_stop(self, worker: Worker) -> None:
        pass

    def settled(self, worker: Worker) -> None:
        if worker.failed and worker.exit is not None:
            self._start(self._examine(worker))
        elif worker.state is not State.UNSTARTED:
            self._gone(self._slots[worker])

    async def _examine(self, worker: Worker) -> None:
        found = await self._ground.evidence([worker])
        self._gone(self._slots[worker], found=found.get(worker))

    def leaked(self, process: Process, worker: Worker | None) -> None:
        pass

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(work)
