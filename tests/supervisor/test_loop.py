"""The caller's event loop: nothing of ours blocks it, but the start of a process itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster
from helpers import QUIET, kill_and_see_it_dead, sh

from aioelastic import Logs, Match, Rotate, SpecError, Std, Stop, supervise
from aioelastic.events import Event, Spawned
from aioelastic.system import time_slices as turns
from aioelastic.system.helper_thread import HelperThread
from aioelastic.watch import Poller


@pytest.fixture
def blocking_raises() -> Iterator[None]:
    """Any blocking call in a running loop raises, except the vfork and exec of a child (about 1 ms)."""
    buster = BlockBuster()
    buster.activate()
    buster.functions["os.read"].can_block_in("subprocess.py", "_execute_child")  # the exec's errno, until it is done
    # a helper thread whose last word this is: what it waits for is that it gets the interpreter once more
    buster.functions["threading.Lock.acquire"].can_block_in("aioelastic/system/helper_thread.py", "_ended")
    try:
        yield
    finally:
        buster.deactivate()


async def test_nothing_blocks(blocking_raises: None, tmp_path: Path) -> None:
    logs = Logs(
        dir=tmp_path,
        tee=Std.NONE,
        match=Match(include=("1",)),
        rotate=Rotate(size=1000, keep=2),
        callback=lambda line: None,
    )
    script = "seq 2000; seq 2000 >&2; setsid sleep 1000 & exit $RANK"
    result = await supervise(sh(script), n=3, logs=logs, stop=Stop(grace=0.5), check=False)
    assert result.first_failure is not None
    assert result[0].stdout.total == len("".join(f"{i}\n" for i in range(1, 2001)))


async def test_it_would_have_been_noticed(blocking_raises: None) -> None:
    """The check above can fail."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(type(context["exception"])))

    def blocks(event: object) -> None:
        if isinstance(event, Spawned):
            import time

            time.sleep(0.0001)

    await supervise(sh("exit 0"), logs=Logs(tee=Std.NONE), on_event=blocks)
    assert {one.__name__ for one in told} == {"BlockingError"}


async def test_others_run_meanwhile() -> None:
    """Between two starts the loop gets its turn."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    turns_at_spawn: list[int] = []
    await supervise(
        sh("exit 0"),
        n=50,
        logs=Logs(tee=Std.NONE),
        on_event=lambda e: turns_at_spawn.append(turns) if isinstance(e, Spawned) else None,
    )
    task.cancel()
    assert len(set(turns_at_spawn)) >= 10


async def test_an_exit_is_told_once_however_busy_the_pipes_are() -> None:
    """Its end comes between two reads of the same slice; it is reaped only when that slice is over."""
    loop = asyncio.get_running_loop()
    poller = Poller(loop)
    child = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
    pidfd = os.pidfd_open(child)
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    told: list[int] = []
    over = loop.create_future()

    def read() -> None:
        if os.read(reader, 1) == b"a":
            kill_and_see_it_dead(child, signal.SIGKILL)

    def exited() -> None:
        told.append(child)
        loop.call_soon(reap)

    def reap() -> None:
        if not over.done():
            poller.remove(pidfd)
            over.set_result(None)

    poller.add_exit(pidfd, exited)
    poller.add_reader(reader, read)
    await over
    poller.remove(reader)
    for fd in (pidfd, reader, writer):
        os.close(fd)
    os.waitpid(child, 0)
    assert told == [child]


@pytest.mark.parametrize("cancel_at", [*range(12), None])
async def test_each_turn_of_the_loop_while_workers_start(monkeypatch: Any, cancel_at: int | None) -> None:
    """The loop has its turn after every single worker, and in any of these turns the task may be cancelled."""
    monkeypatch.setattr(turns, "SLICE", -1.0)
    spawned: list[Event] = []

    def on_event(event: Event) -> None:
        spawned.extend([event] if isinstance(event, Spawned) else [])

    task = asyncio.create_task(supervise(sh("exit 0"), 6, logs=QUIET, on_event=on_event))
    between = 0
    while not task.done():
        await asyncio.sleep(0)
        if spawned and len(spawned) < 6:
            if between == cancel_at:
                task.cancel()
            between += 1
    if cancel_at is None:
        assert (await task).ok
        assert between >= 5
    else:
        with contextlib.suppress(asyncio.CancelledError):
            assert (await task).ok


async def test_a_helper_thread_has_its_name_in_ps() -> None:
    thread = HelperThread(asyncio.get_running_loop(), "aioelastic-file")
    name = await thread.submit(Path("/proc/thread-self/comm").read_text)
    await thread.end()
    assert name == "aioelastic-file\n"


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()], ids=type)
async def test_a_helper_thread_survives_its_jobs_and_tells(error: BaseException) -> None:
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    thread = HelperThread(loop, "aioelastic-file")

    def fails() -> None:
        raise error

    try:
        thread.put(fails)
        assert await thread.submit(lambda: 1) == 1
        await thread.end()
    finally:
        loop.set_exception_handler(None)
    assert [one["exception"] for one in told] == [error]
    assert "aioelastic-file" in told[0]["message"]


async def test_a_helper_thread_that_cannot_start_says_so_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread = HelperThread(asyncio.get_running_loop(), "aioelastic-file")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        for _ in range(2):
            with pytest.raises(SpecError, match="new thread"):
                thread.submit(lambda: 1)
    assert await thread.submit(lambda: 2) == 2
    await thread.end()
