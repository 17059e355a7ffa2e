"""Whatever comes of a task or a function is told to who waits for it, and ends nobody else."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import outcome_jobs as jobs
import pytest
from helpers import QUIET, sh

from aioelastic import (
    Function,
    Group,
    GroupFailed,
    Logs,
    RemoteError,
    Std,
    Stop,
    WorkerExecutor,
    WorkerFailed,
    supervise,
)
from aioelastic.child.wire import untrusted
from aioelastic.child.worker import error_record, exceptions
from aioelastic.events import Ready
from aioelastic.testing import FakeLauncher, Life

pytestmark = pytest.mark.one_loop  # what is held here is in the worker, and in what is sent

STARTS = ["zygote", "spawn", "fork"]
BOUND = 150.0  # seconds: only how long a hang may last


def told_by(error: BaseException) -> RemoteError:
    found = error if isinstance(error, RemoteError) else error.__cause__
    assert isinstance(found, RemoteError)
    return found


def type_of(kind: str) -> str:
    return type(jobs.KINDS[kind]()).__name__


# --- what a task raises ---


@pytest.mark.parametrize("kind", jobs.KINDS)
async def test_whatever_a_task_raises_reaches_who_awaits_it(kind: str) -> None:
    async with WorkerExecutor(1) as executor:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await asyncio.wait_for(executor.run(jobs.raises, kind), BOUND)
        assert type_of(kind) in told_by(caught.value).type_name
        assert await asyncio.wait_for(executor.run(abs, -1), BOUND) == 1


def test_whatever_a_task_raises_is_in_its_future() -> None:
    with WorkerExecutor(1) as executor:
        futures = {kind: executor.submit(jobs.raises, kind) for kind in jobs.KINDS}
        errors = {kind: future.exception(BOUND) for kind, future in futures.items()}
        assert executor.submit(abs, -1).result(BOUND) == 1
    assert {kind: isinstance(one, Exception) for kind, one in errors.items()} == dict.fromkeys(jobs.KINDS, True)
    for kind, error in errors.items():
        assert error is not None
        assert type_of(kind) in told_by(error).type_name


def test_one_that_lets_nothing_be_set_comes_with_all_it_has() -> None:
    """As the frozen dataclass that it may be."""
    frozen = jobs.FrozenWhole("odd")
    frozen.__dict__["__notes__"] = ["a note"]
    try:
        raise frozen from ValueError("cause")
    except jobs.FrozenWhole as exc:
        made, _ = exceptions.rebuild(exceptions.describe(exc)["packed"])
    assert isinstance(made, jobs.FrozenWhole)
    assert (made.word, made.__notes__, str(made.__cause__)) == ("odd", ["a note"], "cause")
    with WorkerExecutor(1) as executor:
        error = executor.submit(jobs.raises_one_that_has_no_cause).exception(BOUND)
        assert isinstance(error, jobs.HasNoCause)
        assert executor.submit(abs, -1).result(BOUND) == 1


async def test_the_thread_pool_way_of_asyncio_has_it_too() -> None:
    loop = asyncio.get_running_loop()
    with WorkerExecutor(1) as executor:
        for kind in ("StopIteration", "futures.CancelledError"):
            with pytest.raises(RemoteError):
                await asyncio.wait_for(loop.run_in_executor(executor, jobs.raises, kind), BOUND)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", [one for one in jobs.KINDS if not one.startswith("SystemExit")])
async def test_whatever_a_function_raises_is_its_failure(kind: str, start: Any) -> None:
    result = await supervise(Function(jobs.raises, kind), start=start, logs=QUIET, check=False)
    assert result[0].failure is not None
    assert type_of(kind) in str(result[0].failure.headline)


@pytest.mark.parametrize(
    ("code", "status"), [(256, 0), (257, 1), (-1, 255), (1 << 80, 255), (True, 1), ("text", 1), (b"", 1), ([], 1)]
)
@pytest.mark.parametrize("start", STARTS)
async def test_exit_codes_are_those_of_any_program(start: Any, code: Any, status: int) -> None:
    result = await supervise(Function(sys.exit, code), start=start, logs=QUIET, check=False)
    assert result[0].exit is not None
    assert (result[0].exit.code, result.ok) == (status, not status)


@pytest.mark.parametrize(("code", "status"), [(256, 0), (-1, 255), (1 << 80, 255), ("text", 1)])
async def test_exit_codes_in_a_lent_executor(code: Any, status: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = await supervise(Function(sys.exit, code), start=pool, logs=QUIET, check=False)
    assert result[0].exit is not None
    assert (result[0].exit.code, result.ok) == (status, not status)


# --- what unpickling raises here ---


@pytest.mark.parametrize("name", jobs.THROWN)
@pytest.mark.parametrize("function", [jobs.returns_rude, jobs.raises_rude])
async def test_a_task_whose_outcome_cannot_be_unpickled_fails_alone(function: Any, name: str) -> None:
    async with WorkerExecutor(1) as executor:
        await asyncio.wait_for(executor.run(abs, -1), BOUND)
        before = executor.pids
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await asyncio.wait_for(executor.run(function, name), BOUND)
        assert isinstance(caught.value, Exception)
        assert await asyncio.wait_for(executor.run(abs, -2), BOUND) == 2
        assert executor.pids == before


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", jobs.THROWN)
async def test_a_value_that_cannot_be_unpickled_is_that_workers_failure(name: str, start: Any) -> None:
    result = await supervise(Function(jobs.returns_rude, name), start=start, logs=QUIET, check=False)
    assert result[0].failure is not None
    assert "could not be unpickled here" in str(result[0].failure)


@pytest.mark.parametrize("name", jobs.THROWN)
async def test_an_error_that_cannot_be_unpickled_is_told_as_text(name: str) -> None:
    result = await supervise(Function(jobs.raises_rude, name), logs=QUIET, check=False)
    assert result[0].failure is not None
    with pytest.raises(GroupFailed) as caught:
        result.raise_for_failures()
    error = caught.value.exceptions[0].__cause__
    assert isinstance(error, RemoteError)
    assert (error.exception, error.message) == (None, "rude")
    assert name in error.not_rebuilt


@pytest.mark.parametrize("name", jobs.THROWN)
async def test_a_message_that_cannot_be_unpickled_is_an_error_of_receive(name: str) -> None:
    async with Group(Function(jobs.sends_rude, name), logs=QUIET) as group:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await group[0].receive()
        assert isinstance(caught.value, Exception)
        assert await group[0].receive() == "the next"
        result = await group.wait()
    assert result[0].value == "value"


async def test_such_a_message_is_not_taken_for_the_end_of_them() -> None:
    async with Group(Function(jobs.sends_rude, "EOFError"), logs=QUIET) as group:
        with pytest.raises(EOFError):
            _ = [one async for one in group[0]]
        assert [one async for one in group[0]] == ["the next"]


@pytest.mark.parametrize("function", [jobs.returns_rude, jobs.raises_rude])
@pytest.mark.parametrize("name", jobs.THROWN)
async def test_in_a_lent_executor_too(name: str, function: Any) -> None:
    with ProcessPoolExecutor(1) as pool:
        result = await supervise(Function(function, name), start=pool, logs=QUIET, check=False)
        assert result[0].failure is not None
        assert pool.submit(abs, -1).result(BOUND) == 1


class Alarm(Exception):
    pass


def rings(_: int, __: object) -> None:
    raise Alarm


def interrupts_itself(signum: int) -> None:
    """What a handler raises comes while Python runs."""
    signal.raise_signal(signum)
    for _ in range(1000):
        pass


class InterruptsWhoUnpickles:
    def __init__(self, signum: int) -> None:
        self.signum = int(signum)

    def __reduce__(self) -> Any:
        return interrupts_itself, (self.signum,)


@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, Alarm)])
def test_what_a_signal_handler_raises_meanwhile_is_the_programs(signum: int, kind: type[BaseException]) -> None:
    data = pickle.dumps(InterruptsWhoUnpickles(signum))
    before = [signal.signal(signal.SIGUSR1, rings), signal.signal(signal.SIGINT, signal.default_int_handler)]
    try:
        with pytest.raises(kind):
            untrusted.attempt(pickle.loads, data)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_keyboard_interrupt_without_a_signal_is_the_senders() -> None:
    value, problem = untrusted.attempt(pickle.loads, pickle.dumps(jobs.Rude("KeyboardInterrupt")))
    assert value is None
    assert isinstance(problem, RuntimeError)
    assert isinstance(problem.__cause__, KeyboardInterrupt)


def test_in_another_thread_no_handler_runs() -> None:
    found: list[Any] = []
    data = pickle.dumps(jobs.Rude("KeyboardInterrupt"))
    thread = threading.Thread(target=lambda: found.append(untrusted.attempt(pickle.loads, data)))
    thread.start()
    thread.join()
    assert isinstance(found[0][1], RuntimeError)


def test_a_ctrl_c_while_a_value_is_unpickled_ends_the_program() -> None:
    code = (
        "import asyncio, signal, sys, test_outcomes as t; from aioelastic import *\n"
        "async def main(): await supervise(Function(t.InterruptsWhoUnpickles, 2), logs=t.QUIET, check=False)\n"
        "signal.signal(2, signal.default_int_handler)\n"
        "loop = asyncio.new_event_loop()\n"
        "try: loop.run_until_complete(main())\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "import os; os._exit(0)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        timeout=BOUND,
    )
    assert ran.stdout == b"interrupted\n", ran.stderr


# --- chains ---


def diamond(levels: int) -> BaseException:
    below: BaseException = ValueError("leaf")
    for level in range(levels):
        left, right, top = ValueError("left", level), ValueError("right", level), ValueError("top", level)
        left.__cause__ = right.__cause__ = below
        top.__cause__, top.__context__ = left, right
        below = top
    return below


def chain(length: int) -> BaseException:
    last: BaseException = ValueError("first")
    for number in range(length):
        following = ValueError(number)
        following.__cause__ = following.__context__ = last
        last = following
    return last


def again(exc: BaseException) -> BaseException:
    found, why = exceptions.rebuild(exceptions.describe(exc)["packed"])
    assert found is not None, why
    return found


def test_what_is_shared_travels_once() -> None:
    packed = exceptions.describe(diamond(25))["packed"]
    assert len(packed["nodes"]) == 1 + 3 * 25
    found, _ = exceptions.rebuild(packed)
    assert found is not None
    assert found.__cause__ is not None
    assert found.__context__ is not None
    assert found.__cause__ is not found.__context__
    assert found.__cause__.__cause__ is found.__context__.__cause__


def test_a_long_chain_travels_whole_and_its_text_in_part() -> None:
    exc: BaseException | None = again(chain(1000))
    seen = 0
    while exc is not None:
        assert exc.__context__ is exc.__cause__
        exc, seen = exc.__cause__, seen + 1
    assert seen == 1001
    assert exceptions.describe(chain(1000))["traceback"].count("ValueError") == error_record.TOLD


def test_the_work_grows_with_the_chain() -> None:
    """Counted, not timed: calls of Python functions."""

    def calls(length: int) -> int:
        exc, count = chain(length), 0

        def counts(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(counts)
        try:
            exceptions.rebuild(exceptions._pack(exc))
        finally:
            sys.setprofile(None)
        return count

    assert calls(1000) < 10.5 * calls(100)


def test_signals_are_seen_to_once_for_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each of its exceptions, which takes longer than to unpickle one."""
    seen: list[bool] = []
    lend = untrusted._lend
    monkeypatch.setattr(untrusted, "_lend", lambda: seen.append(True) or lend())
    exceptions.rebuild(exceptions.describe(chain(100))["packed"])
    assert 0 < len(seen) < 10


def test_a_chain_of_arguments_has_a_limit_in_bytes() -> None:
    """Each holds all of those before it, as an argument."""
    last = ValueError("first")
    for _ in range(200):
        following = ValueError("x" * 100, last)
        following.__cause__ = last
        last = following
    packed = exceptions.describe(last)["packed"]
    assert sum(len(one.get("data", "")) for one in packed["nodes"]) < 3 * exceptions.SHOWN


def test_circles_come_back_as_circles() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__, other.__context__ = other, one, other
    found = again(one)
    assert found.__cause__ is not None
    assert found.__cause__.__cause__ is found
    assert found.__cause__.__context__ is found.__cause__


def test_a_long_chain_of_those_that_let_nothing_be_set() -> None:
    first = last = jobs.FrozenWhole("first")
    for number in range(2 * error_record.TOLD):
        cause = jobs.FrozenWhole(f"number {number}")
        error_record.assign(last, "cause", cause)
        last = cause
    assert "number 1" in error_record.formatted(first)
    assert len(error_record.reachable(first, 1000)) == 2 * error_record.TOLD + 1


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
async def test_a_copy_that_a_worker_has_forked_says_nothing_in_its_name(start: Any) -> None:
    async with Group(Function(jobs.has_a_copy_speak), start=start, logs=QUIET) as group:
        assert await group[0].receive() == "by itself"
        seen = [type(one) async for one in group.events()]
        assert (await group.wait())[0].value == 3
    assert Ready not in seen


@pytest.mark.parametrize("levels", [1, 4, 12, 25, 100])
def test_groups_that_share_their_parts_are_told_once(levels: int) -> None:
    """As often as each stands in one they would be more than there is memory for."""
    found: Exception = ValueError("within")
    for _ in range(levels):
        found = ExceptionGroup("group", [found, found])
    told = exceptions.describe(found)
    assert "ExceptionGroup: group" in told["traceback"]
    assert ("ValueError: within" in told["traceback"]) == (levels <= 4)
    assert ("they are too many" in told["traceback"]) == (levels >= 25)
    made, why = exceptions.rebuild(told["packed"])
    assert why == ""
    for _ in range(levels):
        assert isinstance(made, ExceptionGroup)
        one, other = made.exceptions
        assert one is other
        made = one
    assert isinstance(made, ValueError)


def test_telling_of_a_long_chain_leaves_it_as_it_is() -> None:
    exc = chain(100)
    exc.__suppress_context__ = False
    exceptions.describe(exc)
    one: BaseException | None = exc
    seen = 0
    while one is not None:
        assert one.__context__ is one.__cause__
        one, seen = one.__cause__, seen + 1
    assert seen == 101
    assert not exc.__suppress_context__


def test_parts_of_groups_keep_notes_and_causes_and_are_the_same() -> None:
    part = ValueError("part")
    part.add_note("a note")
    part.__cause__ = KeyError("why")
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [part]), TypeError("other")])
    group.__cause__ = part
    found = again(group)
    assert isinstance(found, ExceptionGroup)
    inner = found.exceptions[0]
    assert isinstance(inner, ExceptionGroup)
    assert inner.exceptions[0].__notes__ == ["a note"]
    assert isinstance(inner.exceptions[0].__cause__, KeyError)
    assert found.__cause__ is inner.exceptions[0]


def test_one_of_a_chain_that_cannot_travel_costs_that_one() -> None:
    exc = ValueError("last")
    exc.__cause__, exc.__context__ = jobs.Unpicklable("no"), TypeError("yes")
    found = again(exc)
    assert found.__cause__ is None
    assert isinstance(found.__context__, TypeError)


# --- callbacks ---


@pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt", "Outcome", "GeneratorExit", "ValueError"])
def test_a_callback_that_raises_keeps_no_other_from_being_called(kind: str, caplog: Any) -> None:
    def leaves(_: object) -> None:
        jobs.throw(kind)

    with WorkerExecutor(1) as executor:
        told: list[Future[Any]] = []
        future = executor.submit(jobs.own_pid)
        for call in (leaves, told.append, leaves, told.append):
            future.add_done_callback(call)
        assert executor.submit(jobs.own_pid).result(BOUND) == future.result(BOUND)
        future.add_done_callback(leaves)  # which is called at once
    assert told == [future] * 2
    assert caplog.text.count("exception calling callback") == 3


async def test_who_awaits_is_told_beside_a_callback_that_leaves() -> None:
    with WorkerExecutor(1) as executor:
        future = executor.submit(abs, -1)
        future.add_done_callback(lambda _: jobs.throw("SystemExit"))
        assert await asyncio.wait_for(asyncio.wrap_future(future), BOUND) == 1


# --- copies ---


@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
def test_the_copy_of_a_task_does_not_go_on_serving(how: str) -> None:
    with WorkerExecutor(1) as executor:
        first, rest = executor.submit(jobs.forks, how), [executor.submit(abs, -i) for i in range(20)]
        assert first.result(BOUND) == "itself"
        assert [one.result(BOUND) for one in rest] == list(range(20))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
def test_the_copy_of_an_initializer_does_not_serve(how: str, start: Any) -> None:
    with WorkerExecutor(1, initializer=jobs.forks, initargs=(how,), start=start) as executor:
        assert [one.result(BOUND) for one in [executor.submit(abs, -i) for i in range(20)]] == list(range(20))


def test_the_copy_of_what_is_unpickled_does_not_do_the_task() -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(jobs.same, jobs.ForksWhileUnpickled()).result(BOUND) == "itself"
        assert [one.result(BOUND) for one in [executor.submit(abs, -i) for i in range(20)]] == list(range(20))


def test_a_task_that_forks_while_its_result_is_pickled() -> None:
    with WorkerExecutor(1) as executor:
        first, rest = executor.submit(jobs.returns_what_forks), [executor.submit(abs, -i) for i in range(20)]
        assert first.result(BOUND) == "itself"
        assert [one.result(BOUND) for one in rest] == list(range(20))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
async def test_the_copy_of_a_function_tells_nothing(how: str, start: Any) -> None:
    result = await supervise(Function(jobs.forks, how), start=start, logs=QUIET)
    assert result[0].value == "itself"


@pytest.mark.parametrize("start", STARTS)
async def test_a_function_that_forks_while_its_value_is_pickled(start: Any) -> None:
    result = await supervise(Function(jobs.returns_what_forks), start=start, logs=QUIET)
    assert result[0].value == "itself"


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
async def test_the_copy_of_a_call_in_a_lent_executor_does_no_other_calls(how: str, pool: Any) -> None:
    with pool(1) as lent:
        result = await supervise(Function(jobs.forks, how), start=lent, logs=QUIET)
        assert result[0].value == "itself"
        assert [lent.submit(abs, -i).result(BOUND) for i in range(5)] == list(range(5))


# --- what a task does to its process ---


def test_a_task_that_closes_descriptors_costs_itself_at_most() -> None:
    with WorkerExecutor(1) as executor:
        before = executor.submit(jobs.own_pid).result(BOUND)
        with pytest.raises((WorkerFailed, BrokenExecutor)):
            executor.submit(jobs.closes_all).result(BOUND)
        assert executor.submit(jobs.own_pid).result(BOUND) != before


def test_what_a_task_opens_by_the_number_of_the_channel_is_not_written_to() -> None:
    with WorkerExecutor(1) as executor:
        with pytest.raises((WorkerFailed, BrokenExecutor)):
            executor.submit(jobs.closes_all_and_opens, 10).result(BOUND)
        assert executor.submit(abs, -1).result(BOUND) == 1


def test_a_directory_and_threads_stay_for_later_tasks_as_in_any_pool(tmp_path: Path) -> None:
    with WorkerExecutor(1) as executor:
        pid = executor.submit(jobs.goes_to, str(tmp_path)).result(BOUND)
        assert executor.submit(jobs.leaves_a_thread).result(BOUND) == 2
        assert executor.submit(jobs.where).result(BOUND) == (str(tmp_path), pid)


def test_a_limit_that_a_task_sets_stays_for_later_tasks_as_in_any_pool() -> None:
    with WorkerExecutor(1) as executor:
        pid = executor.submit(jobs.limits_its_core_dumps, 4096).result(BOUND)
        assert executor.submit(jobs.core_limit).result(BOUND) == (4096, pid)


def test_map_with_chunks_runs_coroutine_functions() -> None:
    with WorkerExecutor(2) as executor:
        assert list(executor.map(jobs.twice, range(10), chunksize=3)) == [2 * i for i in range(10)]


def test_map_with_chunks_tells_a_stop_iteration() -> None:
    with WorkerExecutor(1) as executor, pytest.raises(RemoteError):
        list(executor.map(jobs.raises, ["StopIteration"] * 4, chunksize=2))


# --- another user ---


def of_nobody(what: str) -> Any:
    from aioelastic.child.worker.send_receive import send  # nobody may not be allowed to read where this is

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65_534)
        os.setuid(65_534)
    if what == "message":
        send(jobs.Rude("SystemExit"))
    if what == "error":
        raise ValueError("in words")
    return jobs.Rude("SystemExit")


root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@root
async def test_nothing_that_another_user_sends_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    unpickled: list[str] = []
    monkeypatch.setattr(jobs, "throw", unpickled.append)
    async with Group(Function(of_nobody, "message"), logs=QUIET, check=False) as group:
        with pytest.raises(PermissionError, match="another user"):
            await group[0].receive()
    for what in ("value", "error"):
        result = await supervise(Function(of_nobody, what), logs=QUIET, check=False)
        assert result[0].failure is not None
        assert ("another user" if what == "value" else "in words") in str(result[0].failure)
        error = result[0].failure.exception
        assert error is None or (isinstance(error, RemoteError) and error.exception is None)
    assert unpickled == []


@root
def test_tasks_of_another_user_are_told_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    unpickled: list[str] = []
    monkeypatch.setattr(jobs, "throw", unpickled.append)
    with WorkerExecutor(1) as executor:
        problems = [executor.submit(of_nobody, what).exception(BOUND) for what in ("value", "error")]
    value, error = (told_by(one) for one in problems if one is not None)
    assert "another user" in value.message
    assert (error.type_name, error.message, error.exception) == ("ValueError", "in words", None)
    assert "another user" in error.not_rebuilt
    assert unpickled == []


async def test_what_a_worker_had_written_that_does_not_die_is_read(tmp_path: Path) -> None:
    """Though whoever takes it had it wait in the pipe."""
    words = b"the last that it says\n"
    launcher = FakeLauncher(Life(undying=True))
    logs = Logs(dir=tmp_path, tee=Std.NONE)
    async with Group(sh("exit 0"), logs=logs, launcher=launcher, stop=Stop(grace=0, bound=0), check=False) as group:
        group._supervisor.workers[0].output._pumps[Std.OUT].hold("somebody")
        launcher[0].write(words)
        result = await group.stop()
    assert result[0].outcome == "would not die"
    assert result[0].stdout.tail == words
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == words
