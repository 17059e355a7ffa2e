"""`result.clean`: true by the kernel's word, else it says exactly what is left."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import QUIET, alive, event_of, gone, py, sh, stands_still

from aioelastic import Command, Function, Group, GroupResult, Logs, Restart, SpecError, Stop, supervise
from aioelastic.events import Spawned
from aioelastic.launch import _guardian, _launchers
from aioelastic.model.leftovers import Process, Unkillable
from aioelastic.processes.proc_files import describe
from aioelastic.processes.tcp_ports import is_free
from aioelastic.supervisor.leak_check import of_worker
from aioelastic.system import shared_memory_names
from aioelastic.testing._chaos import guardian, kill
from aioelastic.testing._failing_calls import failing
from aioelastic.testing._fake_launcher import FakeLauncher
from aioelastic.testing._misbehaving_workers import daemon, made, pipe_holder, setsid_escape

LEAVE = Stop(scope="leader")
SHORT = Logs(tee=QUIET.tee, drain=0.05)

# it leaves its session, cleans its environment and takes off its mark
NOBODYS = """
import os, resource, sys
if os.fork() == 0:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.execve("/bin/sleep", ["sleep", "1000"], {})
    os.close(theirs)
    os.read(ours, 1)  # until its execve: only then is its environment clean
    print("made", pid, flush=True)
    os._exit(0)
os.wait()
"""

LISTENER = """
import os, socket
sock = socket.create_server(("", int(os.environ["PORT"])))
pid = os.fork()
if pid == 0:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.set_inheritable(sock.fileno(), True)
    os.execv("/bin/sleep", ["sleep", "1000"])
print("made", pid, flush=True)
"""


def words(result: GroupResult, kind: str) -> list[str]:
    return [str(one) for one in result.remains if one.kind == kind]


@pytest.fixture
def port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


# --- clean ---


@pytest.mark.parametrize(
    "work",
    [
        {"entry": sh("exit 0"), "n": 3},
        {"entry": sh("exit 3"), "n": 3},
        {"entry": Function(abs, -3), "n": 2},
        {"entry": Function(abs, -3), "n": 2, "start": "spawn"},
        {"entry": [sh("exit 0"), Function(abs, -3)]},
        {"entry": sh("kill -9 $$"), "n": 2},
    ],
    ids=["commands", "failures", "zygote", "spawn", "mixed", "killed"],
)
async def test_an_ordinary_group_is_clean(work: Any) -> None:
    result = await supervise(**work, logs=QUIET, check=False)
    assert result.clean
    assert result.remains == ()
    assert all(one.clean for one in result)


@pytest.mark.parametrize("body", [setsid_escape(), daemon(), py(NOBODYS)], ids=["setsid", "daemon", "nobody's"])
async def test_what_is_found_is_ended_and_then_it_is_clean(body: Command) -> None:
    result = await supervise(body, logs=QUIET)
    (pid,) = made(result[0].stdout)
    assert [one.pid for one in result.leaked] == [pid]
    assert not alive(pid)
    assert result.clean


async def test_after_a_restart_too() -> None:
    result = await supervise(
        sh('test "$AIOELASTIC_ATTEMPT" = 1'), logs=QUIET, restart=Restart.on_failure(1), launcher="guardian"
    )
    assert result[0].attempt == 1
    assert result.clean


# --- not clean ---


async def test_what_shall_stay_is_told_with_its_rank() -> None:
    result = await supervise([sh("exit 0"), daemon()], logs=QUIET, stop=LEAVE)
    (pid,) = made(result[1].stdout)
    (one,) = result.remains
    assert (one.kind, one.rank, one.pid) == ("process", 1, pid)
    assert str(one) == f"rank 1: process {pid} (sleep 1000) still runs"
    assert not result.clean
    assert result[0].clean
    assert not result[1].clean
    assert result[1].remains == (one,)
    os.kill(pid, signal.SIGKILL)
    await gone(pid)


async def test_with_two_groups_what_is_nobodys_is_told_and_the_last_ends_it() -> None:
    """Nothing is signalled that may be another's."""
    async with Group(sh("read x; exec sleep 1000"), logs=QUIET) as other:
        first = await supervise(py(NOBODYS), n=1, logs=QUIET)
        (pid,) = made(first[0].stdout)
        assert alive(pid)
        (one,) = first.remains
        assert (one.kind, one.rank, one.pid) == ("process", None, pid)
        assert not first[0].clean
        last = await other.stop()
    assert [one.pid for one in last.leaked] == [pid]
    assert not alive(pid)
    assert last.clean


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"entry": sh("exit 0"), "launcher": "direct"}, "no guardian"),
        ({"entry": Function(abs, -3), "start": "fork"}, 'start="fork"'),
    ],
)
async def test_without_a_guardian_nobody_can_be_sure(how: Any, told: str) -> None:
    result = await supervise(**how, n=2, logs=QUIET)
    assert result.ok
    assert not result.clean
    (one,) = result.remains
    assert one.kind == "unproven"
    assert told in one.words
    assert not result[0].clean


@pytest.mark.fresh
async def test_why_there_is_no_guardian_is_told() -> None:
    with failing("os.pidfd_open", error=errno.EPERM, times=None, within="aioelastic.launch._guardian"):
        result = await supervise(sh("exit 0"), logs=QUIET)
    (one,) = result.remains
    assert (
        "no guardian adopted what they left behind (none can run here: [Errno 1] Operation not permitted)" in one.words
    )


@pytest.mark.fresh
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EAGAIN])
async def test_a_passing_lack_is_no_reason_to_do_without_a_guardian(code: int) -> None:
    lack = failing("os.pidfd_open", error=code, times=None, within="aioelastic.launch._guardian")
    with lack, pytest.raises((SpecError, OSError)) as caught:
        await supervise(sh("exit 0"), logs=QUIET)
    assert os.strerror(code) in str(caught.value)
    assert (await supervise(sh("exit 0"), logs=QUIET)).clean  # it has passed


async def test_another_launcher_cannot_say() -> None:
    result = await supervise(sh("exit 0"), logs=QUIET, launcher=FakeLauncher())
    assert "of the caller's" in words(result, "unproven")[0]


async def test_an_executor_of_the_callers_cannot_say() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = await supervise(Function(abs, -3), logs=QUIET, start=pool)
    assert "executor" in words(result, "unproven")[0]


@pytest.mark.fresh
async def test_a_guardian_that_died_cannot_be_asked() -> None:
    blow = kill(guardian)
    async with Group(sh("exec sleep 1000"), logs=QUIET, check=False) as group:
        blow(await event_of(group, Spawned))
        result = await group.wait()
    assert "guardian has died" in words(result, "unproven")[0]


@pytest.mark.fresh
async def test_a_guardian_that_stands_still_is_not_waited_for(monkeypatch: Any) -> None:
    stood: list[int] = []

    def asked(session: int) -> list[int]:
        os.killpg(session, signal.SIGSTOP)
        keeper = psutil.Process(session)
        while not all(stands_still(one.pid) for one in (keeper, *keeper.children())):
            pass
        stood.append(session)
        return _guardian.left_to_guardian(session)

    monkeypatch.setattr(_guardian, "LAST", 0.01)
    monkeypatch.setattr(_launchers, "left_to_guardian", asked)
    result = await supervise(sh("exit 0"), logs=QUIET)
    os.killpg(stood[0], signal.SIGCONT)
    assert "does not answer" in words(result, "unproven")[0]


async def test_who_holds_a_stream() -> None:
    result = await supervise(pipe_holder(), logs=SHORT, stop=LEAVE)
    (pid,) = made(result[0].stdout)
    assert words(result, "stream") == [
        f"rank 0: {name} is still open in process {pid} (sleep 1000)" for name in ("stdout", "stderr")
    ]
    os.kill(pid, signal.SIGKILL)
    await gone(pid)


async def test_one_that_would_not_die() -> None:
    from dataclasses import replace

    result = await supervise(sh("exit 0"), logs=QUIET)
    (one,) = of_worker(replace(result[0], unkillable=Unkillable(0, 5, "D", "nfs_wait")))
    assert (one.kind, one.rank, one.pid) == ("process", 0, 5)
    assert "D nfs_wait" in one.words


# --- ports ---


@pytest.mark.parametrize(
    ("ports", "told"),
    [
        ([0], r"ports\[0\]=0"),
        ([80, 65_536], r"ports\[1\]=65536"),
        (["80"], r"ports\[0\]='80'"),
        (8000, "ports=8000"),
        ("8000", "ports='8000'"),
    ],
)
async def test_bad_ports(ports: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        await supervise(sh("exit 0"), ports=ports)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_a_port_that_is_taken_is_told_before_the_start(family: Any, tmp_path: Path) -> None:
    mark = tmp_path / "started"
    with closing(socket.create_server(("", 0), family=family)) as server:
        number = server.getsockname()[1]
        with pytest.raises(SpecError, match=re.escape(f"ports[1]={number} is taken by process {os.getpid()} (")):
            await supervise(sh(f"touch {mark}"), ports=[1, number], logs=QUIET)
    assert not mark.exists()


async def test_a_port_that_stays_taken_is_told_with_its_holder(port: int) -> None:
    worker = py(LISTENER, {"PORT": str(port)})
    result = await supervise(worker, logs=QUIET, ports=[port], stop=LEAVE)
    (pid,) = made(result[0].stdout)
    assert words(result, "port") == [f"port {port} is taken by process {pid} (sleep 1000)"]
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    assert is_free(port)


async def test_a_port_is_free_when_its_holder_is_ended(port: int) -> None:
    result = await supervise(py(LISTENER, {"PORT": str(port)}), logs=QUIET, ports=[port])
    assert len(result.leaked) == 1
    assert result.clean


def test_a_connection_that_was_closed_takes_no_port() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        number = server.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", number))) as client:
            accepted, _ = server.accept()
            accepted.close()  # first: its end is what stays in TIME_WAIT
            assert client.recv(1) == b""
    assert is_free(number)


def test_a_process_without_a_command_line_is_told_by_its_name() -> None:
    """One that has ended, say, or is just becoming another program."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    name = Path("/proc/self/comm").read_text().strip()
    assert describe(pid) == Process(pid, f"[{name}]", "Z")
    os.waitpid(pid, 0)
    assert describe(pid) == Process(pid, "", "?")


# --- names of shared memory ---


def killed_with_files() -> None:
    from aioelastic import sharing

    sharing.configure(strategy="file")
    kept = sharing.empty(100_000)
    assert kept.nbytes
    print(*[path for path in os.listdir("/dev/shm") if str(os.getpid()) in path], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def test_names_of_one_that_was_killed_are_removed() -> None:
    result = await supervise(Function(killed_with_files), logs=QUIET, check=False)
    name = str(result[0].stdout).strip()
    assert name.startswith("aioelastic-shares-")
    assert not Path("/dev/shm", name).exists()
    assert result.clean


async def test_names_that_cannot_be_removed_are_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        shared_memory_names.sweep, "__defaults__", (str(tmp_path),)
    )  # in /dev/shm any other program may remove it
    path = tmp_path / f"aioelastic-shares-{2**22}-0"
    path.mkdir()
    with monkeypatch.context() as cannot:
        cannot.setattr(shared_memory_names, "remove", lambda *_: None)
        result = await supervise(sh("exit 0"), logs=QUIET)
    assert words(result, "memory") == [f"shared memory {path} could not be removed"]
    assert shared_memory_names.sweep() == []
    assert not path.exists()


async def test_names_of_one_that_lives_stay() -> None:
    """Even where its process id means nothing to us: a lock says that it lives."""
    own = Path(shared_memory_names.own_directory(shared_memory_names.SHM))
    (own / "array").touch()
    result = await supervise(Function(killed_with_files), logs=QUIET, check=False)
    assert result.clean
    assert (own / "array").exists()
    (own / "array").unlink()
    shared_memory_names.leave_empty()
    assert not own.exists()


# --- the command line ---


def run(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "aioelastic", "run", *args]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_require_clean() -> None:
    done = run("--require-clean", "--", "/bin/sh", "-c", "exit 0")
    assert (done.returncode, "not clean" in done.stderr) == (0, False)
    done = run("--require-clean", "--start", "fork", "-m", "platform:node")
    assert done.returncode == 1
    assert 'not clean: whether other processes are left is not known: a worker by start="fork"' in done.stderr
    assert run("--start", "fork", "-m", "platform:node").returncode == 0


def test_a_taken_port() -> None:
    with closing(socket.create_server(("", 0))) as server:
        number = server.getsockname()[1]
        for more in ([], ["--dry-run"]):
            done = run("--port", str(number), *more, "--", "true")
            assert done.returncode == 2
            assert f"ports[0]={number} is taken by process {os.getpid()}" in done.stderr
