"""Whatever ends a guardian or a zygote, the groups and executors that use it notice the ends of their workers, say why,
and go on; and who tidies up ends only those that nobody uses."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, alive, event_of, gone, sh

from aioelastic import Function, Group, Restart, Stop, WorkerExecutor, WorkerFailed, sharing, supervise
from aioelastic.events import Spawned
from aioelastic.launch import _guardian, _zygote, end_helpers
from aioelastic.testing._chaos import guardian, keeper, zygote
from aioelastic.testing._leak_check import cool_down, no_leaks

pytestmark = pytest.mark.fresh

STAY = sh("exec sleep 1000")
IGNORED = ["*"]  # names in /dev/shm are not what this is about
HANGS = 150.0  # seconds: only how long a failure takes


def killed(*parties: Callable[[Any], int | None]) -> Callable[[], None]:
    """All of them, so that none has time to do its last work."""

    def way() -> None:
        pids = [pid for one in parties if (pid := one(Spawned(None, None, 0, 0.0))) is not None]
        assert len(pids) == len(parties)
        for signum in (signal.SIGSTOP, signal.SIGKILL) if len(pids) > 1 else (signal.SIGKILL,):
            for pid in pids:
                os.kill(pid, signum)

    return way


def hung_up() -> None:
    """What connects this program with them is shut down."""
    for one in _zygote._zygotes:
        one._control.shutdown(socket.SHUT_RDWR)
    for other in _guardian._guardians:
        other._outbox.sock.shutdown(socket.SHUT_RDWR)


def ended_by_a_thread() -> None:
    thread = threading.Thread(target=end_helpers)
    thread.start()
    thread.join()


def ended_while_stopped() -> None:
    for party in (guardian, keeper, zygote):
        if (pid := party(Spawned(None, None, 0, 0.0))) is not None:
            os.kill(pid, signal.SIGSTOP)
    end_helpers()


WAYS: dict[str, Callable[[], None]] = {
    "guardian killed": killed(guardian),
    "keeper killed": killed(keeper),
    "hung up": hung_up,
    "ended": end_helpers,
    "ended by a thread": ended_by_a_thread,
    "ended while stopped": ended_while_stopped,
}
WORDS = r"killed with its parent: the (zygote|guardian) that had started it (died|was ended)"
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "command": (STAY, {}),
    "command with grace": (STAY, {"stop": Stop(if_lost="stop", grace=5)}),
    "function": (Function(jobs.sleeps), {}),
    "function with grace": (Function(jobs.sleeps), {"stop": Stop(if_lost="stop", grace=5)}),
    "fresh interpreter": (Function(jobs.sleeps), {"start": "spawn"}),
}
CASES = [
    *(pytest.param(kind, WAYS[way], id=f"{kind}, {way}") for kind in KINDS for way in WAYS),
    *(pytest.param(kind, killed(zygote), id=f"{kind}, zygote killed") for kind in KINDS if kind.startswith("function")),
    *(pytest.param(kind, killed(guardian, keeper), id=f"{kind}, both killed") for kind in KINDS if "command" in kind),
]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "way"), CASES)
async def test_a_group_ends_in_words(kind: str, way: Callable[[], None]) -> None:
    entry, options = KINDS[kind]
    async with Group(entry, n=2, logs=QUIET, check=False, **options) as group:
        pids = group.pids
        way()
        async with asyncio.timeout(HANGS):
            result = await group.wait()
    assert result.first_failure is not None
    assert re.fullmatch(WORDS, str(result.first_failure.why))
    assert not any(map(alive, pids.values()))
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok
    assert (await supervise(Function(jobs.parent), logs=QUIET)).ok


async def test_a_zygote_outlives_its_guardian_and_serves_its_workers() -> None:
    async with Group(Function(jobs.sleeps), logs=QUIET, check=False) as group:
        pid = zygote(Spawned(None, None, 0, 0.0))
        assert pid is not None
        killed(guardian, keeper)()
        group[0].send_signal(signal.SIGUSR1)
        result = await group.wait()
    assert result.failures[0].cause == "SIGUSR1"
    end_helpers()
    await gone(pid)  # it is nobody's child now


@pytest.mark.parametrize("kind", ["command", "function", "fresh interpreter"])
@pytest.mark.parametrize("way", ["guardian killed", "ended"])
async def test_a_group_that_begins_again_does_so_by_new_ones(kind: str, way: str) -> None:
    """... and not by those that are on their way out, which would end it a second time."""
    entry, options = KINDS[kind]
    policy = Restart.on_failure(max=1, scope="all")
    async with Group(entry, n=2, logs=QUIET, restart=policy, **options) as group:
        before = group.pids
        await asyncio.to_thread(WAYS[way])  # the group hears of it while it goes on
        for rank in before:
            await event_of(group, Spawned, rank, attempt=1)
        assert (await supervise(sh("exit 0"), logs=QUIET)).ok  # whoever would go on the way, has gone by then
        assert all(map(alive, group.pids.values()))
        assert not any(map(alive, before.values()))
        await group.stop()
        result = await group.wait()
    assert [one.attempt for one in result] == [1, 1]


def begins(path: Path) -> None:
    path.touch()
    signal.pause()


@pytest.mark.long
@pytest.mark.parametrize("way", [*WAYS.values(), killed(zygote)], ids=[*WAYS, "zygote killed"])
def test_an_executor_tells_its_tasks_and_goes_on(way: Callable[[], None], tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    with WorkerExecutor(2) as executor:
        tasks = [executor.submit(begins, path) for path in paths]
        while not all(path.exists() for path in paths):  # a task that was not taken yet is given to another
            wait(tasks, 0.01)
        way()
        for one in tasks:
            with pytest.raises(WorkerFailed, match=WORDS):
                one.result(timeout=HANGS)
        assert executor.submit(abs, -1).result(timeout=HANGS) == 1


# --- what is idle, and what is not ---


def serve() -> None:
    while (request := sharing.receive()) is not None:
        sharing.send(request + 1)


async def answers(group: Group) -> bool:
    await group[0].send(1)
    return bool(await group[0].receive() == 2)


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
async def test_a_group_lives_through_a_block_that_must_leave_nothing(start: Any) -> None:
    entries = [Function(serve), STAY]
    async with Group(entries, logs=QUIET, start=start, check=False) as group:
        before = group.pids
        with no_leaks(IGNORED):
            assert await answers(group)
        with no_leaks(IGNORED):
            assert (await supervise([Function(jobs.parent), sh("exit 0")], logs=QUIET, start=start)).ok
        assert await answers(group)
        assert group.pids == before
        assert all(map(alive, before.values()))
        await group[0].send(None)
        assert str(await group[0].wait()) == "exit code 0"


async def test_only_what_nobody_uses_is_ended() -> None:
    environ = {"ANOTHER": "one"}  # a zygote of its own
    async with Group(Function(serve), logs=QUIET) as group:
        (busy,) = _zygote._zygotes
        assert (await supervise(Function(jobs.parent), logs=QUIET, env=environ)).ok
        assert len(_zygote._zygotes) == 2
        pid = _zygote._zygotes[1]._there
        cool_down()
        assert _zygote._zygotes == [busy]
        await gone(pid)
        assert len(_guardian._guardians) == 1
        assert await answers(group)
        await group[0].send(None)
        await group.wait()
    assert alive(busy._there)
    pids = [busy._there, _guardian._guardians[0].session]
    cool_down()
    assert (_zygote._zygotes, _guardian._guardians) == ([], [])
    for pid in pids:
        await gone(pid)


def test_an_executor_of_another_loop_lives_through_it() -> None:
    with WorkerExecutor(1) as executor:
        before = executor.submit(os.getpid).result()
        with no_leaks(IGNORED):
            assert executor.submit(abs, -1).result() == 1
        with no_leaks(IGNORED):
            asyncio.run(supervise(sh("exit 0"), logs=QUIET))
        assert executor.submit(os.getpid).result() == before
