"""The contract of a launcher, and every launcher held to it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, gone, kill_and_see_it_dead, sh, until

from aioelastic import Command, Function, Group, Stop, supervise
from aioelastic.launch import DirectLauncher, GuardianLauncher, Launcher, LiveProcess, RawExit, reap_abandoned
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.logs import Logs, Std
from aioelastic.planning import plan, preflight

Ended = tuple[RawExit, resource.struct_rusage | None]
LAUNCHERS: dict[str, Callable[[], Launcher]] = {
    "guardian": lambda: GuardianLauncher(dict(os.environ)),
    "direct": lambda: DirectLauncher(dict(os.environ)),
    "direct-by-popen": lambda: DirectLauncher(dict(os.environ), spawn="popen"),
    "direct-without-pidfd": lambda: DirectLauncher(dict(os.environ), watch="thread"),
}


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    one = LAUNCHERS[request.param]()
    yield one
    if isinstance(one, GuardianLauncher):
        one.end()


async def start(launcher: Launcher, command: Command) -> tuple[LiveProcess, asyncio.Future[Ended]]:
    environ = dict(os.environ)
    worker = preflight(plan(GroupSpec.of(command), environ=environ), environ).workers[0]
    process = await launcher.start(worker)
    return process, ending(process)


def ending(process: LiveProcess) -> asyncio.Future[Ended]:
    exited: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
    early: list[RawExit] = []

    def on_exit(raw: RawExit) -> None:
        if raw.early:
            early.append(raw)
            return
        assert len(early) <= 1
        assert all(one.status == raw.status for one in early)
        exited.set_result((raw, process.reap()))

    process.watch(on_exit)
    return exited


def slurp(process: LiveProcess) -> tuple[bytes, bytes]:
    """Both streams to their end, after the exit, and closed."""
    out = []
    for fd in (process.stdout, process.stderr):
        assert fd is not None
        os.set_blocking(fd, True)
        with os.fdopen(fd, "rb") as file:
            out.append(file.read())
    return out[0], out[1]


async def test_streams_status_and_usage(launcher: Launcher) -> None:
    process, exited = await start(launcher, sh("echo out; echo err >&2; exit 7"))
    raw, rusage = await exited
    assert raw.status is not None
    assert os.waitstatus_to_exitcode(raw.status) == 7
    assert rusage is not None
    assert raw.ended_ns > process.started_ns
    assert slurp(process) == (b"out\n", b"err\n")
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


@pytest.mark.parametrize("ignored", [False, True], ids=["", "a signal is ignored"])
@pytest.mark.parametrize("kind", [{}, {"stdin": "pipe"}, {"tty": True}], ids=["no input", "a pipe", "a terminal"])
async def test_streams_of_each_kind(launcher: Launcher, kind: dict[str, Any], ignored: bool) -> None:
    """By Popen, too, where what it calls in the copy makes that a forked one, which owns nothing of ours."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGTERM)
    try:
        group = Group(sh("test -t 0 && tty </dev/tty >/dev/null; echo $?", **kind), logs=QUIET, launcher=launcher)
        async with group:
            result = await group.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result[0].stdout.tail == (b"0\n" if "tty" in kind else b"1\n")


async def test_death_by_signal(launcher: Launcher) -> None:
    process, exited = await start(launcher, sh("exec sleep 1000"))
    assert process.send_signal(signal.SIGTERM)
    raw, _ = await exited
    assert raw.status is not None
    assert os.WTERMSIG(raw.status) == signal.SIGTERM
    slurp(process)


async def test_leads_a_session_of_its_own(launcher: Launcher) -> None:
    process, exited = await start(launcher, sh("exec sleep 1000"))
    assert os.getsid(process.pid) == process.pid
    assert os.getpgid(process.pid) == process.pid
    assert process.signal_group(signal.SIGKILL)
    await exited
    slurp(process)


class Watcher:
    """Has a process that has it."""

    def __init__(self, process: LiveProcess) -> None:
        self.process = process
        self.ended = asyncio.get_running_loop().create_future()
        process.watch(self.on_exit)

    def on_exit(self, raw: RawExit) -> None:
        if not raw.early:
            self.process.reap()
            self.ended.set_result(None)


@pytest.mark.parametrize("when", ["before its end", "after it", "in vain"])
async def test_who_watches_is_not_held(launcher: Launcher, when: str) -> None:
    environ = dict(os.environ)
    entry = sh("exit 0") if when == "after it" else sh("exec sleep 1000")
    process = await launcher.start(preflight(plan(GroupSpec.of(entry), environ=environ), environ).workers[0])
    if when == "after it":
        await until(lambda: getattr(process, "_told", "") is not None)  # a launcher that knows it by itself
    gc.collect()
    gc.disable()
    try:
        watcher = Watcher(process)
        known = weakref.ref(watcher)
        process.send_signal(signal.SIGKILL)
        if when == "in vain":
            process.abandon()
        else:
            await watcher.ended
        del watcher
        await until(lambda: known() is None)
    finally:
        gc.enable()
    slurp(process)
    await gone(process.pid or 0)
    await until(lambda: not any(one.name == f"aioelastic-wait-{process.pid}" for one in threading.enumerate()))
    reap_abandoned()


async def test_no_signal_after_the_end(launcher: Launcher) -> None:
    process, exited = await start(launcher, sh("exec sleep 1000"))
    kill_and_see_it_dead(process.pid, signal.SIGKILL)
    assert not process.send_signal(signal.SIGTERM)  # dead, not yet reaped
    await exited
    assert not process.send_signal(signal.SIGTERM)  # reaped: its pid may be a stranger's
    assert not process.signal_group(signal.SIGTERM)
    slurp(process)


async def test_group_alive(launcher: Launcher) -> None:
    process, exited = await start(launcher, sh("exit 0"))
    await exited
    assert not process.group_alive()
    slurp(process)
    process, exited = await start(launcher, sh("sleep 1000 >/dev/null 2>&1 & echo $!"))
    await exited
    assert process.group_alive()
    child = int(slurp(process)[0])
    os.kill(child, signal.SIGKILL)
    await gone(child)


@pytest.mark.parametrize(
    ("name", "content", "mode", "code"),
    [
        ("missing", None, 0, errno.ENOENT),
        ("forbidden", b"#!/bin/sh\n", 0o644, errno.EACCES),
        ("foreign", b"\x7fELF\x02\x01\x01" + bytes(57), 0o755, errno.ENOEXEC),
    ],
)
async def test_exec_failures_are_exact(
    launcher: Launcher, tmp_path: Path, name: str, content: bytes | None, mode: int, code: int
) -> None:
    program = tmp_path / name
    worker = preflight(plan(GroupSpec.of(sh("exit 0")), environ={}), dict(os.environ)).workers[0]
    import dataclasses

    worker = dataclasses.replace(worker, program=str(program), argv=(str(program),))
    if content is not None:
        program.write_bytes(content)
        program.chmod(mode)
    with pytest.raises(OSError, match=name) as caught:
        await launcher.start(worker)
    assert caught.value.errno == code
    assert str(program) in str(caught.value)


async def test_nothing_of_ours_is_inherited(launcher: Launcher, tmp_path: Path) -> None:
    """Not even a descriptor that the host made inheritable."""
    leaky = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(leaky, True)
    try:
        process, exited = await start(launcher, Command("/bin/ls", "-l", "/proc/self/fd"))
        await exited
        out = slurp(process)[0].decode()
    finally:
        os.close(leaky)
    names = [line.split()[-3] for line in out.splitlines() if "->" in line]
    assert names == ["0", "1", "2", "3"]  # 3 is ls reading the directory
    assert "0 -> /dev/null" in out


async def test_ours_are_closed_on_exec_and_non_blocking(launcher: Launcher) -> None:
    process, exited = await start(launcher, sh("exit 0"))
    for fd in (process.stdout, process.stderr):
        assert fd is not None
        assert not os.get_inheritable(fd)
        assert not os.get_blocking(fd)
    await exited
    slurp(process)


async def test_out_of_descriptors_leaves_nothing(launcher: Launcher) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    environ = dict(os.environ)
    worker = preflight(plan(GroupSpec.of(sh("exit 0")), environ=environ), environ).workers[0]
    lowest_free = os.dup(0)
    os.close(lowest_free)
    refusals: list[int | None] = []
    for room in range(8):  # each descriptor that a start needs is the one that is missing once
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + room, hard))
        try:
            process = await launcher.start(worker)
        except OSError as exc:
            refusals.append(exc.errno)
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await ending(process)
        slurp(process)
    assert refusals
    assert set(refusals) == {errno.EMFILE}


async def test_a_start_for_which_we_have_no_descriptor_left_costs_no_other_worker_anything(launcher: Launcher) -> None:
    first, ended = await start(launcher, sh("exec sleep 1000"))
    environ = dict(os.environ)
    worker = preflight(plan(GroupSpec.of(sh("exec sleep 1000")), environ=environ), environ).workers[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    starting = [launcher.start(worker) for _ in range(2)]
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))  # nothing that is sent to us can be taken
    try:
        await asyncio.wait(starting)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    others = []
    for one in starting:
        if (problem := one.exception()) is None:  # it was started before
            others.append(one.result())
        else:
            assert isinstance(problem, OSError)
            assert problem.errno == errno.EMFILE
    # by the guardian one may be, by descriptors that the start of the other has closed here in time
    assert len(others) < 2 if launcher.name == "guardian" else len(others) == 2
    later, later_ended = await start(launcher, sh("exit 3"))
    assert (await later_ended)[0].status == 3 << 8
    assert not ended.done()
    ends = [ended, *map(ending, others)]
    for one in (first, *others):
        one.send_signal(signal.SIGKILL)
    assert [raw.status for raw, _ in await asyncio.gather(*ends)] == [signal.SIGKILL] * len(ends)
    for one in (first, later, *others):
        slurp(one)


@pytest.mark.fresh
async def test_abandoned_is_reaped_later(launcher: Launcher) -> None:
    process, _ = await start(launcher, sh("exec sleep 1000"))
    process.abandon()
    kill_and_see_it_dead(process.pid, signal.SIGKILL)
    slurp(process)
    await supervise(sh("exit 0"), logs=Logs(tee=Std.NONE))  # any later group
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


async def test_a_host_that_reaps_everything(launcher: Launcher) -> None:
    """Some other part of the program calls waitpid(-1): the exit is still seen; its status where the kernel tells."""
    process, exited = await start(launcher, sh("exec sleep 1000"))
    os.kill(process.pid, signal.SIGKILL)
    if launcher.name == "guardian":  # no child of ours: nobody else here can take its status
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, 0)
        raw, rusage = await exited
        assert rusage is not None
        assert raw.status == signal.SIGKILL
    else:
        os.waitpid(process.pid, 0)
        raw, rusage = await exited
        assert rusage is None
        assert raw.status in (None, signal.SIGKILL)
    slurp(process)


async def test_group_on_every_launcher(launcher: Launcher) -> None:
    result = await supervise(
        lambda r: sh("echo $RANK; exit 3" if r == 1 else "echo $RANK; exec sleep 1000"),
        n=3,
        logs=Logs(tee=Std.NONE),
        check=False,
        launcher=launcher,
    )
    assert [f.rank for f in result.failures] == [1]
    assert str(result[1].stdout) == "1\n"


async def test_exit_order_is_the_kernels() -> None:
    async with Group(sh("exec sleep 1000"), n=12, logs=Logs(tee=Std.NONE), check=False) as group:
        order = [7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6]
        for rank in order:
            kill_and_see_it_dead(group[rank].pid, signal.SIGSEGV)
        result = await group.wait()
    assert [one.rank for one in result.failures] == order


def test_popen_objects_do_not_reap_behind_our_back() -> None:
    """`subprocess` reaps dropped Popen objects when it makes the next one; ours must not be among them."""
    code = """
import asyncio, gc, os, signal, subprocess, sys
from aioelastic import *
async def main():
    quiet = Logs(tee=Std.NONE)
    async with Group(Command("/bin/sh", "-c", "exit 9"), logs=quiet, check=False, launcher="direct") as group:
        pid = group[0].pid
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        gc.collect()
        subprocess.run(["/bin/true"], check=True)
        result = await group.wait()
        assert result[0].exit.code == 9, result[0].exit
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_hosts_other_threads_may_spawn_meanwhile() -> None:
    """Children of other threads never inherit our pipes, which would keep them from ending."""
    stop = threading.Event()

    def spawn() -> None:
        while not stop.is_set():
            subprocess.run(["/bin/true"], check=True, close_fds=False)

    thread = threading.Thread(target=spawn)
    thread.start()
    try:
        result = asyncio.run(supervise(sh("echo x"), n=20, logs=Logs(tee=Std.NONE)))
    finally:
        stop.set()
        thread.join()
    assert [str(one.stdout) for one in result] == ["x\n"] * 20
    assert all(one.stdout.holders == () for one in result)


@pytest.mark.parametrize("start", ["direct", "fork"])
async def test_a_group_that_may_not_be_signalled_is_stopped(start: str, monkeypatch: Any) -> None:
    """All of it has another user; SIGKILL to the leader may work all the same."""
    monkeypatch.setattr(os, "killpg", refuse)
    how: dict[str, Any] = {"launcher": "direct"} if start == "direct" else {"start": "fork"}
    entry = sh("trap '' TERM; echo up; while :; do sleep 1000; done") if start == "direct" else Function(deaf)
    stop = Stop(grace=0.1, scope="group")
    async with Group(entry, logs=QUIET, check=False, stop=stop, **how) as group:
        assert (await anext(aiter(group.lines()))).text == "up"
        result = await group.stop()
        monkeypatch.undo()  # what the leader has left is found by its mark
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGKILL


def refuse(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    signal.pause()
    signal.pause()
