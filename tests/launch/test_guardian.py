"""The guardian, and its keeper: each party dies, hides or changes, and nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
from helpers import QUIET, alive, event_of, gone, kill_and_see_it_dead, py, sh, stopped_itself

from aioelastic import Command, Function, Group, Restart, SpecError, supervise
from aioelastic.child.guardian import main_loop
from aioelastic.child.kernel import child_processes, posix_spawn
from aioelastic.child.wire import datagrams, requests
from aioelastic.events import Drained, Spawned
from aioelastic.launch import GuardianLauncher, RawExit, end_helpers
from aioelastic.launch._guardian import guardian as launch_guardian
from aioelastic.launch._guardian import let_go
from aioelastic.launch._helper_process import Server
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.states import State
from aioelastic.planning import plan, preflight
from aioelastic.testing._chaos import cont, guardian, keeper, kill, when
from aioelastic.testing._chaos import stop as chaos_stop
from aioelastic.testing._misbehaving_workers import daemon, made
from aioelastic.testing._supervisor_process import Program
from aioelastic.watch import Poller

pytestmark = pytest.mark.fresh

STAY = "exec sleep 1000"

FAMILY = """
import asyncio
from aioelastic import *
from aioelastic.testing import daemon, setsid_escape, made
async def main():
    stay = "exec sleep 1000"
    entries = [daemon(stay), setsid_escape(stay), Command("/bin/sh", "-c", "sleep 1000 & echo up; wait")]
    async with Group(entries, logs=Logs(tee=Std.NONE)) as group:
        seen = 0
        async for line in group.lines():
            print("said", line.text, flush=True)
            seen += 1
            if seen == 3:
                print("ready", *group.pids.values(), flush=True)
asyncio.run(main())
"""


def family_of(pid: int) -> list[int]:
    return [one.pid for one in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_the_supervisor_dies(signum: signal.Signals) -> None:
    """A plain worker and its child, one that left the session, a daemon without a variable: all gone."""
    with Program(FAMILY) as program:
        await asyncio.to_thread(program.line, "ready")
        family = family_of(program.pid)
        assert len(family) >= 7  # guardian, keeper, three workers and what they have started
        os.kill(program.pid, signum)
        for pid in family:
            await gone(pid)


FILES = """
import asyncio, tempfile
from aioelastic import *
def keeps():
    sharing.configure(strategy="file")
    x = sharing.empty(100_000)
    sharing.send("up")
    sharing.receive()
async def main():
    tempfile.tempdir = HOME
    sharing.configure(strategy="file")
    x = sharing.empty(100_000)
    async with Group(Function(keeps), logs=Logs(tee=Std.NONE)) as group:
        await group[0].receive()
        print("ready", group[0].pid, flush=True)
        await group.wait()
if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_names_of_shared_memory_and_error_files_go_with_their_program(tmp_path: Path) -> None:
    with Program(FILES.replace("HOME", repr(str(tmp_path)))) as program:
        ready = await asyncio.to_thread(program.line, "ready")
        marks = tuple(f"aioelastic-shares-{pid}-" for pid in (program.pid, int(ready.split()[0])))
        names = [name for name in os.listdir("/dev/shm") if name.startswith(marks)]
        assert len(names) == 2
        assert len(list(tmp_path.iterdir())) == 1
        family = family_of(program.pid)
        os.kill(program.pid, signal.SIGKILL)
        for pid in family:
            await gone(pid)
    assert [name for name in names if Path("/dev/shm", name).exists()] == []
    assert list(tmp_path.iterdir()) == []


GRACEFUL = """
import asyncio, contextlib, signal, os
from aioelastic import *
def saves(home):
    def save(signum, frame):
        with open(home + "/asked", "w") as file:
            file.write("asked")
        with open(home + "/go") as file:
            file.readline()
        with open(home + "/saved", "w") as file:
            file.write("saved")
        os._exit(0)
    signal.signal(signal.SIGTERM, save)
    print("up", flush=True)
    while True:
        signal.pause()
async def main():
    home = HOME
    shell = f"trap 'echo asked >{home}/asked; read x <{home}/go; echo saved >{home}/saved; exit' TERM; echo up; "
    command = Command("sh", "-c", shell + "while :; do sleep 1000 & wait; done")
    entry = Function(saves, home) if KIND == "function" else command
    quiet = Logs(tee=Std.NONE)
    patient = Group(entry, stop=Stop(if_lost="stop", grace=31 * 86400), logs=quiet)
    deaf = Command("sh", "-c", "trap '' TERM; echo up; exec sleep 1000")
    short = Group(deaf, stop=Stop(if_lost="stop", grace=0.01), logs=quiet)
    other = Group(deaf, logs=quiet)
    async with contextlib.AsyncExitStack() as stack:
        for group in (patient, short, other):
            await stack.enter_async_context(group)
            async for line in group.lines():
                break
        print("ready", patient[0].pid, short[0].pid, other[0].pid, flush=True)
        await other.wait()
if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["command", "function"])
async def test_a_lost_worker_may_have_its_grace(tmp_path: Path, kind: str) -> None:
    """Its own: one of another group has none, one that does not heed it has no more than that; and nothing stays."""
    for name in ("asked", "go"):
        os.mkfifo(tmp_path / name)
    # before the other end: an open(2) of a FIFO that a signal interrupts begins anew, when the writer may be gone
    go = os.open(tmp_path / "go", os.O_RDWR)
    with (
        open(go, "wb", buffering=0),
        Program(GRACEFUL.replace("HOME", repr(str(tmp_path))).replace("KIND", repr(kind))) as program,
    ):
        ready = await asyncio.to_thread(program.line, "ready")
        patient, short, other = map(int, ready.split())
        family = family_of(program.pid)
        os.kill(program.pid, signal.SIGKILL)
        await gone(other)
        await gone(short)
        assert await asyncio.to_thread((tmp_path / "asked").read_text)
        assert alive(patient)
        os.write(go, b"go\n")
        for pid in family:
            await gone(pid)
    assert (tmp_path / "saved").read_text().strip() == "saved"


@pytest.mark.parametrize("party", [guardian, keeper], ids=["guardian", "keeper"])
async def test_one_of_the_two_is_killed(party: Any) -> None:
    """The group fails and says why; what had hidden is gone too; the next group has a guardian again."""
    blow = kill(party)
    async with Group([daemon(STAY), sh(STAY)], logs=QUIET, check=False) as group:
        async for line in group.lines():
            (hidden,) = made(line.text)
            break
        blow(await event_of(group, Spawned, rank=1))
        result = await group.wait()
    assert blow.struck
    assert not result.ok
    assert {one.rank for one in result.failures} <= {0, 1}
    assert all("the guardian that had started it died" in one.cause for one in result.failures)
    assert all(one.exit.signal == signal.SIGKILL for one in result if one.exit)
    await gone(hidden)
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok


async def test_an_exit_is_known_before_the_guardian_tells_it() -> None:
    halt, go = chaos_stop(guardian), cont(guardian)
    async with Group([sh("exec sleep 1000"), sh("exec sleep 1000")], logs=QUIET, check=False) as group:
        spawned = await event_of(group, Spawned, rank=1)
        halt(spawned)
        pid = group[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        exit = await group[0].wait()
        assert exit is not None
        assert exit.signal == signal.SIGKILL
        assert group[0].state is State.EXITED
        assert group[0]._life.usage is None  # what it used comes with its end at the guardian
        go(spawned)
        result = await group.wait()
    assert result.failures[0].exit is not None
    assert result.failures[0].exit.signal == signal.SIGKILL
    assert result[0].usage is not None
    assert result[1].stopped


async def test_an_exit_is_looked_for_once_no_start_is_under_way() -> None:
    """The guardian's word is soon enough while it is busy; what was started meanwhile is looked after later."""
    environ = dict(os.environ)
    worker = preflight(plan(GroupSpec.of(sh(STAY)), environ=environ), environ).workers[0]
    launcher = GuardianLauncher(environ)
    first = await launcher.start(worker)
    at = guardian(None)  # type: ignore[arg-type]
    assert at is not None
    os.kill(at, signal.SIGSTOP)
    await stopped_itself(at)
    later = launcher.start(worker)
    told: list[RawExit] = []
    ended = asyncio.Event()

    def tell(raw: RawExit) -> None:
        told.append(raw)
        ended.set()

    first.watch(tell)
    kill_and_see_it_dead(first.pid, signal.SIGKILL)
    await gone(first.pid)
    await asyncio.sleep(0)
    assert told == []
    os.kill(at, signal.SIGCONT)
    second = await later
    await ended.wait()
    while told[-1].early:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert {one.status for one in told} == {signal.SIGKILL}
    third = launcher.start(worker)
    told.clear()
    second.watch(tell)
    third = await third
    os.kill(at, signal.SIGSTOP)
    await stopped_itself(at)
    ended.clear()
    assert second.pid is not None
    os.kill(second.pid, signal.SIGKILL)
    await ended.wait()
    assert [one.early for one in told] == [True]
    os.kill(at, signal.SIGCONT)
    while told[-1].early:  # noqa: ASYNC110
        await asyncio.sleep(0)
    launcher.end()
    for process in (first, second, third):
        process.reap()
        for fd in (process.stdout, process.stderr):
            assert fd is not None
            os.close(fd)
    assert third.pid is not None
    await gone(third.pid)


async def test_the_guardian_dies_before_anybody_watches_its_worker() -> None:
    environ = dict(os.environ)
    worker = preflight(plan(GroupSpec.of(sh(STAY)), environ=environ), environ).workers[0]
    launcher = GuardianLauncher(environ)
    process = await launcher.start(worker)
    kill_and_see_it_dead(guardian(None), signal.SIGKILL)  # type: ignore[arg-type]
    while not launcher.gone:  # noqa: ASYNC110
        await asyncio.sleep(0)
    told: asyncio.Future[RawExit] = asyncio.get_running_loop().create_future()
    process.watch(told.set_result)
    raw = await told
    assert not raw.early
    assert "guardian" in raw.reason
    process.reap()
    for fd in (process.stdout, process.stderr):
        assert fd is not None
        os.close(fd)


@pytest.mark.parametrize("dies", [False, True])
async def test_no_more_exits_can_be_watched(dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an epoll set (ENOSPC, epoll_ctl(2)): the guardian tells of each; and where it dies, so do they."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Poller, "add_exit", full)
    async with Group(sh(STAY), 2, logs=QUIET, check=False) as group:
        await event_of(group, Spawned, 1)
        if dies:
            kill_and_see_it_dead(guardian(None), signal.SIGKILL)  # type: ignore[arg-type]
            result = await group.wait()
            assert all("guardian" in one.cause for one in result.failures)
        else:
            result = await group.stop()
            assert [one.exit.signal for one in result if one.exit is not None] == [signal.SIGTERM] * 2


async def test_the_guardian_is_killed_under_function_workers() -> None:
    blow = kill(guardian)
    listen = when(Spawned, blow, rank=1)
    result = await supervise(Function(jobs.sleeps), n=2, logs=QUIET, on_event=listen, check=False)
    assert blow.struck
    assert "zygote" in result.failures[0].cause
    assert (await supervise(Function(jobs.parent), logs=QUIET)).ok


@pytest.mark.parametrize("scope", ["one", "all"])
async def test_a_later_attempt_gets_a_new_guardian(tmp_path: Path, scope: Any) -> None:
    blow = kill(guardian)
    script = f"test $AIOELASTIC_ATTEMPT = 1 || {STAY}; echo $PPID >{tmp_path}/$RANK"
    again = Restart.on_failure(1, scope)
    result = await supervise(sh(script), 2, logs=QUIET, restart=again, on_event=when(Spawned, blow, rank=1))
    assert blow.struck
    assert [one.attempt for one in result] == [1, 1]
    assert {int((tmp_path / name).read_text()) for name in "01"} == {guardian(None)}  # type: ignore[arg-type]


async def test_a_guardian_that_is_gone_is_replaced() -> None:
    await supervise(sh("exit 0"), logs=QUIET)
    pid = guardian(None)  # type: ignore[arg-type]
    kill_and_see_it_dead(pid, signal.SIGKILL)
    assert (await supervise(sh("exit 0"), logs=QUIET)).ok
    assert guardian(None) != pid  # type: ignore[arg-type]


async def test_a_guardian_dies_and_another_group_is_the_first_to_know() -> None:
    """Whoever needs one next lets go of it; those that it had served hear of its end all the same."""
    async with Group(sh(STAY), logs=QUIET, check=False) as group:
        kill_and_see_it_dead(guardian(None), signal.SIGKILL)  # type: ignore[arg-type]
        let_go(launch_guardian(None))  # before our loop has heard anything
        result = await group.wait()
    assert "the guardian that had started it died" in result.failures[0].cause


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ETOOMANYREFS, errno.EMSGSIZE])
@pytest.mark.parametrize("entry", [sh("exit 0"), Function(abs, -1)], ids=["command", "function"])
async def test_a_request_that_the_system_does_not_take_is_refused(
    entry: Any, code: int, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or after it had to wait; and the next is sent."""
    errors, real = [BlockingIOError()] * later + [OSError(code, os.strerror(code))], datagrams.send

    def send(sock: Any, packet: bytes, fds: Any = ()) -> None:
        if errors and packet[:1] in (requests.EXEC, requests.FORK):
            raise errors.pop(0)
        real(sock, packet, fds)

    monkeypatch.setattr(datagrams, "send", send)
    async with asyncio.timeout(150):
        result = await supervise(entry, logs=QUIET, check=False)
    assert os.strerror(code) in str(result[0].failure)
    assert (await supervise(entry, logs=QUIET)).ok


def test_the_end_of_a_connection_does_not_raise() -> None:
    """At the interpreter's end others are still to be ended."""

    class Bad(socket.socket):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    ours, theirs = socket.socketpair()
    Server(Bad(fileno=ours.detach())).end()
    assert theirs.recv(1) == b""
    theirs.close()


async def test_it_answers_no_signal_that_is_for_the_program() -> None:
    """As a service manager sends it to all processes of a service at once."""
    async with Group(sh(STAY), logs=QUIET) as group:
        for party in (guardian, keeper):
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(party(None), signum)  # type: ignore[arg-type]
        result = await group.stop()
    assert result[0].stopped
    assert group[0].exit is not None
    assert group[0].exit.signal == signal.SIGTERM


async def test_orphans_are_reaped() -> None:
    """A worker that lives on and leaves children of children behind does not fill the table of processes."""
    script = "for i in 1 2 3 4 5; do (setsid sh -c 'echo $$' &); done; exec sleep 1000"
    async with Group(sh(script), logs=QUIET) as group:
        pids = []
        async for line in group.lines():
            pids.append(int(line.text))
            if len(pids) == 5:
                break
        for pid in pids:
            await gone(pid)
        above = guardian(None)  # type: ignore[arg-type]
        assert above is not None
        while any(one.pid in pids for one in psutil.Process(above).children()):  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the user of a process")
async def test_what_has_changed_its_user_is_ended_by_root() -> None:
    script = """if True:
        import os
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.setresuid(65534, 65534, 65534)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            os.execv("/bin/sleep", ["sleep", "1000"])
        print(pid, flush=True)
    """
    result = await supervise(py(script), logs=QUIET)
    pid = int(str(result[0].stdout))
    assert [one.pid for one in result.leaked] == [pid]
    assert not alive(pid)
    assert result.clean


async def test_each_stray_is_its_own_workers() -> None:
    """Without variables, in sessions of their own, children of the guardian both: only one of them is to end."""
    async with Group([daemon(STAY), daemon(STAY)], logs=QUIET) as group:
        pids: dict[int, int] = {}
        async for line in group.lines():
            pids[line.rank] = made(line.text)[0]
            if len(pids) == 2:
                break
        await group[0].stop()
        await event_of(group, Drained, rank=0)
        await gone(pids[0])
        assert alive(pids[1])
    await gone(pids[1])


async def test_what_the_program_changes_later_counts() -> None:
    script = "umask; ulimit -n; ulimit -Hn; nice; exec cat /proc/self/status"
    environ = {"PATH": os.environ["PATH"]}
    before = await supervise(sh(script, env=environ), logs=QUIET)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cpus = os.sched_getaffinity(0)
    old = os.umask(0o027)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        os.sched_setaffinity(0, {min(cpus)})
        after = await supervise(sh(script, env=environ), logs=QUIET)
    finally:
        os.umask(old)
        os.sched_setaffinity(0, cpus)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    first, second = str(before[0].stdout).split("\n"), str(after[0].stdout).split("\n")
    assert second[0] == "0027" != first[0]
    assert (int(first[1]), int(second[1])) == (soft, soft - 1)
    assert f"Cpus_allowed_list:\t{min(cpus)}" in second
    assert [one for one in second if one.startswith("SigBlk")] == ["SigBlk:\t0000000000000000"]


async def test_what_cannot_be_executed_with_changed_surroundings(tmp_path: Path) -> None:
    await supervise(sh("exit 0"), logs=QUIET)
    environ = dict(os.environ)
    worker = preflight(plan(GroupSpec.of(sh("exit 0")), environ=environ), environ).workers[0]
    missing = str(tmp_path / "missing")
    old = os.umask(0o027)
    try:
        launcher = GuardianLauncher(environ)
        with pytest.raises(FileNotFoundError) as caught:
            await launcher.start(dataclasses.replace(worker, program=missing))
        launcher.end()
    finally:
        os.umask(old)
    assert caught.value.filename == missing


async def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    here = os.getcwd()
    place = tmp_path / "place"
    place.mkdir()
    os.chdir(place)
    try:
        place.rmdir()
        result = await supervise(Command("/bin/true"), logs=QUIET)
    finally:
        os.chdir(here)
    assert result.ok


async def test_large_arguments_and_environment() -> None:
    """More than a datagram holds."""
    value = "x" * 100_000
    entry = Command("/bin/sh", "-c", "echo ${#LARGE} ${#1}", "sh", value, env={"LARGE": value})
    result = await supervise(entry, logs=QUIET)
    assert str(result[0].stdout) == "100000 100000\n"


async def test_bytes_that_are_no_text() -> None:
    odd = os.fsdecode(b"\xff\xfe")
    result = await supervise(Command("/bin/sh", "-c", 'printf %s "$ODD$1"', "sh", odd, env={"ODD": odd}), logs=QUIET)
    assert bytes(result[0].stdout.tail) == b"\xff\xfe\xff\xfe"


def test_two_loops_share_it() -> None:
    seen: list[int | None] = []

    async def main() -> None:
        async with Group(sh(STAY), logs=QUIET) as group:
            stat = Path(f"/proc/{group[0].pid}/stat").read_text()
            seen.append(int(stat.rpartition(")")[2].split()[1]))

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(set(seen)) == 1


async def test_a_forked_copy_has_one_of_its_own() -> None:
    async with Group(sh(STAY), logs=QUIET) as group:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                asyncio._set_running_loop(None)
                loop = asyncio.SelectorEventLoop()
                loop.run_until_complete(supervise(sh("exit 0"), logs=QUIET))
                end_helpers()
                code = 0
            finally:
                os._exit(code)
        code = await asyncio.to_thread(lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert code == 0
        assert alive(group[0].pid or 0)


async def test_chosen_by_name() -> None:
    async with Group(sh(STAY), logs=QUIET, launcher="direct") as group:
        assert psutil.Process(group[0].pid).ppid() == os.getpid()
    async with Group(sh(STAY), logs=QUIET, launcher="guardian") as group:
        assert psutil.Process(group[0].pid).ppid() == guardian(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["nobody", "", None, 3])
async def test_a_launcher_that_is_none(value: Any) -> None:
    with pytest.raises(SpecError, match="launcher="):
        await supervise(sh("exit 0"), launcher=value)


async def test_where_none_can_run_it_is_done_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    from aioelastic.launch import _launchers

    def refuse(*_: object) -> Any:
        raise OSError(errno.ENOSYS, "no pidfd")

    monkeypatch.setattr(_launchers, "GuardianLauncher", refuse)
    async with Group(sh(STAY), logs=QUIET) as group:
        assert psutil.Process(group[0].pid).ppid() == os.getpid()
        result = await group.stop()
    assert "no guardian adopted what they left behind (none can run here: [Errno 38] no pidfd)" in str(result.remains)


@pytest.mark.fresh
async def test_a_connection_that_the_system_does_not_take_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """That lack may pass: it is no reason to start the worker without a guardian."""
    real = datagrams.send

    def send(sock: Any, packet: bytes, fds: Any = (), flags: int = 0) -> None:
        if packet[:1] == requests.CONNECT:
            raise datagrams.Crowded
        real(sock, packet, fds, flags)

    monkeypatch.setattr(datagrams, "send", send)
    with pytest.raises(OSError, match=r"the guardian cannot be started: .*descriptors under way"):
        await supervise(sh("exit 0"), logs=QUIET)


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
@pytest.mark.parametrize("entry", [sh(STAY), Function(signal.pause)], ids=["command", "function"])
async def test_a_signal_that_the_system_does_not_take_is_sent_again(
    entry: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, real = [code, code], datagrams.send

    def send(sock: Any, packet: bytes, fds: Any = ()) -> None:
        if errors and packet[:1] == requests.SIGNAL:
            number = errors.pop(0)
            raise OSError(number, os.strerror(number))
        real(sock, packet, fds)

    monkeypatch.setattr(datagrams, "send", send)
    async with asyncio.timeout(150), Group(entry, logs=QUIET, check=False) as group:
        assert group[0].signal_group(signal.SIGKILL)
        result = await group.wait()
    assert errors == []
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGKILL


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM])
@pytest.mark.parametrize("entry", [sh("exit 3"), Function(sys.exit, 3)], ids=["command", "function"])
async def test_what_cannot_be_received_just_now_is_received_later(
    entry: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the guardian, nor the zygote, nor the worker is taken for dead."""
    failed, real = set(), datagrams.receive

    def receive(sock: Any, *args: Any) -> Any:
        if sock not in failed:
            failed.add(sock)
            raise OSError(code, os.strerror(code))
        return real(sock, *args)

    monkeypatch.setattr(datagrams, "receive", receive)
    result = await supervise(entry, logs=QUIET, check=False)
    assert failed
    assert result[0].exit is not None
    assert result[0].exit.code == 3


@pytest.mark.fresh
async def test_a_zygote_that_cannot_be_told_what_to_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = datagrams.send

    def send(sock: Any, packet: bytes, fds: Any = (), flags: int = 0) -> None:
        if packet[:1] == requests.SETUP:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        real(sock, packet, fds, flags)

    with monkeypatch.context() as patch:
        patch.setattr(datagrams, "send", send)
        with pytest.raises(OSError, match=os.strerror(errno.ENOBUFS)):
            await supervise(Function(abs, -1), logs=QUIET)
    assert (await supervise(Function(abs, -1), logs=QUIET))[0].value == 1


async def test_junk_for_the_guardian_ends_that_connection_only() -> None:
    async with Group(sh(STAY), logs=QUIET) as other:
        async with Group(sh(STAY), logs=QUIET, check=False) as group:
            server: Any = group._supervisor.resources._launchers._guardians[-1]
            server.send(requests.EXEC + b"\0nonsense", [])
            result = await group.wait()
        assert "guardian" in result.failures[0].cause
        assert other[0].exit is None


async def test_the_hosts_loop_may_stand_still() -> None:
    """A supervisor that does not read its exits holds up no other group of the program."""
    done = threading.Event()

    def elsewhere() -> None:
        asyncio.run(supervise(sh("exit 0"), n=50, logs=QUIET))
        done.set()

    async with Group(sh("exit 0"), n=300, logs=QUIET):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()  # our loop stands still
        assert done.is_set()


def test_children_are_found_without_the_kernels_list() -> None:
    import subprocess

    children = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    try:
        assert {one.pid for one in children} <= set(child_processes.by_search(os.getpid()))
        assert set(child_processes.by_search(os.getpid())) == set(child_processes.children(os.getpid()))
        own = child_processes.own_list()
        for left in (3, 2):  # opened once, it is read anew each time
            assert child_processes.listed(own).count(b" ") == len(child_processes.by_search(os.getpid()))
            if left == 3:
                last = children.pop()
                last.kill()
                last.wait()
        os.close(own)
    finally:
        for one in children:
            one.kill()
            one.wait()


def test_a_long_list_of_children_is_read_to_its_end(tmp_path: Path) -> None:
    words = b"".join(b"%d " % number for number in range(5000))
    (tmp_path / "children").write_bytes(words)
    fd = os.open(tmp_path / "children", os.O_RDONLY)
    assert child_processes.listed(fd) == words
    os.close(fd)


def test_it_is_small() -> None:
    """Isolated, one thread, and none of the modules that would double its size."""
    code = (
        "import sys\n"
        "module = sys.modules['aioelastic'] = type(sys)('aioelastic')\n"
        "module.__path__ = [sys.argv[1]]\n"
        "import aioelastic.child.guardian.main_loop\n"
        "print(*sorted({'asyncio', 'socket', 'signal', 'pickle', 'typing', 'subprocess', 're'} & set(sys.modules)))"
    )
    import subprocess

    home = str(Path(main_loop.__file__).parent.parent.parent)
    out = subprocess.run([sys.executable, "-I", "-S", "-c", code, home], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == ""


@pytest.mark.filterwarnings("ignore:.*is multi-threaded:DeprecationWarning")
async def test_an_older_c_library_starts_a_guardian_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By fork(2) where glibc is older than 2.34: it has all signals blocked all the same, and no worker has any."""

    def lacks(name: str, holds: bool = False) -> Any:
        raise OSError(f"undefined symbol: {name}")  # as dlsym(3) is told by Python

    end_helpers()
    monkeypatch.setattr(posix_spawn, "function", lacks)
    result = await supervise(sh("grep -h SigBlk /proc/self/status /proc/$PPID/status"), logs=QUIET)
    end_helpers()
    own, guardians = str(result[0].stdout).splitlines()
    assert int(own.split()[1], 16) == 0
    assert int(guardians.split()[1], 16) >> (signal.SIGTERM - 1) & 1
