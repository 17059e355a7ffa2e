"""A thread of ours survives its jobs: what fails is told, what it was to do is counted as lost, and others follow."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from helpers import QUIET, sh, until

from aioelastic import events, supervise
from aioelastic.child.wire import datagrams, messages, requests, sent_objects
from aioelastic.launch import _descriptor_exchange, _function_channel, _helper_process
from aioelastic.planning import TAG
from aioelastic.processes import census as census_module
from aioelastic.processes.census import Census
from aioelastic.streams import _console_target
from aioelastic.system import helper_thread
from aioelastic.system.helper_thread import HelperThread
from aioelastic.watch import Poller


@contextlib.asynccontextmanager
async def helper() -> AsyncIterator[tuple[HelperThread, list[dict[str, Any]]]]:
    """One, and what the loop was told."""
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    one = HelperThread(loop, "test-helper")
    try:
        yield one, told
    finally:
        await one.end()
        loop.set_exception_handler(None)


async def test_a_look_that_fails_is_answered_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked would wait for ever."""

    def fails(*args: Any) -> Any:
        raise IndexError("a line of /proc that nobody knows")

    async with helper() as (thread, told):
        census = Census(thread, TAG)
        census._since = 0
        with monkeypatch.context() as patch:
            patch.setattr(census_module, "_see", fails)
            async with asyncio.timeout(150):
                assert (await census.take(60)).by_owner == {}
        await until(lambda: [type(one["exception"]) for one in told] == [IndexError])
        assert (await census.take(60)).by_session
        census.close()


async def test_a_thread_that_fails_before_its_first_job_does_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that is an error to the program, for one."""
    async with helper() as (thread, told):
        monkeypatch.setattr(helper_thread, "tell_kernel", broken)
        assert await thread.submit(lambda: 7) == 7
        await until(lambda: [type(one["exception"]) for one in told] == [EncodingWarning])


async def test_a_console_whose_thread_fails_is_told_and_waited_for_by_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_console_target, "tell_kernel", broken)
    problems: list[str] = []
    with open(tmp_path / "out", "w") as out, contextlib.redirect_stdout(out):
        result = await supervise(
            sh("echo lost"),
            on_event=lambda event: problems.append(event.problem) if isinstance(event, events.SinkTrouble) else None,
        )
    assert result.ok
    assert ["EncodingWarning" in one for one in problems] == [True]


def broken(*args: Any) -> None:
    raise EncodingWarning


def test_an_exchange_without_descriptors_serves_those_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fail, real = (
        [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "aborted")],
        socket.socket.accept,
    )

    def accept(listener: socket.socket) -> Any:
        if fail:
            raise fail.pop()
        return real(listener)

    monkeypatch.setattr(socket.socket, "accept", accept)
    exchange = _descriptor_exchange.Exchange()
    try:
        place = exchange.place()
        place.leave(b"V", [])
        assert exchange.take(place.number) == (b"V", [])
        assert not fail
    finally:
        exchange.close()


async def test_without_a_thread_to_unpickle_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    packet = bytearray(messages.encode(messages.OBJECT, (1,))[0])
    packet[1] |= messages._SLOW
    here, there = datagrams.pair()
    with here, there:
        here.setblocking(False)
        before = set(os.listdir("/proc/self/fd"))
        one = _function_channel.FunctionChannel(Poller(asyncio.get_running_loop()), here, lambda: None)
        datagrams.send(there, bytes(packet), [0, 0])

        def comes(obj: sent_objects.SentObject) -> None:
            obj.packet, obj.fds = bytes(packet), [os.dup(0)]

        monkeypatch.setattr(threading.Thread, "start", none_left)
        one._poller._ready()
        assert "can't start new thread" in one.invalid
        with pytest.raises(RuntimeError):
            await sent_objects.Reader().take([], comes, lambda can: can)
        gc.collect()
        one._poller.remove(here.fileno())
        assert set(os.listdir("/proc/self/fd")) == before
        one.finish()


async def test_a_process_that_was_told_in_vain_has_its_descriptor_closed_once(monkeypatch: Any) -> None:
    """Its number may be another's by then."""
    here, there = datagrams.pair()
    here.setblocking(False)
    loop = asyncio.get_running_loop()
    server = _helper_process.Server(here)
    server.attach(loop)
    closed: list[int] = []
    real = os.close

    def close(fd: int) -> None:
        closed.append(fd)
        real(fd)

    class Nobody:
        stdin = stdout = stderr = channel = None

        def close_ours(self) -> None:
            pass

    done = loop.create_future()
    done.cancel()  # against the contract
    poller = Poller(loop)
    server._starting[1] = cast("Any", (done, Nobody(), 0.0, 0, poller))
    pidfd = os.pidfd_open(os.getpid())
    packet, _ = requests.encode(requests.STARTED, (1, os.getpid(), 0))
    datagrams.send(there, packet, [pidfd, pidfd])
    real(pidfd)
    monkeypatch.setattr(_helper_process, "send_signal", lambda *args: None)
    monkeypatch.setattr(os, "close", close)
    server.hear()
    assert server.gone
    assert len(closed) == len(set(closed)) == 2  # what came without need, and the connection
    assert server._running == {}
    (kept,) = poller._callbacks
    process = cast("Any", poller._callbacks[kept]).__self__
    process.abandon()
    assert closed.count(kept) == 1
    there.close()


async def test_all_is_well_after_jobs_that_fail() -> None:
    async with helper() as (thread, told):
        for exc in (ValueError("one"), SystemExit(1), KeyboardInterrupt()):

            def job(exc: BaseException = exc) -> None:
                raise exc

            thread.put(job)
        assert await thread.submit(lambda: 3) == 3
        assert [type(one["exception"]) for one in told] == [ValueError, SystemExit, KeyboardInterrupt]
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok
