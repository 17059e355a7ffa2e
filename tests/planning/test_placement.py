"""Where workers run: CPUs, memory, GPUs, limits, control groups."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fake_gpu
import jobs
import psutil
import pytest
from helpers import QUIET, alive, event_of, kill_and_see_it_dead, needs, py, sh
from test_executor import Gate
from test_platforms import a_plain_user
from test_proof import NOBODYS

from aioelastic import (
    Function,
    Group,
    GroupFailed,
    Placement,
    Restart,
    SpecError,
    Stop,
    WorkerExecutor,
    WorkerFailed,
    plan,
    supervise,
)
from aioelastic.events import Spawned
from aioelastic.model.group_spec import GroupSpec
from aioelastic.processes import cgroups
from aioelastic.supervisor import resources
from aioelastic.system import shared_memory_names
from aioelastic.testing._chaos import guardian
from aioelastic.testing._environment import Unavailable, pid_namespace
from aioelastic.testing._misbehaving_workers import made
from aioelastic.testing._supervisor_process import Program

CPUS = sorted(os.sched_getaffinity(0))
# --- in force, whoever starts it ---


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
async def test_a_function_is_where_it_was_to_be(start: Any) -> None:
    where = Placement(cpus=[CPUS[-1]], nodes=[0], nice=5, oom_score_adj=300, limits={"rlimit_nofile": (333, 444)})
    result = await supervise(Function(jobs.place), 2, placement=[where, None], start=start, logs=QUIET)
    assert result[0].value == {
        "cpus": [CPUS[-1]],
        "nice": 5,
        "oom_score_adj": 300,
        "NOFILE": (333, 444),
        "memory": "bind:0",
    }
    assert result[1].value == jobs.place()


async def test_so_is_a_command_and_what_it_starts() -> None:
    script = "ulimit -n; nice; cat /proc/self/oom_score_adj; grep Cpus_allowed_list /proc/self/status"
    where = Placement(cpus=CPUS[:1], nice=3, oom_score_adj=7, limits={"NOFILE": 99})
    result = await supervise([sh(script), sh(script)], placement=lambda rank: where if rank else None, logs=QUIET)
    assert str(result[1].stdout).split() == ["99", "3", "7", "Cpus_allowed_list:", str(CPUS[0])]
    assert str(result[0].stdout) != str(result[1].stdout)


async def test_a_later_attempt_too() -> None:
    entry = sh('nice; test "$AIOELASTIC_ATTEMPT" = 1')
    result = await supervise(entry, placement=Placement(nice=4), logs=QUIET, restart=Restart.on_failure(1))
    assert (result[0].attempt, str(result[0].stdout)) == (1, "4\n")


def test_an_executors_workers_too() -> None:
    with WorkerExecutor(1, placement=Placement(nice=6)) as executor:
        assert executor.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == 6


def most_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def numbered(seat: int) -> Placement:
    return Placement(limits={"NOFILE": 200 + seat})


@pytest.mark.parametrize("listed", [False, True])
def test_an_executors_workers_each_in_its_place(tmp_path: Path, listed: bool) -> None:
    places: Any = [numbered(0), numbered(1)] if listed else numbered
    gate = Gate(tmp_path)
    with WorkerExecutor(2, placement=places) as executor:
        first = executor.submit(jobs.waits_in, gate.path)
        gate.entered()
        assert {executor.submit(most_files).result() for _ in range(3)} == {201}
        for _ in range(2):  # whoever takes its place is where it was
            with pytest.raises(WorkerFailed):
                executor.submit(jobs.dies, 9).result()
            assert executor.submit(most_files).result() == 201
        gate.open()
        assert first.result() == gate.path
        if listed:
            with pytest.raises(SpecError, match="max_workers=3 is more than `placement` has places for, 2"):
                executor.resize(3)
            assert executor.max_workers == 2
        else:
            executor.resize(3)
            gates = [Gate(tmp_path, name) for name in "ab"]
            for one in gates:
                executor.submit(jobs.waits_in, one.path)
                one.entered()
            assert executor.submit(most_files).result() == 202
            for one in gates:
                one.open()


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([Placement()], "is not of the length of the group, 2"),
        (lambda seat: Placement(cpus=[seat * 8191]) if seat else None, "8191"),
    ],
)
def test_an_executors_places_are_checked_for_all_its_workers(places: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words), WorkerExecutor(2, placement=places) as executor:
        executor.submit(abs, 1).result()


def test_a_start_in_another_place_sees_the_gpus_of_that() -> None:
    one = plan(GroupSpec.of(Function(abs, 1), placement=Placement(gpus=[1]), env={"MINE": "1"})).workers[0]
    other = one.placed(Placement(gpus=[2]))
    assert (other.overlay["CUDA_VISIBLE_DEVICES"], other.overlay["MINE"]) == ("2", "1")
    nowhere = one.placed(None)
    assert "CUDA_VISIBLE_DEVICES" not in nowhere.overlay
    assert nowhere.placement is None


def test_an_executors_control_groups(boxed: Placement) -> None:
    with WorkerExecutor(2, placement=[boxed, boxed]) as executor:
        with pytest.raises(WorkerFailed):
            executor.submit(jobs.dies, 9).result()
        assert "aioelastic-" in executor.submit(Path.read_text, Path("/proc/self/cgroup")).result()


async def test_this_program_stays_where_it_is() -> None:
    before = jobs.place()
    await supervise(Function(jobs.place), placement=Placement(cpus=CPUS[:1], nodes=[0], nice=1), logs=QUIET)
    assert jobs.place() == before


async def test_no_gpus_are_none() -> None:
    result = await supervise(sh('echo "[$CUDA_VISIBLE_DEVICES]"'), placement=Placement(gpus=()), logs=QUIET)
    assert str(result[0].stdout) == "[]\n"
    assert result.clean


async def test_what_the_kernel_refuses_all_the_same_is_told_with_its_field(monkeypatch: Any) -> None:
    monkeypatch.setattr(resources, "check_places", lambda plan, attempt: None)  # as if a CPU went offline just then
    with pytest.raises(GroupFailed) as info:
        await supervise(sh("exit 0"), placement=Placement(cpus=[8191]), logs=QUIET)
    assert "Invalid argument: 'Placement.cpus'" in str(info.value.exceptions[0])


# --- said wrong ---


@pytest.mark.parametrize(
    ("given", "field", "problem"),
    [
        ({"cpus": 3}, "Placement.cpus", "not a collection"),
        ({"cpus": []}, "Placement.cpus", "is empty"),
        ({"cpus": [-1]}, "Placement.cpus", "less than 0"),
        ({"cpus": ["0"]}, "Placement.cpus", "is str, not int"),
        ({"cpus": [8192]}, "Placement.cpus", "more than 8,191"),
        ({"nodes": "0"}, "Placement.nodes", "not a collection"),
        ({"gpus": [0, "GPU-1"]}, "Placement.gpus", "mixes"),
        ({"gpus": ["0"]}, "Placement.gpus", "not the UUID"),
        ({"gpus": [0, 0]}, "Placement.gpus", "twice"),
        ({"gpus": "GPU-1"}, "Placement.gpus", "not a collection"),
        ({"nice": 20}, "Placement.nice", "more than 19"),
        ({"nice": 1.5}, "Placement.nice", "is float"),
        ({"oom_score_adj": -1001}, "Placement.oom_score_adj", "less than -1000"),
        ({"limits": [1]}, "Placement.limits", "not a mapping"),
        ({"limits": {"CHEESE": 1}}, "Placement.limits", "no limit of this system"),
        ({"limits": {7: 1}}, "Placement.limits", "no limit of this system"),
        ({"limits": {"RTTIME": 1}}, "Placement.limits", "known by"),
        ({"limits": {"CORE": -2}}, "Placement.limits['CORE']", "less than 0"),
        ({"limits": {"CORE": (2, 1)}}, "Placement.limits['CORE']", "more soft than hard"),
        ({"limits": {"CORE": (resource.RLIM_INFINITY, 1)}}, "Placement.limits['CORE']", "more soft than hard"),
        ({"cgroup": ""}, "Placement.cgroup", "is empty"),
        ({"cgroup": 1}, "Placement.cgroup", "is int"),
    ],
)
def test_a_placement_that_is_none(given: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(SpecError) as info:
        Placement(**given)
    assert info.value.field == field
    assert problem in str(info.value)


def nowhere(rank: int) -> Any:
    return {0: None, 1: "cpu"}.get(rank) if rank < 2 else 1 / 0


@pytest.mark.parametrize(
    ("given", "field", "problem"),
    [
        ("cpus", "placement", ", not a Placement"),
        (3, "placement", ", not a Placement"),
        ([Placement()], "placement", "not of the length of the group, 3"),
        ([None, None, 5], "placement[2]", "is int"),
        (nowhere, "placement(rank=1)", "is str"),
        (lambda rank: nowhere(2), "placement(rank=0)", "raised ZeroDivisionError"),
        (lambda rank: Placement(cpus=[-rank]), "placement(rank=1): Placement.cpus", "less than 0"),
    ],
)
def test_places_that_are_none(given: Any, field: str, problem: str) -> None:
    with pytest.raises(SpecError) as info:
        GroupSpec.of(sh("exit 0"), 3, placement=given)
    assert info.value.field == field
    assert problem in str(info.value)


async def test_places_that_cannot_be_given() -> None:
    here = Placement(nice=1)
    with pytest.raises(SpecError, match=r"placement=.*given by the guardian"):
        await supervise(sh("exit 0"), placement=here, launcher="direct")
    with pytest.raises(SpecError, match=r"placement=.*executor of the caller's"), ThreadPoolExecutor() as pool:
        await supervise(Function(abs, 1), placement=here, start=pool)
    with pytest.raises(SpecError, match=r"Placement\.gpus=.*CUDA_VISIBLE_DEVICES in env of rank 0"):
        await supervise(sh("exit 0", env={"CUDA_VISIBLE_DEVICES": "1"}), placement=Placement(gpus=[0]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Placement(cpus=[CPUS[0], 8191]), r"Placement\.cpus=.* of rank 1 .*not here: 8191"),
        (Placement(cpus=[8191]), r"Placement\.cpus=.* of rank 1 .*not here: 8191"),
        (Placement(nodes=[0, 1023]), r"Placement\.nodes=.* of rank 1 .*not all nodes"),
    ],
)
async def test_places_that_are_not_here(given: Placement, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words):
        await supervise(sh(f"touch {tmp_path}/started"), 2, placement=[None, given], logs=QUIET)
    assert not (tmp_path / "started").exists()


PLAIN = """
import asyncio, resource
from aioelastic import *
core = {"CORE": (0, resource.RLIM_INFINITY)}
for given in (dict(nice=-5), dict(oom_score_adj=-5), dict(limits=core), dict(cgroup=True)):
    try:
        asyncio.run(supervise(Command("true"), placement=Placement(**given)))
    except SpecError as exc:
        print(exc)
"""


def test_a_plain_user_is_told_what_it_may_not() -> None:
    try:
        before = a_plain_user()
    except Unavailable as exc:
        pytest.skip(f"no plain user to be had here: {exc}")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    ran = subprocess.run([*before, sys.executable, "-c", limit + PLAIN], capture_output=True, text=True)
    assert ran.stderr == ""
    nice, oom, core, cgroup = ran.stdout.splitlines()
    assert "Placement.nice=-5 of rank 0 is less than this user may have" in nice
    assert "Placement.oom_score_adj=-5 of rank 0 is less than this process has" in oom
    assert "Placement.limits['CORE']=(0, -1) of rank 0 is more than this process's hard limit" in core
    assert "Placement.cgroup=True cannot be had: " in cgroup


def test_the_plan_tells_it() -> None:
    where = Placement(
        cpus=[0, 1, 2, 5],
        nodes=[0],
        gpus=[3],
        nice=-1,
        oom_score_adj=2,
        limits={"NOFILE": 9, "CORE": (0, -1)},
        cgroup=True,
    )
    text = str(plan(GroupSpec.of(sh("exit 0"), 2, placement=[None, where])))
    words = (
        "CPUs 0-2,5, memory of nodes 0, GPUs 3, nice -1, oom_score_adj 2, NOFILE 9, CORE 0/unlimited, "
        "a control group of its own"
    )
    assert text.count("placement:") == 1
    assert f"  placement: {words}\n" in text
    assert "CUDA_VISIBLE_DEVICES=3" in text


# --- control groups ---


def ours() -> list[str]:
    return [one.name for one in cgroups.own().glob("aioelastic-*")]


def left() -> list[str]:
    """Those that nobody's group holds; another process may run these tests, too."""
    found = []
    for name in ours():
        with suppress(OSError):
            os.close(shared_memory_names.locked(cgroups.own() / name))
            found.append(name)
    return found


def guardian_of(pid: int) -> int:
    """A program's: its child is the keeper, whose child is the guardian."""
    (keeper,) = (one for one in psutil.Process(pid).children() if one.name() == "aio-keeper")
    return int(keeper.children()[0].pid)


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def boxed() -> Iterator[Placement]:
    """Each worker in a control group of its own."""
    try:
        cgroups.ControlGroups(None, f"try-{os.getpid()}").close()
    except SpecError as exc:
        pytest.skip(f"no control groups here: {exc.problem}")
    yield Placement(cgroup=True)
    assert left() == []


@pytest.mark.parametrize(
    "entry",
    [sh("cat /proc/self/cgroup"), Function(jobs.printed, "/proc/self/cgroup")],
    ids=["command", "function"],
)
async def test_a_worker_has_its_own(boxed: Placement, entry: Any) -> None:
    result = await supervise(entry, 2, placement=boxed, logs=QUIET)
    names = [str(one.stdout).splitlines()[-1].rsplit("/", 2)[1:] for one in result]
    assert names == [[f"aioelastic-{result.run_id}", "0-0"], [f"aioelastic-{result.run_id}", "1-0"]]
    assert result.clean


async def test_below_another_one(boxed: Placement) -> None:
    below = cgroups.own() / f"test-{os.getpid()}"
    below.mkdir()
    try:
        result = await supervise(sh("cat /proc/self/cgroup"), placement=Placement(cgroup=below), logs=QUIET)
        assert f"/{below.name}/aioelastic-" in str(result[0].stdout)
    finally:
        below.rmdir()


async def test_whatever_escapes_is_its_workers(boxed: Placement) -> None:
    """Nothing but its control group tells whose it is; and another group lives that it may belong to."""
    async with Group(sh("exec sleep 1000"), logs=QUIET) as other:
        result = await supervise([py(NOBODYS), sh("exit 0")], placement=boxed, logs=QUIET)
        (pid,) = made(result[0].stdout)
        assert not alive(pid)
        assert pid in {one.pid for one in result.leaked}
        assert result.clean
        assert other[0].exit is None


async def test_what_may_stay_is_told_with_its_rank(boxed: Placement) -> None:
    result = await supervise([sh("exit 0"), py(NOBODYS)], placement=boxed, logs=QUIET, stop=Stop(scope="leader"))
    (pid,) = made(result[1].stdout)
    assert [(one.rank, one.pid) for one in result.remains if one.pid == pid] == [(1, pid)]
    assert result[0].clean
    kill_and_see_it_dead(pid, 9)
    await supervise(sh("exit 0"), placement=boxed, logs=QUIET)  # ... removes the empty one


# twenty chains: each process forks the next one in a session of its own, and ends. There are always as many, and never
# the same: one that grows takes the process ids of the whole machine, and with them starts in other tests
STORM = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(20):
    if os.fork() == 0:
        while True:
            os.setsid()
            time.sleep(0.005)
            if os.fork():
                os._exit(0)
print("storm", flush=True)
signal.pause()
"""


async def test_a_fork_storm_is_over_at_one_stroke(boxed: Placement) -> None:
    async with Group(
        py(STORM), placement=Placement(cgroup=True, limits={"CORE": 0}), logs=QUIET, stop=Stop(grace=0), check=False
    ) as group:
        async for _ in group.lines():
            break
        result = await group.stop()
    assert result.clean
    assert result[0].exit.signal == 9


OWNS = """
import asyncio, sys
from aioelastic import *
async def main():
    async with Group(Command("sleep", "1000"), n=2, placement=Placement(cgroup=True)) as group:
        print("ready", *group.pids.values(), flush=True)
        await group.wait()
asyncio.run(main())
"""


def test_a_killed_programs_are_removed(boxed: Placement) -> None:
    with Program(OWNS) as program:
        pids = [int(one) for one in program.line("ready").split()]
        with ExitStack() as held:
            watched = [held.enter_context(_pidfd(one)) for one in (*pids, guardian_of(program.pid))]
            assert ours()
            program.kill()
            for fd in watched:
                select.select([fd], [], [])
    # the fixture sees that the guardian has removed them


async def test_no_more_control_groups(boxed: Placement) -> None:
    below = cgroups.own() / f"test-{os.getpid()}"
    below.mkdir()
    try:
        (below / "cgroup.max.descendants").write_text("2")
        with pytest.raises(SpecError, match=r"of rank 1 cannot be made .*max\.descendants"):
            await supervise(sh("exit 0"), 2, placement=Placement(cgroup=below), logs=QUIET)
    finally:
        below.rmdir()


async def test_many_groups_at_once(boxed: Placement) -> None:
    results = await asyncio.gather(*(supervise(sh("exit 0"), 2, placement=boxed, logs=QUIET) for _ in range(16)))
    assert all(one.clean for one in results)


FORKED = """
import asyncio, subprocess, sys, time
from aioelastic import *
def work():
    subprocess.run([sys.executable, "-S", "-c", NOBODYS])
    time.sleep(1000)
async def main():
    async with Group(Function(work), start="fork", placement=Placement(cgroup=True), logs=Logs(prefix="")) as group:
        await group.wait()
asyncio.run(main())
""".replace("NOBODYS", repr(NOBODYS))


def test_a_forked_copys_escapes_end_with_the_program(boxed: Placement) -> None:
    with Program(FORKED) as program:
        pid = int(program.line("made"))
        with _pidfd(pid) as fd, _pidfd(guardian_of(program.pid)) as last:
            program.kill()
            select.select([fd], [], [])
            select.select([last], [], [])


async def test_without_their_guardian_they_are_ended_too(boxed: Placement) -> None:
    async with Group(sh("exec sleep 1000"), placement=boxed, logs=QUIET, check=False) as group:
        pid = guardian(await event_of(group, Spawned))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert not (await group.wait()).ok


def test_those_that_nobody_removed_are_removed_by_the_next(boxed: Placement) -> None:
    old = cgroups.own() / f"aioelastic-test-{os.getpid()}"
    live = cgroups.ControlGroups(None, f"live-{os.getpid()}")
    (old / "0-0").mkdir(parents=True)
    cgroups.ControlGroups(None, f"next-{os.getpid()}").close()
    assert not old.exists()
    assert live.path.exists()
    live.close()


def test_a_directory_that_another_keeps_locked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read it can lock it, for as long as he likes."""
    monkeypatch.setattr(cgroups, "LOCKED", 0.0)
    (tmp_path / "cgroup.procs").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        with pytest.raises(
            SpecError, match=rf"Placement\.cgroup=.* cannot be had: another process keeps {tmp_path} locked"
        ):
            cgroups.ControlGroups(str(tmp_path), "locked")
    finally:
        os.close(fd)
    assert [one.name for one in tmp_path.iterdir()] == ["cgroup.procs"]


# as the filters of containers do (seccomp(2)): clone3 says ENOSYS
FORBIDDEN = """
import ctypes, struct
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 435), (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7fff0000)]
program = b"".join(struct.pack("HBBI", *one) for one in code)
buffer = ctypes.create_string_buffer(program)
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
prog = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
assert libc.prctl(22, 2, prog, 0, 0) == 0, ctypes.get_errno()
import asyncio
from aioelastic import *
result = asyncio.run(supervise(Command("cat", "/proc/self/cgroup"), placement=Placement(cgroup=True), logs=Logs(tee=0)))
print(str(result[0].stdout).splitlines()[-1], result.clean)
"""


def test_where_clone3_is_forbidden(boxed: Placement) -> None:
    ran = subprocess.run([sys.executable, "-c", FORBIDDEN], capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.rstrip().endswith("/0-0 True")


# --- GPUs ---


GPUS = """
import asyncio, ctypes, os, sys
library = ctypes.CDLL(os.environ["FAKE_NVML_LIBRARY"])
from aioelastic import *
async def main():
    try:
        entry = Command("sh", "-c", os.environ.get("SCRIPT", "true"))
        result = await supervise(entry, placement=Placement(gpus=[GPU]), logs=Logs(tee=0))
        print(*result.remains, result.clean)
    except SpecError as exc:
        print(exc)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    needs("cuda.bindings.driver")
    path = fake_gpu.compiled(tmp_path_factory.mktemp("nvml"), "libnvidia-ml")
    if path is None:
        pytest.skip("needs a C compiler (cc)")

    def run(which: str, before: Sequence[str] = (), **environ: str) -> str:
        environ = {**os.environ, "FAKE_NVML_LIBRARY": str(path), **environ}
        argv: Sequence[str] = [*before, sys.executable, "-c", GPUS.replace("GPU]", f"{which}]")]
        ran = subprocess.run(argv, capture_output=True, text=True, env=environ)
        assert ran.stderr == ""
        return ran.stdout.rstrip()

    return run


@pytest.fixture
def proves() -> None:
    """Only outside of a PID namespace the driver's process ids tell what is left."""
    from aioelastic import gpu

    if gpu.why_unproven():
        pytest.skip(f"needs the machine's own PID namespace: {gpu.why_unproven()}")


def test_gpus_that_are_here_are_clean_afterwards(nvml: Callable[..., str], proves: None) -> None:
    assert nvml("0") == "True"


def test_memory_that_a_worker_still_has(nvml: Callable[..., str], proves: None, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    told = nvml("0", FAKE_NVML_PID_FILE=str(file), SCRIPT=f"echo $$ > {file}")
    assert told == f"5 MiB of GPU 0 (Fake GPU 0) is held by process {int(file.read_text())} False"


def test_gpus_that_are_not_here(nvml: Callable[..., str]) -> None:
    assert "Placement.gpus=7 is not a GPU of this machine; there are 2: " in nvml("7")
    assert "Placement.gpus='GPU-nonsense' is not a GPU of this machine" in nvml('"GPU-nonsense"')
    assert "Placement.gpus=[0] cannot be had: NVML says" in nvml("0", FAKE_NVML_STATUS="9")


def test_gpus_by_the_beginning_of_their_uuids(nvml: Callable[..., str], proves: None, tmp_path: Path) -> None:
    """As CUDA_VISIBLE_DEVICES takes them, at the start and at the end."""
    file = tmp_path / "pid"
    told = nvml('"GPU-11"', FAKE_NVML_PID_FILE=str(file), SCRIPT=f"echo $$ > {file}")
    assert told == f"5 MiB of GPU 0 (Fake GPU 0) is held by process {int(file.read_text())} False"
    assert nvml('"MIG-a1"') == "True"
    assert "Placement.gpus='GPU-' is the beginning of 2 UUIDs; give more of it" in nvml('"GPU-"')
    assert "Placement.gpus='MIG-' is the beginning of 2 UUIDs" in nvml('"MIG-"')


def test_a_gpu_that_is_lost_is_not_given(nvml: Callable[..., str], proves: None) -> None:
    assert "Placement.gpus=0 cannot be had: GPU is lost" in nvml("0", FAKE_NVML_LOST="0")
    assert nvml("1", FAKE_NVML_LOST="0") == "True"  # the others keep their numbers


UNKNOWN = "whether the workers' GPU memory is free is not known: "


def test_who_uses_a_gpu_that_does_not_tell(nvml: Callable[..., str], proves: None) -> None:
    assert nvml("0", FAKE_NVML_DENIED="0") == f"{UNKNOWN}GPU 0 does not tell who uses it False"


def test_a_gpu_that_is_lost_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    from aioelastic import gpu
    from aioelastic.supervisor import leak_check

    lost = gpu.Gpu("", "", None, None, None, False, (), None, 0, "GPU is lost")
    monkeypatch.setattr(gpu, "inventory", lambda: (lost,))
    monkeypatch.setattr(gpu, "why_unproven", str)
    for given, words in ((0, "GPU 0 does not tell who uses it"), ("GPU-1", "GPU GPU-1 does not answer any more")):
        assert [(one.kind, str(one)) for one in leak_check.gpus_left([given], [1])] == [("unproven", UNKNOWN + words)]


def test_process_ids_in_a_pid_namespace_prove_nothing(nvml: Callable[..., str]) -> None:
    """The driver may tell those of the host: neither that one of ours is there, nor that none is, is known then."""
    try:
        before = pid_namespace()
    except Unavailable as exc:
        pytest.skip(f"needs a PID namespace: {exc}")
    assert nvml("0", before=before) == f"{UNKNOWN}{NAMESPACE} False"


NAMESPACE = "this is a PID namespace, and the driver's process ids may be those of the host"
