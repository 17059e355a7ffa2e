"""`map` and `map_unordered`: read by `for` and by `async for`, in chunks, with what calls raise, left in the middle."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import alive, until
from test_executor import Gate

from aioelastic import RemoteError, SpecError, WorkerExecutor, WorkerFailed
from aioelastic.executor import MapResults

WAYS = ["map", "map_unordered"]


@pytest.fixture
def executor() -> Iterator[WorkerExecutor]:
    with WorkerExecutor(2) as one:
        yield one


@pytest.fixture(params=["for", "async for"])
def read(request: pytest.FixtureRequest) -> Callable[[MapResults[Any]], list[Any]]:
    """All of the results, and what ends them."""

    async def all_of(results: AsyncIterator[Any], found: list[Any]) -> None:
        async for one in results:
            found.append(one)

    def by(results: MapResults[Any]) -> list[Any]:
        found: list[Any] = []
        try:
            if request.param == "for":
                for one in results:
                    found.append(one)  # noqa: PERF402  # what comes before an exception is seen, too
            else:
                asyncio.run(all_of(results, found))
        except Exception as problem:  # it is one of the things to be seen
            found.append(problem)
        return found

    return by


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunksize", [1, 3])
def test_all_come_once(executor: WorkerExecutor, read: Any, way: str, chunksize: int) -> None:
    for count in (0, 1, 10):
        found = read(getattr(executor, way)(pow, range(count), itertools.repeat(2), chunksize=chunksize))
        assert (found if way == "map" else sorted(found)) == [one * one for one in range(count)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("fn", "chunksize"), [(jobs.quotient, 1), (jobs.quotient, 2), (jobs.async_quotient, 5)])
def test_exceptions_as_results(executor: WorkerExecutor, read: Any, way: str, fn: Any, chunksize: int) -> None:
    calls = getattr(executor, way)(fn, [1] * 5, [1, 0, 2, 0, 4], chunksize=chunksize, return_exceptions=True)
    found = read(calls)
    told = [one for one in found if isinstance(one, ZeroDivisionError)]
    assert len(told) == 2
    for one in told:
        assert isinstance(one.__cause__, RemoteError)
        assert f"{fn.__name__}(1, 0), " in str(one.__cause__)
        assert f"in {fn.__name__}" in one.__cause__.traceback
    if way == "map":
        assert [one for one in found if one not in told] == [1, 0.5, 0.25]
        assert [found.index(one) for one in told] == [1, 3]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_exception_ends_it_after_what_the_chunk_had_before(
    executor: WorkerExecutor, read: Any, way: str
) -> None:
    found = read(getattr(executor, way)(jobs.quotient, [1] * 4, [1, 2, 0, 4], chunksize=4))
    assert found[:2] == [1, 0.5]
    assert isinstance(found[2], ZeroDivisionError)
    assert len(found) == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_dies_is_told_for_each_call_of_its_chunk(read: Any, way: str) -> None:
    with WorkerExecutor(1) as executor:
        found = read(getattr(executor, way)(jobs.dies_of, range(6), chunksize=2, return_exceptions=True))
        failed = [one for one in found if isinstance(one, WorkerFailed)]
        assert sorted(one for one in found if one not in failed) == [0, 1, 4, 5]
        assert len(failed) == 2
        assert "2 calls from dies_of(2) on, " in str(failed[0])


@pytest.mark.parametrize("chunksize", [1, 3])
async def test_nothing_of_a_result_stays(executor: WorkerExecutor, chunksize: int) -> None:
    for one in executor.map(frozenset, [[number] for number in range(6)], chunksize=chunksize):
        seen = weakref.ref(one)
        del one
        await until(lambda: seen() is None)  # noqa: B023
    async for one in executor.map_unordered(frozenset, [[number] for number in range(6)], chunksize=chunksize):
        seen = weakref.ref(one)
        del one
        await until(lambda: seen() is None)  # noqa: B023


def test_what_cannot_be_rebuilt_and_what_would_end_who_reads(executor: WorkerExecutor, read: Any) -> None:
    calls = [jobs.odd, jobs.interrupted, jobs.fails_anywhere]
    found = read(executor.map(jobs.called, calls, chunksize=3, return_exceptions=True))
    assert [type(one) for one in found] == [RemoteError, RemoteError, ValueError]
    assert "could not be rebuilt here: TypeError" in str(found[0])
    assert found[2].__notes__ == ["a note"]


@pytest.mark.parametrize("go_on", [True, False])
def test_a_result_that_cannot_be_pickled_costs_no_other_of_its_chunk(
    executor: WorkerExecutor, read: Any, go_on: bool
) -> None:
    calls = [int, threading.Lock, str]
    found = read(executor.map(jobs.called, calls, chunksize=3, return_exceptions=go_on))
    assert [type(one) for one in found] == [int, TypeError, str][: 3 if go_on else 2]
    assert "task: called(" in str(found[1].__cause__)


@pytest.mark.parametrize("way", WAYS)
async def test_what_was_not_read_goes_with_who_leaves(executor: WorkerExecutor, way: str) -> None:
    """And not when there is a collection: results may be large."""
    results = getattr(executor, way)(frozenset, [[number] for number in range(4)])
    next(results)
    seen = [weakref.ref(one.result()) for one in results._calls._pending]
    assert len(seen) == 3
    gc.disable()
    try:
        results.close()
        await until(lambda: not any(one() for one in seen))
    finally:
        gc.enable()


@pytest.mark.parametrize(("way", "how"), [("map", {"buffersize": 1}), ("map_unordered", {})])
def test_an_executor_lives_as_long_as_there_is_something_to_read(way: str, how: dict[str, Any]) -> None:
    results = getattr(WorkerExecutor(1).with_options(task_timeout=300), way)(abs, range(-9, 0), **how)
    pool = results._calls._pool
    gc.collect()
    assert sorted(results) == list(range(1, 10))
    del results
    assert pool.closed
    pool.join()


@pytest.mark.parametrize("way", WAYS)
def test_a_forked_copy_of_the_program_waits_for_none(executor: WorkerExecutor, tmp_path: Path, way: str) -> None:
    gate = Gate(tmp_path)
    results = getattr(executor, way)(jobs.enters, ["/dev/null", gate.path])
    assert next(results) == "/dev/null"
    gate.entered()
    pid = os.fork()
    if pid == 0:
        try:
            next(results)
        except RuntimeError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    gate.open()
    assert list(results) == [gate.path]


def test_a_forked_copy_of_a_call_does_no_other_call_of_the_chunk(tmp_path: Path) -> None:
    with WorkerExecutor(1) as executor:
        pids = list(executor.map(jobs.notes_and_forks, [str(tmp_path / "calls")] * 3, chunksize=3))
    assert all(pids)
    assert (tmp_path / "calls").read_text() == "called\n" * 3


def test_so_many_are_submitted_ahead(tmp_path: Path, read: Any) -> None:
    seen: list[int] = []
    with WorkerExecutor(1) as executor:
        calls = executor.map(abs, (seen.append(one) or one for one in range(8)), buffersize=3)  # type: ignore[func-returns-value]
        assert seen == [0, 1, 2]
        assert read(calls) == list(range(8))
        executor.map_unordered(abs, (seen.append(one) or one for one in itertools.count()))  # type: ignore[func-returns-value]
        assert seen == list(range(8))  # not before it is read


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["close", "drop"])
def test_left_in_the_middle_of_for(tmp_path: Path, way: str, how: str) -> None:
    """What runs is finished, and what waits is cancelled."""
    gate = Gate(tmp_path)
    paths = ["/dev/null", gate.path, *(str(tmp_path / f"{number}") for number in range(9))]
    with WorkerExecutor(1) as executor:
        pid = executor.submit(os.getpid).result()
        results = getattr(executor, way)(jobs.enters, paths)
        assert next(results) == "/dev/null"
        gate.entered()
        if how == "close":
            results.close()
            assert list(results) == []
        else:
            del results
        assert len(executor._pool._queue) == 0
        gate.open()
        assert executor.submit(os.getpid).result() == pid
    assert [one.name for one in tmp_path.iterdir()] == ["gate"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kill", [True, False])
async def test_left_in_the_middle_of_async_for(tmp_path: Path, way: str, kill: bool) -> None:
    """What runs is ended, if that is to be; and what waits is cancelled."""
    gate = Gate(tmp_path)
    async with WorkerExecutor(1) as executor:
        pid = await executor.run(os.getpid)
        asked = executor.with_options(kill_on_cancel=kill)
        paths = ["/dev/null", gate.path, *(str(tmp_path / f"{number}") for number in range(9))]
        async with aclosing(getattr(asked, way)(jobs.enters, paths)) as results:
            assert await anext(results) == "/dev/null"
            await asyncio.to_thread(gate.entered)
        assert alive(pid) is not kill
        assert [one async for one in results] == []
        gate.open()
        assert (await executor.run(os.getpid) == pid) is not kill
    assert [one.name for one in tmp_path.iterdir()] == ["gate"]


@pytest.mark.parametrize("way", WAYS)
async def test_cancelled_while_it_waits(tmp_path: Path, way: str) -> None:
    gate = Gate(tmp_path)
    async with WorkerExecutor(1) as executor:
        pid = await executor.run(os.getpid)
        waiting = asyncio.ensure_future(anext(getattr(executor, way)(jobs.waits_in, [gate.path])))
        await asyncio.to_thread(gate.entered)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not alive(pid)
        assert await executor.run(abs, -1) == 1
    gate.open()


async def test_a_limit_of_time_for_all(tmp_path: Path) -> None:
    first, gate = Gate(tmp_path, "first"), Gate(tmp_path)
    words = "is not there after the `timeout` of its map, which is for all results"
    async with WorkerExecutor(1) as executor:
        by_for = executor.map(jobs.waits_in, [first.path], timeout=0)
        await asyncio.to_thread(first.entered)
        with pytest.raises(TimeoutError, match=words):
            next(by_for)
        assert list(by_for) == []
        first.open()
        results = executor.map(jobs.waits_in, [gate.path], timeout=0)
        with pytest.raises(TimeoutError, match=words):
            await anext(results)
        assert [one async for one in results] == []
        assert await executor.run(abs, -1) == 1


async def test_what_is_there_already_does_not_keep_others_from_running(executor: WorkerExecutor) -> None:
    results = executor.map(abs, range(3_000), buffersize=3_000)
    await asyncio.wrap_future(executor.submit(abs, 1))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.ensure_future(count())
    await asyncio.sleep(0)
    before = turns
    assert [one async for one in results] == list(range(3_000))
    assert turns > before
    counting.cancel()


async def test_a_limit_of_pending_tasks_holds_for_what_is_submitted_ahead() -> None:
    async with WorkerExecutor(4, max_pending=2) as executor:
        room = executor._pool._room
        assert room is not None
        async for _ in executor.map_unordered(abs, range(20)):
            assert room.taken <= 2
        for _ in executor.map_unordered(abs, range(20)):
            assert room.taken <= 2


def test_results_are_read_in_one_way(executor: WorkerExecutor) -> None:
    with closing(executor.map(abs, range(3))) as results:
        assert next(results) == 0
        with pytest.raises(RuntimeError, match="by `for`"):
            asyncio.run(results.aclose())
        assert list(results) == [1, 2]


def test_an_executor_that_is_ended_tells_each_call(read: Any, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        results = executor.map(jobs.waits_in, [gate.path] * 5, return_exceptions=True)
        gate.entered()
        executor.kill_workers()
        found = read(results)
    assert len(found) == 5
    assert [type(one) for one in found] == [WorkerFailed, *[CancelledError] * 4]
    gate.open()


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("map", {"chunksize": 0}),
        ("map", {"buffersize": 0}),
        ("map", {"timeout": "1"}),
        ("map_unordered", {"chunksize": 0}),
    ],
)
def test_bad_arguments(executor: WorkerExecutor, way: str, options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"^{next(iter(options))}="):
        getattr(executor, way)(abs, [1], **options)
