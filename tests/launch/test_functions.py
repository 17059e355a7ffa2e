"""Function workers, by every way to start one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import operator
import os
import pickle
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import psutil
import pytest
import warm_jobs
from helpers import QUIET, gone, kill_and_see_it_dead, sh, until
from test_executor import Gate

from aioelastic import (
    Function,
    Group,
    GroupFailed,
    GroupResult,
    Logs,
    RemoteError,
    Restart,
    SpecError,
    Std,
    Stop,
    Worker,
    WorkerExecutor,
    plan,
    supervise,
)
from aioelastic.events import Exited, Ready, Spawned
from aioelastic.launch import _function_channel, _zygote
from aioelastic.model.group_spec import GroupSpec

STARTS = ["zygote", "spawn", "fork"]


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> Any:
    return request.param


async def run(function: Function, n: int = 1, **options: Any) -> GroupResult:
    return await supervise(function, n, **{"logs": QUIET, "check": False, **options})


async def failure(function: Function, **options: Any) -> Any:
    result = await run(function, **options)
    assert not result.ok
    assert result[0].failure is not None
    pickle.loads(pickle.dumps(result))
    return result[0].failure


# --- what they return ---


async def test_values(start: Any) -> None:
    result = await supervise(Function(jobs.product, 10, y=2), 3, start=start, logs=QUIET)
    assert result.ok
    assert [one.value for one in result] == [20, 21, 22]
    assert all(one.exit is not None and one.exit.code == 0 for one in result)
    assert all(one.usage is not None and one.usage.max_rss > 0 for one in result)


async def test_async_functions_have_a_loop_of_their_own(start: Any) -> None:
    result = await run(Function(jobs.loop_module), start=start)
    assert result[0].value == "uvloop"


async def test_they_know_who_they_are(start: Any) -> None:
    result = await run(Function(jobs.who), 2, start=start)
    assert [one.value for one in result] == [(0, 2, 0, 0), (1, 2, 1, 0)]


def test_a_worker_of_a_task_of_an_executor_has_a_supervisor(start: Any) -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(warm_jobs.hears_from_a_worker, start).result() == "hello"


def test_nobody_else_is_a_worker() -> None:
    import aioelastic

    with pytest.raises(RuntimeError, match="no worker of aioelastic's"):
        aioelastic.rank()
    aioelastic.ready()  # does nothing


async def test_where_the_working_directory_is_deleted(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    monkeypatch.chdir(nowhere)
    nowhere.rmdir()
    result = await run(Function(os.getpid), 2, start=start)
    assert result.ok, result.failures


async def test_a_large_array_comes_and_goes_by_memory(start: Any) -> None:
    result = await run(Function(jobs.zeros, 3_000_000), start=start)
    array = result[0].value
    assert array.nbytes == 3_000_000
    assert not array.any()
    array[:] = 1  # it is ours
    shared = np.ones(200_000, dtype=np.uint8)
    result = await run(Function(jobs.total, shared), 3, start=start)
    assert [one.value for one in result] == [199_999, 200_000, 200_001]  # nobody saw what another wrote
    assert shared.sum() == 200_000


async def test_a_large_value_is_gone_when_its_owner_lets_go() -> None:
    gc.collect()
    gc.disable()
    try:
        result = await run(Function(jobs.zeros, 3_000_000), 2)
        assert "memfd:aioelastic" in Path("/proc/self/maps").read_text()
        del result
        await asyncio.sleep(0)  # the loop's own handle of our waking up held it, too
        assert "memfd:aioelastic" not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


async def test_as_completed_gives_each_the_moment_it_ends(start: Any, tmp_path: Path) -> None:
    pipes = [tmp_path / str(rank) for rank in range(3)]
    for one in pipes:
        os.mkfifo(one)
    entries = [Function(jobs.waits_for, str(one)) for one in pipes]
    async with Group(entries, start=start, logs=QUIET) as group:
        order = [2, 0, 1]
        os.close(await asyncio.to_thread(os.open, pipes[2], os.O_WRONLY))
        seen = []
        async for rank, value in group.as_completed():
            seen.append((rank, value))
            if len(seen) < 3:
                os.close(await asyncio.to_thread(os.open, pipes[order[len(seen)]], os.O_WRONLY))
    assert seen == [(2, 2), (0, 0), (1, 1)]


async def test_beside_commands() -> None:
    result = await supervise([Function(jobs.product, 3), sh("exit 0")], logs=QUIET)
    assert [one.value for one in result] == [3, None]


async def test_workers_may_supervise(start: Any) -> None:
    result = await run(Function(jobs.nested), start=start)
    assert result.ok, result[0].failure
    assert result[0].value == [0, 1] or result[0].value == [2 * 1 + 0, 2 * 1 + 1]


# --- how they fail ---


async def test_the_exception_itself_comes_back(start: Any) -> None:
    with pytest.raises(GroupFailed) as caught:
        await supervise(Function(jobs.fails), 1, start=start, logs=QUIET)
    error = caught.value.exceptions[0].__cause__
    assert isinstance(error, RemoteError)
    exception = error.exception
    assert isinstance(exception, ValueError)
    assert exception.args == ("bad", 0)
    assert exception.__notes__ == ["a note"]
    assert isinstance(exception.__cause__, KeyError)
    assert exception.__cause__.args == ("the reason",)
    assert "in fails\n" in error.traceback
    assert "_work.py" not in error.traceback
    assert str(caught.value.exceptions[0]).rstrip().endswith("a note")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.exceptions[0].__cause__.exception.args == ("bad", 0)


async def test_groups_of_exceptions(start: Any) -> None:
    told = await failure(Function(jobs.fails_in_a_group), start=start)
    group = told.exception.exception
    assert isinstance(group, ExceptionGroup)
    first, second = group.exceptions
    assert isinstance(first, OSError)
    assert first.errno == 2
    assert isinstance(first.__cause__, KeyError)
    assert isinstance(second, TypeError)


async def test_all_that_failed_are_reported_in_order(start: Any, tmp_path: Path) -> None:
    async with Group(Function(jobs.sleeps), 3, start=start, logs=QUIET, check=False) as group:
        said = 0
        async for _ in group.lines():
            said += 1
            if said == 3:
                break
        for rank in (2, 0):
            kill_and_see_it_dead(group[rank].pid, signal.SIGKILL)
        result = await group.wait()
    assert [one.rank for one in result.failures] == [2, 0]
    assert result[1].stopped


async def test_locals_on_request(start: Any) -> None:
    told = await failure(Function(jobs.shows, 41).options(show_locals=True), start=start)
    assert "local_value = 42" in told.exception.traceback
    assert "secret = ****" in told.exception.traceback
    told = await failure(Function(jobs.shows, 41), start=start)
    assert "local_value = 42" not in told.exception.traceback


async def test_a_result_that_cannot_be_pickled(start: Any) -> None:
    told = await failure(Function(jobs.unpicklable_without_cloudpickle), start=start)
    assert told.exception.phase == "result"
    assert told.cause.startswith("its result could not be pickled: ")
    assert told.exit.code == 1
    three = (await run(Function(jobs.unpicklable), start=start))[0].value  # with cloudpickle it can
    assert three() is None


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_arguments_that_cannot_be_unpickled_there(start: Any) -> None:
    told = await failure(Function(jobs.product, jobs.Refuses()), start=start)
    assert told.exception.phase == "unpickle"
    assert "could not be unpickled there: RuntimeError: not in this process" in told.cause


async def test_a_result_that_cannot_be_unpickled_here(start: Any) -> None:
    told = await failure(Function(jobs.refuses), start=start)
    assert "could not be unpickled here: RuntimeError: not in this process" in told.cause
    assert told.exit.code == 0


async def test_an_exception_that_cannot_be_rebuilt_is_told_as_text(start: Any) -> None:
    told = await failure(Function(jobs.odd), start=start)
    assert told.exception.exception is None
    assert "TypeError" in told.exception.not_rebuilt
    assert told.exception.type_name == "jobs.Odd"
    assert told.exception.message == "1 and 2"
    assert "raise Odd(1, 2)" in told.exception.traceback


async def test_a_signal_while_an_exception_is_sent_loses_nothing(start: Any) -> None:
    told = await failure(Function(jobs.told), start=start)
    assert told.exit.signal == signal.SIGTERM
    assert told.exception.type_name == "jobs.Deadly"
    assert told.exception.message == "told"
    assert told.error.message == "Deadly: told"


@pytest.mark.parametrize("code", [0, None])
async def test_leaving_with_0_is_success(start: Any, code: Any) -> None:
    result = await run(Function(jobs.leaves, code), start=start)
    assert result.ok
    assert result[0].value is None


@pytest.mark.parametrize(("code", "status"), [(3, 3), ("words", 1), (True, 1)])
async def test_leaving_otherwise_is_a_failure(start: Any, code: Any, status: int) -> None:
    told = await failure(Function(jobs.leaves, code), start=start)
    assert told.exit.code == status
    assert told.cause == f"exit code {status}"


async def test_a_keyboard_interrupt_is_a_failure(start: Any) -> None:
    told = await failure(Function(jobs.interrupted), start=start)
    assert isinstance(told.exception.exception, KeyboardInterrupt)


async def test_to_vanish_is_a_failure(start: Any) -> None:
    told = await failure(Function(jobs.vanishes, 0), start=start)
    assert "ended without returning" in told.cause
    told = await failure(Function(jobs.vanishes, 7), start=start)
    assert told.cause == "exit code 7"


async def test_a_signal_is_told_by_name(start: Any) -> None:
    told = await failure(Function(jobs.dies, signal.SIGKILL), start=start)
    assert told.cause == "SIGKILL"


async def test_a_crash_brings_its_python_stack(start: Any) -> None:
    told = await failure(Function(jobs.crashes), start=start)
    assert told.exit.signal == signal.SIGSEGV
    text = "\n".join(told.stderr.last_lines(100))
    assert "Fatal Python error: Segmentation fault" in text
    assert "in crashes" in text


# --- what they are like ---


async def test_everything_they_print_is_seen(start: Any) -> None:
    result = await run(Function(jobs.writes), start=start)
    assert result.ok, result[0].failure
    assert set(result[0].stdout.tail.splitlines()) == {b"by print", b"by write", b"by printf", b"by a child"}
    assert result[0].stderr.tail == b"to stderr\n"


@pytest.mark.fresh
async def test_they_have_nothing_of_others(start: Any, tmp_path: Path) -> None:
    function = Function(jobs.inside).options(cwd=tmp_path, env={"MINE": "yes"})
    own = {0, 1, 2}
    if start == "fork":  # a copy of the program has what that has
        found = {int(one) for one in os.listdir("/proc/self/fd")}
        own = {one for one in found if os.path.lexists(f"/proc/self/fd/{one}")}  # without that of listdir
    (one,) = await run(function, start=start)
    seen = one.value
    assert len(set(seen["fds"]) - own) == 2  # its channel, and where it may write its stacks
    assert seen["stdin"] == "/dev/null"
    assert seen["leader"]
    assert seen["mask"] == set()
    assert seen["int"]
    assert seen["term"] == signal.SIG_DFL
    assert seen["cwd"] == str(tmp_path)
    assert seen["mine"] == "yes"
    assert seen["argv"] == sys.argv
    assert "MINE" not in os.environ


async def test_no_two_draw_the_same_numbers(start: Any) -> None:
    result = await run(Function(jobs.draws), 4, start=start)
    assert len({one.value[0] for one in result}) == 4


async def test_they_say_when_they_are_ready(start: Any) -> None:
    async with Group(Function(jobs.tells), start=start, logs=QUIET) as group:
        kinds = [type(event) async for event in group.events()]
    assert kinds.index(Spawned) < kinds.index(Ready) < kinds.index(Exited)


@pytest.mark.parametrize("function", [jobs.stops_when_asked, jobs.stops_when_asked_async])
async def test_one_that_heeds_the_stop_signal_still_returns(start: Any, function: Any) -> None:
    async with Group(Function(function), start=start, logs=QUIET) as group:
        async for line in group.lines():
            assert line.text == "waiting"
            break
        result = await group.stop()
    assert result[0].value == "saved"
    assert result[0].stopped
    assert result.failures == ()


async def test_one_that_does_not_heed_it_ends(start: Any) -> None:
    async with Group(Function(jobs.sleeps), 2, start=start, logs=QUIET) as group:
        async for _ in group.lines():
            break
    result = await group.wait()
    assert {str(one.exit) for one in result} == {"stopped (SIGTERM)"} or all(one.stopped for one in result)


@pytest.mark.fresh
async def test_cancelling_leaves_nothing(start: Any) -> None:
    task = asyncio.create_task(supervise(Function(jobs.sleeps), 3, start=start, logs=QUIET))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- zygotes ---


@pytest.mark.fresh
async def test_a_zygote_stays_warm() -> None:
    first = (await run(Function(jobs.parent)))[0].value
    assert first != os.getpid()
    assert (await run(Function(jobs.parent), 2))[1].value == first
    other = (await run(Function(jobs.parent), env={"SOMETHING": "else"}))[0].value  # what is set before imports
    assert other != first


@pytest.mark.fresh
def test_a_zygote_serves_one_loop_after_another() -> None:
    first = asyncio.run(run(Function(jobs.parent)))[0].value
    assert asyncio.run(run(Function(jobs.parent)))[0].value == first


async def test_what_is_preloaded_is_there() -> None:
    assert not (await run(Function(jobs.loaded, "colorsys")))[0].value
    assert (await run(Function(jobs.loaded, "colorsys"), preload=["colorsys"]))[0].value


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("absent_module", None, "No module named 'absent_module'"),
        ("raising_module", "raise RuntimeError('not today')", "RuntimeError: not today"),
        ("leaving_module", "import sys; sys.exit(0)", "SystemExit"),
        (
            "threaded_module",
            "import threading; threading.Thread(target=threading.Event().wait, name='poisoner', daemon=True).start()",
            "threads run in it (poisoner)",
        ),
        (
            "cuda_module",  # no driver here: its descriptor is told to be that of a GPU
            (
                "import os; real, fd = os.readlink, os.open('/dev/null', os.O_RDONLY)\n"
                "os.readlink = lambda path: '/dev/nvidiactl' if path == f'/proc/self/fd/{fd}' else real(path)"
            ),
            "CUDA is initialised in it",
        ),
    ],
)
async def test_a_preload_that_fails(
    name: str, source: str | None, words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError) as caught:
        await run(Function(jobs.who), preload=[name])
    assert caught.value.field == "preload"
    assert words in str(caught.value)


@pytest.mark.fresh
async def test_a_zygote_that_nobody_wants_leaves(monkeypatch: Any) -> None:
    monkeypatch.setattr(_zygote, "IDLE", 0.0)  # but not before its first worker, however late that is asked for
    monkeypatch.setenv("OTHERS_HAVE_NONE", "1")  # not one that is warm already
    first = await run(Function(jobs.parent))
    assert first.ok, first.summary()
    await gone(first[0].value)
    second = await run(Function(jobs.parent))
    assert second.ok, second.summary()
    assert second[0].value != first[0].value


@pytest.mark.fresh
async def test_a_zygote_that_is_about_to_leave_is_not_taken(monkeypatch: Any) -> None:
    monkeypatch.setenv("OTHERS_HAVE_NONE", "2")
    first = (await run(Function(jobs.parent)))[0].value
    assert (await run(Function(jobs.parent)))[0].value == first
    monkeypatch.setattr(_zygote, "IDLE", 0.0)  # it waited for longer than that
    assert (await run(Function(jobs.parent)))[0].value != first


@pytest.mark.fresh
async def test_a_zygote_that_dies_takes_its_workers_and_the_group_says_so() -> None:
    async with Group(Function(jobs.sleeps), 3, logs=QUIET, check=False) as group:
        said = 0
        async for _ in group.lines():
            said += 1
            if said == 3:
                break
        zygote = int(Path(f"/proc/{group[0].pid}/stat").read_text().rpartition(")")[2].split()[1])
        pids = list(group.pids.values())
        os.kill(zygote, signal.SIGKILL)
        result = await group.wait()
    for pid in pids:
        await gone(pid)
    assert result.failures
    assert "zygote" in result.failures[0].cause
    assert (await run(Function(jobs.parent)))[0].value != zygote


@pytest.mark.fresh
async def test_a_zygote_that_dies_is_replaced_for_the_next_attempt(tmp_path: Path) -> None:
    async with Group(
        Function(jobs.kills_its_zygote_once), 2, logs=QUIET, restart=Restart.on_failure(max=3, scope="all")
    ) as group:
        result = await group.wait()
    assert [one.value for one in result] == ["done", "done"]
    assert any("zygote" in one.cause for each in result for one in each.earlier)


@pytest.mark.fresh
async def test_a_zygote_that_died_while_nobody_looked_is_replaced() -> None:
    zygote = (await run(Function(jobs.parent)))[0].value
    kill_and_see_it_dead(zygote, signal.SIGKILL)
    assert (await run(Function(jobs.parent)))[0].value != zygote


async def test_a_zygote_does_not_outlive_its_supervisor() -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1]); import jobs\n"
        "from aioelastic import Function, supervise\n"
        "asyncio.run(supervise(Function(jobs.sleeps), 2))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(Path(jobs.__file__).parent), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(2):
        await process.stdout.readline()
    family = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
    assert len(family) == 5  # the guardian and its keeper, the zygote, two workers
    process.kill()
    await process.wait()
    for pid in family:
        await gone(pid)


# --- bad input, before anything starts ---


def test_not_callable() -> None:
    with pytest.raises(SpecError, match="cannot be called"):
        Function(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["forkserver", "", None, 3])
async def test_an_unknown_start(value: Any) -> None:
    with pytest.raises(SpecError, match="start="):
        await run(Function(jobs.who), start=value)


@pytest.mark.parametrize("value", ["torch", [""], [3]])
async def test_a_bad_preload(value: Any) -> None:
    with pytest.raises(SpecError, match="preload="):
        await run(Function(jobs.who), preload=value)


@pytest.mark.parametrize("how", [{"start": "fork"}, {"launcher": "direct"}])
async def test_a_grace_for_the_lost_needs_somebody_who_outlives_us(how: Any) -> None:
    with pytest.raises(SpecError, match=r"Stop\.if_lost='stop'"):
        await run(Function(jobs.parent), stop=Stop(if_lost="stop"), **how)


async def test_preload_needs_a_zygote() -> None:
    with pytest.raises(SpecError, match="needs start="):
        await run(Function(jobs.who), start="spawn", preload=["json"])


async def test_a_function_without_function() -> None:
    with pytest.raises(SpecError, match=r"Function\(fn, \.\.\.\)"):
        await supervise(lambda rank: rank, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_a_lambda_needs_cloudpickle(start: Any, monkeypatch: Any) -> None:
    three = 3
    assert (await run(Function(lambda x: x + three, 4), start=start))[0].value == 7
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(SpecError, match="install cloudpickle") as caught:
        await run(Function(lambda x: x + three, 4), start=start)
    assert caught.value.field == "fn of rank 0"


async def test_a_fork_needs_no_pickling(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    held: list[Any] = [lambda: 5]
    assert (await run(Function(lambda: held[0]()), start="fork"))[0].value == 5


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_an_argument_that_does_not_pickle_is_named(start: Any) -> None:
    lock = threading.Lock()
    with pytest.raises(SpecError) as caught:
        await run(Function(jobs.product, 1, lock), start=start)
    assert caught.value.field == "args[1] of jobs:product of rank 0"
    with pytest.raises(SpecError) as caught:
        await run(Function(jobs.product, 1, y=lock), start=start)
    assert caught.value.field == "y of jobs:product of rank 0"


def test_the_plan_tells_it() -> None:
    for start, words in (("zygote", "forked by a zygote"), ("spawn", "fresh interpreter"), ("fork", "forked copy")):
        text = str(plan(GroupSpec.of(Function(jobs.product, 1), 2, start=start)))  # type: ignore[arg-type]
        assert "rank 1: function jobs:product" in text
        assert words in text


def test_errors_pickle() -> None:
    error = RemoteError("call", "Odd", "text", "trace", jobs.Odd(1, 2))
    again = pickle.loads(pickle.dumps(error))
    assert again.traceback == "trace"


class Given:
    def __reduce__(self) -> Any:
        return dict, ()


@pytest.mark.parametrize(
    "options",
    [{"start": "fork"}, {"start": "spawn"}, {"start": "zygote"}, {"restart": Restart.on_failure(1)}],
    ids=["fork", "spawn", "zygote", "restart"],
)
@pytest.mark.parametrize("launcher", ["guardian", "direct"])
async def test_what_functions_were_given_goes_with_the_group(options: Any, launcher: Any) -> None:
    """By itself: garbage is collected when much of it was made, and an array may be all the memory there is."""
    given = Given()
    known = weakref.ref(given)
    gc.collect()
    gc.disable()
    try:
        job = operator.length_hint if "restart" not in options else operator.index
        with contextlib.suppress(GroupFailed):
            await supervise([Function(job, given), sh("echo up")], launcher=launcher, logs=QUIET, **options)
        del given
        await until(lambda: known() is None)  # a thread that had it may be about to end
    finally:
        gc.enable()


async def test_results_of_an_executor_go_when_they_are_dropped() -> None:
    """Of a large argument, too, which is copied by other threads."""
    gc.collect()
    gc.disable()
    try:
        async with WorkerExecutor(1, preload=["numpy"]) as executor:
            for argument in (np.ones(10_000), np.ones(2 << 20)):
                known = weakref.ref(await executor.run(np.sqrt, argument))
                await until(lambda known=known: known() is None)  # type: ignore[misc]  # its thread may just be at it
    finally:
        gc.enable()


# --- breakpoint() ---


@pytest.mark.parametrize("closes", [False, True])
async def test_a_breakpoint_says_that_nobody_is_there(start: Any, closes: bool) -> None:
    told = await failure(Function(jobs.stops_to_be_looked_at, closes), start=start)
    assert "RuntimeError: breakpoint() has nobody to talk to here" in told.headline
    assert "PYTHONBREAKPOINT" in told.describe()


async def test_a_breakpoint_of_ones_own(start: Any) -> None:
    ignored = Function(jobs.stops_to_be_looked_at).options(env={"PYTHONBREAKPOINT": "0"})
    elsewhere = Function(jobs.stops_to_be_looked_at).options(env={"PYTHONBREAKPOINT": "builtins.print"})
    entries = [ignored, elsewhere, Function(jobs.has_a_debugger_of_its_own)]
    result = await supervise(entries, logs=QUIET, start=start)
    assert [one.value for one in result] == ["went on", "went on", "its own"]
    assert str(result[1].stdout) == "\n"


def test_a_breakpoint_in_a_task() -> None:
    with WorkerExecutor(1) as executor, pytest.raises(RuntimeError, match="nobody to talk to"):
        executor.submit(jobs.stops_to_be_looked_at).result()


async def test_who_sends_to_a_worker_is_told_of_its_end_while_its_child_lives(tmp_path: Path, monkeypatch: Any) -> None:
    gate, full, real = Gate(tmp_path), asyncio.Event(), _function_channel.writable

    async def writable(fd: int) -> None:
        full.set()
        await real(fd)

    async def sends(worker: Worker) -> None:
        while True:
            await worker.send(b"x" * 10_000)

    monkeypatch.setattr(_function_channel, "writable", writable)
    entry, stop = Function(jobs.leaves_a_copy_when, gate.path), Stop(scope="leader")
    async with Group(entry, logs=Logs(tee=Std.NONE, drain=0.1), stop=stop) as group:
        sending = asyncio.ensure_future(sends(group[0]))
        await full.wait()
        await asyncio.to_thread(gate.entered)
        gate.open()
        async with asyncio.timeout(60):
            with pytest.raises(BrokenPipeError):
                await sending
        pid = (await group.wait())[0].value
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
    await asyncio.get_running_loop().shutdown_default_executor()
