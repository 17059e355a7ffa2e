"""A worker of another user tries what it can; its host runs as root, grows by no more than 64 MiB, and ends in time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hostile_jobs as jobs
import pytest
from helpers import QUIET, until

from aioelastic import Command, Function, Group, Logs, RemoteError, Std, Stop, WorkerExecutor
from aioelastic.launch import _function_channel as replies
from aioelastic.processes.census import ticks_now
from aioelastic.processes.strays import Stray
from aioelastic.testing._process_tree import read_stat

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MOST = 64 << 20  # bytes
STOP = Stop(grace=0.2, bound=5)
BOUND = 150.0  # seconds: only how long a hang may last


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
        while (read_stat(pid) or "  ")[1] != "T":  # noqa: ASYNC110
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
                await until(lambda: any(pump._held for pump in group[0]._life.output._pumps.values()))
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


async def test_it_traces_itself_and_its_children() -> None:
    """Nobody else can reap it then, dead or alive; whom it may not trace it does not."""
    async with attacked("traces", str(os.getpid())):
        pass


async def test_it_stops_whom_it_may_signal() -> None:
    """They are stopped anew whenever they are continued; SIGKILL ends them."""
    async with attacked("stops_others", str(os.getpid())):
        pass


@pytest.mark.parametrize("what", ["socket", "link", "fifo", "listens", "many"])
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


# --- a pid is given again ---

# has a process of the pid argv[1] (clone3(2), `set_tid`), which sleeps
REBORN = """
import ctypes, os, struct, sys
wanted = ctypes.c_int(int(sys.argv[1]))
args = ctypes.create_string_buffer(struct.pack("11Q", 0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(wanted), 1, 0))
pid = ctypes.CDLL(None, use_errno=True).syscall(435, args, 88)
if pid == 0:
    os.environ.clear()
    os.execve("/bin/sleep", ["sleep", "1000"], {})
print(pid, flush=True)
if pid > 0:
    sys.stdin.read()
    os.kill(pid, 9)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


async def test_the_pid_of_a_left_over_is_given_to_a_bystander(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look that finds it and the signal that would end it: the bystander gets none."""
    real = Stray.catch
    there: list[subprocess.Popen[str]] = []
    left: list[int] = []

    def catch(seen: Any) -> Any:
        if [seen.pid] == left and not there:
            os.kill(seen.pid, signal.SIGKILL)
            while Path(f"/proc/{seen.pid}").exists():
                os.sched_yield()
            argv = [sys.executable, "-I", "-S", "-c", REBORN, str(seen.pid)]
            one = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={})
            there.append(one)
            assert one.stdout is not None
            assert int(one.stdout.readline()) == seen.pid
        return real(seen)

    monkeypatch.setattr(Stray, "catch", catch)
    script = "setsid sleep 1000 & echo $!; exec sleep 1000"
    async with Group(Command("/bin/sh", "-c", script), logs=QUIET, stop=STOP, check=False) as group:
        left.append(int((await anext(aiter(group.lines()))).text))
        before = ticks_now()
        await until(lambda: ticks_now() > before + 1)  # a start time is known to 10 ms
        result = await group.stop()
    (one,) = there
    rest, _ = await asyncio.to_thread(one.communicate)
    assert int(rest) == -signal.SIGKILL  # ours, and no signal before
    assert left[0] not in [two.pid for two in result.leaked]


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


@pytest.mark.parametrize("nobody", [True, False])
@pytest.mark.parametrize("what", WHAT)
async def test_it_floods_its_channel(what: str, nobody: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with called(jobs.floods_channel, what, nobody) as group:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(group[0].wait(), 1)
        assert len(os.listdir("/proc/self/fd")) < before + 700


async def test_it_floods_a_receiver() -> None:
    async with called(jobs.floods_channel, "descriptors", False) as group:
        got = [one async for one in group[0]]  # the system lets a user have so many under way
        assert got == [1] * len(got)
        assert len(got) > 1


async def test_its_descriptors_have_no_end() -> None:
    async with called(jobs.endless_descriptors) as group:
        replies = group[0]._life.channel
        assert replies is not None
        await until(lambda: bool(replies.invalid))
        assert "not a message" in replies.invalid


@pytest.mark.parametrize("size", [4096, 1 << 20, 1 << 40])
async def test_it_cuts_off_the_memory_of_its_value(size: int) -> None:
    async with called(jobs.shrinks, size) as group:
        result = await group.wait()
        assert result[0].failure is not None
        assert "not sealed" in str(result[0].failure)


@pytest.mark.parametrize("late", [False, True])
async def test_its_error_is_nonsense(late: bool) -> None:
    """Also where it is read when its exit is known already: who waits is told of both."""
    async with called(jobs.says, b"E\0garbage", True) as group:
        assert group[0].pid is not None
        pidfd = os.pidfd_open(group[0].pid)
        await group[0].send("now")
        if late:
            dead = select.poll()
            dead.register(pidfd, select.POLLIN)
            dead.poll()
        os.close(pidfd)
        result = await group.wait()
        assert result[0].failure is not None
        assert "not a message" in str(result[0].failure)


async def test_what_cannot_be_read_after_its_end_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = replies.FunctionChannel.finish

    def fails(self: replies.FunctionChannel) -> None:
        real(self)
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr(replies.FunctionChannel, "finish", fails)
    async with called(jobs.says, b"N\0") as group:
        result = await group.wait()
        assert "of our own" in str(result[0].failure)


def test_the_reply_of_a_task_is_nonsense() -> None:
    with WorkerExecutor(1) as executor:
        with pytest.raises(RemoteError, match="another user"):
            executor.submit(jobs.says, b"L\0garbage").result(BOUND)
        assert executor.submit(abs, -1).result(BOUND) == 1
