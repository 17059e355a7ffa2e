"""An executor's pool: every path that leaves gives back what it took, and nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import BrokenExecutor, CancelledError, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import psutil
import pytest
from fake_pool import AGES, FakePool, FakeWorker
from helpers import until
from test_executor import Gate

from aioelastic import Stop, TaskTimeout, WorkerExecutor, WorkerFailed
from aioelastic.executor import owner, tasks, workers
from aioelastic.executor.tasks import Called, Line, Task
from aioelastic.executor.workers import FALSE_STARTS
from aioelastic.launch import Launchers
from aioelastic.planning import WorkerPlan
from aioelastic.supervisor.worker import Worker

STARTS = ["zygote", "spawn", "fork"]


# --- room ---


def waiting(executor: WorkerExecutor) -> int:
    room = executor._pool._room
    assert room is not None
    return len(room._waiting)


def taken(executor: WorkerExecutor) -> int:
    room = executor._pool._room
    assert room is not None
    return room.taken


@pytest.mark.parametrize("cancel", [False, True])
async def test_those_that_wait_for_room_are_told_of_the_shutdown(tmp_path: Path, cancel: bool) -> None:
    gate, seen = Gate(tmp_path), list[str]()

    def submit() -> None:
        try:
            executor.submit(abs, 1)
        except RuntimeError as exc:
            seen.append(str(exc))

    executor = WorkerExecutor(1, max_pending=1)
    first = executor.submit(jobs.waits_in, gate.path)
    await asyncio.to_thread(gate.entered)
    threads = [threading.Thread(target=submit) for _ in range(3)]
    for one in threads:
        one.start()
    run = asyncio.ensure_future(executor.run(abs, 1))
    await until(lambda: waiting(executor) == 4)
    executor.shutdown(wait=False, cancel_futures=cancel)
    for one in threads:
        await asyncio.to_thread(one.join)
    assert seen == ["cannot schedule new futures after shutdown"] * 3
    with pytest.raises(RuntimeError, match="after shutdown"):
        await run
    gate.open()
    executor.shutdown()
    assert first.result() == gate.path
    assert taken(executor) == 0


async def test_a_run_that_is_cancelled_while_it_waits_for_room_is_never_run(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    async with WorkerExecutor(1, max_pending=1) as executor:
        first = asyncio.ensure_future(executor.run(jobs.waits_in, gate.path))
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.entered)
        second = asyncio.ensure_future(executor.run(jobs.touches, str(tmp_path / "second")))
        third = asyncio.ensure_future(executor.run(abs, -3))
        await until(lambda: waiting(executor) == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open()
        assert await third == 3
        await first
    assert not (tmp_path / "second").exists()
    assert taken(executor) == 0


async def test_waits_that_are_cancelled_leave_nothing(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    async with WorkerExecutor(1, max_pending=1) as executor:
        first = asyncio.ensure_future(executor.run(jobs.waits_in, gate.path))
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.entered)
        many = [asyncio.ensure_future(executor.run(abs, 1)) for _ in range(200)]
        await asyncio.sleep(0)
        assert waiting(executor) == 200
        for one in many:
            one.cancel()
        await asyncio.wait(many)
        assert waiting(executor) == 0
        gate.open()
        await first


def test_a_loop_that_is_closed_while_one_waits_keeps_no_room(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1, max_pending=1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # a task was destroyed: so it was
        task = loop.create_task(executor.run(abs, 1))
        loop.run_until_complete(asyncio.sleep(0))
        assert waiting(executor) == 1
        loop.close()
        gate.open()
        first.result()
        del task
        gc.collect()
        assert executor.submit(abs, -2).result() == 2
    assert taken(executor) == 0


def test_room_that_is_left_at_the_last_moment_goes_to_the_next(tmp_path: Path) -> None:
    """It was given already to one who is cancelled before he knows."""
    gate = Gate(tmp_path)
    with WorkerExecutor(1, max_pending=1) as executor:
        room = executor._pool._room
        assert room is not None
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        left, right = Called(), Called()
        one, two = room.ask(False, left), room.ask(False, right)
        assert one is not None
        assert two is not None
        gate.open()
        one.result()
        first.result()
        room.leave(left)
        two.result()
        room.leave(right)
        assert executor.submit(abs, -1).result() == 1
    assert taken(executor) == 0


def test_what_cannot_be_pickled_takes_no_room() -> None:
    with WorkerExecutor(1, max_pending=1) as executor:
        for _ in range(3):
            with pytest.raises(TypeError):
                executor.submit(id, threading.Lock()).result()
        assert executor.submit(abs, -1).result() == 1


def test_a_callback_does_not_wait_for_itself() -> None:
    """In the thread that makes room, nobody waits for room."""
    later: list[Future[int]] = []
    ready = threading.Event()

    def more(_: object) -> None:
        later.extend(executor.submit(abs, -i) for i in range(3))
        ready.set()

    with WorkerExecutor(1, max_pending=1) as executor:
        executor.submit(abs, 1).add_done_callback(more)
        ready.wait()
        assert [one.result() for one in later] == [0, 1, 2]
    assert taken(executor) == 0


async def test_a_running_loop_is_not_held_up_for_room(tmp_path: Path) -> None:
    """It is the tasks of `run` that wait; `submit` goes ahead."""
    gate = Gate(tmp_path)
    async with WorkerExecutor(1, max_pending=1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        await asyncio.to_thread(gate.entered)
        more = [executor.submit(abs, -1), asyncio.get_running_loop().run_in_executor(executor, abs, -2)]
        run = asyncio.ensure_future(executor.run(abs, -3))
        await until(lambda: waiting(executor) == 1)
        assert taken(executor) == 3
        gate.open()
        assert await run == 3
        assert [await asyncio.wrap_future(one) if isinstance(one, Future) else await one for one in more] == [1, 2]
        assert first.result() == gate.path
    assert taken(executor) == 0


# --- time limits, deaths ---


def test_no_task_for_one_that_is_killed_for_the_time_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1, task_timeout=AGES)
    first, second = fake.executor.submit(abs, 0), fake.executor.submit(abs, 1)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    assert fake.do(worker.receive) == 0
    fake.do(lambda: fake.owner._expire(fake.slots[0, 0]))
    fake.do(worker.reply)  # it was on its way
    assert first.result() == 0
    assert fake.do(worker.receive) is None
    assert not second.running()
    fake.do(worker.die)
    fake.end()
    assert second.result() == 1


def test_a_time_limit_is_told_when_the_worker_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1, task_timeout=AGES)
    future = fake.executor.submit(abs, 0)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    fake.do(worker.receive)
    fake.do(lambda: fake.owner._expire(fake.slots[0, 0]))
    assert not future.done()
    fake.do(worker.die)
    with pytest.raises(TaskTimeout):
        future.result()
    fake.end()


def test_one_that_was_told_to_run_and_came_back_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be cancelled any more, so a shutdown that cancels does it all the same."""
    fake = FakePool(monkeypatch, 1)
    first = fake.executor.submit(abs, 0)
    fake.do(lambda: None)
    dying = fake.launcher.workers[0]
    fake.do(dying.ready)
    fake.do(dying.receive)
    fake.do(dying.reply)
    first.result()
    fake.do(dying.close)  # its channel is shut, and its end not known yet
    future = fake.executor.submit(abs, 1)
    fake.do(lambda: None)
    assert future.running()
    fake.executor.shutdown(wait=False, cancel_futures=True)
    fake.do(dying.die)
    fake.end()
    assert future.result() == 1


def test_a_task_that_no_worker_takes_fails_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    future = fake.executor.submit(abs, 0)
    for number in range(FALSE_STARTS):
        fake.do(lambda: None)
        assert not future.done()
        fake.do(fake.launcher.workers[number].ready)
        fake.do(fake.launcher.workers[number].die)
    with pytest.raises(WorkerFailed):
        future.result()
    fake.end()


def test_a_task_that_cannot_be_sent_to_any_worker_fails_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    future = fake.executor.submit(abs, 0)
    for number in range(FALSE_STARTS):
        fake.do(lambda: None)
        assert not future.done()
        worker = fake.launcher.workers[number]
        fake.do(lambda worker=worker: (worker.ready(), worker.close()))  # type: ignore[misc]
        assert signal.SIGKILL in worker.signals or number < FALSE_STARTS - 1
        fake.do(worker.die)
    with pytest.raises(WorkerFailed):
        future.result()
    fake.end()


def test_a_task_that_was_not_taken_when_no_worker_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    future = fake.executor.submit(abs, 0)
    fake.do(lambda: None)
    fake.do(fake.launcher.workers[0].ready)
    fake.do(lambda: fake.pool.break_off(ZeroDivisionError("none")))
    with contextlib.suppress(CancelledError):  # it ends with its last worker
        fake.do(fake.launcher.workers[0].die)
    with pytest.raises(BrokenExecutor, match="no worker can be started"):
        future.result()
    fake.end()


def test_what_cannot_be_sent_fails_and_costs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from aioelastic.launch import FunctionChannel

    with WorkerExecutor(1) as executor:
        pid = executor.submit(os.getpid).result()
        send, fates = FunctionChannel.send, [OSError(24, "Too many open files")]

        def fails(self: FunctionChannel, packet: bytes, fds: list[int]) -> None:
            if fates:
                raise fates.pop()
            send(self, packet, fds)

        monkeypatch.setattr(FunctionChannel, "send", fails)
        with pytest.raises(OSError, match="Too many open files"):
            executor.submit(abs, 1).result()
        assert executor.submit(os.getpid).result() == pid


def test_a_task_that_comes_back_in_a_forked_copy_too(tmp_path: Path) -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(jobs.returns_twice).result() == "itself"
        assert [executor.submit(abs, -i).result() for i in range(5)] == list(range(5))


# --- cancelling ---


def test_what_is_cancelled_holds_nothing_any_more(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        futures = [executor.submit(np.sum, np.zeros(1 << 17)) for _ in range(5)]
        tasks = list(executor._pool._queue)
        holding = [bool(one.fds) for one in tasks]
        cancelled = [one.cancel() for one in futures]
        waits, told, held = len(executor._pool._queue), wait(futures).done, [one.fds for one in tasks]
        gate.open()
        first.result()
    assert holding == cancelled == [True] * 5
    assert (waits, told, held) == (0, set(futures), [[]] * 5)


def test_what_is_cancelled_is_not_searched_for() -> None:
    """`Executor.map` cancels all that wait, from the last to the first, when one call fails."""
    compared: list[object] = []

    class Watched(Task):
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return self is other

        __hash__ = Task.__hash__

    line, waiting = Line(), [Watched((abs, (number,), {}), False) for number in range(100)]
    for one in waiting:
        line.append(one)
    assert all(line.take_out(one) for one in reversed(waiting[1:]))
    assert not line.take_out(waiting[-1])
    assert (list(line), len(line), compared) == ([waiting[0]], 1, [])


def test_the_order_of_a_line() -> None:
    line, (first, second, third) = Line(), [Task((abs, (number,), {}), False) for number in range(3)]
    for one in (first, second, third):
        line.append(one)
    assert line.next() is first
    line.appendleft(first)
    assert line.take_out(second)
    assert [line.next(), line.next(), line.next()] == [first, third, None]


def test_a_callback_that_raises_costs_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    def leaves(_: object) -> None:
        raise SystemExit

    with WorkerExecutor(1) as executor:
        first = executor.submit(abs, -1)
        first.add_done_callback(leaves)
        assert [executor.submit(abs, -i).result() for i in range(3)] == [0, 1, 2]
    assert "exception calling callback" in caplog.text


def test_a_callback_that_raises_while_many_are_cancelled(tmp_path: Path) -> None:
    def leaves(_: object) -> None:
        raise SystemExit

    gate = Gate(tmp_path)
    executor = WorkerExecutor(1)
    first = executor.submit(jobs.waits_in, gate.path)
    gate.entered()
    rest = [executor.submit(abs, 1) for _ in range(3)]
    rest[0].add_done_callback(leaves)
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(one.cancelled() for one in rest)
    gate.open()
    executor.shutdown()
    first.result()


def test_a_future_that_the_caller_settles_costs_nobody_else() -> None:
    with WorkerExecutor(1) as executor:
        future = executor.submit(abs, -1)
        future.set_result(7)
        assert executor.submit(abs, -2).result() == 2
        assert future.result() == 7


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("how", ["wait", "twice", "leave it"])
def test_shutdown_in_a_callback(how: str, cancel: bool) -> None:
    done = threading.Event()

    def shut(_: object) -> None:
        for _ in range(2 if how == "twice" else 1):
            executor.shutdown(wait=how != "leave it", cancel_futures=cancel)
        done.set()

    executor = WorkerExecutor(1)
    future = executor.submit(abs, -1)
    future.add_done_callback(shut)
    done.wait()
    executor.shutdown()
    assert future.result() == 1


# --- what cannot be started ---


@pytest.mark.parametrize("sync", [True, False], ids=["raises", "its future raises"])
def test_a_launcher_that_raises(monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    fake = FakePool(monkeypatch, 2)
    fake.launcher.fate, fake.launcher.sync = ZeroDivisionError("a bug"), sync
    with pytest.raises(BrokenExecutor, match="a bug"):
        fake.executor.submit(abs, 1).result()
    fake.end()


@pytest.mark.parametrize("start", STARTS)
def test_a_launcher_that_raises_in_each_way_to_start(monkeypatch: pytest.MonkeyPatch, start: Any) -> None:
    begin, count = Launchers.start, iter(range(100))

    def fails(self: Launchers, worker: Any) -> Any:
        if next(count) >= 1:
            raise ZeroDivisionError("a bug")
        return begin(self, worker)

    monkeypatch.setattr(Launchers, "start", fails)
    executor = WorkerExecutor(1, start=start, max_pending=10)
    assert executor.submit(abs, -1).result() == 1
    with pytest.raises(WorkerFailed):
        executor.submit(jobs.dies, signal.SIGKILL).result()
    with pytest.raises(BrokenExecutor, match="a bug"):
        executor.submit(abs, 1).result()
    with pytest.raises(BrokenExecutor, match="a bug"):
        executor.submit(abs, 1)
    executor.shutdown()
    assert taken(executor) == 0


def test_refusals_in_a_row_break_it_and_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    start = fake.launcher.start

    def refuses(worker: Any) -> Any:
        fake.launcher.fate = PermissionError(1, "no more processes")
        return start(worker)

    fake.launcher.fate = PermissionError(1, "no more processes")
    future = fake.executor.submit(abs, 0)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    fake.do(worker.receive)
    fake.do(worker.reply)
    assert future.result() == 0
    monkeypatch.setattr(fake.launcher, "start", refuses)
    fake.do(worker.die)
    later = fake.executor.submit(abs, 1)
    with pytest.raises(BrokenExecutor, match="no more processes"):
        later.result()
    fake.end()


@pytest.mark.parametrize("start", STARTS)
def test_one_that_cannot_be_adopted_is_ended(monkeypatch: pytest.MonkeyPatch, start: Any) -> None:
    from aioelastic.executor.workers import Workers

    def fails(self: Workers, worker: Worker, std: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Workers, "taps", fails)
    executor = WorkerExecutor(1, start=start)
    with pytest.raises(BrokenExecutor, match="a bug"):
        executor.submit(abs, 1).result()
    executor.shutdown()


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> None:
        raise RuntimeError("can't start new thread")

    with WorkerExecutor(1, max_pending=1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start"):
                    executor.submit(abs, 1)
        assert taken(executor) == 0
        assert executor.submit(abs, -1).result() == 1


def test_no_loop_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> None:
        raise OSError(24, "Too many open files")

    executor = WorkerExecutor(1, max_pending=1)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.Runner, "get_loop", fails)
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                executor.submit(abs, 1).result()
    assert executor.submit(abs, -1).result() == 1
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)


@pytest.mark.parametrize("where", ["_look", "_goes_on"])
def test_a_bug_of_ours_hangs_nobody(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from aioelastic.executor.owner import Owner

    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    executor = WorkerExecutor(1)
    assert executor.submit(abs, -1).result() == 1

    def fails(*_: object) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Owner, "_hand_out" if where == "_look" else where, fails)
    future = executor.submit(abs, -1)
    if where == "_look":
        with pytest.raises(BrokenExecutor, match="a bug"):
            future.result()
    else:
        assert future.result() == 1
    executor.shutdown()
    assert len(seen) == (where != "_look")  # whom no task could tell it to
    with pytest.raises(BrokenExecutor, match="a bug"):
        executor.submit(abs, 1)


async def test_an_initializer_that_hangs_is_ended_with_the_executor(tmp_path: Path) -> None:
    home = tmp_path / "pids"
    os.mkfifo(home)

    async def work() -> None:
        async with WorkerExecutor(1, initializer=jobs.hides_and_hangs, initargs=(str(home),)) as executor:
            await executor.run(abs, 1)

    task = asyncio.ensure_future(work())
    await asyncio.to_thread(home.read_text)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- signals ---

INTERRUPTED = """
import sys, threading
from concurrent.futures import wait
from aioelastic import WorkerExecutor
from aioelastic.executor import pool, tasks

FILES, futures, refused, lines = {pool.__file__, tasks.__file__}, [], [], set()

def handler():  # what a signal's may do, between any two lines
    try:
        futures.append(executor.submit(abs, -7))
    except RuntimeError:
        refused.append(1)
    if futures and len(futures) % 3 == 0:
        futures[-2].cancel()
    if ENDS and len(lines) == ENDS:
        executor.shutdown(wait=False, cancel_futures=True)

def trace(frame, event, arg):
    code = frame.f_code
    if code.co_filename not in FILES and (code.co_filename, code.co_name) != (threading.__file__, "start"):
        return None
    if event == "line" and (code.co_filename, frame.f_lineno) not in lines:
        lines.add((code.co_filename, frame.f_lineno))
        handler()
    return trace

executor = WorkerExecutor(1, max_pending=10_000)
sys.settrace(trace)
mine = []
try:
    mine += [executor.submit(abs, -7) for _ in range(4)]
    mine[3].cancel()
    executor.resize(2)
    executor.shutdown(wait=False, cancel_futures=True)
except RuntimeError:
    assert ENDS
sys.settrace(None)
executor.shutdown()
wait(futures + mine)
assert all(one.cancelled() or one.result() == 7 for one in futures + mine)
assert executor._pool._room.taken == 0
assert len(lines) > 60 or ENDS, len(lines)
print("all", "refused" if refused else "")
"""


@pytest.mark.parametrize("ends", [0, 5, 15, 25, 40])
def test_a_handler_may_submit_cancel_and_shut_down(ends: int) -> None:
    """Between any two lines of ours."""
    done = script(f"ENDS = {ends}\n{INTERRUPTED}")
    assert (done.stdout, done.stderr) == ("all refused\n", "")


@pytest.mark.long
def test_a_handler_of_a_real_signal(tmp_path: Path) -> None:
    futures, mine = list[Future[int]](), list[Future[int]]()

    def handler(*_: object) -> None:
        futures.append(executor.submit(abs, -7))

    before = signal.signal(signal.SIGPROF, handler)
    try:
        with WorkerExecutor(1) as executor:
            signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
            while len(futures) < 100:
                mine.append(executor.submit(abs, -7))
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert {one.result() for one in futures + mine} == {7}


# --- workers that do not end ---


def test_a_worker_that_does_not_end_when_it_is_told_to_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1, tasks_per_worker=1)
    fake.owner._workers.stop_policy = Stop(grace=AGES, bound=AGES)
    futures = [fake.executor.submit(abs, i) for i in range(3)]
    workers = fake.launcher.workers
    for number in range(2):
        fake.do(lambda: None)
        assert len(workers) == number + 1
        for call in (workers[-1].ready, workers[-1].receive, workers[-1].reply):
            fake.do(call)
        assert futures[number].result(30) == number
    assert len(workers) == 2, "as many on their way out as there may be others"
    slot = fake.slot(workers[0])
    assert slot is not None
    assert slot.timer is not None
    fake.do(slot.timer._run)
    assert [one.signals[:1] for one in workers] == [[signal.SIGTERM], []]
    fake.do(lambda: workers[0].die(15))
    fake.do(lambda: None)
    assert len(workers) == 3
    fake.end()
    assert futures[2].result(30) == 2


def test_workers_that_do_not_end_are_not_added_up() -> None:
    with WorkerExecutor(1, tasks_per_worker=1) as executor:
        executor._pool._owner._workers.stop_policy = Stop(grace=0, bound=1)
        pids = set[int]()
        for _ in range(3):
            pids.add(executor.submit(jobs.leaves_a_thread_that_stays).result(30))
            assert len(executor.pids) <= 2
    assert len(pids) == 3


# --- starts that never come ---


@pytest.mark.parametrize("how", ["shutdown", "cancel", "stop", "bug"])
def test_a_start_that_never_comes_ends_with_the_executor(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    fake, starting = FakePool(monkeypatch, 1), list[asyncio.Future[Any]]()
    fake.owner._workers.stop_policy = Stop(grace=0, bound=0.02)

    def never(worker: WorkerPlan) -> asyncio.Future[Any]:
        starting.append(asyncio.get_running_loop().create_future())
        return starting[-1]

    monkeypatch.setattr(fake.launcher, "start", never)
    future = fake.executor.submit(abs, -1)
    assert fake.do(lambda: len(starting)) == 1
    if how == "stop":
        fake.pool.stop()
    elif how == "bug":
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        fake.do(lambda: fake.owner.crash(ZeroDivisionError("a bug")))
    fake.executor.shutdown(wait=True, cancel_futures=how == "cancel")
    if how in ("cancel", "stop"):
        assert future.cancelled()
    else:
        words = "a bug" if how == "bug" else "its start had not come when the time to stop was over"
        with pytest.raises(BrokenExecutor, match=words):
            future.result()
    assert len(starting) == (3 if how == "shutdown" else 1), "it was tried again for what waits, and not for nothing"


def test_a_result_that_never_comes_ends_with_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of a GPU, which has to be asked about it, hangs."""
    fake, asked = FakePool(monkeypatch, 1), list[object]()
    fake.owner._workers.stop_policy = Stop(grace=0, bound=0.02)

    def hangs(work: object) -> Future[Any]:
        asked.append(work)
        return Future()

    monkeypatch.setattr(owner.messages, "is_slow", lambda _: True)
    monkeypatch.setattr(tasks.sent_objects, "aside", hangs)
    future = fake.executor.submit(abs, 0)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    fake.do(worker.receive)
    fake.do(worker.reply)
    assert asked
    fake.end()
    with pytest.raises(BrokenExecutor, match="does not answer"):
        future.result()


def test_a_start_that_comes_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, starting = FakePool(monkeypatch, 1), list[asyncio.Future[Any]]()
    fake.owner._workers.stop_policy = Stop(grace=0, bound=0.02)

    def never(worker: WorkerPlan) -> asyncio.Future[Any]:
        starting.append(asyncio.get_running_loop().create_future())
        fake.launcher.workers.append(FakeWorker(worker))
        return starting[-1]

    monkeypatch.setattr(fake.launcher, "start", never)
    fake.executor.submit(abs, -1)
    assert fake.do(lambda: len(starting)) == 1
    gone = threading.Event()
    monkeypatch.setattr(fake.owner._workers.resources, "forget", lambda _: gone.set())
    # the executor stays up until what is about to be withdrawn was
    clear = workers.clear

    async def late(*args: Any) -> Any:
        starting[0].set_result(fake.launcher.workers[0])
        await asyncio.sleep(0)
        return await clear(*args)

    monkeypatch.setattr(workers, "clear", late)
    fake.executor.shutdown(cancel_futures=True)
    assert gone.is_set()
    assert fake.launcher.workers[0].signals == [signal.SIGKILL]
    fake.launcher.workers[0].close()


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_preload_that_hangs_ends_with_the_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    gate = Gate(tmp_path)
    (tmp_path / "hangs_at_import.py").write_text(f"open({gate.path!r}).read()\nimport signal\nsignal.pause()\n")
    monkeypatch.syspath_prepend(tmp_path)
    executor = WorkerExecutor(1, preload=["hangs_at_import"])
    future = executor.submit(abs, -1)
    gate.entered()
    gate.open()
    if how == "stop":
        executor._pool.stop()
    executor.shutdown(cancel_futures=True)
    assert future.cancelled()


# --- the death of whoever had started the workers is one event ---


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_workers_whose_parent_dies_while_they_begin_are_begun_again(start: Any, tmp_path: Path) -> None:
    goes_on = tmp_path / "goes_on"
    initializer = partial(jobs.waits_unless, str(goes_on))
    many = 2 * FALSE_STARTS
    async with WorkerExecutor(many, start=start, initializer=initializer) as executor:
        futures = [executor.submit(abs, -number) for number in range(2 * many)]
        await until(lambda: len(executor.pids) == many)
        parent = psutil.Process(executor.pids[0]).ppid()
        goes_on.touch()
        os.kill(parent, signal.SIGKILL)
        assert await asyncio.gather(*map(asyncio.wrap_future, futures)) == [*range(2 * many)]


def test_workers_that_end_their_zygote_each_time_are_not_begun_for_ever(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with WorkerExecutor(1, initializer=jobs.kills_its_parent, initargs=(str(seen),)) as executor:
        told = executor.submit(abs, -1).exception()
    assert isinstance(told, BrokenExecutor)
    assert "the zygote that had started it died" in str(told)
    assert seen.read_text() == "x" * FALSE_STARTS


# --- the end of the interpreter, and of what nobody has ---


def test_one_that_is_collected_in_a_thread_that_holds_its_lock() -> None:
    executor = WorkerExecutor(1, max_pending=1)
    assert executor.submit(abs, -1).result() == 1
    pool = executor._pool
    assert pool._room is not None
    with pool._lock, pool._room._lock:
        del executor
        gc.collect()
    pool.join()


def script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)


def test_threads_that_wait_when_the_interpreter_ends() -> None:
    done = script(
        "import threading, time\n"
        "from aioelastic import WorkerExecutor\n"
        "e = WorkerExecutor(1, max_pending=1)\n"
        "e.submit(time.sleep, 0.2)\n"
        "def wait():\n"
        "    try: e.submit(print, 'late')\n"
        "    except RuntimeError as exc: print(exc)\n"
        "t = threading.Thread(target=wait)\n"
        "t.start()\n"
        "while not e._pool._room._waiting: pass\n"
    )
    assert (done.stdout, done.stderr) == ("cannot schedule new futures after shutdown\n", "")


@pytest.mark.parametrize("work", ["_letters.aside(forever)", "_packing.Packing(Namespace()).aside(None, forever)"])
def test_a_driver_that_never_answers_does_not_hold_the_end_of_the_interpreter(work: str) -> None:
    done = script(
        "import threading\n"
        "from types import SimpleNamespace as Namespace\n"
        "from aioelastic.child.wire import pending as _packing, sent_objects as _letters\n"
        "began = threading.Event()\n"
        "def forever(*_):\n"
        "    began.set()\n"
        "    threading.Event().wait()\n"
        f"{work}\n"
        "began.wait()\n"
        "print('ends')\n"
    )
    assert (done.stdout, done.stderr) == ("ends\n", "")


def test_one_that_is_made_when_the_interpreter_ends() -> None:
    done = script(
        "import threading\n"
        "from aioelastic import WorkerExecutor\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    try: WorkerExecutor(1).submit(abs, 1)\n"
        "    except RuntimeError as exc: print(exc)\n"
        "threading.Thread(target=late).start()\n"
    )
    assert (done.stdout, done.stderr) == ("cannot schedule new futures after shutdown\n", "")
