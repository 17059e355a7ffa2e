"""An executor in a program that has too few descriptors, threads or processes for a while: nothing hangs, and nothing
is broken afterwards. What waits, and what came back and is kept, needs no descriptor each."""

from __future__ import annotations

import _ctypes
import asyncio
import errno
import gc
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from fake_pool import FakePool
from helpers import QUIET, no_descriptors_left, until
from test_executor import Gate

from aioelastic import Function, SpecError, WorkerExecutor, WorkerFailed, sharing, supervise
from aioelastic.child.kernel.libc import mapped
from aioelastic.child.wire import messages
from aioelastic.executor import tasks
from aioelastic.executor.pool import NEAR
from aioelastic.executor.tasks import Called
from aioelastic.executor.workers import FALSE_STARTS
from aioelastic.memory._received_copies import COPIED
from aioelastic.model.errors import is_lack

STARTS = ["zygote", "spawn", "fork"]


def descriptors(_: object = None) -> int:
    return len(os.listdir("/proc/self/fd"))


def maps() -> str:
    return Path("/proc/self/maps").read_text()


@contextmanager
def few_descriptors(left: int) -> Iterator[None]:
    """So many can be made."""
    with no_descriptors_left():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft + left, hard))
        yield


# --- a lack that passes ---


@pytest.mark.parametrize("start", STARTS)
def test_a_first_use_without_enough_descriptors(start: Any) -> None:
    """Whatever it is that cannot be made: the loop of the thread, what the group stands on, or the worker."""
    for left in range(12):
        executor = WorkerExecutor(1, start=start, max_pending=1)
        with few_descriptors(left), pytest.raises((OSError, SpecError)) as told:
            executor.submit(abs, -1).result(30)
        assert is_lack(told.value)
        assert executor.submit(abs, -2).result(30) == 2
        executor.shutdown()


@pytest.mark.parametrize("start", STARTS)
def test_no_worker_can_be_started_for_a_while(start: Any) -> None:
    with WorkerExecutor(1, start=start, tasks_per_worker=1) as executor:
        assert executor.submit(abs, -1).result(30) == 1
        asyncio.run(until(lambda: not executor.pids))
        with no_descriptors_left():
            futures = [executor.submit(abs, -i) for i in range(3)]
            for one in futures:
                with pytest.raises(OSError, match="Too many open files"):
                    one.result(30)
        assert executor.submit(abs, -2).result(30) == 2


@pytest.mark.parametrize("start", STARTS)
def test_those_that_live_do_the_rest_meanwhile(tmp_path: Path, start: Any) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(2, start=start) as executor, asyncio.Runner() as runner:
        runner.get_loop()
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        with no_descriptors_left():
            futures = [executor.submit(abs, -i) for i in range(3)]
            ours = executor._pool._owner._workers
            runner.run(until(lambda: ours._lacks > FALSE_STARTS))
            waiting = [one.done() for one in futures]
            gate.open()
            assert waiting == [False] * 3
            assert [one.result(30) for one in futures] == [0, 1, 2]
        assert first.result() == gate.path
        assert executor.submit(abs, -2).result(30) == 2


def test_starts_that_fail_for_other_reasons_break_it_after_lacks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    fates = [OSError(errno.EAGAIN, "no more processes")] * FALSE_STARTS + [OSError(errno.ENOEXEC, "no program")] * 9
    start = fake.launcher.start

    def refuses(worker: Any) -> Any:
        fake.launcher.fate = fates.pop(0)
        return start(worker)

    monkeypatch.setattr(fake.launcher, "start", refuses)
    with pytest.raises(OSError, match="no more processes"):
        fake.executor.submit(abs, 0).result(30)
    with pytest.raises(BrokenExecutor, match="no program"):
        fake.executor.submit(abs, 0).result(30)
    assert len(fates) == 9 - FALSE_STARTS
    fake.end()


def test_copies_of_a_program_that_lacks_something_may_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePool(monkeypatch, 1)
    workers = fake.launcher.workers
    with monkeypatch.context() as patch:
        patch.setattr("aioelastic.executor.workers.is_short", lambda: True)
        future = fake.executor.submit(abs, 0)
        for number in range(FALSE_STARTS):
            asyncio.run(until(lambda number=number: len(workers) > number))  # type: ignore[misc]
            fake.do(workers[-1].die)
        with pytest.raises(WorkerFailed):
            future.result(30)
    later = fake.executor.submit(abs, 7)
    asyncio.run(until(lambda: len(workers) > FALSE_STARTS))
    fake.do(workers[-1].ready)
    fake.do(workers[-1].receive)
    fake.do(workers[-1].reply)
    assert later.result(30) == 7
    fake.end()


def test_no_thread_for_what_it_stands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the executor can be started, and no other."""
    start = threading.Thread.start

    def fails(self: threading.Thread) -> None:
        if self.name == "aioelastic-proc":
            raise RuntimeError("can't start new thread")
        start(self)

    with WorkerExecutor(1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            with pytest.raises(SpecError, match="aioelastic-proc"):
                executor.submit(abs, 1).result(30)
        assert executor.submit(abs, -1).result(30) == 1


@pytest.fixture
def no_thread_to_unpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each message is of the kind that needs one."""
    start = threading.Thread.start

    def fails(self: threading.Thread) -> None:
        if self.name == "aioelastic-unpickle":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fails)
    monkeypatch.setattr(messages, "is_slow", lambda _: True)


@pytest.mark.usefixtures("no_thread_to_unpickle")
async def test_no_thread_for_the_result_of_a_task() -> None:
    fd = os.dup(0)
    task = tasks.Task((abs, (-1,), {}), False)
    value, problem = await tasks.opened_aside(messages.encode(messages.DONE, (1,))[0], [fd], task)
    assert value is None
    assert isinstance(problem, RuntimeError)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with WorkerExecutor(1) as executor, pytest.raises(RuntimeError, match="new thread"):
        executor.submit(abs, -1).result(30)


@pytest.mark.usefixtures("no_thread_to_unpickle")
async def test_no_thread_for_the_value_of_a_function() -> None:
    result = await supervise(Function(abs, -1), logs=QUIET, check=False)
    assert "new thread" in str(result[0].failure)


def test_a_callback_of_what_lacked_something_may_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room left, too, and though its thread ends then."""
    later: list[Future[int]] = []
    told, others = threading.Event(), Called()

    def again(_: object) -> None:
        executor._pool._room.ask(True, others)  # type: ignore[union-attr]  # as if they had it all
        later.append(executor.submit(abs, -2))
        told.set()

    def fails(self: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with WorkerExecutor(1, max_pending=1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.Runner, "get_loop", fails)
            executor.submit(abs, 1).add_done_callback(again)
            assert told.wait(30)
        later[0].exception(30)
        executor._pool._room.back(others)  # type: ignore[union-attr]
        assert executor.submit(abs, -3).result(30) == 3


@pytest.mark.parametrize("shared", ["cause", "context", "itself"])
def test_what_a_lack_is(shared: str) -> None:
    lack, other = OSError(errno.EMFILE, "none"), SpecError("field", 1, "problem", "remedy")
    if shared == "cause":
        other.__cause__ = lack
    elif shared == "context":
        other.__context__ = lack
    assert is_lack(lack if shared == "itself" else other)
    assert not is_lack(SpecError("field", 1, "problem", "remedy"))
    assert not is_lack(OSError(errno.ENOENT, "no such file"))
    assert not is_lack(None)


# --- what waits, and what is kept ---


@pytest.mark.parametrize("kind", ["bytes", "array", "shared"])
def test_what_waits_needs_no_descriptor_each(tmp_path: Path, kind: str) -> None:
    gate = Gate(tmp_path)
    made: dict[str, Callable[[int], Any]] = {
        "bytes": lambda i: bytes([i]) * 70_000,
        "array": lambda i: np.full(70_000, i, np.uint8),
        "shared": lambda i: sharing.copy(np.full(70_000, i, np.uint8)),
    }
    shared = [made[kind](i) for i in range(4)]
    with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        before = descriptors()
        futures = [executor.submit(jobs.sum_of, shared[i % 4]) for i in range(200)]
        waiting = descriptors() - before
        gate.open()
        assert [one.result() for one in futures] == [i % 4 * 70_000 for i in range(200)]
        assert first.result() == gate.path
    assert waiting <= 2 * NEAR + 4  # the segments that bodies were written to, beside their leases


async def test_what_waits_and_was_copied_elsewhere_needs_none_either(tmp_path: Path) -> None:
    """Submitted in an event loop, a large array is copied by other threads."""
    gate = Gate(tmp_path)
    async with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        await asyncio.to_thread(gate.entered)
        large = np.ones(8 << 20, np.uint8)
        futures = [executor.submit(jobs.sum_of, large) for _ in range(NEAR + 3)]
        line = list(executor._pool._queue)
        await until(lambda: all(one.making is None for one in line))
        holding = [bool(one.fds) for one in line]
        gate.open()
        assert [await asyncio.wrap_future(one) for one in futures] == [8 << 20] * (NEAR + 3)
        assert first.result() == gate.path
    assert holding == [True] * NEAR + [False] * 3


async def test_one_that_is_cancelled_while_it_is_put_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, under_way, go = Gate(tmp_path), threading.Event(), threading.Event()
    taken_in = messages.taken_in

    def waits(fd: int) -> memoryview:
        under_way.set()
        assert go.wait(60)
        return taken_in(fd)

    async with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        await asyncio.to_thread(gate.entered)
        rest = [executor.submit(abs, -i) for i in range(NEAR)]
        monkeypatch.setattr(messages, "taken_in", waits)
        future = executor.submit(jobs.sum_of, np.ones(8 << 20, np.uint8))
        task = list(executor._pool._queue)[-1]
        await until(under_way.is_set)
        assert future.cancel()
        go.set()
        gate.open()
        assert [await asyncio.wrap_future(one) for one in rest] == list(range(NEAR))
        assert first.result() == gate.path
        await until(lambda: not any(one.name == "aioelastic-copy" for one in threading.enumerate()))
        assert task.fds == []


HELD = """
import os
from aioelastic import WorkerExecutor

def held():
    links = [f"/proc/self/fd/{one}" for one in os.listdir("/proc/self/fd")]
    return [os.readlink(one) for one in links if os.path.lexists(one)].count("/memfd:aioelastic (deleted)")

with WorkerExecutor(1, start="fork") as executor:
    futures = [executor.submit(len, bytes(1 << 20)) for _ in range(3)]
    print(executor.submit(held).result(), {one.result() for one in futures})
"""


def test_what_waits_is_not_held_by_a_worker_that_is_forked_meanwhile() -> None:
    """In a program without arrays: with them, `aioelastic.memory` sees to that."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=150)
    assert (done.stdout, done.stderr) == (f"0 {{{1 << 20}}}\n", "")


def test_a_shared_array_that_waits_is_still_that_array(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        shared = sharing.copy(np.zeros(100, np.uint8))
        futures = [executor.submit(jobs.sum_of, shared) for _ in range(NEAR + 1)]
        np.asarray(shared)[:] = 2
        del shared
        gate.open()
        assert [one.result() for one in futures] == [200] * (NEAR + 1)


def test_no_descriptor_for_what_waits_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(body: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        with monkeypatch.context() as patch:
            patch.setattr(messages, "taken_out", fails)
            futures = [executor.submit(len, bytes(100_000)) for _ in range(NEAR + 3)]
            gate.open()
            for one in futures[NEAR:]:
                with pytest.raises(OSError, match="Too many open files"):
                    one.result(30)
        assert [one.result() for one in futures[:NEAR]] == [100_000] * NEAR
        assert executor.submit(len, bytes(100_000)).result() == 100_000


class Unreadable:
    """Who unpickles it fails."""

    def __reduce__(self) -> Any:
        return _fail, ()


def _fail() -> None:
    raise ValueError("not here")


@pytest.mark.parametrize("kind", ["bytes", "array", "shared", "queue"])
def test_a_task_that_cannot_be_unpickled_leaves_no_descriptor_in_the_worker(kind: str) -> None:
    with WorkerExecutor(1) as executor:
        made: dict[str, Callable[[], Any]] = {
            "bytes": lambda: bytes(100_000),
            "array": lambda: np.zeros(100_000),
            "shared": lambda: sharing.copy(np.zeros(10)),
            "queue": sharing.Queue,
        }
        given = made[kind]()
        found = []
        for times in (1, 5):
            for _ in range(times):
                with pytest.raises(ValueError, match="not here"):
                    executor.submit(len, (given, Unreadable())).result(30)
            found.append(executor.submit(descriptors).result(30))
        if isinstance(given, sharing.Queue):
            given.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("size", [40_000, 70_000, 300_000])
def test_what_is_kept_needs_no_descriptor_each(size: int) -> None:
    """Neither here nor in the worker, and its memory is free when the last view of it is gone."""
    with WorkerExecutor(1) as executor:
        executor.submit(jobs.zeros, 10).result()
        before = descriptors()
        kept = list(executor.map(jobs.zeros, [size] * 300))
        assert descriptors() - before <= 4
        assert executor.submit(descriptors).result() < 200
        is_mapped = size >= COPIED
        assert ("/memfd:aioelastic" in maps()) == is_mapped
        views = [one[5:10] for one in kept]
        del kept
        assert ("/memfd:aioelastic" in maps()) == is_mapped
        assert [one.sum() for one in views] == [0] * 300
        before_end = maps().count("/memfd:aioelastic")
        del views
        gc.collect()
        assert maps().count("/memfd:aioelastic") <= before_end - 250 * is_mapped


def test_memory_of_a_file(tmp_path: Path) -> None:
    """With no type for each size, and without the descriptor."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    kinds = len(_ctypes.Array.__subclasses__())
    with path.open("r+b") as file:
        private = mapped(file.fileno(), 10, private=True)
        shared = mapped(file.fileno(), 10)
        many = [mapped(file.fileno(), size) for size in range(1, 3000)]
        with pytest.raises(OSError, match="Invalid argument"):
            mapped(file.fileno(), 0)
    assert len(_ctypes.Array.__subclasses__()) <= kinds + 14
    assert [one.nbytes for one in many] == list(range(1, 3000))
    private[0] = shared[1] = ord("x")
    assert (bytes(private[:3]), bytes(shared[:3]), path.read_bytes()[:3]) == (b"x12", b"0x2", b"0x2")
    part = shared[2:4]
    del private, shared, many
    assert maps().count(str(path)) == 1
    assert bytes(part) == b"23"
    del part
    assert str(path) not in maps()


# --- the end of the interpreter, and copies of it ---

ENDS = {
    "tasks that run": """
import time
executor = WorkerExecutor(2)
for _ in range(3):
    executor.submit(time.sleep, 0.1).add_done_callback(lambda one: print(one.result()))
""",
    "a thread that goes on": """
def work():
    try:
        while True:
            executor.submit(abs, 1).result()
            began.set()
    except RuntimeError as exc:
        print(exc)
executor, began = WorkerExecutor(1), threading.Event()
threading.Thread(target=work, daemon=DAEMON).start()
began.wait()
""",
    "atexit": """
import atexit
@atexit.register
def late():
    try:
        executor.submit(abs, 1)
    except RuntimeError as exc:
        print(exc)
    executor.shutdown()
executor = WorkerExecutor(1)
executor.submit(abs, 1).result()
""",
    "callbacks that submit": """
def again(_):
    try:
        executor.submit(abs, 1).add_done_callback(again)
        began.set()
    except RuntimeError as exc:
        print(exc)
executor, began = WorkerExecutor(1), threading.Event()
executor.submit(abs, 1).add_done_callback(again)
began.wait()
""",
    "a forked copy": """
import os
executor = WorkerExecutor(1)
later = executor.submit(abs, -2)
pid = os.fork()
if not pid:
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    raise SystemExit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), later.result(), executor.submit(abs, -3).result())
""",
}
LATE = "cannot schedule new futures after shutdown\n"


@pytest.mark.parametrize(
    ("case", "daemon", "said"),
    [
        ("tasks that run", False, "None\n" * 3),
        ("a thread that goes on", False, LATE),
        ("a thread that goes on", True, LATE),
        ("atexit", False, LATE),
        ("callbacks that submit", False, LATE),
        ("a forked copy", False, "7 2 3\n"),
    ],
)
def test_the_interpreter_ends(case: str, daemon: bool, said: str) -> None:
    code = "import threading\nfrom aioelastic import WorkerExecutor\n" + ENDS[case].replace("DAEMON", str(daemon))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=150)
    assert (done.stdout, done.stderr, done.returncode) == (said, "", 0)
