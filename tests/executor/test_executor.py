"""`WorkerExecutor`, held to what concurrent.futures promises, and to what it promises besides."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Future,
    as_completed,
    wait,
)
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from helpers import alive, gone, kill_and_see_it_dead, stopped_itself

from aioelastic import Remains, RemoteError, SpecError, TaskTimeout, WorkerExecutor, WorkerFailed
from aioelastic.executor import workers

STARTS = ["zygote", "spawn", "fork"]


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def executor() -> Iterator[WorkerExecutor]:
    with WorkerExecutor(2) as one:
        yield one


class Gate:
    """A task that is in it waits until it is opened."""

    def __init__(self, home: Path, name: str = "gate") -> None:
        self.path = str(home / name)
        os.mkfifo(self.path)
        self._fd = -1

    def entered(self) -> None:
        """Wait until somebody is in it."""
        self._fd = os.open(self.path, os.O_WRONLY)

    def open(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is not in there any more
            os.write(self._fd, b"\n")
        os.close(self._fd)


# --- as concurrent.futures ---


async def _twice(value: int) -> int:
    await asyncio.sleep(0)
    return 2 * value


def test_a_callback_may_run_a_loop_of_its_own() -> None:
    told: list[int] = []
    with WorkerExecutor(1) as executor:
        future = executor.submit(abs, -1)
        future.add_done_callback(lambda one: told.append(asyncio.run(_twice(one.result()))))
        wait([future])
        assert executor.submit(abs, -2).result() == 2
    assert told == [2]


class _OfTheMainThread(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        assert threading.current_thread() is threading.main_thread()
        return super().new_event_loop()


def test_whatever_policy_for_event_loops_the_program_has() -> None:
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_OfTheMainThread())
    try:
        with WorkerExecutor(1) as executor:
            assert executor.submit(abs, -1).result(30) == 1
    finally:
        asyncio.set_event_loop_policy(before)


def test_submit(start: Any) -> None:
    with WorkerExecutor(2, start=start) as executor:
        assert executor.submit(pow, 2, 8).result() == 256
        assert executor.submit(jobs.named, 2, y=3).result() == 6
        assert executor.submit(dict, self=1, fn=2).result() == {"self": 1, "fn": 2}


def test_map(executor: WorkerExecutor) -> None:
    assert list(executor.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(executor.map(pow, range(10), range(10), chunksize=3)) == list(map(pow, range(10), range(10)))
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(pow, range(2), range(2), chunksize=0)


def test_map_with_an_exception(executor: WorkerExecutor) -> None:
    results = executor.map(divmod, [1, 1, 1], [2, 1, 0])
    assert next(results) == (0, 1)
    assert next(results) == (1, 0)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_with_a_timeout(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        with pytest.raises(TimeoutError):
            list(executor.map(abs, [1], timeout=0))
        gate.open()


def test_map_of_many_calls(executor: WorkerExecutor) -> None:
    assert list(executor.map(abs, range(2_000))) == list(range(2_000))


def test_results_in_the_order_of_the_tasks_and_futures_by_completion(executor: WorkerExecutor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    slow, quick = executor.submit(jobs.waits_in, gate.path), executor.submit(abs, -1)
    done, pending = wait([slow, quick], return_when=FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {slow})
    assert slow.running()
    assert not slow.cancel()
    gate.entered()
    gate.open()
    done, pending = wait([slow, quick], return_when=ALL_COMPLETED)
    assert not pending


def test_what_waits_can_be_cancelled(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        second, third = executor.submit(abs, -2), executor.submit(abs, -3)
        assert second.cancel()
        gate.open()
        assert third.result() == 3
        assert first.result() == gate.path
        with pytest.raises(CancelledError):
            second.result()


def test_nothing_after_shutdown(executor: WorkerExecutor) -> None:
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    executor.shutdown()


def test_shutdown_finishes_what_was_submitted(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    executor = WorkerExecutor(1)
    futures = [executor.submit(jobs.waits_in, gate.path), *(executor.submit(abs, -i) for i in range(5))]
    executor.shutdown(wait=False)
    gate.entered()
    gate.open()
    executor.shutdown()
    assert [one.result() for one in futures[1:]] == list(range(5))


def test_shutdown_that_cancels(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    executor = WorkerExecutor(1)
    first = executor.submit(jobs.waits_in, gate.path)
    gate.entered()
    rest = [executor.submit(abs, i) for i in range(5)]
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    executor.shutdown()
    assert first.result() == gate.path
    assert all(one.cancelled() for one in rest)


def test_never_used() -> None:
    WorkerExecutor(2).shutdown()


def test_one_that_is_forgotten_ends() -> None:
    executor = WorkerExecutor(2)
    assert executor.submit(abs, -1).result() == 1
    pool = executor._pool
    del executor
    gc.collect()
    pool.join()


def test_an_interpreter_that_ends_finishes_what_was_submitted() -> None:
    script = "from aioelastic import WorkerExecutor; e = WorkerExecutor(2); e.submit(print, 'apple')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150)
    assert (done.stdout, done.stderr, done.returncode) == ("apple\n", "", 0)


def test_an_initializer(start: Any) -> None:
    with WorkerExecutor(2, start=start, initializer=jobs.remember, initargs=("it",)) as executor:
        assert executor.submit(jobs.remembered).result() == "it"


async def _remembers(value: int) -> None:
    await asyncio.sleep(0)
    jobs.remember(value)


def test_an_async_initializer(start: Any) -> None:
    with WorkerExecutor(1, start=start, initializer=_remembers, initargs=(7,)) as executor:
        assert executor.submit(jobs.remembered).result() == 7


def test_an_initializer_that_fails(start: Any) -> None:
    with WorkerExecutor(2, start=start, initializer=jobs.fails_plainly) as executor:
        futures = [executor.submit(abs, 1) for _ in range(3)]
        for one in futures:
            with pytest.raises(BrokenExecutor, match="ValueError: plainly"):
                one.result()
        with pytest.raises(BrokenExecutor):
            executor.submit(abs, 1)


def test_what_does_not_pickle_fails_by_itself(executor: WorkerExecutor) -> None:
    with pytest.raises(TypeError, match="pickle"):
        executor.submit(id, threading.Lock()).result()
    assert executor.submit(abs, -1).result() == 1


def test_a_result_that_does_not_pickle(executor: WorkerExecutor) -> None:
    with pytest.raises(TypeError, match="pickle"):
        executor.submit(threading.Lock).result()
    assert executor.submit(abs, -1).result() == 1


def test_the_traceback_comes_with_the_exception(executor: WorkerExecutor) -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        executor.submit(jobs.fails_anywhere).result()
    assert caught.value.__notes__ == ["a note"]
    told = caught.value.__cause__
    assert isinstance(told, RemoteError)
    assert "in fails_anywhere" in told.traceback
    assert "KeyError: 'the reason'" in told.traceback


@pytest.mark.parametrize("function", [jobs.interrupted, sys.exit])
def test_an_exit_fails_its_task_only(executor: WorkerExecutor, function: Any) -> None:
    with pytest.raises(RemoteError):
        executor.submit(function).result()
    assert executor.submit(abs, -1).result() == 1


def test_nothing_of_a_task_stays() -> None:
    class Held:
        pass

    held = Held()
    seen = weakref.ref(held)
    with WorkerExecutor(1, start="fork") as executor:
        executor.submit(abs, 1).result()
        future: Future[Any] = executor.submit(id, 3)
        future.result()
        del held, future
        gc.collect()
        assert seen() is None


def test_from_many_threads(executor: WorkerExecutor) -> None:
    results: list[int] = []

    def use(first: int) -> None:
        results.extend(executor.map(abs, range(first, first + 50)))

    threads = [threading.Thread(target=use, args=(first,)) for first in range(0, 400, 50)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(results) == list(range(400))


# --- what it has besides ---


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_fails_only_its_task(start: Any, signum: int) -> None:
    with WorkerExecutor(2, start=start) as executor:
        futures = [executor.submit(jobs.dies, signum) if i == 3 else executor.submit(abs, -i) for i in range(12)]
        for i, one in enumerate(futures):
            if i == 3:
                with pytest.raises(WorkerFailed) as caught:
                    one.result()
                assert caught.value.failure.exit is not None
                assert caught.value.failure.exit.signal == signum
                if signum == signal.SIGSEGV:
                    assert "in dies" in "\n".join(caught.value.failure.stderr.last_lines(50))
            else:
                assert one.result() == i


def test_one_that_is_killed_while_idle_is_replaced(executor: WorkerExecutor) -> None:
    assert executor.submit(abs, -1).result() == 1
    (pid,) = executor.pids
    kill_and_see_it_dead(pid, signal.SIGKILL)  # else it may still take the next task
    assert [executor.submit(abs, -i).result() for i in range(20)] == list(range(20))
    assert executor.pids != [pid]


def is_sent(executor: WorkerExecutor) -> None:
    """Wait until a worker was sent a task."""
    while not any(one.task is not None for one in list(executor._pool._owner._slots.all.values())):
        time.sleep(0)


@contextmanager
def held_up(executor: WorkerExecutor) -> Iterator[int]:
    """Its one worker takes no task, and is killed at the end."""
    (pid,) = executor.pids
    os.kill(pid, signal.SIGSTOP)
    asyncio.run(stopped_itself(pid))
    yield pid
    os.kill(pid, signal.SIGKILL)


def test_what_a_killed_worker_had_not_taken_is_given_to_another(start: Any) -> None:
    with WorkerExecutor(1, start=start) as executor:
        assert executor.submit(abs, -1).result() == 1
        with held_up(executor) as pid:
            futures = [executor.submit(os.getpid) for _ in range(3)]
            is_sent(executor)
        assert len({one.result() for one in futures} | {pid}) == 2


def test_what_it_had_taken_is_not_run_twice(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        future = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        with held_up(executor):
            pass
        with pytest.raises(WorkerFailed):
            future.result()
        gate.open()
        assert executor.submit(abs, -1).result() == 1


def test_what_went_with_descriptors_is_not_given_again() -> None:
    """They are gone."""
    with WorkerExecutor(1) as executor:
        assert executor.submit(abs, -1).result() == 1
        with held_up(executor):
            future = executor.submit(np.sum, np.ones(1 << 17))
            is_sent(executor)
        with pytest.raises(WorkerFailed):
            future.result()
        assert executor.submit(abs, -1).result() == 1


def test_what_copies_of_the_worker_may_have_taken_is_not_run_twice() -> None:
    """Who has its channel, too, may read there."""
    with WorkerExecutor(1) as executor:
        copy = executor.submit(jobs.leaves_a_copy).result()
        with held_up(executor):
            future = executor.submit(abs, -1)
            is_sent(executor)
        with pytest.raises(WorkerFailed):
            future.result()
        assert not alive(copy)


def test_a_task_that_takes_too_long(start: Any) -> None:
    with WorkerExecutor(1, start=start, task_timeout=0.05) as executor:
        slow = executor.submit(jobs.sleeps)
        quick = executor.submit(abs, -1)
        with pytest.raises(TaskTimeout, match=r"longer than 0\.05 s"):
            slow.result()
        assert isinstance(quick.exception(), TaskTimeout | None)  # a machine under load may need as long to fork


def test_a_worker_ends_after_so_many_tasks() -> None:
    with WorkerExecutor(1, tasks_per_worker=3) as executor:
        pids = [executor.submit(os.getpid).result() for _ in range(9)]
    assert [len(set(pids[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


def test_a_worker_that_has_grown_is_replaced() -> None:
    with WorkerExecutor(1, memory_limit=300 * 2**20) as executor:
        first = executor.submit(os.getpid).result()
        assert executor.submit(os.getpid).result() == first
        executor.submit(jobs.grows, 400 * 2**20).result()
        assert executor.submit(os.getpid).result() != first


_NUMBERS = ("RANK", "LOCAL_RANK", "ROLE_RANK", "WORLD_SIZE", "AIOELASTIC_LOCAL_WORLD_SIZE")


def test_one_that_takes_anothers_place_has_its_rank(start: Any) -> None:
    """Scripts compare it with the size of the world, and take a GPU by it."""
    with WorkerExecutor(2, start=start, tasks_per_worker=1) as executor:
        for _ in range(4):
            assert executor.submit(_numbers).result() in (list("00022"), list("11122"))
        restarts = {executor.submit(os.getenv, "AIOELASTIC_ATTEMPT").result() for _ in range(4)}
        assert len(restarts) > 1
        executor.resize(3)
        assert executor.submit(_numbers).result()[3:] == ["3", "3"]
    with WorkerExecutor(1, start=start, env={"RANK": "7"}) as executor:
        assert executor.submit(_numbers).result() == ["7", "0", "7", "1", "1"]


def _numbers() -> list[str | None]:
    return [os.environ.get(key) for key in _NUMBERS]


def test_more_and_fewer(tmp_path: Path) -> None:
    with WorkerExecutor(1) as executor:
        gates = [Gate(tmp_path, str(i)) for i in range(4)]
        futures = [executor.submit(jobs.waits_in, one.path) for one in gates]
        gates[0].entered()
        assert len(executor.pids) == 1
        executor.resize(4)
        for one in gates[1:]:
            one.entered()  # so they run side by side
        assert len(executor.pids) == 4
        executor.resize(1)
        for one in gates:
            one.open()
        assert [one.result() for one in futures] == [one.path for one in gates]
        assert {executor.submit(os.getpid).result() for _ in range(20)} <= set(executor.pids)
        assert len({executor.submit(os.getpid).result() for _ in range(20)}) == 1


def test_submit_waits_for_room(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1, max_pending=2) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        executor.submit(abs, 1)
        third: list[Future[int]] = []
        thread = threading.Thread(target=lambda: third.append(executor.submit(abs, -3)))
        thread.start()
        assert not third
        gate.open()
        thread.join()
        assert third[0].result() == 3
        assert first.done()


def test_async_functions_and_large_arrays(executor: WorkerExecutor) -> None:
    assert executor.submit(jobs.loop_module).result() == "uvloop"
    array = np.arange(1_000_000)
    assert (executor.submit(np.add, array, 1).result() == array + 1).all()


def test_lambdas_go_by_value(executor: WorkerExecutor) -> None:
    three = 3
    assert list(executor.map(lambda x: x + three, range(3))) == [3, 4, 5]


def test_what_they_print_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerExecutor(1) as executor:
        executor.submit(print, "hello from a worker").result()
    assert "hello from a worker\n" in capfd.readouterr().out


async def test_run_and_map_unordered(start: Any) -> None:
    async with WorkerExecutor(2, start=start) as executor:
        assert await executor.run(abs, -1) == 1
        assert sorted([one async for one in executor.map_unordered(abs, range(-50, 0))]) == list(range(1, 51))
        with pytest.raises(ZeroDivisionError):
            async for _ in executor.map_unordered(divmod, [1, 1], [1, 0]):
                pass
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(executor, abs, -5) == 5


async def test_map_unordered_while_there_are_fewer_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Future[int]] = []

    async def submit_soon(body: object, timeout: object) -> Future[int]:
        begun.append(Future())
        return begun[-1]

    async with WorkerExecutor(3) as executor:
        monkeypatch.setattr(executor._pool, "submit_soon", submit_soon)
        results = executor.map_unordered(abs, range(8))
        for number in range(8):
            coming = asyncio.ensure_future(anext(results))
            while len(begun) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0)
            begun[number].set_result(number)
            assert await coming == number
            executor.resize(1)
        assert [one async for one in results] == []


@pytest.mark.parametrize("count", [0, 1, 49, 50, 51, 230])
async def test_map_unordered_in_chunks(count: int) -> None:
    async with WorkerExecutor(2) as executor:
        found = [one async for one in executor.map_unordered(abs, range(count), chunksize=50)]
        assert sorted(found) == list(range(count))
        with pytest.raises(TypeError):
            _ = [one async for one in executor.map_unordered(abs, [1, None], chunksize=2)]
        with pytest.raises(SpecError, match="chunksize"):
            _ = [one async for one in executor.map_unordered(abs, [1], chunksize=0)]


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_workers_that_are_ended(how: str, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        running = executor.submit(jobs.waits_in, gate.path)
        waiting = executor.submit(abs, -1)
        gate.entered()
        getattr(executor, how)()
        failed = running.exception()
        assert isinstance(failed, WorkerFailed)
        assert failed.failure.exit is not None
        assert failed.failure.exit.signal == (signal.SIGTERM if how == "terminate_workers" else signal.SIGKILL)
        assert waiting.cancelled()
        with pytest.raises(RuntimeError):
            executor.submit(abs, -1)
        getattr(executor, how)()  # once more does nothing
    gate.open()


def test_ctrl_c_in_the_block_does_not_wait_for_what_runs(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with pytest.raises(KeyboardInterrupt), WorkerExecutor(1) as executor:  # noqa: PT012
        running = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        raise KeyboardInterrupt
    assert isinstance(running.exception(), WorkerFailed)
    gate.open()


@pytest.mark.parametrize("late", [False, True], ids=["in the block", "leaving it"])
async def test_cancelled_it_ends_what_runs_and_what_that_has_left(tmp_path: Path, late: bool) -> None:
    home = tmp_path / "pids"
    os.mkfifo(home)
    running: list[Future[Any]] = []

    async def work() -> None:
        async with WorkerExecutor(1) as executor:
            running.append(executor.submit(jobs.hides_and_hangs, str(home)))
            if not late:
                await asyncio.wrap_future(running[0])

    task = asyncio.ensure_future(work())
    pids = [int(one) for one in (await asyncio.to_thread(home.read_text)).split()]
    assert len(pids) == 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(map(alive, pids))
    assert running[0].cancelled() or isinstance(running[0].exception(), WorkerFailed)


@pytest.mark.parametrize("after", [jobs.leaves_a_daemon, jobs.leaves_a_copy], ids=["out of sight", "in its session"])
def test_what_tasks_leave_running_is_told(caplog: pytest.LogCaptureFixture, after: Any) -> None:
    """It is ended: who has meant it to stay reads why it has not."""
    with WorkerExecutor(1, name="mine") as executor:
        pid = executor.submit(after).result()
        assert alive(pid)
    assert not alive(pid)
    (told,) = [one for one in caplog.records if one.name == "aioelastic"]
    assert told.levelname == "WARNING"
    assert told.getMessage().startswith(f"executor 'mine': process {pid} (")
    assert "was left running" in told.getMessage()


def test_what_cannot_be_ended_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a group has it in its `remains`; and nobody is harmed by a handler that raises."""

    async def clear(*_: object) -> list[Remains]:
        return [Remains("process", "process 7 (dd) still runs", pid=7), Remains("unproven", "who knows")]

    def refuses(record: logging.LogRecord) -> bool:
        if "who knows" in record.getMessage():
            raise ValueError("no")
        return True

    monkeypatch.setattr(workers, "clear", clear)
    monkeypatch.setattr(logging.getLogger("aioelastic"), "filters", [refuses])
    with WorkerExecutor(1) as executor:
        assert executor.submit(abs, -1).result() == 1
    assert [one.getMessage() for one in caplog.records] == ["executor 'executor': process 7 (dd) still runs"]


async def test_run_that_is_cancelled_while_it_waits(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    async with WorkerExecutor(1) as executor:
        first = asyncio.ensure_future(executor.run(jobs.waits_in, gate.path))
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.entered)
        second = asyncio.ensure_future(executor.run(jobs.touches, str(tmp_path / "second")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open()
        await first
    assert not (tmp_path / "second").exists()


def test_a_worker_may_fork_workers_of_its_own(start: Any) -> None:
    """They are no copies of it that have gone on by themselves."""
    with WorkerExecutor(1, start=start) as executor:
        assert executor.submit(jobs.uses_a_forked_executor).result() == 3


# --- trouble ---


def test_a_preload_that_fails_is_told_by_the_first_task() -> None:
    with WorkerExecutor(2, preload=["absent_module"]) as executor:
        future = executor.submit(abs, 1)
        with pytest.raises(SpecError, match="absent_module"):
            future.result()
        with pytest.raises(BrokenExecutor):
            executor.submit(abs, 1)


def test_a_zygote_that_dies_is_survived(executor: WorkerExecutor) -> None:
    zygote = executor.submit(os.getppid).result()
    workers = executor.pids
    os.kill(zygote, signal.SIGKILL)
    for pid in workers:  # they die with it, but not at that instant
        asyncio.run(gone(pid))
    outcomes = []
    for i in range(10):
        try:
            outcomes.append(executor.submit(abs, -i).result())
        except (WorkerFailed, BrokenExecutor):
            outcomes.append(None)
    assert outcomes[-1] == 9


def test_a_forked_copy_has_no_executor(executor: WorkerExecutor) -> None:
    executor.submit(abs, 1).result()
    pid = os.fork()
    if pid == 0:
        try:
            executor.submit(abs, 1)
        except RuntimeError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


WAYS_TO_WAIT: dict[str, Callable[[list[Future[Any]]], object]] = {
    "result": lambda futures: futures[0].result(30),
    "one that waits": lambda futures: futures[-1].result(30),
    "exception": lambda futures: raised(futures[0].exception(30)),
    "as_completed": lambda futures: [one.result() for one in as_completed(futures, 30)],
    "wait": lambda futures: [one.result() for one in wait(futures, 30).done],
    "await": lambda futures: asyncio.run(_awaited(futures[0])),
}


async def _awaited(future: Future[Any]) -> Any:
    return await asyncio.wait_for(asyncio.wrap_future(future), 30)


def raised(problem: BaseException | None) -> None:
    assert problem is not None
    raise problem


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_a_forked_copy_waits_for_no_future(way: str, tmp_path: Path) -> None:
    """Whatever locks of them other threads had at that moment."""
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        futures = [executor.submit(jobs.waits_in, gate.path), executor.submit(abs, -2)]
        gate.entered()
        done = executor.submit(abs, -1)
        assert done.cancel()
        with futures[0]._condition, futures[1]._condition:
            pid = os.fork()
            if pid == 0:
                told = ""
                signal.alarm(60)
                try:
                    WAYS_TO_WAIT[way](futures)
                except BaseException as exc:
                    told = str(exc)
                executor.shutdown()
                os._exit(7 if "this is a forked copy" in told and done.cancelled() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        gate.open()
        assert [one.result(60) for one in futures] == [gate.path, 2]


def test_a_forked_copy_in_the_midst_of_as_completed(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(2) as executor:
        running = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        several = as_completed([running, executor.submit(abs, -1)], 60)
        assert next(several).result() == 1
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            os._exit(7 if isinstance(next(several).exception(), RuntimeError) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        gate.open()
        assert next(several).result() == gate.path


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_workers": 0}, "max_workers"),
        ({"max_workers": 1.5}, "max_workers"),
        ({"initializer": print, "initargs": 5}, "initargs"),
        ({"initializer": print, "initargs": "seven"}, "initargs"),
        ({"initializer": 3}, "initializer"),
        ({"task_timeout": -1}, "task_timeout"),
        ({"tasks_per_worker": 0}, "tasks_per_worker"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"max_pending": 0}, "max_pending"),
        ({"start": "forkserver"}, "start"),
    ],
)
def test_bad_arguments(options: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        WorkerExecutor(**options)
    assert caught.value.field == field
