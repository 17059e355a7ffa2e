"""What only the machine can tell: programs, directories, limits. One clear error, and nothing started or left."""

from __future__ import annotations

import json
import os
import platform
import pwd
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, sh

from aioelastic import Command, Function, Group, GroupFailed, Logs, Match, Placement, SpecError, Std, supervise
from aioelastic.events import Event, Spawned
from aioelastic.model.group_spec import GroupSpec
from aioelastic.planning import _machine_checks

# Runs one group and prints what came of it: for limits and users that would hurt the test process itself.
ALONE = """
import asyncio, json, os, resource, sys, traceback
import psutil, uvloop, aioelastic.supervisor.group, aioelastic.streams
from aioelastic import Command, Group, Logs, SpecError, Std
given = json.loads(sys.argv[1])
for name, limit in given.get("limits", {}).items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
if "uid" in given:
    os.setgroups([])
    os.setresgid(given["uid"], given["uid"], given["uid"])
    os.setresuid(given["uid"], given["uid"], given["uid"])
started = []

async def main():
    entry = Command(*given["argv"], cwd=given.get("cwd"), env=given.get("env"))
    logs = Logs(dir=given.get("dir"), tee=Std.NONE)
    on_event = lambda event: started.append(type(event).__name__)
    async with Group(entry, given["n"], logs=logs, check=False, on_event=on_event) as group:
        if not given.get("leave"):
            return await group.wait()
    return await group.wait()

try:
    result = asyncio.run(main())
except SpecError as exc:
    out = {"field": exc.field, "value": exc.value, "problem": exc.problem, "remedy": exc.remedy}
else:
    out = {"codes": [one.exit and one.exit.code for one in result], "causes": [f.cause for f in result.failures]}
print(json.dumps({**out, "spawned": started.count("Spawned")}))
"""


def alone(**given: Any) -> dict[str, Any]:
    """A limit that bites must not hang us: hence the bound."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps({"argv": ["/bin/true"], "n": 1, **given})],
        capture_output=True,
        text=True,
        timeout=150,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All temporary directories of the group are made here, and none may remain."""
    home = tmp_path / "temporary"
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield home
    monkeypatch.undo()
    tempfile.tempdir = None
    assert os.listdir(home) == []


async def refused(entry: Any, n: int | None = None, **more: Any) -> SpecError:
    """It is refused by `supervise` and by `Group`, with the same words, and no event ever tells of a start."""
    events: list[Event] = []
    with pytest.raises(SpecError) as caught:
        await supervise(entry, n, **{"logs": QUIET, **more}, on_event=events.append)
    with pytest.raises(SpecError) as again:
        async with Group(entry, n, **{"logs": QUIET, **more}, on_event=events.append):
            pass
    assert events == []
    assert caught.value.field == again.value.field
    assert caught.value.problem
    assert caught.value.remedy
    return caught.value


def program(path: Path, content: bytes, mode: int = 0o755) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


# --- programs ---


async def test_not_found() -> None:
    error = await refused(lambda rank: sh("exit 0") if rank < 2 else Command("no-such-program-here"), 4)
    assert error.field == "program of rank 2"
    assert error.value == "no-such-program-here"
    assert "PATH" in error.problem


async def test_not_found_as_a_path(tmp_path: Path) -> None:
    error = await refused(Command(tmp_path / "nothing"))
    assert (error.field, error.value) == ("program of rank 0", str(tmp_path / "nothing"))
    assert "No such file" in error.problem


async def test_python_without_a_number_is_a_common_slip(tmp_path: Path) -> None:
    assert sys.executable in (await refused(Command("python", env={"PATH": str(tmp_path)}))).remedy


async def test_the_workers_own_path_counts(tmp_path: Path) -> None:
    program(tmp_path / "tool", b"#!/bin/sh\necho found\n")
    await refused(Command("tool"))
    result = await supervise(Command("tool", env={"PATH": f"{tmp_path}:/usr/bin:/bin"}), logs=QUIET)
    assert str(result[0].stdout) == "found\n"
    await refused(Command("sh", env={"PATH": str(tmp_path)}))
    await refused(Command("sh", env={"PATH": ""}))


async def test_a_relative_program_is_taken_where_the_worker_starts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    program(tmp_path / "sub" / "tool", b"#!/bin/sh\necho found\n")
    result = await supervise(Command("./tool", cwd=tmp_path / "sub"), logs=QUIET)
    assert str(result[0].stdout) == "found\n"
    error = await refused(Command("./tool", cwd=tmp_path))
    assert error.field == "program of rank 0"


async def test_a_relative_path_entry_is_taken_where_the_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """execvp(3) resolves it after the chdir(2): found here and not there is not found."""
    for name in ("here", "there"):
        (tmp_path / name / "bin").mkdir(parents=True)
    program(tmp_path / "there" / "bin" / "tool", b"#!/bin/sh\necho there\n")
    monkeypatch.chdir(tmp_path / "here")
    entry = Command("tool", cwd=tmp_path / "there", env={"PATH": "bin:/usr/bin:/bin"})
    result = await supervise(entry, logs=QUIET)
    assert str(result[0].stdout) == "there\n"
    monkeypatch.chdir(tmp_path / "there")
    await refused(Command("tool", cwd=tmp_path / "here", env={"PATH": "bin:/usr/bin:/bin"}))


async def test_a_directory(tmp_path: Path) -> None:
    error = await refused(Command(tmp_path))
    assert "is a directory" in error.problem


async def test_not_executable(tmp_path: Path) -> None:
    error = await refused(Command(program(tmp_path / "script.sh", b"#!/bin/sh\n", 0o644)))
    assert "not executable" in error.problem
    assert "chmod +x" in error.remedy


@pytest.mark.parametrize("by_path", [False, True])
def test_a_fifo_is_no_program_and_never_waited_for(tmp_path: Path, by_path: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo").chmod(0o755)
    more = {"argv": ["fifo"], "env": {"PATH": str(tmp_path)}} if by_path else {"argv": [str(tmp_path / "fifo")]}
    out = alone(**more)
    assert out["field"] == "program of rank 0"
    assert out["spawned"] == 0


def _elf(machine: int) -> bytes:
    order = "<" if sys.byteorder == "little" else ">"
    head = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    return (head + struct.pack(order + "HH", 2, machine)).ljust(64, b"\0")


@pytest.mark.skipif(
    platform.machine() not in _machine_checks._MACHINES, reason="not a machine we know by its ELF number"
)
async def test_a_program_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine_checks, "_binfmt", lambda: False)
    mine = _machine_checks._MACHINES[platform.machine()]
    other = next(one for one in (183, 62) if one != mine)
    error = await refused(Command(program(tmp_path / "prog", _elf(other))))
    assert error.field == "program of rank 0"
    assert f"another machine (ELF machine {other})" in error.problem


async def test_a_program_for_this_machine_that_is_broken(tmp_path: Path) -> None:
    """Only the kernel can tell; it says so for rank 0, and nothing was started."""
    mine = _machine_checks._MACHINES.get(platform.machine(), 0)
    events: list[Event] = []
    with pytest.raises(GroupFailed) as caught:
        await supervise(Command(program(tmp_path / "prog", _elf(mine))), 3, logs=QUIET, on_event=events.append)
    failure = caught.value.result.failures[0]
    assert "Exec format error" in failure.cause
    assert str(tmp_path / "prog") in failure.describe()
    assert failure.status == 126
    assert not [one for one in events if isinstance(one, Spawned)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"#!/no/such/interpreter -x\n", "/no/such/interpreter"),
        (b"#!\n", "interpreter"),
        (b"#! \n", "interpreter"),
        (b"#!/bin/sh\r\necho hi\r\n", "interpreter"),  # saved on Windows: the kernel looks for "/bin/sh\r"
        (b"echo hi\n", "#! line"),
        (b"", "is empty"),
        (b"\x7fELF", "neither"),
        (b"\x00\x01\x02", "neither"),
    ],
)
async def test_text_that_the_kernel_cannot_run(
    tmp_path: Path, content: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_machine_checks, "_binfmt", lambda: False)
    error = await refused(Command(program(tmp_path / "script", content)))
    assert error.field == "program of rank 0"
    assert told in error.problem


@pytest.mark.parametrize("kind", ["directory", "not executable"])
async def test_an_interpreter_that_cannot_run(tmp_path: Path, kind: str) -> None:
    interpreter = tmp_path / "interpreter"
    if kind == "directory":
        interpreter.mkdir()
    else:
        program(interpreter, b"#!/bin/sh\n", 0o644)
    error = await refused(Command(program(tmp_path / "script", f"#!{interpreter}\n".encode())))
    assert error.field == "program of rank 0"
    assert str(interpreter) in error.problem


# --- directories ---


async def test_cwd(tmp_path: Path) -> None:
    error = await refused([sh("exit 0"), Command("/bin/true", cwd=tmp_path / "no")])
    assert (error.field, error.value) == ("cwd of rank 1", str(tmp_path / "no"))
    assert "does not exist" in error.problem
    (tmp_path / "file").touch()
    assert "is not a directory" in (await refused(Command("/bin/true", cwd=tmp_path / "file"))).problem


async def test_log_dir_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        error = await refused(sh("exit 0"), 2, logs=Logs(dir=where, tee=Std.NONE))
        assert (error.field, error.value) == ("Logs.dir", str(where))
        assert "file" in error.problem
        assert "directory" in error.remedy
    assert (tmp_path / "file").read_text() == "mine"


async def test_a_refused_run_leaves_no_directory(tmp_path: Path) -> None:
    """Neither when the program is missing, nor when the last file of a tree cannot be made."""
    logs = Logs(dir=tmp_path / "new" / "runs", tee=Std.NONE)
    await refused(Command("no-such-program-here"), logs=logs)
    assert not (tmp_path / "new").exists()
    long = Logs(dir=tmp_path / "new" / "runs", tee=Std.NONE, match=Match("a", file="x" * 300))
    assert "too long" in (await refused(sh("exit 0"), logs=long)).problem
    assert not (tmp_path / "new").exists()


async def test_a_refused_run_leaves_the_callers_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").touch()
    long = Logs(dir=tmp_path / "runs", tee=Std.NONE, match=Match("a", file="x" * 300))
    await refused(sh("exit 0"), logs=long)
    assert os.listdir(tmp_path / "runs") == ["mine"]


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def _nobody() -> int:
    return pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def shared(temporary: Path) -> Iterator[Path]:
    """A directory that another user can reach (pytest's own are private)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@root_only
def test_log_dir_of_another_user(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    out = alone(uid=_nobody(), dir=str(shared / "runs"), n=2)
    assert (out["field"], out["value"]) == ("Logs.dir", str(shared / "runs"))
    assert "may not be written" in out["problem"]
    assert "permissions" in out["remedy"]
    assert out["spawned"] == 0
    assert os.listdir(shared) == []


@root_only
def test_cwd_that_may_not_be_entered(shared: Path) -> None:
    (shared / "private").mkdir(mode=0o700)
    out = alone(uid=_nobody(), cwd=str(shared / "private"))
    assert out["field"] == "cwd of rank 0"
    assert "may not be entered" in out["problem"]
    assert out["spawned"] == 0


@root_only
def test_program_of_another_user(shared: Path) -> None:
    program(shared / "tool", b"#!/bin/sh\n", 0o744)
    out = alone(uid=_nobody(), argv=[str(shared / "tool")])
    assert out["field"] == "program of rank 0"
    assert "not executable by this user" in out["problem"]
    assert out["spawned"] == 0


def _mounted(tmp_path: Path, *options: str) -> Path:
    where = tmp_path / "mounted"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(where)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    return where


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    places: list[Path] = []

    def mount(*options: str) -> Path:
        places.append(_mounted(tmp_path, *options))
        return places[-1]

    yield mount
    for one in places:
        subprocess.run(["umount", str(one)], check=True)


async def test_log_dir_on_a_full_disk(mounted: Callable[..., Path]) -> None:
    disk = mounted("-o", "size=8k")
    (disk / "full").write_bytes(bytes(8192))
    error = await refused(sh("exit 0"), 2, logs=Logs(dir=disk / "runs", tee=Std.NONE))
    assert (error.field, error.value) == ("Logs.dir", str(disk / "runs"))
    assert "full disk" in error.problem
    assert "make room" in error.remedy
    assert os.listdir(disk) == ["full"]


async def test_log_dir_on_a_disk_without_inodes(mounted: Callable[..., Path]) -> None:
    disk = mounted("-o", "nr_inodes=5")
    error = await refused(sh("exit 0"), 8, logs=Logs(dir=disk / "runs", tee=Std.NONE))
    assert "full disk" in error.problem
    assert os.listdir(disk) == []


async def test_log_dir_on_a_read_only_file_system(mounted: Callable[..., Path]) -> None:
    error = await refused(sh("exit 0"), logs=Logs(dir=mounted("-o", "ro") / "runs", tee=Std.NONE))
    assert "read-only" in error.problem


def test_log_files_that_may_not_grow(tmp_path: Path) -> None:
    out = alone(limits={"RLIMIT_FSIZE": 0}, dir=str(tmp_path / "runs"))
    assert out["field"] == "Logs.dir"
    assert "RLIMIT_FSIZE" in out["problem"]
    assert out["spawned"] == 0
    assert not (tmp_path / "runs").exists()


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    """`rm -r` of the directory in which a shell stands: a relative log directory has no place then."""
    gone = tmp_path / "gone"
    gone.mkdir()
    # Python 3.13.0 itself cannot import asyncio there
    code = f"import asyncio, os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n" + ALONE
    given = json.dumps({"argv": ["/bin/true"], "n": 1, "dir": "runs"})
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["field"] == "Logs.dir"
    assert out["spawned"] == 0


# --- limits ---


@pytest.mark.parametrize("saved", [False, True])
def test_more_workers_than_file_descriptors(tmp_path: Path, saved: bool) -> None:
    """It says how many fit; that many then do run, and one more is refused again."""
    more = {"dir": str(tmp_path / "runs")} if saved else {}
    limits = {"RLIMIT_NOFILE": 128}
    out = alone(limits=limits, n=1000, **more)
    assert (out["field"], out["value"]) == ("n", 1000)
    assert "file descriptors" in out["problem"]
    assert "ulimit -n" in out["remedy"]
    assert out["spawned"] == 0
    assert not (tmp_path / "runs").exists()
    fit = int(out["remedy"].split()[0])
    assert 5 < fit < 64
    assert alone(limits=limits, n=fit, **more)["codes"] == [0] * fit
    assert alone(limits=limits, n=fit + 1, **more)["spawned"] == 0


def test_the_channel_of_a_function_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three descriptors for a command, four for a function."""
    room = len(os.listdir("/proc/self/fd")) + _machine_checks._SLACK + 3 * 10
    monkeypatch.setattr(_machine_checks.resource, "getrlimit", lambda which: (room, room))
    _machine_checks.check_limits(GroupSpec.of(sh("exit 0"), 10))
    with pytest.raises(SpecError, match="7 workers fit"):
        _machine_checks.check_limits(GroupSpec.of(Function(os.getpid), 10))


@pytest.mark.parametrize(
    ("how", "each"),
    [
        ({"stdin": "pipe"}, 4),
        ({"input": "x"}, 4),
        ({"input": Path("/etc/passwd")}, 3),
        ({"stdin": "inherit"}, 3),
        ({"stderr": "stdout"}, 2),
        ({"stdin": "pipe", "stderr": "stdout"}, 3),
        ({"tty": True}, 3),
    ],
)
def test_the_streams_of_a_command_count(how: Any, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    room = len(os.listdir("/proc/self/fd")) + _machine_checks._SLACK + each * 10
    monkeypatch.setattr(_machine_checks.resource, "getrlimit", lambda which: (room, room))
    _machine_checks.check_limits(GroupSpec.of(Command("true", **how), 10))
    with pytest.raises(SpecError, match="10 workers fit"):
        _machine_checks.check_limits(GroupSpec.of(Command("true", **how), 11))


def test_merged_files_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """One descriptor each, however many workers there are."""
    room = len(os.listdir("/proc/self/fd")) + _machine_checks._SLACK + 3 * 10
    monkeypatch.setattr(_machine_checks.resource, "getrlimit", lambda which: (room, room))
    match = [Match(file=f"{one}.log") for one in "abc"]
    with pytest.raises(SpecError, match="9 workers fit"):
        _machine_checks.check_limits(GroupSpec.of(sh("exit 0"), 10, logs=Logs(dir="runs", save=Std.NONE, match=match)))


def test_no_room_at_all() -> None:
    out = alone(limits={"RLIMIT_NOFILE": 20})
    assert out["field"] == "n"
    assert out["remedy"].startswith("0 workers fit")


@root_only
def test_more_workers_than_processes(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    uid = 54_399  # no other test has it, so the count is only ours
    limits = {"RLIMIT_NPROC": 40}
    out = alone(uid=uid, limits=limits, n=500)
    assert (out["field"], out["value"]) == ("n", 500)
    assert "RLIMIT_NPROC (40)" in out["problem"]
    assert "ulimit -u" in out["remedy"]
    assert out["spawned"] == 0
    fit = int(out["remedy"].split()[0])
    assert 20 < fit < 40
    # all of them at once, with the group's own threads beside them
    ran = alone(uid=uid, limits=limits, n=fit, argv=["/bin/sleep", "1000"], leave=True)
    assert (ran["spawned"], ran["causes"]) == (fit, [])
    assert alone(uid=uid, limits=limits, n=fit + 1)["spawned"] == 0


def test_save_by_rank_counts_every_ranks_files(tmp_path: Path) -> None:
    """Rank 0 alone saves nothing; the others' files need descriptors all the same."""
    code = """
import asyncio, resource, sys
import aioelastic.supervisor.group, uvloop
from aioelastic import Command, Logs, SpecError, Std, supervise
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
n = 30
logs = Logs(dir=sys.argv[1], tee=Std.NONE, save={rank: Std.ALL for rank in range(1, n)})
try:
    asyncio.run(supervise(Command("/bin/true"), n, logs=logs))
except SpecError as exc:
    print(exc.field)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs")], capture_output=True, text=True, timeout=150
    )
    assert (done.stdout, done.stderr) == ("n\n", "")
    assert not (tmp_path / "runs").exists()


def test_the_room_of_a_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    from aioelastic.model.group_spec import GroupSpec

    monkeypatch.setattr(_machine_checks, "_pids_room", lambda: 3)
    with pytest.raises(SpecError, match=r"pids\.max") as caught:
        _machine_checks.check_limits(GroupSpec.of(Command("x"), 4))
    assert caught.value.remedy.startswith("3 workers fit")
    _machine_checks.check_limits(GroupSpec.of(Command("x"), 3))


# --- sizes ---

PAGES = 32 * resource.getpagesize()


@pytest.mark.parametrize("start", ["command", "spawn"])
@pytest.mark.parametrize("letter", ["x", "é", "\udcff"])
async def test_an_argument_or_a_variable_that_is_too_long(start: str, letter: str) -> None:
    """By the bytes that the system counts, to the last one."""
    most = (PAGES - 1) // len(os.fsencode(letter))
    too_long = letter * (most + 1)

    def entry(**more: Any) -> Any:
        return Command("true", **more) if start == "command" else Function(os.getpid).options(**more)

    how: Any = "zygote" if start == "command" else "spawn"
    with pytest.raises(SpecError, match=r"env\['LONG'\]=.* of rank 0 ") as caught:
        await supervise(entry(env={"LONG": too_long}), logs=QUIET, start=how)
    assert caught.value.status == 126
    assert len(str(caught.value)) < 500
    assert "file" in caught.value.remedy
    fits = letter * ((PAGES - len("LONG") - 2) // len(os.fsencode(letter)))
    assert (await supervise(entry(env={"LONG": fits}), logs=QUIET, start=how)).ok
    if start == "command":
        with pytest.raises(SpecError, match=r"argv\[2\]=.* of rank 0 "):
            await supervise(Command("true", "a", too_long), logs=QUIET)
        assert (await supervise(Command("true", "a", letter * most), logs=QUIET)).ok


async def test_a_secret_by_its_name_that_is_too_long_is_not_shown() -> None:
    with pytest.raises(SpecError, match=r"env\['DB_PASSWORD'\]='\*\*\*\*' of rank 0 has ") as caught:
        await supervise(Command("true", env={"DB_PASSWORD": "hunter2" * PAGES}), logs=QUIET)
    assert "hunter2" not in str(caught.value)


async def test_a_function_of_a_zygote_may_have_any_variable() -> None:
    """No execve(2) is in its way."""
    long = Function(os.environ.__getitem__, "LONG").options(env={"LONG": "x" * (PAGES + 1)})
    assert len((await supervise(Function(jobs.long).options(env=long.env), logs=QUIET))[0].value) == PAGES + 1


async def test_all_of_it_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it inherits too, and by the limit that it will have itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    many = ["x" * 100_000] * 70
    with pytest.raises(SpecError, match=r"argv and env=7,?[0-9,]+ of rank 0 are more bytes"):
        await supervise(Command("true", *many), logs=QUIET)
    for number in range(5):
        monkeypatch.setenv(f"INHERITED{number}", "x" * 100_000)
    small = Placement(limits={"STACK": 2**20})
    with pytest.raises(SpecError, match="this limit on the stack, 262,144; give less"):
        await supervise(Command("true"), logs=QUIET, placement=small)
    if soft == resource.RLIM_INFINITY or soft >= 8 * 2**20:
        assert (await supervise(Command("true"), logs=QUIET)).ok


async def test_what_only_the_system_knows_is_told_without_numbers(tmp_path: Path) -> None:
    """A name that is not UTF-8, and a program that it refuses."""
    mine = _machine_checks._MACHINES.get(platform.machine(), 0)
    path = program(tmp_path / os.fsdecode(b"pr\xffog"), _elf(mine))
    result = await supervise(Command(path), logs=QUIET, check=False)
    (failure,) = result.failures
    for text in (failure.cause, failure.headline, str(failure.why)):
        assert "Exec format error: '" in text
        assert "Errno" not in text
        assert "b'" not in text
        assert r"pr\udcffog" in text
