"""What a signal's handler raises (Ctrl-C, a time-out) in a call of an executor costs that call, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import child_process, until
from test_executor import Gate

from aioelastic import WorkerExecutor
from aioelastic.executor.owner import Owner
from aioelastic.executor.pool import NEAR
from aioelastic.executor.tasks import Called, Line, Room
from aioelastic.system import descriptors


def interrupted(real: Callable[..., Any], late: bool = False) -> Callable[..., Any]:
    """The same, and its first call is interrupted: just before, or just after it has done its work."""
    calls: list[object] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            return real(*args, **kwargs)
        if late:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    return call


@pytest.mark.parametrize("late", [False, True], ids=["before it", "after it"])
def test_waking_the_owner(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    executor = WorkerExecutor(1)
    assert executor.submit(abs, -1).result() == 1
    owner = executor._pool._owner
    asyncio.run(until(lambda: not owner._woken and bool(owner._slots.idle)))
    try:
        monkeypatch.setattr(owner.loop, "call_soon_threadsafe", interrupted(owner.loop.call_soon_threadsafe, late))
        with pytest.raises(KeyboardInterrupt):
            executor.submit(abs, -2)
        assert executor.submit(abs, -3).result(60) == 3
    finally:
        owner._woken = False
        executor.shutdown()


@pytest.mark.parametrize("late", [False, True], ids=["before it", "after it"])
def test_starting_the_owner(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Nobody knows then whether its thread runs."""
    with WorkerExecutor(1) as executor:
        monkeypatch.setattr(threading.Thread, "start", interrupted(threading.Thread.start, late))
        with pytest.raises(KeyboardInterrupt):
            executor.submit(abs, -1)
        assert executor.submit(abs, -2).result() == 2
        pool = executor._pool
        assert [one._is_up for one in (*pool._past, pool._owner)] == [False, True]


@pytest.mark.parametrize(
    ("where", "late"),
    [
        ((Called, "add_done_callback"), False),
        ((Called, "add_done_callback"), True),
        ((Line, "append"), False),
        ((Line, "append"), True),
        ((Owner, "offer"), False),
    ],
)
def test_queueing_a_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: tuple[type, str], late: bool) -> None:
    """It is not run, and its permit comes back once."""
    with WorkerExecutor(1, max_pending=4) as executor:
        assert executor.submit(abs, -1).result() == 1
        pool = executor._pool
        assert pool._room is not None
        asyncio.run(until(lambda: bool(pool._owner._slots.idle)))
        with monkeypatch.context() as patch:
            patch.setattr(*where, interrupted(getattr(*where), late))
            with pytest.raises(KeyboardInterrupt):
                executor.submit(jobs.touches, str(tmp_path / "it"))
        assert executor.submit(abs, -2).result() == 2
    assert not (tmp_path / "it").exists()
    assert pool._room.taken == 0


@pytest.mark.parametrize("late", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("is_full", [False, True])
def test_asking_for_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_full: bool, late: bool) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1, max_pending=1) as executor:
        room = executor._pool._room
        assert room is not None
        first = executor.submit(jobs.waits_in, gate.path) if is_full else None
        with monkeypatch.context() as patch:
            patch.setattr(Room, "ask", interrupted(Room.ask, late))
            with pytest.raises(KeyboardInterrupt):
                executor.submit(abs, -1)
        if first is not None:
            gate.entered()
            gate.open()
            assert first.result() == gate.path
        assert (len(room._waiting), room.taken) == (0, 0)
        assert executor.submit(abs, -2).result(60) == 2
    assert room.taken == 0


def test_queueing_a_task_that_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerExecutor(1, max_pending=4) as executor:
        pool, offer = executor._pool, Owner.offer
        assert pool._room is not None

        def offered(self: Owner) -> None:
            offer(self)
            asyncio.run(until(lambda: any(one.task is not None or one.done for one in self._slots.all.values())))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Owner, "offer", offered)
            with pytest.raises(KeyboardInterrupt):
                executor.submit(abs, -1)
        assert executor.submit(abs, -2).result() == 2
    assert pool._room.taken == 0


def test_what_cannot_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerExecutor(1, max_pending=4) as executor:
        room = executor._pool._room
        assert room is not None
        monkeypatch.setattr(Room, "back", interrupted(Room.back, late=True))
        with contextlib.suppress(KeyboardInterrupt):
            executor.submit(id, threading.Lock())
        assert room.taken == 0


def test_putting_a_task_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No number is closed twice: it may be somebody else's by then."""
    gate, closed, again = Gate(tmp_path), list[int](), list[int]()

    class Closing:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def close(self, fd: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                os.close(fd)
            elif fd in closed:
                again.append(fd)
            else:
                closed.append(fd)
                os.close(fd)
                raise KeyboardInterrupt

    with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        waiting = [executor.submit(abs, -i) for i in range(NEAR)]
        with monkeypatch.context() as patch:
            patch.setattr(descriptors, "os", Closing())
            with pytest.raises(KeyboardInterrupt):
                executor.submit(len, bytes(100_000))
        gate.open()
        assert [one.result() for one in waiting] == list(range(NEAR))
        assert first.result() == gate.path
    assert len(closed) == 1
    assert again == []


class Stopped(Exception):
    """What this program's handler raises."""


def stops(*_: object) -> None:
    raise Stopped


@pytest.fixture(params=[signal.default_int_handler, stops])
def heard(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """What Ctrl-C raises."""
    before = signal.signal(signal.SIGINT, request.param)
    yield Stopped if request.param is stops else KeyboardInterrupt
    signal.signal(signal.SIGINT, before)


def is_interrupted(_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def raised_by(call: Callable[[], object]) -> type[BaseException] | None:
    try:
        call()
    except BaseException as exc:
        return type(exc)
    return None


def test_a_callback_of_what_is_done(heard: type[BaseException]) -> None:
    with WorkerExecutor(1) as executor:
        future = executor.submit(abs, -1)
        assert future.result() == 1
        with pytest.raises(heard):
            future.add_done_callback(is_interrupted)
        future.add_done_callback(lambda _: None)  # it is heard once


def test_a_callback_of_what_is_cancelled(tmp_path: Path, heard: type[BaseException]) -> None:
    gate, told = Gate(tmp_path), list[object]()
    with WorkerExecutor(1, max_pending=10) as executor:
        room = executor._pool._room
        assert room is not None
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        second, third = executor.submit(abs, -2), executor.submit(abs, -3)
        second.add_done_callback(is_interrupted)
        second.add_done_callback(told.append)
        raised = raised_by(second.cancel)
        waiting, taken = len(executor._pool._queue), room.taken
        gate.open()
        assert (first.result(), third.result()) == (gate.path, 3)
    assert raised is heard
    assert (told, waiting, taken) == ([second], 1, 2)


def test_a_callback_of_one_of_many_that_a_shutdown_cancels(tmp_path: Path, heard: type[BaseException]) -> None:
    gate = Gate(tmp_path)
    executor = WorkerExecutor(1)
    first = executor.submit(jobs.waits_in, gate.path)
    gate.entered()
    rest = [executor.submit(abs, 1) for _ in range(3)]
    rest[0].add_done_callback(is_interrupted)
    raised = raised_by(partial(executor.shutdown, wait=False, cancel_futures=True))
    gate.open()
    executor.shutdown()
    assert first.result() == gate.path
    assert raised is heard
    assert wait(rest, 10).not_done == set()
    assert all(one.cancelled() for one in rest)


def test_a_callback_in_the_thread_of_the_owner(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it raises ends nothing there."""

    def raises(_: object) -> None:
        raise KeyboardInterrupt

    with WorkerExecutor(1) as executor:
        executor._pool._lock.acquire()  # so that it is not done before it has a callback
        future = executor.submit(abs, -1)
        future.add_done_callback(raises)
        executor._pool._lock.release()
        assert [executor.submit(abs, -i).result() for i in range(3)] == [0, 1, 2]
    assert "exception calling callback" in caplog.text


ENDS = {
    "in the wait for a result": "executor.submit(waits_in, path).result()",
    "in the reading of a map": "list(executor.map(waits_in, [path] * 3))",
    "while others wait": """
others = [executor.submit(waits_in, path) for _ in range(20)]
others[-1].result()
""",
    "at the end of a `with`": "with executor:\n    executor.submit(waits_in, path)",
    "as the interpreter ends": "executor.submit(waits_in, path)",
}


@pytest.mark.parametrize("case", ENDS)
def test_ctrl_c_ends_a_program_that_has_no_with(case: str, tmp_path: Path) -> None:
    """Nobody waits for what runs, which here never ends."""
    gate = Gate(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(Path(jobs.__file__).parent)!r})
from aioelastic import WorkerExecutor
from jobs import waits_in
path, executor = {gate.path!r}, WorkerExecutor(1)
{ENDS[case]}
"""
    with child_process([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as program:
        gate.entered()
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    gate.open()
    assert said.rstrip().endswith("KeyboardInterrupt:" if case == "as the interpreter ends" else "KeyboardInterrupt")
    assert "WorkerFailed" not in said


def test_a_session_goes_on_after_ctrl_c() -> None:
    """What was interrupted at its prompt was not the program."""
    code = """
import sys
from aioelastic import WorkerExecutor
executor = WorkerExecutor(1)
raise KeyboardInterrupt

late = executor.submit(print, "done")
"""
    done = subprocess.run([sys.executable, "-i", "-q"], input=code, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n"
