"""A guardian or a zygote that somebody has stopped (SIGSTOP) holds nobody up: not the loop, not the end of a group."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from helpers import QUIET, TWO_WORKERS, alive, gone, sh, stopped_itself, until

from aioelastic import Function, Group, Stop, supervise
from aioelastic.child.wire import datagrams
from aioelastic.launch import end_helpers
from aioelastic.model.states import State
from aioelastic.testing._process_tree import descendants
from aioelastic.testing._supervisor_process import Program

pytestmark = pytest.mark.fresh

STAY = "exec sleep 1000"
SHORT = Stop(grace=0.1, bound=0.3)
MANY = 400  # datagrams: a socket of the default size holds some 280
HANGS = 150.0  # seconds: only how long a failure takes


def stay() -> None:
    signal.pause()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """It is stopped in this block. Whoever waits for it there fails: it goes on only since the block takes too long."""
    over = threading.Event()
    hung = threading.Event()

    def rescue() -> None:
        if not over.wait(HANGS):
            hung.set()
            os.kill(pid, signal.SIGCONT)

    rescuer = threading.Thread(target=rescue)
    os.kill(pid, signal.SIGSTOP)
    rescuer.start()
    try:
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            os.sched_yield()
        yield
    finally:
        over.set()
        rescuer.join()
        os.kill(pid, signal.SIGCONT)
    assert not hung.is_set(), "somebody waited for it"


def of_ours(name: str) -> int:
    """The pid of our guardian, or of our zygote: one of a test before this may be on its way out."""
    family, mark = psutil.Process().children(recursive=True), f"{name}.main_loop"
    found = {one.pid: one for one in family if one.name() == name or mark in " ".join(one.cmdline())}
    helpers = [one for one in found.values() if one.ppid() not in found]  # a zygote's workers have its words, too
    return max(helpers, key=psutil.Process.create_time).pid


def server_of(group: Group) -> Any:
    launchers: Any = group._supervisor.resources._launchers
    return launchers._guardians[-1].server


async def test_what_a_guardian_is_asked_while_it_does_not_read() -> None:
    """More than its socket holds: connections, helpers, directories; all of it is done when it goes on."""
    async with Group(sh(STAY), logs=QUIET) as group:
        server = server_of(group)
        with stopped(of_ours("aio-guardian")):
            for _ in range(MANY):
                server.connect({}).close()
            assert server._outbox._unsent, "the socket was not full"
            server.remove("/nonexistent")
            server.end_helper(0)
            commands = asyncio.create_task(supervise(sh("echo up"), n=3, logs=QUIET))
            functions = asyncio.create_task(supervise(Function(os.getpid), n=2, logs=QUIET))  # its zygote is a helper
            assert not (await asyncio.wait({commands, functions}, timeout=0.1))[0]
        assert [str(one.stdout) for one in await commands] == ["up\n"] * 3
        assert (await functions).ok
        await until(lambda: server._outbox._thread is None)


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
async def test_what_had_to_wait_is_sent_again(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that waits for room, and is refused when there is some: no group takes its guardian for dead."""
    errors, real = [], datagrams.send

    def send(sock: Any, packet: bytes, fds: Any = (), flags: int = 0) -> None:
        if errors and threading.current_thread().name == "aioelastic-outbox":
            number = errors.pop()
            raise OSError(number, os.strerror(number))
        real(sock, packet, fds, flags)

    monkeypatch.setattr(datagrams, "send", send)
    async with Group(sh(STAY), logs=QUIET) as group:
        server = server_of(group)
        with stopped(of_ours("aio-guardian")):
            while not server._outbox._unsent:
                server.connect({}).close()
            commands = asyncio.create_task(supervise(sh("echo up"), n=3, logs=QUIET))
            assert not (await asyncio.wait({commands}, timeout=0.1))[0]
            errors += [code, code]
        assert [str(one.stdout) for one in await commands] == ["up\n"] * 3
        assert errors == []
        await until(lambda: server._outbox._thread is None)


async def test_a_guardian_is_replaced_while_it_does_not_read() -> None:
    """It is continued, and goes."""
    async with Group(sh(STAY), logs=QUIET) as group:
        server, pid = server_of(group), of_ours("aio-guardian")
        with stopped(pid):
            for _ in range(MANY):
                server.connect({}).close()
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(HANGS):
            await asyncio.to_thread(end_helpers)
            await gone(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert not [one for one in threading.enumerate() if one.name == "aioelastic-outbox"]


async def test_a_guardian_that_was_dismissed_dies_under_a_group_that_uses_it() -> None:
    """Its control socket is closed here by then: nothing fails on the loop."""
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with Group(sh(STAY), logs=QUIET, stop=SHORT, check=False) as group:
        pid = of_ours("aio-guardian")
        await asyncio.to_thread(end_helpers)
        await gone(pid)
        async with asyncio.timeout(HANGS):
            result = await group.wait()
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGKILL
    assert problems == []


async def test_signals_and_starts_of_groups_whose_guardian_does_not_read() -> None:
    """Each by a connection of its own; the groups end in time, and what was started late is killed."""
    groups = [Group(sh(STAY), n=16, logs=QUIET, stop=SHORT, check=False) for _ in range(2)]
    async with Group(sh(STAY), logs=QUIET, stop=SHORT, check=False) as full:
        launchers: Any = full._supervisor.resources._launchers
        launcher = launchers._guardians[-1]
        with stopped(of_ours("aio-guardian")):
            for _ in range(MANY):
                assert launcher.signal_group(1, signal.SIGCONT)
            assert launcher._unsent, "the socket was not full"
            entering = [asyncio.create_task(one.__aenter__()) for one in groups]
            await until(lambda: all(one.plan is not None and one[0].state is State.STARTING for one in groups))
            for one in groups:
                result = await one.stop()
                assert [two.exit for two in result] == [None] * 16
            await asyncio.wait(entering)
            result = await full.stop()
            assert result[0].exit is not None
            assert result[0].exit.signal == signal.SIGTERM
    await until(lambda: all(stat[0] != "sleep" or stat[1] == "Z" for stat in descendants().values()))
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok


async def test_a_zygote_that_has_not_read_all_goes_on_with_the_next_group() -> None:
    async with Group(Function(stay), logs=QUIET, stop=SHORT, check=False) as group:
        pid = of_ours("zygote")
        launchers: Any = group._supervisor.resources._launchers
        zygote = launchers.zygote._zygotes[-1]
        with stopped(pid):
            for _ in range(MANY):
                assert zygote.signal_group(1, 0)
            assert zygote._unsent, "the socket was not full"
            await group.stop()
    async with asyncio.timeout(HANGS):
        assert (await supervise(Function(os.getppid), logs=QUIET))[0].value == pid


@pytest.mark.parametrize("who", ["guardian", "zygote"])
async def test_a_worker_stops_who_has_started_it(who: str) -> None:
    """The end comes in time all the same, says how it ended, and that nobody could prove that nothing is left."""
    script = "trap 'kill -STOP $PPID; echo up; exec sleep 1000' USR2; echo ready; while :; do sleep 0.01; done"
    entry: Any = sh(script) if who == "guardian" else Function(stops_its_parent)
    async with Group([entry, sh(STAY)], logs=QUIET, stop=SHORT, check=False) as group:
        lines = aiter(group.lines())
        await anext(lines)  # whoever has started it has said so
        group[0].send_signal(signal.SIGUSR2)
        await anext(lines)
        pid = psutil.Process(group.pids[0]).ppid()
        with stopped(pid):
            result = await group.stop()
    assert [one.exit.signal for one in result if one.exit] == [signal.SIGTERM] * 2
    if who == "guardian":
        assert not result.clean
        assert {one.kind for one in result.remains} == {"unproven"}
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok


def stops_its_parent() -> None:
    def stop(*_: object) -> None:
        os.kill(os.getppid(), signal.SIGSTOP)
        os.write(1, b"up\n")

    signal.signal(signal.SIGUSR2, stop)
    print("ready", flush=True)
    while True:
        signal.pause()


@pytest.mark.parametrize("how", ["killed", "left"])
async def test_a_program_ends_while_its_guardian_is_stopped(how: str) -> None:
    """Its workers end: the keeper lets the guardian go on."""
    with Program(TWO_WORKERS) as program:
        words = await asyncio.to_thread(program.line, "ready")
        pids = [int(one) for one in words.split()[-2:]]
        guardian = psutil.Process(pids[0]).ppid()
        os.kill(guardian, signal.SIGSTOP)
        await stopped_itself(guardian)
        try:
            os.kill(program.pid, signal.SIGKILL if how == "killed" else signal.SIGTERM)
            async with asyncio.timeout(HANGS):
                for one in (*pids, guardian):
                    await gone(one)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(guardian, signal.SIGCONT)
    assert not any(map(alive, pids))
