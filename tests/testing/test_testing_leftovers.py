"""`no_leaks` knows what outlasts a test by right: what multiprocessing keeps, threads of pools and loops that live on,
fixtures of wider scope, and what only the traceback of a failure holds."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio.to_thread
import jobs
import pytest
from helpers import QUIET, alive, event_of, needs, program, sh
from test_testing_plugin import run, told

from aioelastic import Function, Group, Logs, Restart, Std, WorkerExecutor
from aioelastic.events import Spawned
from aioelastic.system import helper_thread
from aioelastic.system.helper_thread import HelperThread, JobThread
from aioelastic.testing import _allowed_leftovers
from aioelastic.testing._leak_check import Holdings, no_leaks

pytestmark = pytest.mark.fresh

# --- multiprocessing ---

MULTIPROCESSING = """
import multiprocessing, os, sys, time
from multiprocessing import connection, reduction, shared_memory
from concurrent.futures import ProcessPoolExecutor
from aioelastic.testing import LeftBehind, no_leaks

kept = []

def tracked():
    shm = shared_memory.SharedMemory(create=True, size=10)
    shm.close()
    shm.unlink()

def process(method):
    child = multiprocessing.get_context(method).Process(target=os.getpid)
    child.start()
    child.join()
    child.close()

def pool(method):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        pool.submit(os.getpid).result()

def array():
    multiprocessing.get_context("spawn").Array("i", 1000)[0] = 1

def duplicates():
    one, other = multiprocessing.get_context("spawn").Pipe()
    os.close(reduction.DupFd(one.fileno()).detach())
    one.close()
    other.close()

def loky():
    from loky.backend import resource_tracker
    resource_tracker.ensure_running()

def held_array():
    kept.append(multiprocessing.get_context("spawn").RawArray("i", 1000))

def held_memory():
    kept.append(shared_memory.SharedMemory(create=True, size=10))

def running(method):
    child = multiprocessing.get_context(method).Process(target=time.sleep, args=(1000,), daemon=True)
    child.start()
    kept.append(child)

if __name__ == "__main__":
    for _ in range(2):  # the second time it is there
        try:
            with no_leaks():
                eval(sys.argv[1])
        except LeftBehind as exc:
            print(*exc.leaks)
    for one in kept:
        if hasattr(one, "kill"):
            one.kill()
            one.join()
        if hasattr(one, "unlink"):
            one.unlink()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "what",
    ["tracked()", "array()", "duplicates()", "loky()"]
    + [f"{what}({method!r})" for what in ("process", "pool") for method in ("fork", "spawn", "forkserver")],
)
def test_what_multiprocessing_keeps_is_no_leak(what: str, tmp_path: Path) -> None:
    if "loky" in what:
        needs("loky")
    assert program(MULTIPROCESSING, tmp_path, what) == ""


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        ("held_array()", "file descriptor"),
        ("held_memory()", "file descriptor shared memory"),
        ("running('forkserver')", "process file descriptor"),
        ("running('spawn')", "process file descriptor"),
    ],
)
def test_what_is_used_still_is_a_leak(what: str, kinds: str, tmp_path: Path) -> None:
    assert program(MULTIPROCESSING, tmp_path, what).splitlines()[0] == kinds


# --- threads ---


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_allowed_leftovers, "ENDING", 0.05)


@pytest.fixture
def elder() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Mine(ThreadPoolExecutor):
    pass


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, Mine])
def test_idle_threads_of_an_older_pool_are_its_own(kind: type[ThreadPoolExecutor]) -> None:
    with kind(4, "older") as pool:
        for _ in range(2):
            with no_leaks(["*"]):
                assert pool.submit(int, "1").result() == 1


def test_a_thread_of_an_older_pool_that_works_still_is_a_leak(elder: ThreadPoolExecutor, impatient: None) -> None:
    ready, go = threading.Event(), threading.Event()
    before = Holdings.now()
    elder.submit(lambda: (ready.set(), go.wait()))
    ready.wait()
    leaks = Holdings.now().leaks(before, ["*"])
    go.set()
    assert list(leaks) == ["thread"]


def test_a_pool_that_the_block_makes_is_a_leak_as_long_as_somebody_has_it() -> None:
    before = Holdings.now()
    pool = ThreadPoolExecutor(2, "younger")
    pool.submit(int).result()
    assert list(Holdings.now().leaks(before, ["*"])) == ["thread"]
    pool.shutdown()


def dropped() -> None:
    ThreadPoolExecutor(1).submit(int).result()


def shut_down() -> None:
    pool = ThreadPoolExecutor(1)
    pool.submit(int).result()
    pool.shutdown(wait=False)


@pytest.mark.parametrize("block", [dropped, shut_down])
def test_a_thread_that_was_told_to_end_is_waited_for(block: Callable[[], None]) -> None:
    for _ in range(50):
        with no_leaks(["*"]):
            block()


async def test_a_helper_thread_that_was_told_to_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a stop with too little time (`Stop(bound=0)`) no longer does."""
    begun, go, join = threading.Event(), threading.Event(), JobThread.join
    thread = HelperThread(asyncio.get_running_loop(), "the-helper")
    before = Holdings.now()
    thread.put(lambda: (begun.set(), go.wait(), None)[2])
    begun.wait()  # it has a file open as it begins
    assert list(Holdings.now().leaks(before, ["*"])) == ["thread"]
    ended = thread.end()
    monkeypatch.setattr(JobThread, "join", lambda self, timeout=None: (go.set(), join(self, timeout)))
    assert Holdings.now().leaks(before, ["*"]) == {}
    go.set()
    await ended


@pytest.mark.parametrize("relieved", [False, True])
async def test_what_a_thread_has_that_was_told_to_end_goes_with_it(
    relieved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group whose guardian did not answer in time leaves a thread that still asks, by a connection of its own."""
    begun, go, join = threading.Event(), threading.Event(), JobThread.join
    thread = HelperThread(asyncio.get_running_loop(), "the-helper")

    def asks() -> None:
        with open(os.devnull):
            begun.set()
            go.wait()

    with no_leaks(["*"]):
        thread.put(asks)
        begun.wait()
        if relieved:
            monkeypatch.setattr(helper_thread, "STUCK", -1.0)
            thread.relieve()
        ended = thread.end()
        if relieved:
            await ended
        monkeypatch.setattr(JobThread, "join", lambda self, timeout=None: (go.set(), join(self, timeout)))
    await ended


async def test_a_thread_of_asyncio_that_has_waited_for_a_child_is_waited_for() -> None:
    for _ in range(20):
        with no_leaks(["*"]):
            child = await asyncio.create_subprocess_exec("true")
            await child.wait()
            del child


async def test_threads_of_a_loop_that_is_open_are_its_own() -> None:
    for _ in range(2):
        with no_leaks(["*"]):
            await asyncio.gather(*(asyncio.to_thread(int) for _ in range(3)))
            await anyio.to_thread.run_sync(int)
    ready = threading.Barrier(6)
    with no_leaks(["*"]):
        await asyncio.gather(*(asyncio.to_thread(ready.wait) for _ in range(6)))


async def test_a_thread_of_a_loop_that_works_still_is_a_leak(impatient: None) -> None:
    ready, go = threading.Event(), threading.Event()
    before = Holdings.now()
    work: Any = asyncio.get_running_loop().run_in_executor(None, lambda: (ready.set(), go.wait()))
    await asyncio.to_thread(ready.wait)
    leaks = Holdings.now().leaks(before, ["*"])
    go.set()
    await work
    assert list(leaks) == ["thread"]


async def test_a_thread_of_anyio_that_works_still_is_a_leak(impatient: None) -> None:
    ready, go = threading.Event(), threading.Event()
    async with anyio.create_task_group() as group:
        before = Holdings.now()
        group.start_soon(anyio.to_thread.run_sync, lambda: (ready.set(), go.wait()))
        await asyncio.to_thread(ready.wait)
        leaks = Holdings.now().leaks(before, ["*"])
        go.set()
    assert list(leaks) == ["thread", "task"]


# --- groups ---


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
async def test_workers_that_an_older_group_starts_are_its_own(tmp_path: Path, start: Any) -> None:
    policy, logs = Restart.on_failure(max=3), Logs(dir=tmp_path, tee=Std.NONE)
    entries = [Function(jobs.sleeps), sh("exec sleep 1000")]
    async with Group(entries, logs=logs, restart=policy, start=start) as group:
        with no_leaks(["*"]):
            for rank in (0, 1):
                group[rank].send_signal(signal.SIGKILL)
                await event_of(group, Spawned, rank, attempt=1)
        pids = group.pids
        with no_leaks(["*"]):
            assert group.pids == pids
        assert all(map(alive, pids.values()))


async def test_the_workers_of_a_younger_one_are_leaks() -> None:
    async with Group(Function(jobs.sleeps), logs=QUIET) as older:
        before = Holdings.now()
        async with Group(Function(jobs.sleeps), logs=QUIET) as younger:  # by the zygote of the older one
            leaks = Holdings.now().leaks(before, ["*"])
            (words,) = leaks["process"]
            assert words.split()[0] == str(younger.pids[0])
            assert len(leaks["file descriptor"]) >= 4  # its end, its channel, two pipes
        assert Holdings.now().leaks(before, ["*"]) == {}
        assert alive(older.pids[0])


def test_workers_that_an_older_executor_hires_are_its_own(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        os.mkfifo(path)
    with WorkerExecutor(3) as executor:
        executor.submit(abs, -1).result()
        assert len(executor.pids) == 1
        with no_leaks(["*"]):
            tasks = [executor.submit(jobs.waits_in, path) for path in paths]
            for path in paths:
                path.write_text("")  # when somebody reads there
            for one in tasks:
                one.result()
            assert len(executor.pids) == 3


# --- fixtures ---

FIXTURES = """
import asyncio, os, signal, threading
from concurrent.futures import ThreadPoolExecutor
import pytest
from aioelastic import Command, Function, Group, Logs, Std, WorkerExecutor

def opened():
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)

of_class = pytest.fixture(opened, scope="class", name="of_class")
of_module = pytest.fixture(opened, scope="module", name="of_module")
of_package = pytest.fixture(opened, scope="package", name="of_package")
of_session = pytest.fixture(opened, scope="session", params=[1, 2], name="of_session")

@pytest.fixture(scope="session")
def runner():
    with asyncio.Runner() as runner:
        yield runner

@pytest.fixture(scope="session")
def service(runner):
    group = Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE), check=False)
    runner.run(group.__aenter__())
    yield group
    runner.run(group.__aexit__(None, None, None))

@pytest.fixture(scope="session")
def executor():
    with WorkerExecutor(1) as executor:
        executor.submit(os.getpid).result()
        yield executor

@pytest.fixture(scope="session")
def threads():
    with ThreadPoolExecutor(4) as pool:
        yield pool

@pytest.fixture
def of_function(of_module):
    yield os.open(os.devnull, os.O_RDONLY)

@pytest.mark.parametrize("name", ["of_class", "of_module", "of_package", "service", "executor", "threads"])
def test_is_the_first_to_need_it(request, name):
    request.getfixturevalue(name)

def test_parametrized(of_session):
    os.fstat(of_session)

@pytest.mark.parametrize("number", range(3))
def test_service(service, number, runner):
    for pid in service.pids.values():
        os.kill(pid, 0)
    runner.run(asyncio.to_thread(threading.get_ident))

@pytest.mark.parametrize("number", range(3))
def test_executor(executor, number):
    assert executor.submit(abs, -1).result(timeout=60) == 1

def test_threads(threads):
    assert threads.submit(abs, -1).result(timeout=60) == 1

def test_descriptor(of_function):
    pass

def test_service_that_loses_one(service, runner):
    service[0].send_signal(signal.SIGKILL)
    result = runner.run(asyncio.wait_for(service.wait(), 150))
    assert [str(one.exit) for one in result] == ["SIGKILL", "stopped (SIGTERM)"]
"""


def test_fixtures_of_wider_scope_are_no_leaks(pytester: pytest.Pytester) -> None:
    result = run(pytester, FIXTURES)
    assert told(result) == {"test_descriptor": ["file descriptor"]}
    result.assert_outcomes(passed=17, errors=1)


# --- failures ---

FAILURES = """
import os, pytest

def fails():
    kept = open(os.devnull)
    raise ValueError("it did not work")

def test_failing():
    kept = open(os.devnull)
    assert kept is None

async def test_failing_async():
    kept = open(os.devnull)
    assert kept is None

def test_called():
    fails()

def test_cause():
    try:
        fails()
    except ValueError as exc:
        raise KeyError from exc

def test_context():
    try:
        fails()
    except ValueError:
        raise KeyError

def test_group():
    problems = []
    try:
        fails()
    except ValueError as exc:
        problems.append(exc)
    raise ExceptionGroup("all", problems)

def test_skipping():
    kept = open(os.devnull)
    pytest.skip("not now")

@pytest.mark.xfail
def test_expected():
    fails()

@pytest.fixture
def broken(no_leaks):
    fails()

def test_set_up(broken):
    pass

@pytest.mark.parametrize("number", range(2))
def test_generator(number):
    def steps():
        kept = open(os.devnull)
        yield kept
    going = steps()
    next(going)
    raise ValueError

def test_descriptor():
    os.dup(0)
    fails()
"""

SUBTESTS = """
def test_subtests(subtests):
    for number in range(2):
        with subtests.test(number=number):
            fails()
"""


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--showlocals",), ("-o", "xfail_strict=true")], ids=["", "locals", "strict"])
def test_what_only_a_traceback_holds_is_no_second_error(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    source = FAILURES + (SUBTESTS if hasattr(pytest, "Subtests") else "")  # from pytest 9 on
    result = run(pytester, source, *options, asyncio_mode="auto")
    assert told(result) == {"test_descriptor": ["file descriptor"]}
    counts = result.parseoutcomes()
    assert (counts["errors"], counts["skipped"], counts["xfailed"]) == (2, 1, 1)  # one is of a set-up
