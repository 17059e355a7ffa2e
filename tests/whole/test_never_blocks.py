"""The guardian, the zygotes and the direct launcher wait for nobody, and what fails concerns one request."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import QUIET, TWO_WORKERS, alive, child_process, event_of, gone, kill_and_see_it_dead, sh, until

from aioelastic import Command, Function, Group, Restart, Stop, supervise
from aioelastic.child.wire import datagrams, requests
from aioelastic.events import Spawned
from aioelastic.launch import DirectLauncher, _guardian, end_helpers, reap_abandoned
from aioelastic.testing._allowed_leftovers import kept_by_multiprocessing
from aioelastic.testing._supervisor_process import Program

pytestmark = pytest.mark.fresh

STAY = "exec sleep 1000"

TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE = 0x4206
if libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None):
    print(ctypes.get_errno(), flush=True)
    sys.exit()
print("0", flush=True)
sys.stdin.read()
"""


def stay() -> None:
    signal.pause()


@contextlib.contextmanager
def debugged(pid: int) -> Iterator[None]:
    """A debugger holds that process: when it has died, nobody else can reap it."""
    with child_process(
        [sys.executable, "-I", "-S", "-c", TRACER, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdout is not None
        code = int(tracer.stdout.readline())
        if code:
            pytest.skip(f"ptrace(2) is not allowed here: {os.strerror(code)}")
        yield


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.parametrize("how", ["guardian", "zygote", "spawn", "fork", "direct"])
async def test_a_dead_worker_that_a_debugger_holds(how: str) -> None:
    """Its end is told with its status, its group ends, others are served; and it is reaped in the end."""
    entry: Any = sh(STAY) if how in ("guardian", "direct") else Function(stay)
    start: Any = how if how in ("zygote", "spawn", "fork") else "zygote"
    launcher: Any = "direct" if how == "direct" else "guardian"
    stop = Stop(grace=5, bound=5, scope="leader")
    async with Group(entry, start=start, launcher=launcher, logs=QUIET, stop=stop, check=False) as group:
        pid = group[0].pid
        assert pid is not None
        with debugged(pid):
            kill_and_see_it_dead(pid, signal.SIGKILL)
            result = await group.wait()
            assert result[0].exit is not None
            assert result[0].exit.signal == signal.SIGKILL
            assert state_of(pid) == "Z"
            assert (await supervise(sh("exit 0"), n=2, logs=QUIET, launcher=launcher)).ok
    await until(lambda: (reap_abandoned(), state_of(pid))[1] == "")


async def test_a_program_goes_while_a_debugger_holds_a_dead_worker() -> None:
    """Its guardian ends all the same."""
    with Program(TWO_WORKERS) as program:
        words = await asyncio.to_thread(program.line, "ready")
        held, other = map(int, words.split()[-2:])
        family = [one.pid for one in psutil.Process(program.pid).children(recursive=True)]
        helpers = [pid for pid in family if pid not in (held, other)]
        with debugged(held):
            os.kill(held, signal.SIGKILL)
            os.kill(program.pid, signal.SIGKILL)
            for one in (other, *helpers):
                await gone(one)


class Leased:
    """A program whose execve(2) hangs until `close`: somebody has a lease on it (fcntl(2), F_SETLEASE)."""

    def __init__(self, path: Path) -> None:
        shutil.copy(shutil.which("sleep") or "/bin/sleep", path)
        self._fd = os.open(path, os.O_RDWR)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as exc:
            self.close()
            pytest.skip(f"no leases here: {exc}")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@pytest.fixture
def leased(tmp_path: Path) -> Iterator[Leased]:
    had = signal.signal(signal.SIGIO, signal.SIG_IGN)  # "give up your lease"
    one = Leased(tmp_path / "hangs")
    try:
        yield one
    finally:
        one.close()
        signal.signal(signal.SIGIO, had)


def starting() -> list[int]:
    """Children of our guardians that have yet to become what was asked for."""
    found = []
    for keeper in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in keeper.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # any of them may end between two looks
                    if one.ppid() != keeper.pid and one.name() == "aio-guardian":
                        found.append(one.pid)
    return found


SHORT = Stop(grace=0.1, bound=0.2)


def hanging(tmp_path: Path, n: int = 2, **more: Any) -> Group:
    """A group whose second attempt hangs in execve(2), once `strike` was called."""
    program = tmp_path / "program"
    program.unlink(missing_ok=True)
    program.symlink_to(shutil.which("sleep") or "/bin/sleep")
    return Group(Command(str(program), "1000"), n=n, logs=QUIET, restart=Restart(1), check=False, **more)


async def strike(tmp_path: Path, *groups: Group) -> None:
    (tmp_path / "program").unlink()
    (tmp_path / "program").symlink_to(tmp_path / "hangs")
    for group in groups:
        os.kill(group.pids[0], signal.SIGKILL)
    await until(lambda: len(starting()) == len(groups))


async def test_programs_that_hang_delay_their_own_groups_alone(leased: Leased, tmp_path: Path) -> None:
    """One by vfork, others by fork."""
    groups = [hanging(tmp_path, stop=SHORT) for _ in range(3)]
    for one in groups:
        await one.__aenter__()
    await strike(tmp_path, *groups)
    for _ in range(3):
        assert (await supervise(sh("exit 0"), n=3, logs=QUIET)).ok
    for one in groups:
        result = await one.stop()
        # the first is refused: its start had not come when the time to stop was over
        assert [two.exit is None for two in result] == [True, False]
    await until(lambda: not starting())
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok


async def test_a_start_that_comes_late_is_what_was_asked_for(leased: Leased, tmp_path: Path) -> None:
    async with hanging(tmp_path) as one, hanging(tmp_path) as two:
        await strike(tmp_path, one, two)
        leased.close()
        for group in (one, two):
            await event_of(group, Spawned, rank=0, attempt=1)
            who = psutil.Process(group.pids[0])
            await until(lambda who=who: who.cmdline())  # which is empty for a moment of its execve(2)
            assert who.cmdline()[1:] == ["1000"]
        # the thread that hung waits again to take over
        assert (await supervise(sh("exit 0"), n=3, logs=QUIET)).ok
    assert not starting()


async def test_leaving_the_program_ends_starts_that_hang(leased: Leased, tmp_path: Path) -> None:
    async with hanging(tmp_path, stop=Stop(grace=0, bound=0)) as group:
        await strike(tmp_path, group)
    await asyncio.to_thread(end_helpers)
    kept = kept_by_multiprocessing().pids  # its tracker of resources, which another test may have started
    await until(lambda: not [one for one in psutil.Process().children() if one.pid not in kept and alive(one.pid)])


class Slow:
    """A launcher whose starts come when the test says so."""

    name = "slow"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, asyncio.Future[Any]]] = []

    def start(self, worker: Any) -> asyncio.Future[Any]:
        self.asked.append((worker, asyncio.get_running_loop().create_future()))
        return self.asked[-1][1]


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
async def test_a_start_of_any_launcher_is_waited_for_within_bounds(how: str) -> None:
    """And what comes late is killed."""
    slow = Slow()
    group = Group(sh(STAY), n=3, logs=QUIET, stop=SHORT, launcher=slow, check=False)
    entering = asyncio.create_task(group.__aenter__())
    await until(lambda: len(slow.asked) == 3)
    if how == "cancelled":
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
    else:
        result = await group.stop()
        assert [one.exit for one in result] == [None] * 3
        await entering
    direct = DirectLauncher(dict(os.environ))
    pids = []
    for worker, future in slow.asked:
        process = await direct.start(worker)
        pids.append(process.pid)
        future.set_result(process)
    for pid in pids:
        await gone(pid)
    await until(lambda: (reap_abandoned(), not any(map(state_of, pids)))[1])


def test_another_thread_takes_over() -> None:
    """And the one that hung takes over from that, when it hangs in its turn. (In a program: its threads never end.)"""
    script = """
import os, threading
from aioelastic.child.guardian.replaceable_thread import ReplaceableThread
hangs, rounds, told = threading.Event(), [], []
def late():
    while True:
        try:
            return thread.late()
        except BlockingIOError:
            pass
def work():
    rounds.append(threading.get_native_id())
    if len(rounds) == 1:
        assert thread.call("quick", lambda: 7) == 7
        try:
            thread.call("refused", lambda: os.stat("/nowhere/at/all"))
        except FileNotFoundError:
            thread.call("slow", lambda: (hangs.wait(), 8)[1])
    assert thread.thread == rounds[-2]
    hangs.set()
    told.append(late())
    if len(rounds) == 2:
        hangs.clear()
        thread.call("again", lambda: (hangs.wait(), 9)[1])
    return "over"
thread = ReplaceableThread(work, lambda: None)
print(thread.run(), rounds[0] == rounds[2] != rounds[1], *told)
"""
    assert run(script, (1000, 2000)) == "over True ('slow', 8, None) ('again', 9, None)\n"


def run(script: str, limits: tuple[int, int]) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_it_has_the_hard_limit_of_descriptors_and_workers_have_the_programs_own() -> None:
    script = """
import asyncio, resource
from aioelastic import *
def soft():
    return resource.getrlimit(resource.RLIMIT_NOFILE)
async def main():
    groups = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 2000))
    async with Group(Command("sleep", "1000"), n=50, logs=Logs(tee=Std.NONE)) as group:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 2000))
        for kind in ("zygote", "spawn"):
            print(*(await supervise(Function(soft), logs=Logs(tee=Std.NONE), start=kind))[0].value)
        told = Command("/bin/sh", "-c", "ulimit -Sn; ulimit -Hn")
        for one in (None, Placement(nice=19)):
            got = await supervise(told, logs=Logs(tee=Std.NONE), placement=one)
            print(*got[0].stdout.tail.decode().split())
asyncio.run(main())
"""
    assert run(script, (1000, 2000)).split() == ["300", "2000"] * 4


def test_out_of_descriptors_refuses_one_start_and_ends_nobody() -> None:
    """The guardian may have 96: room for two groups, which it keeps; what is more is refused."""
    script = """
import asyncio, errno, resource
from aioelastic import *
from aioelastic.launch import DirectLauncher, end_helpers, GuardianLauncher
async def main():
    quiet = Logs(tee=Std.NONE)
    async with Group(Command("sleep", "1000"), n=20, logs=quiet) as one:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        refused = 0
        async with Group(Command("sleep", "1000"), n=20, logs=quiet) as two:
            for _ in range(3):
                try:
                    async with Group(Command("sleep", "1000"), n=80, logs=quiet):
                        pass
                except GroupFailed as failed:
                    refused += sum("Too many open files" in str(one) for one in failed.exceptions)
            print("refused" if refused else "none", len(one.pids), len(two.pids))
        large = [Command("true", env={"LARGE": "x" * 60_000})] * 3
        print((await supervise(large, logs=quiet)).ok, len(one.pids))
asyncio.run(main())
"""
    patched = """
import resource
from aioelastic.launch import DirectLauncher, end_helpers, _guardian
argv = _guardian._argv
def limited():
    words = argv()
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))\\n"
    return [*words[:-1], code + words[-1]]
_guardian._argv = limited
"""
    assert run(patched + script, (1000, 2000)).split() == ["refused", "20", "20", "True", "20"]


JUNK = [b"", b"\0", b"\0nonsense", b"\1", b"\1i\7\0\0\0", b"\0(", b"\0i\1\0\0\0", b"\0)\1i\x4d\0\0\0", b"\2"]
KINDS = [
    getattr(requests, name) for name in vars(requests) if name.isupper() and isinstance(getattr(requests, name), bytes)
]


@pytest.mark.parametrize("where", ["control", "connection", "zygote"])
async def test_a_bad_frame_concerns_whom_it_came_from(where: str) -> None:
    async with Group(sh(STAY), logs=QUIET) as other, Group(Function(stay), logs=QUIET) as function:
        pids = {*other.pids.values(), *function.pids.values()}
        for kind in KINDS:
            for junk in JUNK:
                if where == "zygote":
                    server: Any = function._supervisor.resources._launchers.zygote._zygotes[-1]
                    datagrams.send(server._control, kind + junk)
                    continue
                launchers: Any = other._supervisor.resources._launchers
                parent = launchers._guardians[-1].server
                if where == "control":
                    if kind != requests.LEAVE:  # an empty one is no order to leave either, but ends the program's part
                        parent._outbox.send(kind + junk, [])
                else:
                    connection = parent.connect({})
                    datagrams.send(connection, kind + junk)
                    connection.close()
        if where == "zygote":
            assert (await supervise(Function(os.getpid), n=2, logs=QUIET)).ok
        assert (await supervise(sh("exit 0"), n=2, logs=QUIET)).ok
        assert pids == {*other.pids.values(), *function.pids.values()}


async def test_starts_that_another_thread_takes_over_are_told_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine so busy that each start takes too long: what is started meanwhile may end before it is told."""
    at_once = "from aioelastic.child.guardian import replaceable_thread as thread\n"
    at_once += "thread._ARMED = thread.struct.pack('4q', 0, 0, 0, 2000)\n"
    real = _guardian._argv

    def argv() -> list[str]:
        *words, code = real()
        head, main, rest = code.partition("from aioelastic.child.guardian.main_loop import main\n")
        return [*words, head + at_once + main + rest]

    monkeypatch.setattr(_guardian, "_argv", argv)
    end_helpers()
    for _ in range(100):
        result = await supervise(sh("echo up"), 4, logs=QUIET, check=False)
        assert [str(one.why) for one in result] == ["None"] * 4
        assert [str(one.stdout) for one in result] == ["up\n"] * 4
