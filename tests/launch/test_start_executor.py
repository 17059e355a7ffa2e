"""Function workers in an executor that the caller lends: what it can do is done, what it cannot is said by the plan."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jobs
import lent_jobs
import numpy as np
import pytest
from helpers import QUIET, event_of, needs, sh

import aioelastic
from aioelastic import Function, Group, GroupFailed, Logs, RemoteError, Restart, SpecError, Std, Stop, plan, supervise
from aioelastic.events import Exited, Ready, Spawned
from aioelastic.launch import DirectLauncher
from aioelastic.model.group_spec import GroupSpec

pytestmark = pytest.mark.one_loop  # what is held here is in the worker, and in what is sent

MAKERS: dict[str, Callable[[int], Executor]] = {
    "threads": lambda n: ThreadPoolExecutor(n),
    "processes": lambda n: ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("fork")),
    "workers": lambda n: aioelastic.WorkerExecutor(n, logs=QUIET),
}
IN_A_MOMENT = Stop(grace=0, bound=0.01)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    lent_jobs.fresh()
    yield
    lent_jobs.release.set()


@pytest.fixture(params=MAKERS)
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with MAKERS[request.param](2) as executor:
        yield executor
        lent_jobs.release.set()


@pytest.fixture(params=["processes", "workers"])
def processes(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with MAKERS[request.param](2) as executor:
        yield executor


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor
        lent_jobs.release.set()


async def run(entry: Any, n: int | None = None, **options: Any) -> Any:
    return await supervise(entry, n, **{"logs": QUIET, "check": False, **options})


async def begun(count: int = 1) -> None:
    for _ in range(count):
        await asyncio.to_thread(lent_jobs.begun.acquire)


async def opened(path: Path) -> None:
    """Wait until somebody opens that named pipe for writing."""
    os.close(await asyncio.to_thread(os.open, path, os.O_RDONLY))


# --- what they return ---


async def test_values(pool: Executor) -> None:
    result = await supervise(Function(jobs.product, 10, y=2), 5, start=pool, logs=QUIET)
    assert result.ok
    assert [one.value for one in result] == [20, 21, 22, 23, 24]
    assert [one.pid for one in result] == [None] * 5
    assert [str(one.exit) for one in result] == ["exit code 0"] * 5
    assert [one.usage for one in result] == [None] * 5
    assert pool.submit(jobs.product.__name__.upper).result() == "PRODUCT"  # it is still open


async def test_they_run_there(pool: Executor) -> None:
    value = (await run(Function(lent_jobs.where), start=pool))[0].value
    if isinstance(pool, ThreadPoolExecutor):
        assert value[0] == os.getpid()
        assert value[1].startswith("ThreadPoolExecutor")
    else:
        assert value[0] != os.getpid()


async def test_they_know_who_they_are_and_nobody_else_does(pool: Executor) -> None:
    result = await run(Function(lent_jobs.told), 2, start=pool)
    assert [one.value["who"] for one in result] == [(0, 2, 0, 0), (1, 2, 1, 0)]
    if not isinstance(pool, aioelastic.WorkerExecutor):  # whose workers are workers themselves
        for _ in range(4):
            pool.submit(lent_jobs.nobody).result()


async def test_async_functions_have_a_loop_of_their_own(pool: Executor) -> None:
    assert (await run(Function(jobs.loop_module), start=pool))[0].value == "uvloop"


async def test_large_values(pool: Executor) -> None:
    array = (await run(Function(jobs.zeros, 3_000_000), start=pool))[0].value
    assert array.nbytes == 3_000_000
    array[:] = 1
    shared = np.ones(200_000, dtype=np.uint8)
    assert (await run(Function(jobs.total, shared), start=pool))[0].value == 199_999


async def test_a_thread_shares_its_arguments_and_its_value(threads: Executor) -> None:
    held = [threading.Lock()]
    assert (await run(Function(lent_jobs.same, held), start=threads))[0].value is held


async def test_as_completed(pool: Executor, tmp_path: Path) -> None:
    pipes = [tmp_path / str(rank) for rank in range(2)]
    for one in pipes:
        os.mkfifo(one)
    async with Group([Function(jobs.waits_for, str(one)) for one in pipes], start=pool, logs=QUIET) as group:
        assert group.pids == {}
        seen = []
        os.close(await asyncio.to_thread(os.open, pipes[1], os.O_WRONLY))
        async for rank, value in group.as_completed():
            seen.append((rank, value))
            if rank == 1:
                os.close(await asyncio.to_thread(os.open, pipes[0], os.O_WRONLY))
    assert seen == [(1, 1), (0, 0)]


async def test_more_ranks_than_threads_wait_their_turn() -> None:
    with ThreadPoolExecutor(1) as executor:
        result = await run(Function(lent_jobs.in_turn), 50, start=executor)
    assert [one.value for one in result] == lent_jobs.order == list(range(50))


async def test_events(pool: Executor) -> None:
    async with Group(Function(jobs.tells), start=pool, logs=QUIET) as group:
        events = [event async for event in group.events()]
    kinds = [type(event) for event in events]
    assert kinds.index(Spawned) < kinds.index(Exited)
    assert events[kinds.index(Spawned)].pid is None
    assert (Ready in kinds) == isinstance(pool, ThreadPoolExecutor)


@pytest.mark.parametrize("executor", [lent_jobs.Inline(), lent_jobs.Bare()])
async def test_any_executor(executor: Any) -> None:
    result = await run(Function(jobs.product, 3), 3, start=executor)
    assert [one.value for one in result] == [3, 4, 5]
    result = await run(Function(jobs.fails), start=executor)
    assert result[0].failure.exception.exception.args == ("bad", 0)


LOKY = """
import asyncio, signal
import jobs, loky
from helpers import QUIET
from aioelastic import Function, SpecError, supervise

async def run(function, n=1):
    return await supervise(function, n, start=executor, logs=QUIET, check=False)

async def main():
    assert [one.value for one in await run(Function(jobs.product, 3), 3)] == [3, 4, 5]
    assert (await run(Function(jobs.fails)))[0].failure.exception.exception.args == ("bad", 0)
    assert "TerminatedWorkerError" in (await run(Function(jobs.dies, signal.SIGKILL)))[0].failure.cause
    executor.shutdown(kill_workers=True)
    try:
        await run(Function(jobs.product, 3))
    except SpecError as exc:
        assert exc.field == "start"
        print("all of it")

if __name__ == "__main__":
    executor = loky.ProcessPoolExecutor(2)
    asyncio.run(main())
"""


def test_loky(tmp_path: Path) -> None:
    """In a process of its own, since loky leaves a helper running until the end of it."""
    needs("loky")
    (tmp_path / "script.py").write_text(LOKY)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.stdout == "all of it\n", done.stderr


async def test_restart(threads: Executor) -> None:
    result = await run(Function(fails_at_first), 2, start=threads, restart=Restart.on_failure(max=1))
    assert result.ok
    assert [one.value for one in result] == [1, 1]
    assert [len(one.earlier) for one in result] == [1, 1]


def fails_at_first() -> int:
    if aioelastic.attempt() == 0:
        raise ValueError("not yet")
    return aioelastic.attempt()


# --- how they fail ---


async def test_the_exception_comes_back(pool: Executor) -> None:
    with pytest.raises(GroupFailed) as caught:
        await supervise(Function(jobs.fails), start=pool, logs=QUIET)
    error = caught.value.exceptions[0].__cause__
    assert isinstance(error, RemoteError)
    assert error.phase == "call"
    assert isinstance(error.exception, ValueError)
    assert error.exception.args == ("bad", 0)
    assert error.exception.__notes__ == ["a note"]
    assert isinstance(error.exception.__cause__, KeyError)
    assert "in fails\n" in error.traceback
    assert "aioelastic/child" not in error.traceback
    told = caught.value.exceptions[0].failure
    assert told.cause == "raised ValueError: ('bad', 0)"
    assert told.exit.code == 1
    assert told.status == 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.exceptions[0].__cause__.exception.args == ("bad", 0)


async def test_in_a_thread_it_is_the_exception_itself(threads: Executor) -> None:
    mine = LookupError("mine")

    def raises() -> None:
        raise mine

    told = (await run(Function(raises), start=threads))[0].failure
    assert told.exception.exception is mine


async def test_one_that_cannot_be_made_again(pool: Executor) -> None:
    told = (await run(Function(jobs.odd), start=pool))[0].failure
    assert told.cause == "raised jobs.Odd: 1 and 2"
    assert (told.exception.exception is None) == (not isinstance(pool, ThreadPoolExecutor))


async def test_several_failures_in_their_order(pool: Executor, tmp_path: Path) -> None:
    pipes = [tmp_path / str(rank) for rank in range(2)]
    for one in pipes:
        os.mkfifo(one)
    entries = [Function(lent_jobs.waits_then_fails, str(one)) for one in pipes]
    async with Group(entries, start=pool, logs=QUIET, check=False) as group:
        waiting = asyncio.create_task(event_of(group, Exited, 1))
        first = await asyncio.to_thread(os.open, pipes[1], os.O_WRONLY)
        second = await asyncio.to_thread(os.open, pipes[0], os.O_WRONLY)
        os.close(first)
        await waiting
        os.close(second)
        result = await group.wait()
    assert result.failures[0].rank == 1
    assert result.failures[0].first
    # the other raised after it had been asked to stop
    assert [one.rank for one in result.failures] == [1]
    assert result[0].stopped


async def test_what_is_written_about_it(pool: Executor, tmp_path: Path) -> None:
    for function, words in ((jobs.fails, "ValueError: ('bad', 0)"), (lent_jobs.recorded, "LookupError: recorded")):
        result = await run(Function(function), start=pool, logs=Logs(dir=tmp_path, tee=Std.NONE))
        written = json.loads((result.log_dir / "attempt_0" / "0" / "error.json").read_text())
        assert written["aioelastic"]["message"] == words
        assert written["aioelastic"]["rank"] == "0"
        assert result[0].failure.error.message == words
        assert os.listdir(result.log_dir / "attempt_0" / "0") == ["error.json"]


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("words", 1)])
async def test_sys_exit(pool: Executor, code: Any, status: int) -> None:
    (one,) = await run(Function(lent_jobs.leaves, code), start=pool)
    assert one.exit.code == status
    assert one.ok == (status == 0)


async def test_a_keyboard_interrupt_is_a_failure(pool: Executor) -> None:
    told = (await run(Function(jobs.interrupted), start=pool))[0].failure
    assert isinstance(told.exception.exception, KeyboardInterrupt)


async def test_a_process_that_dies_is_a_failure_in_words() -> None:
    with MAKERS["processes"](1) as pool:
        result = await run(Function(jobs.dies, signal.SIGKILL), start=pool)
    told = result[0].failure
    assert told.cause.startswith("its executor failed: concurrent.futures.process.BrokenProcessPool: A process in the")
    assert told.exception.phase == "executor"
    assert type(told.exception.exception).__name__ == "BrokenProcessPool"
    assert told.exit.code is None
    assert not result.ok
    with MAKERS["workers"](1) as pool:
        told = (await run(Function(jobs.dies, signal.SIGKILL), start=pool))[0].failure
    assert "SIGKILL" in told.cause


async def test_a_broken_pool_fails_all_that_it_had() -> None:
    with MAKERS["processes"](1) as pool:
        result = await run([Function(jobs.dies, signal.SIGKILL), *[Function(jobs.product, 1)] * 8], start=pool)
        assert not result.ok
        assert all(one.failure or one.ok or one.stopped for one in result)
        with pytest.raises(SpecError, match=r"start=.*BrokenProcessPool"):
            await run(Function(jobs.product, 1), start=pool)


async def test_a_value_that_cannot_travel(processes: Executor) -> None:
    told = (await run(Function(jobs.unpicklable_without_cloudpickle), start=processes))[0].failure
    assert told.cause.startswith("its result could not be pickled")
    assert (await run(Function(jobs.refuses), start=processes))[0].failure.cause.startswith(
        "its result could not be unpickled here: RuntimeError: not in this process"
    )
    assert (await run(Function(jobs.product, 1), start=processes)).ok  # the pool has not suffered


async def test_what_cannot_be_unpickled_there_does_not_break_the_pool(processes: Executor) -> None:
    told = (await run(Function(lent_jobs.same, jobs.Refuses()), start=processes))[0].failure
    assert told.cause == ("its function or arguments could not be unpickled there: RuntimeError: not in this process")
    assert (await run(Function(jobs.product, 1), start=processes)).ok


async def test_a_lambda_needs_cloudpickle_for_another_process(processes: Executor, monkeypatch: Any) -> None:
    three = 3
    assert (await run(Function(lambda x: x + three, 4), start=processes))[0].value == 7
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(SpecError, match="install cloudpickle") as caught:
        await run(Function(lambda x: x + three, 4), start=processes)
    assert caught.value.field == "fn of rank 0"
    with pytest.raises(SpecError) as caught:
        await run(Function(jobs.product, 1, threading.Lock()), start=processes)
    assert caught.value.field == "args[1] of jobs:product of rank 0"


async def test_what_an_unknown_executor_cannot_pickle_is_a_failure() -> None:
    """One that nobody knows to pickle: found out when it does."""

    class Unknown(lent_jobs.Inline):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            def later() -> Any:
                return pickle.loads(pickle.dumps(fn))()

            return super().submit(fn if fn is int else later)

    told = (await run(Function(jobs.product, 1, threading.Lock()), start=Unknown()))[0].failure
    assert "jobs:product or its arguments cannot be pickled: TypeError" in told.cause
    assert (await run(Function(jobs.product, 4), start=Unknown()))[0].value == 4
    assert (await run(Function(jobs.fails), start=Unknown()))[0].failure.exception.exception.args == ("bad", 0)


async def test_one_whose_executor_cancels_it() -> None:
    executor = lent_jobs.Held()
    async with Group(Function(jobs.product, 1), start=executor, logs=QUIET, check=False) as group:
        executor.held[0][0].cancel()
        result = await group.wait()
    assert result[0].failure.cause == "its executor cancelled it before it began"


async def test_one_whose_executor_returns_something_else() -> None:
    executor = lent_jobs.Held()
    async with Group(Function(jobs.product, 1), start=executor, logs=QUIET, check=False) as group:
        executor.held[0][0].set_result(5)
        result = await group.wait()
    assert "its executor returned 5" in result[0].failure.cause


# --- stopping ---


@pytest.mark.parametrize("function", [lent_jobs.heeds, lent_jobs.heeds_async])
async def test_a_thread_that_heeds_stopping(threads: Executor, function: Any) -> None:
    async with Group(Function(function), 2, start=threads, logs=QUIET) as group:
        await begun(2)
        result = await group.stop()
    assert [one.value for one in result] == ["saved", "saved"]
    assert all(one.stopped for one in result)
    assert result.ok


@pytest.mark.parametrize("function", [lent_jobs.heeds_and_says, lent_jobs.heeds_and_says_async])
async def test_a_process_that_heeds_stopping(processes: Executor, function: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    async with Group(Function(function, str(tmp_path / "begun")), start=processes, logs=QUIET) as group:
        await opened(tmp_path / "begun")
        result = await group.stop()
    assert result[0].value == "saved"
    assert result[0].stopped


async def test_one_rank_alone(threads: Executor) -> None:
    async with Group(Function(lent_jobs.heeds), 2, start=threads, logs=QUIET) as group:
        await begun(2)
        exit = await group[1].stop()
        assert exit is not None
        assert exit.stopped_by == signal.SIGTERM
        assert group[0].exit is None
        assert not group[0].send_signal(signal.SIGUSR1)  # nobody can
        assert not group[0].signal_group(signal.SIGTERM)
        assert group[0].send_signal(signal.SIGTERM)  # which asks it to stop, as any process
        result = await group.wait()
    assert [one.value for one in result] == ["saved", "saved"]


async def test_those_that_wait_are_cancelled() -> None:
    with ThreadPoolExecutor(1) as executor:
        async with Group(Function(lent_jobs.heeds), 3, start=executor, logs=QUIET) as group:
            await begun()
            result = await group.stop()
        assert [one.value for one in result] == ["saved", None, None]
        assert [one.stopped for one in result] == [True] * 3
        assert str(result[2].exit) == "stopped (SIGTERM)"
        assert result.ok


async def test_one_that_is_cancelled_late_does_not_begin() -> None:
    executor = lent_jobs.Held()
    async with Group(Function(lent_jobs.in_turn), start=executor, logs=QUIET) as group:
        future, job = executor.held[0]
        assert future.set_running_or_notify_cancel()
        stopping = asyncio.create_task(group.stop())
        await event_of(group, aioelastic.events.Stopping)
        future.set_result(job())
        result = await stopping
    assert lent_jobs.order == []
    assert result[0].stopped


async def test_a_thread_that_does_not_heed_is_left_behind(threads: Executor) -> None:
    async with Group(Function(lent_jobs.ignores), 2, start=threads, logs=QUIET, stop=IN_A_MOMENT) as group:
        await begun(2)
        result = await group.stop()
        lent_jobs.release.set()
    assert [one.rank for one in result.unkillable] == [0, 1]
    assert result.unkillable[0].pid is None
    assert "executor" in str(result.unkillable[0])
    assert not result.ok
    assert result[0].exit is None
    assert result[0].outcome == "would not die"
    assert result[0].unkillable == result.unkillable[0]


async def test_one_left_behind_writes_nothing_later(threads: Executor, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    async with Group(Function(lent_jobs.ignores_and_fails), start=threads, logs=QUIET, stop=IN_A_MOMENT) as group:
        await begun()
        await group.stop()
    lent_jobs.release.set()
    threads.shutdown()
    assert os.listdir(tmp_path) == []


def test_one_left_behind_outlives_its_loop(threads: Executor) -> None:
    async def main() -> Any:
        async with Group(Function(lent_jobs.ignores), start=threads, logs=QUIET, stop=IN_A_MOMENT) as group:
            await begun()
            return await group.stop()

    assert asyncio.run(main()).unkillable
    lent_jobs.release.set()
    threads.shutdown()


async def test_a_failure_stops_the_others(threads: Executor) -> None:
    result = await run([Function(lent_jobs.heeds), Function(jobs.fails)], start=threads)
    assert [one.rank for one in result.failures] == [1]
    assert result[0].stopped


async def test_a_timeout(threads: Executor) -> None:
    async with Group(Function(lent_jobs.heeds), n=2, start=threads, logs=QUIET, check=False) as group:
        await begun(2)
        group.limit(0)
        result = await group.wait()
    assert result.reason == "timeout"
    assert all(one.stopped for one in result)


async def test_a_timeout_that_is_over_before_any_has_started(threads: Executor) -> None:
    result = await run(Function(lent_jobs.heeds), 2, start=threads, timeout=0)
    assert result.reason == "timeout"
    assert [one.outcome for one in result] == ["never started"] * 2


async def test_cancelling_in_the_middle(pool: Executor) -> None:
    task = asyncio.create_task(supervise(Function(jobs.product, 1), 20, start=pool, logs=QUIET))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_what_runs(threads: Executor) -> None:
    task = asyncio.create_task(supervise(Function(lent_jobs.heeds), 5, start=threads, logs=QUIET))
    await begun(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- what they are given ---


async def test_variables_and_directory_are_lent_to_a_process(processes: Executor, tmp_path: Path) -> None:
    before = (None, os.getcwd())
    function = Function(lent_jobs.told).options(cwd=tmp_path, env={"MINE": "yes"})
    seen = (await run(function, start=processes))[0].value
    assert (seen["mine"], seen["rank"], seen["cwd"]) == ("yes", "0", str(tmp_path))
    for _ in range(4):
        assert processes.submit(lent_jobs.outside).result() == before
    assert (await run(Function(lent_jobs.told), start=processes, env={"MINE": "too"}))[0].value["mine"] == "too"


@pytest.mark.parametrize("executor", [ThreadPoolExecutor(1), lent_jobs.Inline()])
async def test_what_cannot_be_had_is_refused(executor: Executor, tmp_path: Path) -> None:
    for field, function, options in (
        ("env", Function(lent_jobs.told), {"env": {"MINE": "yes"}}),
        ("env of rank 0", Function(lent_jobs.told).options(env={"MINE": "yes"}), {}),
        ("cwd of rank 0", Function(lent_jobs.told).options(cwd=tmp_path), {}),
        ("preload", Function(lent_jobs.told), {"preload": ["json"]}),
        ("launcher", Function(lent_jobs.told), {"launcher": DirectLauncher(dict(os.environ))}),
    ):
        with pytest.raises(SpecError) as caught:
            await run(function, start=executor, **options)
        assert caught.value.field == field


async def test_a_fork_inside_a_thread_is_a_worker_of_its_own(threads: Executor) -> None:
    assert (await run(Function(lent_jobs.forks), start=threads))[0].value == [0, 1, 2]


async def test_show_locals(pool: Executor) -> None:
    told = (await run(Function(jobs.shows, 41).options(show_locals=True), start=pool))[0].failure
    assert "local_value = 42" in told.exception.traceback


# --- beside commands ---


async def test_beside_commands(pool: Executor) -> None:
    result = await run([Function(jobs.product, 3), sh("echo out $RANK")], start=pool)
    assert [one.value for one in result] == [3, None]
    assert str(result[1].stdout) == "out 1\n"
    assert (result[0].pid is None, result[1].pid is None) == (True, False)


async def test_a_command_that_fails_stops_the_thread(threads: Executor) -> None:
    result = await run([Function(lent_jobs.heeds), sh("exit 3")], start=threads)
    assert [one.rank for one in result.failures] == [1]
    assert result[0].stopped


async def test_a_thread_that_fails_stops_the_command(threads: Executor) -> None:
    result = await run([Function(jobs.fails), sh("exec sleep 1000")], start=threads)
    assert [one.rank for one in result.failures] == [0]
    assert result[1].stopped or result[1].pid is None


async def test_commands_alone_do_not_touch_it() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    assert (await run(sh("exit 0"), start=executor)).ok


# --- bad input, before anything starts ---


@pytest.mark.parametrize("kind", MAKERS)
async def test_one_that_is_shut_down(kind: str, tmp_path: Path) -> None:
    executor = MAKERS[kind](1)
    executor.shutdown()
    flag = tmp_path / "ran"
    with pytest.raises(SpecError, match=r"start=.*shut ?down") as caught:
        await run([sh(f"touch {flag}"), Function(jobs.product, 1)], start=executor)
    assert caught.value.field == "start"
    assert not flag.exists()


async def test_one_that_is_shut_down_meanwhile(threads: Executor) -> None:
    def shut(event: Any) -> None:
        if isinstance(event, Spawned):
            threads.shutdown(wait=False)

    result = await run([sh("exec sleep 1000"), *[Function(jobs.product, 1)] * 20], start=threads, on_event=shut)
    assert result.failures
    assert "could not start" in result.failures[0].cause
    assert "takes no more work" in result.failures[0].cause


@pytest.mark.parametrize("value", [ThreadPoolExecutor, object(), type("NotCallable", (), {"submit": 3})()])
async def test_no_executor(value: Any) -> None:
    with pytest.raises(SpecError, match="start=") as caught:
        await run(Function(jobs.product, 1), start=value)
    assert caught.value.field == "start"


async def test_a_submit_that_returns_nothing() -> None:
    class Odd:
        def submit(self, *args: Any) -> None:
            return None

    with pytest.raises(SpecError, match="start="):
        await run(Function(jobs.product, 1), start=Odd())


def test_an_executor_of_ours_has_processes_of_its_own(threads: Executor) -> None:
    with pytest.raises(SpecError, match="start="):
        aioelastic.WorkerExecutor(1, start=threads)  # type: ignore[arg-type]


async def test_many_that_wait_need_no_processes(threads: Executor) -> None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (await run(Function(jobs.product, 0), min(2 * soft, 3000), start=threads)).ok


# --- what the plan says ---


def test_the_plan_says_what_cannot_be_had(pool: Executor, tmp_path: Path) -> None:
    spec = GroupSpec.of([Function(jobs.product, 7), sh("true")], start=pool, logs=Logs(dir=tmp_path))
    text = str(plan(spec))
    function, command = text.split("\nrank 1: ")
    kind = type(pool).__name__
    assert f"rank 0: function jobs:product(7), in a {'thread' if 'Thread' in kind else 'process'} of " in function
    assert f"the caller's {kind}" in function
    for words in ("no pid", "cannot be signalled or killed", "what it prints", "Unkillable", "stopping()"):
        assert words in function
    assert ("env: RANK=0" in function) == (kind != "ThreadPoolExecutor")
    assert ("not in os.environ" in function) == (kind == "ThreadPoolExecutor")
    assert "std" not in function
    assert "AIOELASTIC_LINEAGE" not in function
    assert "stdout: tee" in command


def test_the_plan_of_an_unknown_executor() -> None:
    text = str(plan(GroupSpec.of(Function(jobs.product, 7), start=lent_jobs.Inline())))
    assert "wherever the caller's Inline runs it" in text
