"""Time-outs of any length behave, in every call that takes one, and one that is none is refused."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import share_jobs
from helpers import QUIET, event_of, sh
from test_executor import Gate

from aioelastic import Function, Group, GroupTimeout, Logs, SpecError, Stop, WorkerExecutor, sharing, supervise
from aioelastic.child.wire import datagrams
from aioelastic.child.worker import lent_run
from aioelastic.events import Spawned

MONTH = 31 * 86_400  # seconds: more than poll(2) can be asked for
LONG = [
    MONTH,
    threading.TIMEOUT_MAX,
    pytest.param(2 * threading.TIMEOUT_MAX, id="longer"),
    math.inf,
    pytest.param(10**400, id="10**400"),
]
NO_TIME = [-1, -0.001, -math.inf, math.nan, "2", True]
ENDLESS = [None, *LONG]
SOME = [None, MONTH, math.inf]  # where workers are started


class Waits:
    """Sees that a thread is about to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self._real = datagrams.readable
        monkeypatch.setattr(datagrams, "readable", self._readable)

    def _readable(self, *args: Any) -> bool:
        self.begun.set()
        return self._real(*args)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


class Beside(threading.Thread):
    """A call in another thread; what it returns or raises."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.came: list[Any] = []
        self.start()

    def run(self) -> None:
        try:
            self.came.append(self._call())
        except BaseException as exc:
            self.came.append(exc)

    def result(self) -> Any:
        self.join(60)
        return self.came[0]


# --- queues ---


@pytest.mark.parametrize("timeout", ENDLESS)
def test_a_get_that_waits_long(waits: Waits, timeout: Any) -> None:
    q = sharing.Queue(1)
    getting = Beside(lambda: q.get_sync(timeout))
    assert waits.begun.wait(60)
    q.put_nowait("item")
    assert getting.result() == "item"


@pytest.mark.parametrize("timeout", ENDLESS)
def test_a_put_that_waits_long(waits: Waits, timeout: Any) -> None:
    q = sharing.Queue(1)
    q.put_nowait("first")
    putting = Beside(lambda: q.put_sync("second", timeout))
    assert waits.begun.wait(60)
    assert q.get_nowait() == "first"
    assert putting.result() is None
    assert q.get_nowait() == "second"


@pytest.mark.parametrize("timeout", [0, 0.0, 0.001, np.int64(0), np.float32(0.001), Fraction(1, 1000)])
def test_one_kind_of_time_out_satisfies_both_habits(timeout: float) -> None:
    q = sharing.Queue(1)
    for habit in (queue.Empty, TimeoutError):
        with pytest.raises(habit) as caught:
            q.get_sync(timeout)
        assert type(caught.value) is sharing.Empty
        assert str(caught.value)
    q.put_nowait(1)
    for habit in (queue.Full, TimeoutError):
        with pytest.raises(habit) as caught:
            q.put_sync(2, timeout)
        assert type(caught.value) is sharing.Full
        assert str(caught.value)
    with pytest.raises(sharing.Full):
        q.put_nowait(2)
    assert q.get_nowait() == 1
    with pytest.raises(sharing.Empty):
        q.get_nowait()


def test_a_wait_that_is_longer_than_poll_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again."""
    asked: list[float | None] = []
    a, b = socket.socketpair()

    class Poll:
        def __init__(self) -> None:
            self.real = real()

        def register(self, fd: int, mask: int) -> None:
            self.real.register(fd, mask)

        def poll(self, ms: float | None = None) -> Any:
            asked.append(ms)
            self.real.poll(0 if ms is None else min(ms, 1))  # it takes such a time at all
            if len(asked) == 3:
                b.send(b".")
            return self.real.poll(0)

    with a, b:
        real = datagrams.select.poll
        monkeypatch.setattr(datagrams.select, "poll", Poll)
        assert datagrams.readable(MONTH, a.fileno())
    assert len(asked) == 3
    assert all(ms == datagrams.LONGEST * 1000 for ms in asked)


# --- a function worker ---


@pytest.mark.parametrize("timeout", SOME)
async def test_a_worker_that_receives(timeout: Any) -> None:
    async with Group(Function(share_jobs.receives, timeout), logs=QUIET) as group:
        assert await group[0].receive() == "waits"
        await group[0].send("word")
        assert (await group.wait())[0].value == "word"


async def test_a_worker_that_receives_nothing_in_time() -> None:
    async with Group(Function(share_jobs.receives_nothing), logs=QUIET) as group:
        assert (await group.wait())[0].value == ["Empty", "Empty", "SpecError: timeout=-1 is no time-out"]


@pytest.mark.parametrize("timeout", SOME)
async def test_a_worker_that_waits_to_be_stopped(timeout: Any) -> None:
    async with Group(Function(share_jobs.stopped_within, timeout), logs=QUIET) as group:
        assert await group[0].receive() == [False, "timeout=-1"]
        assert await group[0].receive() == "waits"
        await group.stop()
        assert (await group.wait())[0].value is True


@pytest.mark.parametrize("timeout", ENDLESS)
def test_a_call_in_a_lent_thread_that_waits_to_be_stopped(timeout: Any) -> None:
    asked = lent_run.Asked()
    assert asked.wait(0) is False
    with pytest.raises(SpecError, match=r"^timeout=-1"):
        asked.wait(-1)
    waiting = Beside(lambda: asked.wait(timeout))
    asked.ask()
    assert waiting.result() is True


# --- other calls ---


@pytest.mark.parametrize("timeout", ENDLESS)
async def test_a_program_that_attaches(tmp_path: Path, waits: Waits, timeout: Any) -> None:
    path = f"/tmp/aioelastic-test-{os.getpid()}"
    async with sharing.Endpoint(path, {"a": 1}):
        attaching = Beside(lambda: sharing.attach(path, timeout=timeout))
        assert waits.begun.wait(60)  # the loop stands still meanwhile, and offers nothing yet
        await asyncio.to_thread(attaching.join, 60)
        with attaching.result() as offered:
            assert dict(offered) == {"a": 1}


async def test_an_endpoint_that_lets_nobody_in_any_more(tmp_path: Path) -> None:
    """Those that wait to be let in are bounded by their time-out, too."""
    path = f"/tmp/aioelastic-test-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other,
    ):
        listener.bind(path)
        try:
            listener.listen(0)
            other.connect(path)
            with pytest.raises(TimeoutError, match="does not answer"):
                sharing.attach(path, timeout=0.01)
            with pytest.raises(TimeoutError, match="does not answer"):
                sharing.attach(path, timeout=0)
        finally:
            os.unlink(path)


@pytest.mark.parametrize("timeout", [0.2, None])
def test_an_endpoint_that_lets_nobody_in_while_signals_come(timeout: Any) -> None:
    """Python takes a connect(2) that one has interrupted for one that goes on, and here it does not."""
    path = f"/tmp/aioelastic-test-{os.getpid()}"
    listener, other = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    came: list[int] = []

    def handler(*_: Any) -> None:
        came.append(1)
        if len(came) == 5 and timeout is None:
            listener.close()

    before = signal.signal(signal.SIGALRM, handler)
    with listener, other:
        listener.bind(path)
        try:
            listener.listen(0)
            other.connect(path)
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            with pytest.raises(TimeoutError if timeout else sharing.ShareLost):
                sharing.attach(path, timeout=timeout)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.unlink(path)
    assert came


@pytest.mark.parametrize("timeout", SOME)
async def test_a_group_that_may_run_long(timeout: Any) -> None:
    result = await supervise(sh("true"), n=1, timeout=timeout, logs=QUIET)
    assert result.ok


async def test_a_group_that_may_not_run_at_all() -> None:
    with pytest.raises(GroupTimeout):
        await supervise(sh("sleep 1000"), n=1, timeout=0, logs=QUIET)


@pytest.mark.parametrize("timeout", SOME)
def test_an_executor_that_waits_long(timeout: Any) -> None:
    with WorkerExecutor(1, task_timeout=timeout) as executor:
        assert list(executor.map(abs, [-1, -2], timeout=timeout)) == [1, 2]
        assert list(executor.map(abs, [-1, -2, -3], timeout=timeout, chunksize=2)) == [1, 2, 3]


def test_an_executor_that_does_not_wait(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with WorkerExecutor(1) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        with pytest.raises(TimeoutError):
            next(executor.map(abs, [-1], timeout=0))
        gate.entered()
        gate.open()
        assert first.result() == gate.path


@pytest.mark.parametrize("seconds", [MONTH, threading.TIMEOUT_MAX])
async def test_a_stop_that_may_take_long(seconds: float) -> None:
    logs = Logs(tee=QUIET.tee, drain=seconds)
    async with Group(sh("sleep 1000"), logs=logs, stop=Stop(grace=seconds, bound=seconds), check=False) as group:
        await event_of(group, Spawned)
        assert await group.dump_stacks(timeout=seconds)
        await group.stop()
        result = await group.wait()
    assert result[0].exit.signal == signal.SIGTERM


# --- what is none ---


def calls() -> Iterator[Any]:
    for timeout in NO_TIME:
        for name, call in {
            "get_sync": lambda timeout: sharing.Queue(1).get_sync(timeout),
            "put_sync": lambda timeout: sharing.Queue(1).put_sync(1, timeout),
            "attach": lambda timeout: sharing.attach("/nowhere", timeout=timeout),
            "supervise": lambda timeout: asyncio.run(supervise(sh("true"), timeout=timeout)),
            "task_timeout": lambda timeout: WorkerExecutor(1, task_timeout=timeout),
            "map": lambda timeout: WorkerExecutor(1).map(abs, [1], timeout=timeout),
        }.items():
            yield pytest.param(call, timeout, id=f"{name}-{timeout}")


@pytest.mark.parametrize(("call", "timeout"), list(calls()))
def test_what_is_no_time_out(call: Callable[[Any], Any], timeout: Any) -> None:
    with pytest.raises(SpecError, match=r"timeout=.* is no time-out; give seconds, 0 or more, or None"):
        call(timeout)


@pytest.mark.parametrize("seconds", [*NO_TIME, math.inf, pytest.param(10**400, id="10**400"), 1e10, None])
@pytest.mark.parametrize("call", [lambda x: Stop(grace=x), lambda x: Stop(bound=x), lambda x: Logs(drain=x)])
def test_what_does_not_end_is_no_time_to_wait(call: Callable[[Any], Any], seconds: Any) -> None:
    with pytest.raises(SpecError, match="is not a time; give seconds, 0 or more"):
        call(seconds)
