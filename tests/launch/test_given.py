"""What a command is given beside its streams: descriptors, a user, a umask, secrets; by each way to start one."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pickle
import pwd
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import QUIET, event_of, gone, py, sh
from test_launchers import LAUNCHERS, ending, slurp

from aioelastic import Command, Function, Group, GroupFailed, Placement, Restart, SpecError, plan, supervise
from aioelastic.events import Restarting, Spawned
from aioelastic.launch import DirectLauncher
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.text import shown
from aioelastic.planning import preflight

pytestmark = pytest.mark.one_loop  # what is held here is in the worker, and in what is sent

HOW: dict[str, Callable[[], dict[str, Any]]] = {
    "guardian": dict,
    "guardian, forked": lambda: {"placement": Placement(nice=os.getpriority(os.PRIO_PROCESS, 0))},
    "direct": lambda: {"launcher": "direct"},
    "popen": lambda: {"launcher": DirectLauncher(dict(os.environ), spawn="popen")},
}
NOBODY = pwd.getpwnam("nobody")
WHO = "sed -n 's/^[UG]id:.//p; s/^Groups:.//p' /proc/self/status"  # real, effective, saved, file system


def told(uid: int, gid: int, groups: list[int]) -> list[list[int]]:
    return [[uid] * 4, [gid] * 4, sorted(groups)]


def numbers(out: object) -> list[list[int]]:
    return [[int(one) for one in line.split()] for line in str(out).splitlines()]


OPEN = """
import os
for fd in range(3, 300):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to run as somebody else")


@pytest.fixture(params=HOW)
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    return HOW[request.param]()


@contextmanager
def numbered(path: Path, *numbers: int) -> Iterator[tuple[int, ...]]:
    """A file of a line of its own has each of these numbers."""
    try:
        for number in numbers:
            file = path / str(number)
            file.write_text(f"file {number}\n")
            fd = os.open(file, os.O_RDWR)
            os.dup2(fd, number)  # inheritable, as a careless program has it
            os.close(fd)
        yield numbers
    finally:
        for number in numbers:
            os.close(number)


# --- descriptors ---


async def test_descriptors_have_their_numbers_there_and_no_other_is_open(how: Any, tmp_path: Path) -> None:
    with numbered(tmp_path, 160, 161, 162, 175):
        result = await supervise(py(OPEN, pass_fds=(175, 161)), logs=QUIET, **how)
    assert str(result[0].stdout) == f"161 {tmp_path}/161\n175 {tmp_path}/175\n"


async def test_low_numbers_that_are_ours_here(how: Any, tmp_path: Path) -> None:
    """As those of an event loop: the worker has what we have by them, however they come to it."""
    low = sorted(int(one) for one in os.listdir("/proc/self/fd") if int(one) > 2)[:4]
    kinds = [os.readlink(f"/proc/self/fd/{fd}") for fd in low]
    result = await supervise(py(OPEN, pass_fds=low), logs=QUIET, **how)
    assert str(result[0].stdout).splitlines() == [f"{fd} {kind}" for fd, kind in zip(low, kinds, strict=True)]


async def test_each_attempt_has_what_they_were_when_the_group_began(how: Any, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one\n")
    os.dup2(reader, 160)
    os.close(reader)
    worker = sh("read x </dev/fd/160; echo $x; test $x = two", pass_fds=[160])
    group = Group(worker, logs=QUIET, check=False, restart=Restart.on_failure(max=1), **how)
    async with group:
        os.close(160)
        await event_of(group, Restarting)
        os.write(writer, b"two\n")
        result = await group.wait()
    assert result.ok
    with pytest.raises(BrokenPipeError):  # nobody has the other end any more
        os.write(writer, b"three\n")
    os.close(writer)


async def test_who_reads_from_a_pipe_sees_its_end_with_the_workers(how: Any) -> None:
    reader, writer = os.pipe()
    worker = sh(f"echo hello > /dev/fd/{writer}", pass_fds=[writer])
    async with Group(worker, logs=QUIET, **how) as group:
        os.close(writer)
        await group[0].wait()
        assert (os.read(reader, 100), os.read(reader, 1)) == (b"hello\n", b"")  # waits where somebody has it still
    os.close(reader)


async def test_one_that_is_not_open_is_told_before_anything_starts(tmp_path: Path) -> None:
    touch = tmp_path / "started"
    entries = [sh(f"touch {touch}"), sh("true", pass_fds=[200])]
    with pytest.raises(SpecError) as caught:
        await supervise(entries, logs=QUIET)
    assert (caught.value.field, caught.value.value) == ("pass_fds of rank 1", 200)
    assert not touch.exists()
    with pytest.raises(SpecError, match="is not open here"):
        preflight(plan(GroupSpec.of(entries)), dict(os.environ))  # --dry-run


async def test_there_is_none_for_the_duplicates() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader, writer = os.pipe()
    lowest_free = os.dup(0)
    os.close(lowest_free)
    try:
        for room in range(2):  # with none at all not even a module can be read
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + room, hard))
            with pytest.raises(SpecError) as caught:
                await supervise(sh("true", pass_fds=[reader, writer]), logs=QUIET)
            assert caught.value.field == "RLIMIT_NOFILE"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(reader)
        os.close(writer)


async def test_one_that_the_worker_could_not_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with numbered(tmp_path, 300):
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        try:
            with pytest.raises(SpecError, match=r"pass_fds=300 of rank 0 is not below `ulimit -n`, 300"):
                await supervise(sh("true", pass_fds=[300]), logs=QUIET)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_last_that_a_worker_can_have(how: Any, tmp_path: Path) -> None:
    """Also where it must be put aside first, as one that is to have its number here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with numbered(tmp_path, 298, 299):
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        try:
            result = await supervise(py(OPEN, pass_fds=[299, 298]), logs=QUIET, **how)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(result[0].stdout) == f"298 {tmp_path}/298\n299 {tmp_path}/299\n"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([-1], "less than 0"),
        ([2], "one of the standard streams"),
        ([5, 6, 5], "names one twice"),
        ([2**31], "is more than"),
        ([True], "is bool"),
        (["3"], "is str"),
        (3, "is not a collection"),
    ],
)
def test_what_is_no_descriptor(given: Any, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as caught:
        Command("true", pass_fds=given)
    assert caught.value.field == "pass_fds"


@pytest.mark.fresh  # it counts free descriptors from the lowest on: helpers that are kept warm have some of them
@pytest.mark.parametrize("name", ["guardian", "direct", "direct-by-popen"])
async def test_each_descriptor_that_a_start_needs_is_missing_once(name: str) -> None:
    launcher: Any = LAUNCHERS[name]()
    environ = dict(os.environ)
    reader, writer = os.pipe()
    command = sh("cat $A_FILE", pass_fds=[reader], secrets={"A": "a", "B": "b"})
    worker = preflight(plan(GroupSpec.of(command), environ=environ), environ).workers[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    refusals: list[int | None] = []
    for room in range(16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + room, hard))
        try:
            process = await launcher.start(worker)
        except OSError as exc:
            refusals.append(exc.errno)
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await ending(process)
        assert slurp(process) == (b"a", b"")
    assert 0 < len(refusals) < 16
    assert set(refusals) == {errno.EMFILE}
    os.close(writer)
    os.close(reader)
    if name == "guardian":
        launcher.end()


async def test_a_start_that_is_cancelled_in_the_middle(how: Any) -> None:
    """Nothing of what it was to have stays open; the fixture looks."""
    reader, writer = os.pipe()
    worker = sh("exec sleep 1000", pass_fds=[writer], secrets={"A": "a"}, umask=0o077)
    task = asyncio.current_task()
    assert task is not None

    def cancel(event: object) -> None:
        if isinstance(event, Spawned) and event.rank == 2:
            task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await supervise(worker, n=8, logs=QUIET, on_event=cancel, **how)
    task.uncancel()
    os.close(writer)
    assert os.read(reader, 1) == b""  # nobody has the other end
    os.close(reader)


async def test_the_guardian_is_killed() -> None:
    reader, writer = os.pipe()
    worker = sh("exec sleep 1000", pass_fds=[writer], secrets={"A": "a"})
    async with Group(worker, n=2, logs=QUIET, check=False) as group:
        os.kill(psutil.Process(group[0].pid).ppid(), signal.SIGKILL)
        result = await group.wait()
    assert [one.exit.signal for one in result if one.exit] == [signal.SIGKILL] * 2
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


# --- users ---


async def test_a_umask(how: Any, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        script = f"umask; echo > {tmp_path}/file"
        result = await supervise([sh(script, umask=0o027), sh("umask")], logs=QUIET, **how)
    finally:
        os.umask(before)
    assert [str(one.stdout) for one in result] == ["0027\n", "0022\n"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("program", ["true", "gone"])
async def test_somebody_else_has_forked_meanwhile(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has the end of the pipe by which a start tells how it went, and so that never ends."""
    pipe2, copies = os.pipe2, []

    def copied(flags: int) -> tuple[int, int]:
        ours, theirs = pipe2(flags)
        if flags & os.O_NONBLOCK:  # it is that one
            copies.append(os.dup(theirs))
        return ours, theirs

    (tmp_path / "gone").write_text("#!/no/such/interpreter\n")
    (tmp_path / "gone").chmod(0o755)
    command = Command("true", umask=0o022)
    worker = preflight(plan(GroupSpec.of(command)), dict(os.environ)).workers[0]
    worker = replace(worker, program=worker.program if program == "true" else str(tmp_path / "gone"))
    monkeypatch.setattr(os, "pipe2", copied)
    try:
        if program == "gone":
            with pytest.raises(FileNotFoundError):
                await DirectLauncher(dict(os.environ)).start(worker)
        else:
            process = await DirectLauncher(dict(os.environ)).start(worker)
            assert (await ending(process))[0].status == 0
            assert slurp(process) == (b"", b"")
    finally:
        for fd in copies:
            os.close(fd)
    assert len(copies) == 1


@as_root
@pytest.mark.parametrize("user", ["nobody", NOBODY.pw_uid])
async def test_a_user_brings_its_groups(how: Any, user: Any) -> None:
    result = await supervise(sh(WHO, user=user), logs=QUIET, **how)
    uid, gid = NOBODY.pw_uid, NOBODY.pw_gid
    assert numbers(result[0].stdout) == told(uid, gid, os.getgrouplist("nobody", gid))
    assert not result.leaked


@as_root
@pytest.mark.parametrize(
    ("given", "uid", "gid", "groups"),
    [
        ({"user": "nobody", "group": 7}, NOBODY.pw_uid, 7, [7]),
        ({"user": 12345, "group": 7, "extra_groups": [8, "root"]}, 12345, 7, [0, 8]),
        ({"group": 7, "extra_groups": []}, 0, 7, []),
    ],
)
async def test_another_group(given: Any, uid: int, gid: int, groups: list[int]) -> None:
    result = await supervise(sh(WHO, **given), logs=QUIET)
    assert numbers(result[0].stdout) == told(uid, gid, groups)


@as_root
async def test_a_user_is_not_asked_to_write_where_it_may_not(how: Any) -> None:
    """The error file would be in a directory of ours."""
    script = 'echo ${AIOELASTIC_ERROR_FILE-none} ${TORCHELASTIC_ERROR_FILE-none}; test "$AIOELASTIC_ATTEMPT" = 1'
    workers = [sh(script, user="nobody"), sh('test -n "$AIOELASTIC_ERROR_FILE"', user=os.getuid())]
    result = await supervise(workers, logs=QUIET, restart=Restart.on_failure(max=1), **how)
    (earlier,) = result[0].earlier
    assert [str(one.stdout) for one in (earlier, result[0])] == ["none none\n"] * 2


@as_root
async def test_a_program_that_a_user_may_not_run(how: Any, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with pytest.raises(GroupFailed, match=r"could not start as user 'nobody': Permission denied: '.*program'"):
        await supervise(Command(program, user="nobody"), logs=QUIET, **how)


@as_root
async def test_what_a_user_has_of_its_streams(how: Any) -> None:
    """They are its own: it can open them by their names, and a terminal, too. It is stopped like any other."""
    script = "echo out > /dev/stdout; echo err > /dev/stderr; exec sleep 1000"
    reads = sh("cat < /dev/stdin", user="nobody", stdin="pipe")
    workers = [sh(script, user="nobody"), sh(script, user="nobody", tty=True), reads]
    async with Group(workers, logs=QUIET, check=False, **how) as group:
        group[2].stdin.close()
        lines = [line async for line in _some(group, 4)]
        pids = [group[rank].pid for rank in (0, 1)]
        result = await group.stop()
    assert sorted((line.rank, line.text) for line in lines) == [(0, "err"), (0, "out"), (1, "err"), (1, "out")]
    assert [one.exit.signal for one in result if one.exit][:2] == [signal.SIGTERM] * 2
    for pid in pids:
        assert pid is not None
        await gone(pid)


async def _some(group: Group, count: int) -> Any:
    async for line in group.lines():
        yield line
        count -= 1
        if not count:
            return


async def test_a_user_that_this_program_is_already(how: Any) -> None:
    """No right is needed for that."""
    same = {"user": os.getuid(), "group": os.getgid(), "extra_groups": os.getgroups()}
    result = await supervise(sh(WHO, **same), logs=QUIET, **how)
    assert numbers(result[0].stdout) == told(os.getuid(), os.getgid(), os.getgroups())


REFUSED = """
import asyncio, os, sys
from aioelastic import Command, Group, Logs, SpecError, supervise
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
other = os.getuid() + 1
for given in ({"user": other, "group": other}, {"user": other, "group": os.getgid()}, {"extra_groups": [other]}):
    workers = [Command("echo", "started"), Command("true", **given)]
    try:
        asyncio.run(supervise(workers, logs=Logs(), launcher=sys.argv[1]))
    except SpecError as exc:
        print(exc.field, exc.value, "CAP_SETUID" in exc.remedy)
"""


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
def test_a_user_without_the_right(launcher: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REFUSED, launcher], cwd="/", capture_output=True, text=True, timeout=150
    )
    other = (os.getuid() or 54321) + 1
    fields = [("user", other), ("user", other), ("extra_groups", f"({other},)")]
    assert ran.stdout == "".join(f"{field} of rank 1 {value} True\n" for field, value in fields)
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("given", "field", "problem"),
    [
        ({"user": "no-such-user"}, "user of rank 0", "is no user here"),
        ({"group": "no-such-group"}, "group of rank 0", "is no group here"),
        ({"extra_groups": ["no-such-group"]}, "extra_groups of rank 0", "is no group here"),
        ({"user": 4_000_000_000}, "user of rank 0", "nobody knows its group"),
    ],
)
async def test_who_is_not_known_here(given: Any, field: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as caught:
        await supervise(sh("true", **given), logs=QUIET)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"user": ""}, "user"),
        ({"user": True}, "user"),
        ({"user": 2**32}, "user"),
        ({"group": 1.5}, "group"),
        ({"extra_groups": "users"}, "extra_groups"),
        ({"extra_groups": [-1]}, "extra_groups"),
        ({"umask": 0o1000}, "umask"),
        ({"umask": "022"}, "umask"),
    ],
)
def test_what_is_no_user(given: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Command("true", **given)
    assert caught.value.field == field


def test_a_umask_is_told_in_octal() -> None:
    with pytest.raises(SpecError, match="umask='0o1777' is no umask; give 0 to 0o777"):
        Command("true", umask=0o1777)


# --- secrets ---

READ = """
import os, fcntl
path = os.environ["TOKEN_FILE"]
print(open(path).read(), open(path).read(), "TOKEN" in os.environ)
try:
    os.open(path, os.O_RDWR)
except PermissionError:
    print("no write")
else:
    fd = int(path.rpartition("/")[2])
    try:
        os.write(fd, b"x")
    except PermissionError:
        print("no write")
print(fcntl.fcntl(int(path.rpartition("/")[2]), fcntl.F_GET_SEALS) & 15)
"""


async def test_a_secret_is_read_by_its_path(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "inherited")
    result = await supervise(py(READ, secrets={"TOKEN": "s3cret"}), n=2, logs=QUIET, **how)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    for one in result:
        assert str(one.stdout) == f"s3cret s3cret False\nno write\n{seals}\n"


async def test_secrets_beside_descriptors_and_of_each_worker_its_own(how: Any, tmp_path: Path) -> None:
    def worker(rank: int) -> Command:
        return py(OPEN, secrets={"A": f"a{rank}", "B": b"\0\xff"}, pass_fds=[120])

    with numbered(tmp_path, 120):
        result = await supervise(worker, n=2, logs=QUIET, **how)
    memory = "/memfd:secret (deleted)"
    expected = f"20 {memory}\n21 {memory}\n120 {tmp_path}/120\n"
    assert [str(one.stdout) for one in result] == [expected] * 2
    result = await supervise(lambda rank: sh("cat $A_FILE", secrets={"A": f"a{rank}"}), n=2, logs=QUIET, **how)
    assert [str(one.stdout) for one in result] == ["a0", "a1"]


@as_root
async def test_a_secret_of_another_user(how: Any) -> None:
    result = await supervise(sh("cat $A_FILE", secrets={"A": "hers"}, user="nobody"), logs=QUIET, **how)
    assert str(result[0].stdout) == "hers"


def test_numbers_that_are_passed_are_no_secrets() -> None:
    (worker,) = plan(GroupSpec.of(sh("true", secrets={"A": "a", "B": "b", "C": "c"}, pass_fds=[21, 20, 24]))).workers
    assert worker.secret_numbers == {"A": 22, "B": 23, "C": 25}
    assert worker.overlay["C_FILE"] == "/proc/self/fd/25"


async def test_a_path_of_our_own_secret_is_no_other_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """We are a worker with a secret ourselves: what we start does not find one of its own by the name of ours."""
    monkeypatch.setenv("OURS_FILE", "/proc/self/fd/20")
    monkeypatch.setenv("INPUT_FILE", "/proc/self/fd/0")
    script = "echo ${OURS_FILE-none} $INPUT_FILE"
    workers = [sh(script, secrets={"THEIRS": "theirs"}), sh(script, env={"OURS_FILE": "given"})]
    result = await supervise(workers, logs=QUIET)
    assert [str(one.stdout) for one in result] == ["none /proc/self/fd/0\n", "given /proc/self/fd/0\n"]
    passed = plan(GroupSpec.of(sh(script, pass_fds=[20])), environ=dict(os.environ))
    assert "OURS_FILE" not in passed.workers[0].overlay
    function = plan(GroupSpec.of(Function(print)), environ=dict(os.environ))
    assert function.workers[0].overlay["OURS_FILE"] is None


async def test_a_later_attempt_has_them_again(how: Any) -> None:
    worker = sh('cat $A_FILE; cat /dev/fd/20; test "$AIOELASTIC_ATTEMPT" = 1', secrets={"A": "again"})
    result = await supervise(worker, logs=QUIET, restart=Restart.on_failure(max=1), **how)
    assert str(result[0].stdout) == "againagain"


async def test_a_secret_is_nowhere_to_be_seen(tmp_path: Path) -> None:
    value = "c0rrect-h0rse"
    command = sh("exec sleep 1000", secrets={"TOKEN": value, "LONG": value.encode() * 1000})
    spec = GroupSpec.of(command)
    planned = plan(spec)
    for text in (
        repr(command),
        repr(spec),
        repr(planned),
        str(planned),
        shown(command),
        shown(planned.workers[0], 9999),
    ):
        assert value not in text
    assert "secret: TOKEN, descriptor 20" in str(planned)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(command)
    async with Group(command, logs=QUIET) as group:
        for pid in (group[0].pid, psutil.Process(group[0].pid).ppid()):
            for name in ("environ", "cmdline"):
                assert value.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert value not in repr(group)
        result = await group.stop()
    assert value not in repr(result)


def test_a_command_without_secrets_can_be_pickled() -> None:
    command = Command("true", pass_fds=[7], user="nobody", umask=0)
    assert pickle.loads(pickle.dumps(command)) == command


@pytest.mark.parametrize(
    ("secrets", "env", "field"),
    [
        ("hunter2", {}, "secrets"),
        ({"": "hunter2"}, {}, "secrets key"),
        ({"A=B": "hunter2"}, {}, "secrets key"),
        ({"A": None}, {}, "secrets['A']"),
        ({"A": 1234567}, {}, "secrets['A']"),
        ({"A": "hunter2\ud800"}, {}, "secrets['A']"),
        ({"A": "x", "A_FILE": "hunter2"}, {}, "secrets['A_FILE']"),
        ({"AIOELASTIC_LINEAGE": "hunter2"}, {}, "secrets['AIOELASTIC_LINEAGE']"),
        ({"A": "x"}, {"A": "hunter2"}, "env['A']"),
        ({"A": "x"}, {"A_FILE": "hunter2"}, "env['A_FILE']"),
        ({"A": "hunter2"}, {"URL": "db://me:hunter2@host"}, "env['URL']"),
        ({"B": "other", "A": b"hunter2"}, {"OTHER": None, "PIN": "hunter2"}, "env['PIN']"),
        ({"PIN": "1234567\n"}, {"CODE": "1234567"}, "env['CODE']"),
    ],
)
def test_what_is_no_secret_is_told_without_its_value(secrets: Any, env: Any, field: str) -> None:
    for make in (
        lambda: Command("true", secrets=secrets, env=env),
        lambda: GroupSpec.of(Command("true", secrets=secrets), env=env),
    ):
        with pytest.raises(SpecError) as caught:
            make()
        assert caught.value.field == field
        assert "hunter2" not in str(caught.value)
        assert "1234567" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Command("serve", "--port", "--token=hunter2", secrets={"A": "hunter2"}), "argv[2]"),
        (lambda: Command("sh", "-c", "login hunter2", secrets={"A": "hunter2\n"}), "argv[2]"),
        (lambda: Command("serve", "abc", secrets={"A": b"abc"}), "argv[1]"),
        (lambda: Command("serve", "p\udcffssw\udcff", secrets={"A": b"p\xffssw\xff"}), "argv[1]"),
        (lambda: Command("serve", name="hunter2", secrets={"A": "hunter2"}), "name"),
        (lambda: Command("serve", cwd="/srv/hunter2", secrets={"A": "hunter2"}), "cwd"),
        (lambda: GroupSpec.of(Command("serve", secrets={"A": "hunter2"}), name="hunter2"), "name"),
    ],
)
def test_a_secret_that_stands_where_all_see_it_is_told(make: Any, field: str) -> None:
    with pytest.raises(SpecError, match=r"has the value of the secret 'A'; .*A_FILE") as caught:
        make()
    assert (caught.value.field, caught.value.value) == (field, "****")
    assert "hunter2" not in str(caught.value)


def test_a_short_secret_may_be_part_of_a_word() -> None:
    command = Command("serve", "--all", env={"A": None, "PATH": "/a/b"}, secrets={"A": "a", "EMPTY": ""})
    assert GroupSpec.of(command, name="data").entries


@dataclass
class Login:
    user: str
    password: str


def test_values_of_secret_names_are_shown_nowhere_in_short_forms() -> None:
    """Nor as arguments of functions, which travel in a message, and stand in no command line."""
    command = Command("true", env={"API_TOKEN": "hunter2", "LR": "1"})
    assert "hunter2" not in shown(command, 9999)
    assert "'LR': '1'" in shown(command, 9999)
    assert shown(Login("me", "hunter2")) == "Login(user='me', password=****)"
    function = Function(print, {"db_password": "hunter2", "port": 5432}, token=b"hunter2", end="")
    planned = str(plan(GroupSpec.of(function)))
    for text in (planned, repr(plan(GroupSpec.of(function))), repr(GroupSpec.of(function)), shown(function, 9999)):
        assert "hunter2" not in text
    assert repr(function) == "<Function print({'db_password': ****, 'port': 5432}, token=****, end='')>"
    assert "print({'db_password': ****, 'port': 5432}, token=****, end='')" in planned
