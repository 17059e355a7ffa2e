"""A worker that ends on its own does what any Python program does at its end, and nothing of who it was copied from."""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import multiprocessing
import os
import signal
import tempfile
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import outcome_jobs as jobs
import pytest
from helpers import QUIET, alive, until

from aioelastic import Function, Group, Stop, WorkerExecutor, supervise

STARTS = ["zygote", "spawn", "fork"]


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "log")


def words(path: str) -> list[str]:
    return Path(path).read_text().split()


async def test_all_of_it(start: Any, path: str) -> None:
    result = await supervise(Function(jobs.does_exit_work, path, start != "fork"), start=start, logs=QUIET)
    found = words(path)
    assert sorted(set(found) - {"daemon"} - {found[found.index("daemon") + 1]}) == sorted(
        ["thread", "child", "finalize", "atexit", "logged"]
    )
    assert found.index("thread") < found.index("atexit")  # as an interpreter does
    assert not alive(int(found[found.index("daemon") + 1]))
    assert str(result[0].stdout) == "no line end"  # in a fork the alias is the test runner's


async def test_open_files_are_written(start: Any, path: str) -> None:
    await supervise(Function(jobs.leaves_files_open, path), start=start, logs=QUIET)
    assert [Path(path + one).read_text() for one in ("", ".binary", ".both")] == ["text", "bytes", "both"]


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_open_files_of_imports_are_written(start: Any, path: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "exit_opens.py").write_text(f"file = open({path!r}, 'a')\nfile.write('imported ')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    preload = ["exit_opens"] if start == "zygote" else []
    result = await supervise(Function(jobs.writes_to, "exit_opens"), 2, start=start, preload=preload, logs=QUIET)
    assert result.ok
    # a zygote has imported it once for all
    assert sorted(words(path)) == ["imported"] * (1 if preload else 2) + ["worked"] * 2


async def test_open_files_of_the_program_are_the_programs(path: str) -> None:
    with open(path, "w") as jobs.of_program:
        jobs.of_program.write("program ")
        await supervise(Function(jobs.writes_to, "outcome_jobs", "of_program"), start="fork", logs=QUIET)
    assert words(path) == ["program"]


async def test_a_line_begun_before_stdout_was_replaced(start: Any) -> None:
    result = await supervise(Function(jobs.replaces_stdout), start=start, logs=QUIET)
    assert str(result[0].stdout) == "begun"


async def test_a_thread_that_waits_for_a_reader_holds_no_end_up(start: Any, path: str) -> None:
    """It has the lock of what it writes to."""
    await supervise(Function(jobs.leaves_a_writer, path), start=start, logs=QUIET)
    assert Path(path).read_text() == "text"


@pytest.mark.parametrize("how", ["SystemExit", "KeyboardInterrupt", "ValueError"])
async def test_what_raises_keeps_the_rest_from_nothing(start: Any, how: str, path: str) -> None:
    result = await supervise(Function(jobs.exit_work_that_raises, path, how), start=start, logs=QUIET)
    assert words(path) == ["last", "first"]
    assert str(result[0].stdout) == "no line end"


async def test_a_copy_ends_no_child_of_the_worker(start: Any, path: str) -> None:
    await supervise(Function(jobs.forks_beside_a_child, path), start=start, logs=QUIET)
    assert words(path) == ["alive"]


async def test_a_hook_that_leaves_keeps_the_rest_from_nothing(start: Any, path: str) -> None:
    result = await supervise(Function(jobs.has_a_hook_that_leaves, path), start=start, logs=QUIET)
    assert result[0].value == 7
    assert words(path) == ["atexit"]
    assert str(result[0].stdout) == "no line end"


async def test_a_hook_that_leaves_in_a_copy(start: Any, path: str) -> None:
    """As in an interpreter its exit code is that of the process."""
    result = await supervise(Function(jobs.forks_with_a_hook_that_leaves, path), start=start, logs=QUIET)
    assert result[0].value == 3
    assert words(path) == ["atexit"]


async def test_a_hook_that_leaves_in_a_copy_of_a_pools_worker(path: str) -> None:
    with ProcessPoolExecutor(1) as pool:
        result = await supervise(Function(jobs.forks_with_a_hook_that_leaves, path), start=pool, logs=QUIET)
    assert result[0].value == 3


async def test_a_worker_of_an_executor_does_it_too(start: Any, path: str) -> None:
    with WorkerExecutor(1, start=start) as executor:
        executor.submit(atexit.register, jobs.note, path, "atexit").exception()
    assert words(path) == ["atexit"]


async def test_a_stop_ends_exit_work_that_hangs(start: Any, path: str) -> None:
    async with Group(
        Function(jobs.exit_work_that_hangs, path), start=start, logs=QUIET, stop=Stop(grace=0.05)
    ) as group:
        await until(lambda: Path(path).exists())
        result = await group.stop()
    assert result[0].stopped
    assert result[0].exit.signal == signal.SIGKILL


def waits_for_a_word(reader: int) -> None:
    os.read(reader, 1)


async def test_a_copy_of_the_program_does_nothing_of_the_programs(path: str) -> None:
    thing = jobs.Thing()
    mine = weakref.finalize(thing, jobs.note, path, "finalizer of the program")
    atexit.register(jobs.note, path, "atexit of the program")
    target = logging.FileHandler(path)
    handler = logging.handlers.MemoryHandler(100, target=target)
    handler.buffer.append(logging.makeLogRecord({"msg": "record of the program"}))
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=waits_for_a_word, args=(reader,), daemon=True)
    child.start()
    try:
        with tempfile.TemporaryDirectory() as home:
            await supervise(Function(jobs.note, path, "the function"), start="fork", logs=QUIET)
            assert os.path.isdir(home)
        assert words(path) == ["the", "function"]
        assert child.is_alive()
    finally:
        os.write(writer, b".")
        child.join()
        child.close()
        os.close(reader)
        os.close(writer)
        atexit.unregister(jobs.note)
        mine.detach()
        handler.buffer.clear()
        handler.close()
        target.close()


@pytest.mark.parametrize("pool", [ProcessPoolExecutor, ThreadPoolExecutor, WorkerExecutor])
async def test_beside_any_executor_of_the_program(pool: Any, path: str) -> None:
    with pool(1) as mine:
        assert mine.submit(abs, -1).result() == 1
        result = await supervise(Function(jobs.exit_work_that_raises, path, "ValueError"), start="fork", logs=QUIET)
        assert mine.submit(abs, -2).result() == 2
    assert words(path) == ["last", "first"]
    assert str(result[0].stdout) == "no line end"
