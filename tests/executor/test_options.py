"""`with_options`: a limit of time for some calls, and what becomes of a call whose caller is cancelled."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import jobs
import pytest
from fake_pool import AGES, FakePool
from helpers import alive, stopped_itself
from test_executor import Gate, is_sent

from aioelastic import SpecError, TaskTimeout, WorkerExecutor
from aioelastic.executor.tasks import Called

# --- a limit of time ---


def test_a_limit_for_one_call_costs_no_other(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(2) as executor:
        other = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        (pid,) = executor.pids
        with pytest.raises(TaskTimeout, match=r"^sleeps\(\) took longer than 0\.05 s"):
            executor.with_options(task_timeout=0.05).submit(jobs.sleeps).result()
        assert pid in executor.pids
        gate.open()
        assert other.result() == gate.path


def test_a_limit_counts_from_the_start_on_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    future = fake.executor.with_options(task_timeout=AGES).submit(abs, 0)
    fake.do(lambda: None)
    assert fake.slots[0, 0].timer is None
    (worker,) = fake.launcher.workers
    before = fake.do(lambda: fake.owner.loop.time())
    fake.do(worker.ready)
    timer = fake.slots[0, 0].timer
    assert timer is not None
    assert timer.when() >= before + AGES
    fake.end()
    assert future.result() == 0


def test_options_are_added_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerExecutor(1, task_timeout=AGES) as executor:
        given: list[float | None] = []
        monkeypatch.setattr(executor._pool, "submit", lambda _, timeout: given.append(timeout) or Future())
        for one in (
            executor,
            executor.with_options(task_timeout=5),
            executor.with_options(task_timeout=5).with_options(kill_on_cancel=False),
            executor.with_options(task_timeout=float("inf")),
        ):
            one.submit(abs, 1)
    assert given == [AGES, 5, 5, None]


def test_a_function_may_have_arguments_of_the_same_names() -> None:
    with WorkerExecutor(1) as executor:
        given: dict[str, Any] = {"task_timeout": 1, "kill_on_cancel": 2, "timeout": 3, "fn": 4, "self": 5}
        assert executor.with_options(task_timeout=60).submit(dict, **given).result() == given


@pytest.mark.parametrize(("field", "value"), [("task_timeout", -1), ("task_timeout", "5"), ("kill_on_cancel", "no")])
def test_bad_options(field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with WorkerExecutor(1) as executor, pytest.raises(SpecError, match=f"^{field}="):
        executor.with_options(**options)


def test_the_executor_lives_as_long_as_who_has_options_for_it() -> None:
    executor = WorkerExecutor(1).with_options(task_timeout=60)
    gc.collect()
    assert executor.submit(abs, -1).result() == 1
    pool = executor._pool
    del executor
    gc.collect()
    pool.join()


# --- a caller that is cancelled ---


@asynccontextmanager
async def under_way(home: Path, **options: Any) -> AsyncIterator[tuple[WorkerExecutor, int, asyncio.Task[Any], Gate]]:
    """Two workers, of which the second, with this pid, is in a call that a task of ours awaits."""
    first, second = Gate(home, "first"), Gate(home, "second")
    async with WorkerExecutor(2, max_pending=2) as executor:
        other = asyncio.ensure_future(executor.run(jobs.waits_in, first.path))
        await asyncio.to_thread(first.entered)
        known = set(executor.pids)
        call = asyncio.ensure_future(executor.with_options(**options).run(jobs.waits_in, second.path))
        await asyncio.to_thread(second.entered)
        (pid,) = set(executor.pids) - known
        yield executor, pid, call, second
        assert known <= set(executor.pids)
        first.open()
        assert await other == first.path


async def test_a_cancelled_call_frees_its_worker_and_no_other(tmp_path: Path) -> None:
    async with under_way(tmp_path) as (executor, pid, call, gate):
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not alive(pid)
        assert await executor.run(os.getpid) != pid  # and there is room for it
        gate.open()


async def test_it_is_ended_however_often_its_caller_is_cancelled(tmp_path: Path) -> None:
    async with under_way(tmp_path) as (_, pid, call, gate):
        while not call.done():
            call.cancel()
            await asyncio.sleep(0)
        assert call.cancelled()
        assert not alive(pid)
        gate.open()


@pytest.mark.parametrize("scope", ["asyncio.timeout", "anyio"])
async def test_a_time_limit_around_run_ends_the_call(tmp_path: Path, scope: str) -> None:
    gate = Gate(tmp_path)
    async with WorkerExecutor(1) as executor:
        pid = await executor.run(os.getpid)
        entering = asyncio.ensure_future(asyncio.to_thread(gate.entered))
        if scope == "anyio":
            with anyio.CancelScope() as limit:
                entering.add_done_callback(lambda _: limit.cancel())
                await executor.run(jobs.waits_in, gate.path)
        else:
            with pytest.raises(TimeoutError):  # noqa: PT012
                async with asyncio.timeout(None) as time_limit:
                    entering.add_done_callback(lambda _: time_limit.reschedule(0))
                    await executor.run(jobs.waits_in, gate.path)
        assert not alive(pid)
        assert await executor.run(abs, -1) == 1
    gate.open()


async def test_a_call_may_go_on_without_its_caller(tmp_path: Path) -> None:
    async with under_way(tmp_path, kill_on_cancel=False) as (executor, pid, call, gate):
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.open()
        assert await executor.run(os.getpid) == pid


def test_one_that_nobody_waits_for_is_not_given_to_another_worker(tmp_path: Path) -> None:
    """Its worker dies without having taken it."""
    with WorkerExecutor(1) as executor:
        pid = executor.submit(os.getpid).result()
        os.kill(pid, signal.SIGSTOP)
        asyncio.run(stopped_itself(pid))
        future = executor.submit(jobs.touches, str(tmp_path / "touched"))
        is_sent(executor)
        assert isinstance(future, Called)
        future.is_abandoned = True
        os.kill(pid, signal.SIGKILL)
        assert future.exception() is not None
        assert executor.submit(abs, -1).result() == 1
    assert not (tmp_path / "touched").exists()


def test_one_that_has_come_back_to_the_line_is_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, nor for another worker: that may take long to be ready."""
    fake = FakePool(monkeypatch, 1)
    future = fake.executor.submit(abs, 0)
    assert isinstance(future, Called)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    fake.do(worker.die)
    assert future.running()
    assert len(fake.pool._queue) == 1
    fake.pool.abandon(future)
    fake.do(lambda: None)
    try:
        assert future.done()
        assert not fake.pool._queue
    finally:
        fake.end()


async def test_one_whose_owner_has_just_ended_for_lack_of_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another has its place, and is not up; the task is about to be told."""
    fake = FakePool(monkeypatch, 1)
    future = fake.executor.submit(abs, 0)
    assert isinstance(future, Called)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    assert future.running()
    owner = fake.pool._owner
    fake.pool._replace_owner()
    leaving = asyncio.ensure_future(fake.pool.leave([future], True))
    await asyncio.sleep(0)
    fake.pool._owner, fake.pool._begun = owner, True
    fake.end()
    await leaving


def test_one_whose_reply_is_there_already_costs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    first, second = fake.executor.submit(abs, 0), fake.executor.submit(abs, 1)
    assert isinstance(first, Called)
    fake.do(lambda: None)
    (worker,) = fake.launcher.workers
    fake.do(worker.ready)
    fake.do(worker.receive)
    fake.do(worker.reply)
    fake.pool.abandon(first)
    fake.do(lambda: None)
    assert worker.signals == []
    fake.end()
    assert (first.result(), second.result()) == (0, 1)
