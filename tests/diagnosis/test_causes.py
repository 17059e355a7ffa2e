"""Causes of failures: real deaths of every kind that can be had here, and made-up facts for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, kill_and_see_it_dead, py, sh
from test_outcome import exit_with, failure_of

from aioelastic import (
    Cause,
    Command,
    Function,
    Group,
    Placement,
    Restart,
    Result,
    Stop,
    WorkerExecutor,
    WorkerFailed,
    supervise,
)
from aioelastic.diagnosis import Evidence, Facts, Kills, _evidence, cause_of
from aioelastic.diagnosis._evidence import core_glob, find_core, oom_kills, parse_record
from aioelastic.model.entries import Entry
from aioelastic.model.failures import ErrorReport
from aioelastic.processes.proc_files import caught_signals
from aioelastic.supervisor import resources


async def died(entry: Entry, **more: Any) -> Cause:
    """Why the only worker has failed."""
    result = await supervise(entry, logs=QUIET, check=False, **more)
    (failure,) = result.failures
    assert failure.why is not None
    assert result[0].why is failure.why
    return failure.why


# --- real deaths ---

KINDS: list[tuple[str, Entry, str]] = [
    ("exit_code", sh("exit 3"), "exit code 3"),
    ("exception", py("1/0"), "ZeroDivisionError: division by zero"),
    ("exception", py("x = bytearray(1 << 60)"), "MemoryError"),
    ("exception", Function(jobs.product, "a", "b"), "TypeError"),
    ("no_value", Function(os._exit, 0), "without returning"),
    ("exit_code", Function(os._exit, 3), "exit code 3"),
    ("exec_failed", sh("no-such-program"), "no-such-program: not found"),
    ("exec_failed", sh("/etc/passwd"), "Permission denied"),
    ("missing_library", py("import ctypes; ctypes.CDLL('libabsent.so.3')"), "libabsent.so.3"),
    ("fatal_error", py("import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)"), "in string_at"),
    ("fatal_error", py("1", env={"PYTHONHOME": "/nowhere"}), "encoding"),
    ("fatal_error", Function(os.abort), "Fatal Python error: Aborted"),
    ("crash", py("import ctypes; ctypes.string_at(0)"), "SIGSEGV"),
    ("crash", py("import os, sys; print('assertion failed', file=sys.stderr); os.abort()"), "assertion failed"),
    ("limit", sh("ulimit -f 0; echo x > big"), "RLIMIT_FSIZE"),
    ("limit", py("import os; os.kill(os.getpid(), 24)"), "RLIMIT_CPU"),
    (
        "broken_pipe",
        py("import os, signal; signal.signal(13, signal.SIG_DFL); r, w = os.pipe(); os.close(r); os.write(w, b'x')"),
        "nobody reads",
    ),
    ("foreign_signal", sh("kill -TERM $$"), "SIGTERM, which was not sent by us"),
    ("child_signal", sh("sh -c 'kill -TERM $$'; exit $?"), "a child of it was ended by SIGTERM"),
    ("child_signal", sh("sh -c 'kill -SEGV $$'; exit $?"), "Segmentation fault"),
]


@pytest.fixture
def nobody_else_dies(monkeypatch: pytest.MonkeyPatch) -> Kills:
    """Of lack of memory: the counters are those of the machine and of all that runs in our control group, other tests
    too. Returns what they are."""
    kills = oom_kills()
    monkeypatch.setattr(_evidence, "oom_kills", lambda: kills)
    return kills


@pytest.mark.usefixtures("nobody_else_dies")
@pytest.mark.parametrize(("kind", "entry", "told"), KINDS, ids=[f"{kind}-{told[:20]}" for kind, _, told in KINDS])
async def test_kinds(kind: str, entry: Entry, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    why = await died(entry)
    assert why.kind == kind
    assert told in str(why)
    assert "\n" not in str(why)


async def test_a_missing_shared_library(tmp_path: Path) -> None:
    """A real program, of which the loader is told to look for a library that there is not."""
    path = shutil.which("cat")
    assert path is not None
    data = Path(path).read_bytes()
    assert data.count(b"libc.so.6\0") == 1
    broken = tmp_path / "broken"
    broken.write_bytes(data.replace(b"libc.so.6\0", b"libq.so.6\0"))
    broken.chmod(0o755)
    why = await died(Command(str(broken)))
    assert why.kind == "missing_library"
    assert why.certain
    assert "libq.so.6" in why.evidence[0]


async def test_never_started(tmp_path: Path) -> None:
    from test_preflight import _elf, _machine_checks, program

    why = await died(Command(program(tmp_path / "prog", _elf(_machine_checks._MACHINES.get(os.uname().machine, 0)))))
    assert why.kind == "not_started"
    assert "Exec format error" in str(why)


async def test_sigkill_of_somebody_else(nobody_else_dies: Kills) -> None:
    async with Group(sh("echo up; exec sleep 1000"), logs=QUIET, check=False) as group:
        kill_and_see_it_dead(group[0].pid, signal.SIGKILL)
        result = await group.wait()
    why = result.failures[0].why
    assert why is not None
    assert why.kind == "foreign_signal"
    expected = "did not rise" if nobody_else_dies != Kills() else "is not known"
    assert expected in str(why)
    assert f"why: {why}" in result.failures[0].describe()


async def test_a_signal_that_the_program_sent_itself() -> None:
    async with Group(sh("echo up; exec sleep 1000"), logs=QUIET, check=False) as group:
        async for _ in group.lines():
            break
        assert group.send_signal(signal.SIGUSR1) == 1
        result = await group.wait()
    why = result.failures[0].why
    assert why is not None
    assert (why.kind, why.stage) == ("our_signal", "send_signal")
    assert "SIGUSR1" in str(why)


async def test_killed_with_its_zygote() -> None:
    result = await supervise(Function(jobs.kills_its_zygote), 2, logs=QUIET, check=False)
    assert {one.why.kind for one in result.failures if one.why} == {"parent_died"}
    assert "zygote" in str(result.failures[0].why)


def kernel_log_is_readable() -> bool:
    try:
        os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return os.stat("/proc/self/ns/pid").st_ino == _evidence.FIRST_PID_NAMESPACE


@pytest.mark.skipif(not kernel_log_is_readable(), reason="/dev/kmsg is not for this user, or its pids are not ours")
async def test_the_kernels_own_word_about_a_crash() -> None:
    for _ in range(200):  # ten crashes in five seconds, of the whole machine, are all that the kernel writes down
        why = await died(py("import ctypes; ctypes.string_at(0)"))
        if why.certain:
            break
    assert why.certain
    assert "kernel log: " in str(why)
    assert "segfault at 0 ip" in str(why)
    faked = await died(sh("kill -SEGV $$"))
    assert faked.kind == "crash"
    assert not faked.certain


async def test_where_the_core_dump_is(tmp_path: Path) -> None:
    """As this machine's core_pattern has it: a file, which is there, or to whom it was given."""
    why = await died(Command("/bin/sh", "-c", "ulimit -c unlimited; kill -SEGV $$", cwd=tmp_path))
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    assert why.kind == "crash"
    if pattern.startswith(("|", "@")):
        assert why.core is None
        assert "core dump" in str(why)
    else:
        assert why.core is not None
        assert why.core.read_bytes()[:4] == b"\x7fELF"
        assert f"core dump: {why.core}" in str(why)
        if "/" not in pattern:
            assert why.core.parent == tmp_path
        why.core.unlink()


# --- how far we went ---


async def stopped(script: str, stop: Stop, act: Callable[[Group], None]) -> Result:
    async with Group(sh(script), logs=QUIET, stop=stop) as group:
        async for _ in group.lines():
            break
        act(group)
        result = await group.wait()
    assert result[0].failure is None
    return result[0]


DEAF = "trap '' TERM; echo up; exec sleep 1000"


async def test_stages() -> None:
    begin = Group.begin_stop

    def twice(group: Group) -> None:
        group.begin_stop()
        group.hurry()

    cases = [
        ("echo up; exec sleep 1000", Stop(), begin, "asked", "ended with SIGTERM"),
        ("trap 'exit 4' TERM; echo up; while :; do :; done", Stop(), begin, "asked", "exit code 4"),
        ("trap : TERM; echo up; sleep 1000; exit 5", Stop(grace=0.05), begin, "group", "exit code 5"),
        (DEAF, Stop(grace=0.05, scope="leader"), begin, "grace_over", "we sent SIGKILL"),
        (DEAF, Stop(grace=1000), twice, "hurried", "cut short"),
        (DEAF, Stop(grace=0), begin, "at_once", "without a grace"),
    ]
    for script, stop, act, stage, told in cases:
        why = (await stopped(script, stop, act)).why
        assert why is not None
        assert (why.kind, why.stage) == ("our_signal", stage), script
        assert told in str(why)


@pytest.mark.usefixtures("nobody_else_dies")
async def test_a_sigkill_of_somebody_else_during_our_grace() -> None:
    def act(group: Group) -> None:
        group.begin_stop()
        kill_and_see_it_dead(group[0].pid, signal.SIGKILL)

    why = (await stopped(DEAF, Stop(grace=1000), act)).why
    assert why is not None
    assert why.stage == "asked"
    assert "SIGKILL, which was not ours" in str(why)


async def test_who_ended_well_has_no_cause() -> None:
    result = await supervise(sh("exit 0"), 2, logs=QUIET)
    assert [one.why for one in result] == [None, None]


async def test_the_others_of_a_failure_were_stopped_by_us() -> None:
    result = await supervise(lambda rank: sh("exit 9" if rank == 1 else "exec sleep 1000"), 3, logs=QUIET, check=False)
    assert [one.why.kind for one in result if one.why] == ["our_signal", "exit_code", "our_signal"]


# --- out of memory ---


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB."""
    base = Path("/sys/fs/cgroup")
    if (base / "memory").is_dir():
        home, limit = base / "memory", "memory.limit_in_bytes"
    else:
        home, limit = base, "memory.max"
    mine = home / f"aioelastic-test-{os.getpid()}"
    try:
        mine.mkdir()
    except OSError as exc:
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    try:
        try:
            (mine / limit).write_text(str(64 << 20))
            with contextlib.suppress(OSError):
                (mine / "memory.memsw.limit_in_bytes").write_text(str(64 << 20))
            with contextlib.suppress(OSError):
                (mine / "memory.swap.max").write_text("0")
        except OSError as exc:
            pytest.skip(f"no limit can be set on a memory cgroup here: {exc}")
        yield mine
    finally:
        mine.rmdir()


EATER = "import sys; open(sys.argv[1], 'w').write('0'); x = bytearray(1 << 28)"


async def test_out_of_memory(cgroup: Path) -> None:
    why = await died(Command(sys.executable, "-S", "-c", EATER, str(cgroup / "cgroup.procs")))
    assert why.kind == "out_of_memory"
    if kernel_log_is_readable():
        assert why.certain
        assert "Memory cgroup out of memory: Killed process" in str(why)


async def test_out_of_memory_where_the_kernels_log_is_not_to_be_read(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_evidence, "FIRST_PID_NAMESPACE", 0)
    # on the machine others die meanwhile, in other tests too; of this control group nobody else is
    monkeypatch.setattr(_evidence, "_cgroup_files", lambda: [cgroup / "memory.events", cgroup / "memory.oom_control"])
    if oom_kills().group is None:
        pytest.skip("this kernel counts no OOM kills where we may look")
    eater = Command(sys.executable, "-S", "-c", EATER, str(cgroup / "cgroup.procs"))
    result = await supervise(
        [eater, sh("exec sleep 1000")], logs=QUIET, check=False, restart=Restart.on_failure(max=1, scope="all")
    )
    (first,), (last,) = result[0].earlier, result.failures
    for one in (first, last):  # each attempt explains its own death
        assert one.why is not None
        assert (one.why.kind, one.why.certain) == ("out_of_memory", False)
        assert "its memory cgroup rose by 1 meanwhile" in str(one.why)


# --- the evidence, made up ---

KILLED = exit_with(signal=9)


def test_sigkill_and_counters() -> None:
    def why(exit: Any = KILLED, **more: Any) -> Cause:
        return cause_of(Facts(exit, found=Evidence(**more)))

    assert "whether memory ran out is not known" in str(why())
    assert why(kills=Kills(0, 0)).kind == "foreign_signal"
    mine = why(kills=Kills(2, 5))
    assert (mine.kind, mine.certain) == ("out_of_memory", False)
    assert "its memory cgroup rose by 2" in str(mine)
    assert "this machine rose by 1" in str(why(kills=Kills(0, 1)))
    sure = why(kernel=("Out of memory: Killed process 42 (python) total-vm:1kB",), kills=Kills(0, 0))
    assert (sure.kind, sure.certain) == ("out_of_memory", True)
    # a wrapper's word for a child of it
    assert why(exit_with(137), kills=Kills(1, 1)).kind == "out_of_memory"
    assert why(exit_with(137), kills=Kills(0, 0)).kind == "child_signal"
    # somebody else of the cgroup, a data loader say: worth a word, but another cause
    other = why(exit_with(1), kills=Kills(1, 1))
    assert other.kind == "exit_code"
    assert "killed 1 of its memory cgroup" in str(other)


async def test_the_counter_of_its_own_control_group(monkeypatch: Any, tmp_path: Path) -> None:
    """A directory that looks like one: the memory controller is seldom ours to turn on."""
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    made = types.SimpleNamespace(path=tmp_path, make=lambda *_: tmp_path, left=list, close=lambda: None)
    monkeypatch.setattr(resources, "ControlGroups", lambda *_: made)
    why = await died(sh("kill -9 $$"), placement=Placement(cgroup=True))
    assert (why.kind, why.certain) == ("out_of_memory", True)
    assert "its own control group is 1" in str(why)


def test_what_the_gpus_driver_said() -> None:
    xid = "NVRM: Xid (PCI:0000:3b:00): 31, pid=42, name=python, MMU Fault"
    for facts in (
        Facts(exit_with(1), raised="RuntimeError: CUDA error", found=Evidence(kernel=(xid,))),
        Facts(exit_with(signal=6), found=Evidence(kernel=(xid,))),
    ):
        assert f"kernel log: {xid}" in cause_of(facts).evidence
    crash = cause_of(Facts(exit_with(signal=11), found=Evidence(kernel=("python[42]: segfault at 0", xid))))
    assert crash.evidence[0] == "kernel log: python[42]: segfault at 0"


def test_ours_before_counters() -> None:
    why = cause_of(Facts(KILLED, sent=frozenset({9}), found=Evidence(kills=Kills(1, 1))))
    assert why.kind == "our_signal"


def test_nobody_knows() -> None:
    assert cause_of(Facts(exit_with())).kind == "unknown"


def test_a_report_counts_for_more_than_a_traceback() -> None:
    said = "Traceback (most recent call last):\n  File\nKeyError: 1\n"
    assert cause_of(Facts(exit_with(1), said=said)).evidence == ("KeyError: 1",)
    assert cause_of(Facts(exit_with(1), said=said, raised="ValueError: x")).evidence == ("ValueError: x",)
    assert not cause_of(Facts(exit_with(3), said=said)).certain
    # one that was caught and printed earlier, or the words of another program
    assert cause_of(Facts(exit_with(1), said="KeyError: 1\n")).kind == "exit_code"


def test_who_raised_and_was_killed_then_has_raised() -> None:
    ours = cause_of(Facts(exit_with(signal=9, stopped_by=9), raised="ValueError: x\nmore"))
    assert (ours.kind, ours.evidence) == ("exception", ("ValueError: x",))
    own = cause_of(Facts(exit_with(signal=6), raised="ValueError: x"))
    assert (own.kind, own.evidence) == ("exception", ("ValueError: x", "then it ended with SIGABRT"))


def test_a_fatal_error_of_a_child_that_made_it_raise() -> None:
    said = "Fatal Python error: Segmentation fault\nTraceback (most recent call last):\n  File\nOSError: lost it\n"
    assert cause_of(Facts(exit_with(1), said=said)).kind == "exception"
    assert cause_of(Facts(exit_with(signal=11), said=said)).kind == "fatal_error"


def test_evidence_is_cut() -> None:
    for facts in (
        Facts(exit_with(127), said="x" * 100_000 + ": not found"),
        Facts(exit_with(1), raised="y" * 100_000),
        Facts(exit_with(signal=6), said="z" * 100_000),
    ):
        assert len(str(cause_of(facts))) < 700


def test_a_library_that_a_program_can_do_without() -> None:
    said = "warning: libcuda.so: cannot open shared object file: No such file\n" + "more\n" * 5
    assert cause_of(Facts(exit_with(1), said=said)).kind == "exit_code"


def test_127_without_a_word() -> None:
    why = cause_of(Facts(exit_with(127)))
    assert (why.kind, why.certain) == ("exec_failed", False)
    assert str(why) == "probably its shell found no such program: exit code 127"


def test_codes_that_are_no_signal() -> None:
    for code in (128, 255, 128 + 70):
        assert cause_of(Facts(exit_with(code))).kind == "exit_code"


def test_the_line_in_a_failure() -> None:
    text = failure_of(why=Cause("crash", "crashed", ("a", "b"), certain=False)).describe()
    assert "\n  why: probably crashed: a; b\n" in text
    assert "why:" not in failure_of(why=Cause("exit_code", "ended by itself")).describe()


@pytest.mark.parametrize(
    ("record", "pid"),
    [
        (b"6,339,5140900,-;python[42]: segfault at 0 ip 00007f sp 00007f error 4 in libc.so.6[1,2+3]\n", 42),
        (b"6,1,5,-;traps: prog[43] trap invalid opcode ip:1 sp:2 error:0 in prog[1+2]\n", 43),
        (b"6,1,5,-;traps: a b[7]: x[44] general protection fault ip:1 sp:2\n", 44),
        (b"3,2,5,-;Out of memory: Killed process 45 (python) total-vm:1kB\n SUBSYSTEM=x\n", 45),
        (b"3,2,5,c;Memory cgroup out of memory: Killed process 46 (a (b) c) total-vm:1kB\n", 46),
        (b"3,9,5,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=51, name=python, Ch 00000008, intr 00000000. MMU Fault\n", 51),
        (
            b"3,9,5,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off.\n",
            None,
        ),
        (b"12,2,5,-;Out of memory: Killed process 47 (python), says a program\n", None),
        (b"6,1,5,-;usb 1-1: new device [48]\n", None),
        (b"nonsense", None),
        (b"", None),
        (b"x,y;Killed process 49 (x)", None),
    ],
)
def test_records_of_the_kernels_log(record: bytes, pid: int | None) -> None:
    assert parse_record(record)[0] == pid


@pytest.mark.parametrize(
    ("pattern", "uses_pid", "path"),
    [
        ("core", False, "core"),
        ("core", True, "core.42"),
        ("core.%p", True, "core.42"),
        ("/var/cores/%e-%p-%s-%t.core", False, "/var/cores/*-42-11-*.core"),
        ("a%%b%h", False, "a%bhost"),
        ("[x]%", False, "[[]x]*"),
    ],
)
def test_core_patterns(pattern: str, uses_pid: bool, path: str) -> None:
    assert core_glob(pattern, 42, 11, "host", uses_pid) == path


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("|/usr/lib/systemd/systemd-coredump %P %u", "coredumpctl info 42"),
        ("|/usr/share/apport/apport -p%p", "/usr/share/apport/apport, see /var/crash"),
        ("|", "given to ?"),
        ("@/run/coredump.sock", "the socket /run/coredump.sock"),
        ("core.%p", "core dump written as core.%p in its working directory, not found from here"),
    ],
)
def test_where_core_dumps_go(pattern: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evidence, "_text", lambda path: pattern if path.endswith("core_pattern") else "0")
    where, words = find_core(exit_with(signal=11, core_dumped=True), 42, str(tmp_path))
    assert where is None
    assert told in words


def test_an_old_core_dump_is_not_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evidence, "_text", lambda path: "core" if path.endswith("core_pattern") else "0")
    core = tmp_path / "core"
    core.touch()
    born = core.stat().st_mtime
    assert find_core(exit_with(signal=11, core_dumped=True, started_at=born), 42, str(tmp_path))[0] == core
    os.utime(core, (born - 100, born - 100))
    assert find_core(exit_with(signal=11, core_dumped=True, started_at=born), 42, str(tmp_path))[0] is None


@pytest.mark.parametrize(
    ("mine", "files", "kills"),
    [
        ("0::/a/b\n", {"cgroup/a/b/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 9\n"}, Kills(2, 7)),
        ("4:memory:/a\n0::/\n", {"cgroup/memory/a/memory.oom_control": "under_oom 0\noom_kill 4\n"}, Kills(4, 7)),
        ("4:cpu,memory:/host/x\n", {"cgroup/memory/memory.oom_control": "oom_kill 5\n"}, Kills(5, 7)),
        ("0::/\n", {}, Kills(None, 7)),
        ("", {}, Kills(None, 7)),
    ],
)
def test_counters(
    mine: str, files: dict[str, str], kills: Kills, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**files, "vmstat": "pgfault 1\noom_kill 7\n", "self": mine}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_evidence, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(_evidence, "VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(_evidence, "OWN", tmp_path / "self")
    assert oom_kills() == kills


async def test_one_rise_explains_one_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are killed by the kernel at once, and end one after the other; the third is somebody else's doing."""
    counters = iter([Kills(5, 9), *[Kills(7, 11)] * 9])
    monkeypatch.setattr(_evidence, "oom_kills", lambda: next(counters))
    monkeypatch.setattr(_evidence, "FIRST_PID_NAMESPACE", 0)
    async with Group(sh("exec sleep 1000"), 3, logs=QUIET, check=False, stop=Stop(grace=1000)) as group:
        for rank in (2, 0, 1):
            kill_and_see_it_dead(group[rank].pid, signal.SIGKILL)
        result = await group.wait()
    whys = {one.rank: one.why.kind for one in result.failures if one.why}
    assert whys == {2: "out_of_memory", 0: "out_of_memory", 1: "foreign_signal"}
    assert [one.rank for one in result.failures] == [2, 0, 1]


@pytest.mark.parametrize(
    ("pid", "script", "kind"),
    [
        (4_000_000, "exec sleep 1000", "foreign_signal"),
        (None, "exec sleep 1000", "out_of_memory"),
        (4_000_000, "sh -c 'kill -9 $$'; exit $?", "out_of_memory"),  # it may be the child
    ],
)
async def test_a_rise_that_the_log_explains_by_others(
    pid: int | None, script: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has killed somebody else's process meanwhile."""
    counters = iter([Kills(None, 9), *[Kills(None, 10)] * 9])
    monkeypatch.setattr(_evidence, "oom_kills", lambda: next(counters))
    monkeypatch.setattr(_evidence, "FIRST_PID_NAMESPACE", 0)
    log, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)  # each write(2) is a record
    if pid is not None:
        os.write(writer, b"3,1,5140900,-;Out of memory: Killed process %d (hog) total-vm:1kB, anon-rss:1kB" % pid)
    os.write(writer, b"6,2,5140901,-;eth0: link becomes ready")
    async with Group(sh(script), logs=QUIET, check=False) as group:
        group._supervisor.resources.collector._log = log  # which closes it
        if "sleep" in script:
            kill_and_see_it_dead(group[0].pid, signal.SIGKILL)
        result = await group.wait()
    os.close(writer)
    assert result.failures[0].why is not None
    assert result.failures[0].why.kind == kind


async def test_it_looks_once_before_and_then_only_after_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Kills] = []

    def look() -> Kills:
        looks.append(Kills(0, 0))
        return looks[-1]

    monkeypatch.setattr(_evidence, "oom_kills", look)
    await supervise(sh("exit 0"), 20, logs=QUIET)
    assert len(looks) == 1
    async with Group(sh("exec sleep 1000"), 2, logs=QUIET):
        await asyncio.sleep(0)
    assert len(looks) == 2  # what we stop is no failure


@pytest.mark.usefixtures("nobody_else_dies")
async def test_a_worker_of_an_executor() -> None:
    async with WorkerExecutor(1) as executor:
        future = executor.submit(jobs.dies, signal.SIGKILL)
        await asyncio.to_thread(wait, [future])
    error = future.exception()
    assert isinstance(error, WorkerFailed)
    assert error.failure.why is not None
    assert error.failure.why.kind == "foreign_signal"


def test_reports_are_evidence() -> None:
    assert Evidence(ErrorReport("m")).report == ErrorReport("m")


@pytest.mark.parametrize(
    ("line", "pid"),
    [
        (b"x[42]: trap [77]: segfault at 0 ip 00 sp 00 error 4", 77),
        (b"[42] trap x ip:[77] trap divide error ip:1 sp:2 error:0", 77),
        (rb"a\x0a[42]: \x1b[77]: segfault at 0 ip 00 sp 00 error 4", 77),
        (b"x[42]: trap  invoked oom-killer: gfp_mask=0x0, order=0", None),
        (b"x[1]: bad frame invoked oom-killer: gfp_mask=0x0", None),
        (b"[4] segfault at invoked oom-killer: gfp_mask=0x0", None),
        (b"Killed process  invoked oom-killer: gfp_mask=0x0", None),
        (b"oom-kill:constraint=X,task_memcg=/Killed process 42 (x),task=python,pid=77,uid=0", None),
        (b"python[77]: segfault at 0 ip 00 sp 00 error 4 in Killed process 42 (x[1+2]", 77),
        (b"audit: NVRM: Xid (PCI): 31, pid=42, name=x", None),
        (b"traps: python[77] trap divide error ip:1 sp:2 error:0 in x[42]: segfault at 0 [1+2]", 77),
        (b"prog[77]: unhandled signal 11 code 0x1 at 0x0", 77),
    ],
)
def test_a_name_forges_no_line_of_the_kernels_log(line: bytes, pid: int | None) -> None:
    """Names of processes, files and control groups are free; the kernel's words are not."""
    assert parse_record(b"6,1,5,-;" + line)[0] == pid


def test_a_name_is_no_word_of_the_kernels() -> None:
    crash = "x[42]: segfault at 0 ip 00 sp 00 error 4 in Killed process 42 (x[1+2]"
    why = cause_of(Facts(KILLED, found=Evidence(kernel=(crash,), kills=Kills(0, 0))))
    assert why.kind == "foreign_signal"


async def test_a_name_of_any_bytes_hides_no_handlers() -> None:
    """What /proc/<pid>/status begins with is the process's own choice."""
    code = (
        "import ctypes, signal\nsignal.signal(signal.SIGUSR1, print)\n"
        "ctypes.CDLL(None).prctl(15, b'\\rSigCgt:\\t\\xff')\nprint('up', flush=True)\nsignal.pause()"
    )
    async with Group(py(code), logs=QUIET) as group:
        async for _ in group.lines():
            break
        assert group[0].pid is not None
        assert signal.SIGUSR1 in caught_signals(group[0].pid)
        await group.stop()
