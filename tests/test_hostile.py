"""A worker of another user tries what it can; its host runs as root, grows by no more than 64 MiB, and ends in time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hostile_jobs as jobs
import pytest
from helpers import QUIET, until

from aioelastic import Command, Function, Group, Logs, Std, Stop
from aioelastic.testing._family import read_stat

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MOST = 64 << 20  # bytes
STOP = Stop(grace=0.2, bound=5)
BOUND = 30.0  # seconds: only how long a hang may last


def peak() -> int:
    """The largest size of this process since it was last `reset`."""
    return (
        next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        << 10
    )


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """What happens here needs little memory."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is what it has now
    except OSError:
        pytest.skip("needs /proc/PID/clear_refs")
    before = peak()
    yield
    assert peak() - before < MOST


@contextlib.asynccontextmanager
async def attacked(*words: str, logs: Logs = QUIET, **options: Any) -> AsyncIterator[Group]:
    """A group of that worker, after it has done its worst, and of a peaceful one."""
    hostile = Command(sys.executable, "-S", jobs.__file__, *words)
    with bounded():
        async with asyncio.timeout(BOUND):
            async with Group(
                [hostile, Command("sleep", "1000")], logs=logs, stop=STOP, check=False, **options
            ) as group:
                async for line in group.lines(ranks=[0], when_full="drop"):
                    if line.data.startswith((b"shown", b"refused")):
                        assert line.data == b"shown", "this kernel does not let it"
                        break
                yield group
                result = await group.stop()
        assert result[1].exit is not None
        assert result[1].exit.signal == signal.SIGTERM
        assert not [one for one in result.remains if one.kind == "process"]


@pytest.mark.parametrize("what", ["environ", "command_line", "environment"])
async def test_what_it_shows_in_proc_is_huge(what: str) -> None:
    async with attacked(what):
        pass


async def test_names_that_look_like_the_rest_of_a_line() -> None:
    async with attacked("names"):
        pass


async def test_it_stops_itself_and_its_children() -> None:
    async with attacked("stops_itself") as group:
        pid = group.pids[0]
        while (read_stat(pid) or "  ")[1] not in "T":  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("what", ["newlines", "returns", "line"])
async def test_it_floods_its_output(what: str, json: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """To a console that nobody reads, and to readers that are slow."""
    reading, writing = os.pipe()
    try:
        with open(writing, "w", closefd=False) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", out)
            logs = Logs(
                dir=tmp_path, tee=Std.ALL, json=json, when_full="drop", match=["50%"], callback=lambda line: None
            )
            async with attacked("floods", what, logs=logs) as group:
                feed = group.lines(when_full="drop")
                await group[0].wait()
                feed.close()
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("what", ["newlines", "returns"])
async def test_it_floods_a_console_that_holds_it(what: str, monkeypatch: Any) -> None:
    reading, writing = os.pipe()
    try:
        with open(writing, "w", closefd=False) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", out)
            logs = Logs(tee=Std.ALL, json=True, when_full="block")
            async with attacked("floods", what, logs=logs) as group:
                await until(lambda: any(pump._held for pump in group[0]._pumps.values()))
                group.hurry()
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("what", ["fifo", "link", "huge", "nested", "socket", "forged"])
async def test_its_error_file_is_a_forgery(what: str, tmp_path: Path) -> None:
    async with attacked("error_file", what, logs=Logs(dir=tmp_path, tee=Std.NONE)) as group:
        result = await group.wait()
        assert result[0].failure is not None
        assert "secret" not in str(result[0].failure)


@pytest.mark.parametrize("what", ["socket", "link", "fifo"])
async def test_names_of_its_hosts_in_the_temporary_directory(what: str) -> None:
    below = Path(os.environ["TMPDIR"])
    mode = stat.S_IMODE(below.stat().st_mode)
    below.chmod(0o1777)
    try:
        async with attacked("shares", what, str(below), str(os.getpid())) as group:
            await group.wait()
    finally:
        below.chmod(mode)
        for one in below.glob("aioelastic-shares-*-hostile"):
            one.unlink()
    assert Path("/etc/passwd").exists()


# --- by the channel of a function ---


@contextlib.asynccontextmanager
async def called(function: Any, *args: Any) -> AsyncIterator[Group]:
    with bounded():
        async with asyncio.timeout(BOUND):
            entries = [Function(function, *args), Command("sleep", "1000")]
            async with Group(entries, logs=QUIET, stop=STOP, check=False) as group:
                yield group
                result = await group.stop()
        assert result[1].exit is not None
        assert result[1].exit.signal == signal.SIGTERM
        del group, result
        gc.collect()


WHAT = ["ready", "letters", "values", "descriptors", "nonsense", "tasks", "large"]


@pytest.mark.parametrize("what", WHAT)
async def test_it_floods_its_channel(what: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with called(jobs.floods_channel, what) as group:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(group[0].wait(), 1)
        assert len(os.listdir("/proc/self/fd")) < before + 700


async def test_it_floods_a_receiver() -> None:
    async with called(jobs.floods_channel, "descriptors") as group:
        got = [one async for one in group[0]]  # the system lets a user have so many under way
        assert got == [1] * len(got)
        assert len(got) > 1


async def test_its_descriptors_have_no_end() -> None:
    async with called(jobs.endless_descriptors) as group:
        replies = group[0].replies
        assert replies is not None
        await until(lambda: bool(replies.nonsense))
        assert "not a message" in replies.nonsense


@pytest.mark.parametrize("size", [4096, 1 << 20, 1 << 40])
async def test_it_cuts_off_the_memory_of_its_value(size: int) -> None:
    async with called(jobs.shrinks, size) as group:
        result = await group.wait()
        assert result[0].failure is not None
        assert "not sealed" in str(result[0].failure)
