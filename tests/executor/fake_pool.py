"""A pool of an executor whose workers are told what to do, and start nothing: each event comes when a test wants it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from typing import Any, TypeVar

import pytest

from aioelastic import WorkerExecutor
from aioelastic.child.wire import datagrams, messages
from aioelastic.executor.owner import Owner
from aioelastic.executor.slots import LEAVING, Slot, State
from aioelastic.launch import RawExit
from aioelastic.planning import LaunchPlan, WorkerPlan, plan
from aioelastic.processes.census import Left
from aioelastic.watch import Poller

T = TypeVar("T")
_pids = itertools.count((1 << 22) + 1)  # no process ever has such a pid

AGES = 1e6  # seconds: no time limit is over by itself


class FakeWorker:
    """A live process as its launcher gives it, and what a test does in its name; all on the loop of the pool."""

    answer = None
    stdin = stdout = stderr = None
    rss_floor = 0

    def __init__(self, worker: WorkerPlan) -> None:
        self.start = worker.rank, worker.attempt
        self.pid = next(_pids)
        self.started_ns, self.started_at = time.monotonic_ns(), time.time()
        self.channel, self._theirs = datagrams.pair()
        self.channel.setblocking(False)
        self._theirs.setblocking(False)
        self._on_exit: Callable[[RawExit], None] | None = None
        self.is_ready = False
        self.is_dead = False
        self.signals: list[int] = []
        self.task: int | None = None  # that it has received, and not answered

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        self._on_exit = on_exit

    def send_signal(self, signum: int) -> bool:
        self.signals.append(signum)
        return not self.is_dead

    def signal_group(self, signum: int) -> bool:
        return False

    def group_alive(self) -> bool:
        return False

    def reap(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    # --- what a test does ---

    def ready(self) -> None:
        self.is_ready = True
        self._send(*messages.encode(messages.RUNS, ()))

    def receive(self) -> int | None:
        """The number of the task that it gets, if there is one."""
        try:
            packet, fds = datagrams.receive(self._theirs)
        except (BlockingIOError, OSError):
            return None
        if not packet:
            return None
        assert self.task is None, "a second task"
        _, args, _ = messages.decode(packet, fds)
        datagrams.close(fds)
        self.task = args[0]
        return self.task

    def reply(self) -> None:
        packet, fds = messages.encode(messages.DONE, (self.task,))
        self.task = None
        self._send(packet[:2] + bytes(8) + packet[2:], fds)

    def close(self) -> None:
        """Its end of the channel: as of one that is dying, and is not known to."""
        self._theirs.close()

    def die(self, status: int = 9) -> None:
        if self.is_dead:
            return
        self.is_dead = True
        self._theirs.close()
        assert self._on_exit is not None
        self._on_exit(RawExit(status, time.monotonic_ns(), time.time()))

    def _send(self, packet: bytes, fds: list[int]) -> None:
        try:
            datagrams.send(self._theirs, packet, fds)
        except OSError:
            pass  # it is not heard any more


class FakeLauncher:
    """`fate`: raised by the next start (once), or None."""

    name = "fake"

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.fate: BaseException | None = None
        self.sync = False  # it is raised by the call itself

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        fate, self.fate = self.fate, None
        if fate is not None and self.sync:
            raise fate
        if fate is not None:
            done.set_exception(fate)
        else:
            self.workers.append(FakeWorker(worker))
            done.set_result(self.workers[-1])
        return done


class _Census:
    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.marks: set[int] = set()

    def know(self, mark: int, owner: str) -> None:
        assert mark not in self.marks, "two starts have one mark"
        self.marks.add(mark)

    def over(self, mark: int) -> None:
        self.marks.remove(mark)

    async def left(self, owner: str, adopted: Callable[[], list[int]], within: float) -> Left:
        return Left([], [])

    async def catch(self, found: list[Any], within: float) -> list[Any]:
        return []


class _Sinks:
    def taps(self, worker: Any, std: Any) -> list[Any]:
        return []


TURNS = 12  # of the loop, in which what is under way there is done


class FakePool:
    """An executor with such workers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: int, **options: Any) -> None:
        launcher = self.launcher = FakeLauncher()
        self.forgotten: list[tuple[int, int]] = []
        forgotten = self.forgotten

        class Resources:
            def __init__(self, loop: asyncio.AbstractEventLoop, spec: Any, trouble: Any) -> None:
                self.loop, self.spec = loop, spec
                self.census, self.poller, self.sinks = _Census(), Poller(loop), _Sinks()

            async def open(self, run_id: str) -> LaunchPlan:
                return plan(self.spec, run_id=run_id)

            async def another(self, like: WorkerPlan, rank: int, attempt: int, world_size: int) -> WorkerPlan:
                return like.as_start(rank, attempt, world_size)

            def forget(self, worker: WorkerPlan) -> None:
                forgotten.append((worker.rank, worker.attempt))

            def launcher(self) -> FakeLauncher:
                return launcher

            def adopted(self) -> list[int]:
                return []

            def evidence(self, workers: Any) -> asyncio.Future[dict[Any, Any]]:
                return _done(self.loop, {})

            async def close(self, *_: Any) -> None:
                self.poller.let_go()

        monkeypatch.setattr("aioelastic.executor.workers.Resources", Resources)
        self.executor = WorkerExecutor(workers, **options)
        self.pool = self.executor._pool
        self.owner: Owner = self.pool._owner

    def do(self, call: Callable[[], T]) -> T:
        """Call it on the loop of the pool, once what is under way there is done; and wait until what it leads to is."""
        asked: Future[T] = Future()

        def later(turns: int, then: Callable[[], object]) -> None:
            """No task: the loop may end before that does."""
            if turns:
                self.owner.loop.call_soon(later, turns - 1, then)
            else:
                then()

        def done(value: T) -> None:
            if asked.set_running_or_notify_cancel():
                asked.set_result(value)

        def run() -> None:
            try:
                value = call()
            except BaseException as exc:
                asked.set_exception(exc)
            else:
                later(TURNS, lambda: done(value))

        while not self.owner._is_up:
            time.sleep(0)
        with contextlib.suppress(RuntimeError):  # all is over, and its loop closed
            self.owner.loop.call_soon_threadsafe(later, TURNS, run)
        either: list[Future[Any]] = [asked, self.owner.ended]
        wait(either, return_when=FIRST_COMPLETED)
        asked.cancel()  # if the loop has ended first
        return asked.result(0)

    @property
    def slots(self) -> dict[tuple[int, int], Slot]:
        return self.owner._slots.all

    def slot(self, worker: FakeWorker) -> Slot | None:
        return self.slots.get(worker.start)

    def check(self) -> None:
        """What is counted is so; on the loop."""
        slots = self.owner._slots
        assert slots.alive == sum(one.state not in LEAVING for one in slots.all.values())
        assert slots.starting == sum(one.state is State.STARTING for one in slots.all.values())
        assert set(slots.idle) == {one for one in slots.all.values() if one.state is State.IDLE}
        for one in slots.all.values():
            if one.state in (State.STARTING, State.IDLE, State.RETIRING):
                assert one.task is None
            if one.state is State.BUSY:
                assert one.task is not None
                assert one.timer is not None or one.task.timeout is None
            elif one.state is not State.RETIRING:
                assert one.timer is None or one.timer.cancelled()

    def end(self) -> None:
        """Shut it down, and let all workers do what is there, and end as they are told to, until it has ended."""
        self.executor.shutdown(wait=False)

        def step() -> None:
            for one in self.launcher.workers:
                if one.is_dead:
                    continue
                if not one.is_ready:
                    one.ready()
                elif one.receive() is not None or one.task is not None:
                    one.reply()
                elif one.signals or _told_to_end(one):
                    one.die(0)

        try:
            while not self.owner.ended.done():
                self.do(step)
        except (RuntimeError, CancelledError, TimeoutError):
            assert self.owner.ended.done() or self.pool.closed  # its loop is closed, or about to be
        self.executor.shutdown()


def _told_to_end(worker: FakeWorker) -> bool:
    try:
        return worker._theirs.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _done(loop: asyncio.AbstractEventLoop, value: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = loop.create_future()
    future.set_result(value)
    return future
