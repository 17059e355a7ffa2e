"""Who holds what: leases and audit, as the kernel tells it; what a scope finds; both strategies."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import share_jobs
from helpers import QUIET, child_process, gone

from aioelastic import Function, Group, GroupFailed, SpecError, memory, sharing, supervise
from aioelastic.child.wire import datagrams, messages

HOUSE = str(Path(sharing.__file__).parents[2])


def python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": HOUSE}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


async def test_leases_name_their_holders() -> None:
    assert sharing.leases() == []
    x = sharing.empty(1 << 20, "u1")
    assert sharing.leases() == []  # what its owner has is no lease
    _, fds = messages.encode(messages.TASK, (x,))
    (lease,) = sharing.leases()
    assert (lease.owner, lease.holder, lease.size) == (os.getpid(), os.getpid(), 1 << 20)
    assert lease.age >= 0
    datagrams.close(fds)
    async with Group(Function(share_jobs.holds), n=2, logs=QUIET) as group:
        for rank in (0, 1):
            await group[rank].send(x)
        pids = {await group[rank].receive() for rank in (0, 1)}
        assert {one.holder for one in sharing.leases()} == pids
        (held,) = [one for one in sharing.audit() if one.segment == lease.segment]
        assert held.owner == os.getpid()
        assert set(held.leased) == pids
        assert set(held.mapped) >= pids
        assert held.unexplained == ()
    assert sharing.leases() == []


# shared locks are taken and given back, without end
LOCKS_AND_UNLOCKS = """
import fcntl, sys
files = [open(f"{sys.argv[1]}/other{number}", "w") for number in range(20)]
print(flush=True)
while True:
    for how in (fcntl.LOCK_SH, fcntl.LOCK_UN):
        for file in files:
            fcntl.flock(file, how)
"""


def test_each_lease_is_told_once_while_others_lock_and_unlock(tmp_path: Path) -> None:
    """/proc/locks is read page by page: what moves others' lines between two pages must not move ours in or out."""
    with contextlib.ExitStack() as kept:
        x = sharing.empty(1 << 20, "u1")
        _, fds = messages.encode(messages.TASK, (x,))
        kept.callback(datagrams.close, fds)
        file = kept.enter_context(open(tmp_path / "locked", "w"))
        for number in range(300):  # some pages of them
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * number)
        command = [sys.executable, "-c", LOCKS_AND_UNLOCKS, str(tmp_path)]
        other = kept.enter_context(child_process(command, stdout=subprocess.PIPE))
        kept.callback(other.kill)
        assert other.stdout is not None
        other.stdout.readline()
        assert [len(sharing.leases()) for _ in range(300)] == [1] * 300


# two file systems that have just been made give their files the same numbers
SAME_INODES = """
import ctypes, os, sys
from aioelastic import memory, sharing
from aioelastic.child.wire import datagrams as _socket, messages as _wire
libc = ctypes.CDLL(None)
kept = []
for name in ("first", "second"):
    os.mkdir(f"{sys.argv[1]}/{name}")
    assert libc.mount(b"tmpfs", f"{sys.argv[1]}/{name}".encode(), b"tmpfs", 0, None) == 0
    sharing.configure(strategy="file", directory=f"{sys.argv[1]}/{name}")
    kept.append(sharing.empty(100_000))
first, second = (one for one in memory.segments() if one.size >= 800_000)
assert first.key[1] == second.key[1] and first.key != second.key
_, fds = _wire.encode(_wire.TASK, (kept[0],))
assert [one.segment for one in sharing.leases()] == [first.name]
assert {one.segment: one.leased for one in sharing.audit()} == {first.name: (os.getpid(),), second.name: ()}
try:
    with sharing.scope(strict=True):
        _, more = _wire.encode(_wire.TASK, (kept[1],))
        _socket.close(fds)
except ExceptionGroup as leaks:
    print([second.name in str(one) for one in leaks.exceptions])
"""


def test_a_lease_is_of_a_file_of_that_file_system(tmp_path: Path) -> None:
    argv = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", SAME_INODES, str(tmp_path)]
    if subprocess.run([*argv[:3], "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own, which this system does not allow")
    ran = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": HOUSE}, check=False)
    assert (ran.stdout, ran.stderr) == ("[True]\n", "")


def test_a_file_system_whose_files_tell_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As btrfs does: stat(2) tells the device of a subvolume, lists of the kernel that of the whole."""
    sharing.configure(strategy="file", directory=tmp_path)
    try:
        x = sharing.empty(100_000)
        (segment,) = [one for one in memory.segments() if one.size >= x.nbytes]
        monkeypatch.setattr(segment, "key", (segment.key[0] + 1, segment.key[1]))
        _, fds = messages.encode(messages.TASK, (x,))
        assert [one.segment for one in sharing.leases()] == [segment.name]
        datagrams.close(fds)
        monkeypatch.undo()
        del x, segment
    finally:
        gc.collect()
        sharing.configure(strategy="memfd")


async def test_an_audit_finds_who_has_no_lease() -> None:
    x = sharing.empty(1 << 20, "u1")
    (fd,) = [one.fd for one in memory.segments() if one.size >= x.nbytes]
    code = (
        "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096); print(flush=1); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, f"/proc/{os.getpid()}/fd/{fd}"]
    with child_process(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [one.unexplained for one in sharing.audit()] == [(process.pid,)]
        assert sharing.audit([os.getpid()])[0].unexplained == ()
    assert x.nbytes


def test_an_audit_of_a_process_that_maps_files_of_others(tmp_path: Path) -> None:
    for name in ("aioelastic-1.0.so", "aioelastic-", "aioelastic-7"):
        (tmp_path / name).write_bytes(b"x")
    with contextlib.ExitStack() as stack:
        for path in tmp_path.iterdir():
            file = stack.enter_context(path.open("r+b"))
            stack.enter_context(mmap.mmap(file.fileno(), 1))
        assert sharing.audit() == []


def test_a_scope_finds_views() -> None:
    kept: list[Any] = []
    words = rf"81920 bytes .*1 views in this process; owner {os.getpid()}, age"
    with pytest.warns(sharing.ShareLeakWarning, match=words), sharing.scope():
        kept.append(sharing.empty(70_000, "u1"))
    kept.clear()


def test_a_scope_finds_small_ones_beside_others() -> None:
    """Small arrays share segments: one that was there before, and goes, does not make up for one that stays."""
    kept = [sharing.empty(10), sharing.empty(10)]
    with pytest.warns(sharing.ShareLeakWarning, match="1 views in this process"), sharing.scope():
        kept[0] = sharing.empty(10)
    kept.clear()


def test_a_scope_finds_messages() -> None:
    with pytest.raises(ExceptionGroup) as caught, sharing.scope(strict=True):
        _, fds = messages.encode(messages.TASK, (sharing.empty(70_000, "u1"),))
    (leak,) = caught.value.exceptions
    assert isinstance(leak, sharing.ShareLeakWarning)
    assert "a message under way" in str(leak)
    datagrams.close(fds)


async def test_a_scope_finds_processes() -> None:
    async with Group(Function(share_jobs.holds), logs=QUIET) as group:
        strict = sharing.scope(strict=True)
        await strict.__aenter__()
        await group[0].send(sharing.empty(70_000, "u1"))
        pid = await group[0].receive()
        with pytest.raises(ExceptionGroup) as caught:
            await strict.__aexit__(None, None, None)
        assert f"process {pid} (" in str(caught.value.exceptions[0])


async def test_a_scope_of_work_that_leaves_nothing() -> None:
    before = sharing.empty(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with sharing.scope(strict=True):
            x = sharing.copy(np.ones(100_000))
            await supervise(Function(share_jobs.total, x), n=2, logs=QUIET)
            small = sharing.empty(10)
            del x, small
        kept = []
        with pytest.raises(KeyError), sharing.scope(strict=True):
            kept.append({}[str(kept.append(sharing.empty(10)))])  # its own error goes first
    assert before.size == kept[0].size


# --- crashes ---


async def test_a_producer_that_is_killed_loses_nothing() -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await kill_a_producer()
    gc.collect()
    assert sharing.stats().borrowed == 0


async def kill_a_producer() -> None:
    async with Group(Function(share_jobs.sends_and_stays), logs=QUIET) as group:
        x = await group[0].receive()
        private = await group[0].receive()
        pid = group[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        assert (np.asarray(x) == 3).all()
        assert (private == 4).all()
        np.asarray(x)[:] = 5
        again = await supervise(Function(share_jobs.total, x), n=1, logs=QUIET)
        assert again[0].value == 500_000


async def test_a_supervisor_that_is_killed_leaves_nothing() -> None:
    code = f"""
import asyncio, os, signal, sys, psutil
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import share_jobs
from aioelastic import Function, Group, sharing
async def main():
    x = sharing.empty(1 << 20, "u1")
    async with Group(Function(share_jobs.holds)) as group:
        await group[0].send(x)
        family = psutil.Process().children(recursive=True)
        print(*[one.pid for one in family], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": HOUSE}
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env, check=False)
    assert out.returncode == -signal.SIGKILL
    family = [int(one) for one in out.stdout.split()]
    assert len(family) == 4  # the guardian and its keeper, the zygote, the worker
    for pid in family:
        await gone(pid)


# --- files ---


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    sharing.configure(strategy="file", directory=tmp_path)
    yield tmp_path
    gc.collect()
    sharing.configure(strategy="memfd")


def names(below: Path) -> list[str]:
    return sorted(path.name for path in below.glob("*/*"))


async def test_files_work_as_memfds_do(files: Path) -> None:
    x = sharing.copy(np.ones(100_000))
    small = sharing.copy(np.ones(3))
    assert len(names(files)) == 2
    assert (files / os.listdir(files)[0]).stat().st_mode & 0o777 == 0o700
    result = await supervise(Function(share_jobs.add_one, x), n=1, logs=QUIET)
    assert result[0].value.address == x.address
    assert (np.asarray(x) == 2).all()
    (one,) = (await supervise(Function(share_jobs.facts, small), n=1, logs=QUIET))[0].value
    assert one == ("SharedArray", True, 3.0)
    del x, small, result
    gc.collect()
    sharing.trim()


async def test_files_go_with_their_arrays(files: Path) -> None:
    x = sharing.empty(100_000)
    assert len(names(files)) == 1
    del x
    sharing.trim()
    assert names(files) == []


@pytest.mark.parametrize("start", ["fork", "zygote", "spawn"])
async def test_files_of_a_worker_go_with_it(tmp_path: Path, start: Any) -> None:
    preload = ["numpy"] if start == "zygote" else ()
    job = Function(share_jobs.makes_files, str(tmp_path))
    result = await supervise(job, n=1, start=start, preload=preload, logs=QUIET)
    assert (np.asarray(result[0].value) == 3).all()
    assert list(tmp_path.iterdir()) == []


def test_directories_of_the_dead_are_swept(tmp_path: Path) -> None:
    work = "from aioelastic import sharing; import os, signal\n"
    work += f"sharing.configure(strategy='file', directory={str(tmp_path)!r}); x = sharing.empty(100_000)\n"
    python(work)
    assert list(tmp_path.iterdir()) == []  # at its end
    with pytest.raises(subprocess.CalledProcessError):
        python(work + "os.kill(os.getpid(), signal.SIGKILL)")
    assert len(names(tmp_path)) == 1
    python(work)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_follows_no_link(tmp_path: Path) -> None:
    """Everybody may write to /dev/shm."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    (tmp_path / "aioelastic-shares-1-0").symlink_to(tmp_path / "theirs")
    sharing.configure(strategy="file", directory=tmp_path)
    sharing.configure(strategy="memfd")
    assert (tmp_path / "theirs" / "file").exists()


def test_a_full_file_system_says_so(files: Path) -> None:
    with pytest.raises(sharing.ShareLimit, match="cannot have"):
        sharing.empty(1 << 50, "u1")
    assert names(files) == []


@pytest.mark.parametrize(
    "wrong",
    [{"strategy": "shm"}, {"directory": "/tmp"}, {"limit": -1}, {"limit": "1G"}, {"strategy": "file", "directory": 3}],
)
def test_wrong_words(wrong: Any) -> None:
    with pytest.raises(SpecError):
        sharing.configure(**wrong)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/none'$"):
        sharing.configure(strategy="file", directory=tmp_path / "none")


@pytest.mark.parametrize(
    ("call", "arguments", "field"),
    [
        (sharing.audit, ("x",), "pids"),
        (sharing.audit, (1,), "pids"),
        (sharing.scope, ("x",), "strict"),
        (sharing.register, ("F", abs, abs), "kind"),
        (sharing.register, (int, abs, abs), "kind"),
        (sharing.register, (Path, 1, abs), "export"),
        (sharing.register, (Path, abs, 2), "rebuild"),
        (sharing.Queue.get_sync, (None, "x"), "timeout"),
        (sharing.Queue.put_sync, (None, 1, float("nan")), "timeout"),
    ],
)
def test_wrong_arguments(call: Any, arguments: Any, field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field}="):
        call(*arguments)
