"""A worker of an executor whose task has used up its descriptors: it fails what needs one, and lives."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from typing import Any

import jobs
import numpy as np
import pytest
from helpers import QUIET

from aioelastic import Function, RemoteError, WorkerExecutor, memory, sharing, supervise
from aioelastic.child.wire import datagrams, messages

STARTS = ["zygote", "spawn", "fork"]

_held: list[int] = []


def _fill() -> int:
    """No descriptor can be made in this process any more, until `_empty`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 64), hard))
    with contextlib.suppress(OSError):
        while True:
            _held.append(os.dup(0))
    return os.getpid()


def _empty() -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    while _held:
        os.close(_held.pop())
    return os.getpid()


def _leave(count: int) -> int:
    """The same, but for so many."""
    pid = _fill()
    for _ in range(count):
        os.close(_held.pop())
    return pid


async def _doubled(value: int) -> int:
    return 2 * value


@pytest.mark.parametrize("warm", [False, True], ids=["its first loop", "a later one"])
def test_an_event_loop_that_lacks_descriptors_costs_its_task_only(warm: bool) -> None:
    """uvloop's library ends the process where it gets some, and not all that it needs."""
    with WorkerExecutor(1) as executor:
        if warm:
            assert executor.submit(_doubled, 1).result(30) == 2
        for count in range(12):
            pid = executor.submit(_leave, count).result(30)
            future = executor.submit(_doubled, count)
            told = future.exception(30)
            assert told is None or "Too many open files" in str(told)
            assert count < 9 or future.result() == 2 * count
            assert executor.submit(_empty).result(30) == pid


def _raise(words: str, times: int = 1) -> None:
    raise ValueError(words * times)


def _deep(depth: int) -> None:
    """Its traceback is long; what it raises is not."""
    if not depth:
        raise KeyError("small")
    exec(compile(f"_deep({depth - 1})", "x" * 500, "exec"))


class Many:
    """It has more descriptors than one datagram takes, and after it there are no more."""


def _many(one: Many, message: memory.Outgoing) -> Any:
    numbers = [message.descriptor(0) for _ in range(datagrams.FDS + 1)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return len, (numbers,)


memory.carry(Many, _many)


@pytest.mark.parametrize("start", STARTS)
def test_a_worker_without_descriptors_goes_on(start: Any) -> None:
    """What can be told without one is told: it fails the tasks that need one, and no other."""
    shared = sharing.copy(np.zeros(10))
    with WorkerExecutor(1, start=start, memory_limit=1 << 40) as executor:
        pid = executor.submit(_fill).result(30)
        for fn, given in ((len, bytes(100_000)), (jobs.sum_of, shared), (bytes, 100_000), (jobs.zeros, 100_000)):
            with pytest.raises((OSError, sharing.ShareLimit), match="Too many open files"):
                executor.submit(fn, given).result(30)
            assert executor.submit(abs, -1).result(30) == 1
        for words in ("x", "\0", "\U0001f600"):
            with pytest.raises(RemoteError, match="ValueError: ") as told:
                executor.submit(_raise, words, 100_000).result(30)
            assert told.value.message.startswith(words * 100)
            assert "_raise" in told.value.traceback
            assert "Too many open files" in told.value.not_rebuilt
        assert executor.submit(_empty).result(30) == pid
        assert executor.submit(len, bytes(100_000)).result(30) == 100_000
        with pytest.raises(ValueError, match=r"x{100000}"):
            executor.submit(_raise, "x", 100_000).result(30)


def test_an_exception_that_is_small_travels_without_a_descriptor() -> None:
    """Of what is told with it only as much as there is room for."""
    with WorkerExecutor(1) as executor:
        executor.submit(_fill).result(30)
        with pytest.raises(KeyError) as told:
            executor.submit(_deep, 100).result(30)
        executor.submit(_empty).result(30)
    assert isinstance(told.value.__cause__, RemoteError)
    assert "\n…\n" in told.value.__cause__.traceback


def test_a_result_with_more_descriptors_than_can_travel() -> None:
    with WorkerExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(30)
        with pytest.raises(OSError, match="Too many open files"):
            executor.submit(Many).result(30)
        assert executor.submit(_empty).result(30) == pid


def _lacks_buffers_once() -> None:
    real, left = datagrams.send, [OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))]

    def send(sock: Any, packet: bytes, fds: Any = ()) -> None:
        if left and packet[:1] == messages.DONE:
            raise left.pop()
        real(sock, packet, fds)

    datagrams.send = send


def test_a_result_that_the_system_does_not_take_just_now() -> None:
    with WorkerExecutor(1, initializer=_lacks_buffers_once) as executor:
        with pytest.raises(OSError, match="No buffer space"):
            executor.submit(abs, -1).result(30)
        (pid,) = executor.pids
        assert executor.submit(os.getpid).result(30) == pid


def _fill_and_raise() -> None:
    _fill()
    _raise("x", 100_000)


async def test_a_function_that_fails_without_descriptors_is_told_of() -> None:
    result = await supervise(Function(_fill_and_raise), n=1, logs=QUIET, check=False)
    assert result.first_failure is not None
    told = result.first_failure.exception
    assert isinstance(told, RemoteError)
    assert (told.phase, told.type_name, told.message[:100]) == ("call", "ValueError", "x" * 100)
