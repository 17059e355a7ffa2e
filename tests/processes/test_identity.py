"""Identities of starts: nobody's end touches another, and what lives is no left-over."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, alive, event_of, gone, sh, until
from test_executor import Gate
from test_platforms import a_plain_user

from aioelastic import (
    Command,
    Function,
    Group,
    GroupFailed,
    Placement,
    Restart,
    SpecError,
    WorkerExecutor,
    WorkerFailed,
    supervise,
)
from aioelastic.child.kernel import process_marks
from aioelastic.events import Spawned
from aioelastic.model.group_spec import GroupSpec
from aioelastic.planning import TAG, Identity, plan
from aioelastic.processes import census as census_module
from aioelastic.processes import cgroups
from aioelastic.processes.census import Census, _see
from aioelastic.processes.strays import Stray, protect, unprotect
from aioelastic.system.helper_thread import HelperThread
from aioelastic.testing._environment import Unavailable

# as one who has the same user as others, and may not look into them
LOOKS = """
import os
from aioelastic.processes import census
waits = []
census.time.sleep = waits.append
seen = [census._see(pid, b"X", 0, {}, ()) for pid in (os.getpid(), os.getppid())]
print([one and one.pid == os.getppid() for one in seen], len(waits))
"""


def test_who_may_not_be_looked_into_is_not_taken_for_one_that_is_in_execve() -> None:
    """Each cost 40 ms of waiting: with a hundred of them a look took longer than it may, and what workers had left
    stayed."""
    try:
        before = a_plain_user()
    except Unavailable as exc:
        pytest.skip(f"no plain user to be had here: {exc}")
    ran = subprocess.run([*before, sys.executable, "-c", LOOKS], capture_output=True, text=True, check=True)
    assert ran.stdout == "[False, True] 0\n"


async def test_marks_that_nobody_carries_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "MARKS", 8)
    thread = HelperThread(asyncio.get_running_loop(), "test")
    census = Census(thread, TAG)
    try:
        marks = [process_marks.of(f"run/0/{i}") for i in range(40)]
        for i, mark in enumerate(marks):
            census.know(mark, f"run/0/{i}")
        async with Group(Command("sleep", "1000"), logs=QUIET) as group:
            assert group[0].pid is not None
            process_marks.give(group[0].pid, marks[3])
            for mark in marks[:30]:
                census.over(mark)
            await until(lambda: set(census._marks) == {marks[3], *marks[30:]})
            for mark in marks[30:37]:
                census.over(mark)
            await until(lambda: set(census._marks) == {marks[3], *marks[37:]})
        for i in range(100, 108):
            census.know(process_marks.of(f"run/0/{i}"), f"run/0/{i}")
            census.over(process_marks.of(f"run/0/{i}"))
        await until(lambda: set(census._marks) == {*marks[37:]})
    finally:
        census.close()
        await thread.end()


async def test_an_executor_that_replaces_its_workers_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "MARKS", 4)
    async with WorkerExecutor(1, tasks_per_worker=1) as executor:
        left = await executor.run(jobs.leaves_a_daemon)
        for i in range(24):
            assert await executor.run(abs, -i) == i
        marks = executor._pool._owner._workers.census._marks
        assert process_marks.read(left) in marks
        await until(lambda: len(marks) < 12)
        assert alive(left)
    assert not alive(left)


async def test_a_group_that_restarts_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "MARKS", 4)
    async with Group(sh("exit 3"), logs=QUIET, restart=Restart.on_failure(max=20)) as group:
        census = group._supervisor.census
        with pytest.raises(GroupFailed):
            await group.wait()
    assert len(census._marks) < 12


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
@pytest.mark.parametrize("boxed", [False, True], ids=["", "in control groups"])
def test_a_worker_that_leaves_a_child_costs_no_other_its_task(start: Any, boxed: bool, tmp_path: Path) -> None:
    place = Placement(cgroup=True) if boxed else None
    if boxed:
        try:
            cgroups.ControlGroups(None, f"try-{os.getpid()}").close()
        except SpecError as exc:
            pytest.skip(f"no control groups here: {exc.problem}")
    gates = [Gate(tmp_path, str(i)) for i in range(2)]
    with WorkerExecutor(3, start=start, placement=place) as executor:
        held = [executor.submit(jobs.waits_in, one.path) for one in gates]
        for one in gates:
            one.entered()
        for _ in range(2):
            with pytest.raises(WorkerFailed, match="exit code 3"):  # told when nothing is left of it
                executor.submit(jobs.leaves_a_child, 3).result()
        for one in gates:
            one.open()
        assert [one.result() for one in held] == [one.path for one in gates]
    if boxed:
        assert not (cgroups.own() / f"aioelastic-{executor._pool._owner._workers.run_id}").exists()


def test_each_start_is_another(tmp_path: Path) -> None:
    """Of an executor, as it is of a group."""
    with WorkerExecutor(1, tasks_per_worker=1) as executor:
        lineages = [executor.submit(os.getenv, TAG).result() for _ in range(3)]
        marks = {executor.submit(resource.getrlimit, resource.RLIMIT_RTTIME).result()[0] for _ in range(3)}
    assert len(set(lineages)) == 3
    assert [one.split("/")[-2:] for one in lineages] == [["0", "0"], ["0", "1"], ["0", "2"]]
    assert len(marks) == 3


def test_a_plan_has_an_identity_and_no_other_start_has_it() -> None:
    (first,) = plan(GroupSpec.of(Command("x")), run_id="r", environ={TAG: "above/3/0"}).workers
    assert first.identity == Identity.of("r", 0, 0, "above/3/0")
    with pytest.raises(ValueError, match="r/0/0"):
        dataclasses.replace(first, rank=1)
    with pytest.raises(ValueError, match="r/0/0"):
        dataclasses.replace(first, attempt=1)
    fields = {one.name: getattr(first, one.name) for one in dataclasses.fields(first) if one.name != "identity"}
    with pytest.raises(TypeError, match="identity"):
        type(first)(**fields)
    later = first.as_start(7, 2, 8)
    assert (later.rank, later.attempt, later.world_size) == (7, 2, 8)
    assert later.identity == Identity.of("r", 7, 2, "above/3/0")
    has = later.environ({})
    assert has[TAG] == "above/3/0:r/7/2"
    assert [has[key] for key in ("RANK", "AIOELASTIC_LOCAL_RANK", "ROLE_RANK")] == ["7", "7", "7"]
    assert [has[key] for key in ("WORLD_SIZE", "AIOELASTIC_ATTEMPT", "TORCHELASTIC_RESTART_COUNT")] == ["8", "2", "2"]
    assert later.mark != first.mark


async def test_an_identity_is_given_once() -> None:
    census = Census(HelperThread(asyncio.get_running_loop(), "test"), TAG)
    census.know(5, "r/0/0")
    with pytest.raises(RuntimeError, match="r/0/0"):
        census.know(5, "r/0/0")
    census.close()


@pytest.mark.parametrize("entry", [sh("exec sleep 1000"), Function(signal.pause)], ids=["command", "function"])
async def test_a_living_worker_is_no_left_over_whatever_it_looks_like(entry: Any) -> None:
    """Another group's, on another thread's loop, that carries the mark of the one that ends."""
    async with Group(entry, logs=QUIET) as other:
        pid = other[0].pid
        assert pid is not None

        async def end() -> Any:
            async with Group(sh("sleep 1000 & read x"), logs=QUIET, check=False) as group:
                resource.prlimit(pid, resource.RLIMIT_RTTIME, (group[0]._life.plan.mark, resource.RLIM_INFINITY))
                group[0].send_signal(signal.SIGKILL)
                return await group.wait()

        result = await asyncio.to_thread(asyncio.run, end())
        assert [one.command for one in result.leaked if one.pid == pid] == []
        assert other[0].exit is None
        assert alive(pid)


async def test_neither_is_what_starts_workers() -> None:
    async with Group([sh("exec sleep 1000"), Function(signal.pause)], logs=QUIET) as group:
        worker, zygotes = group[0].pid, group[1].pid
        assert worker is not None
        assert zygotes is not None
        guardian, zygote = _parent(worker), _parent(zygotes)
        keeper = _parent(guardian)
        for pid in (worker, zygotes, guardian, keeper, zygote):
            seen = _see(pid, b"", 0, {}, ())
            assert seen is not None
            assert Stray.catch(seen) is None, pid


async def test_one_that_has_ended_protects_nobody() -> None:
    async with Group(sh("sleep 1000 & echo $!; exit 0"), logs=QUIET) as group:
        result = await group.wait()
    assert len(result.leaked) == 1
    await gone(int(str(result[0].stdout)))


async def test_it_is_looked_at_when_it_is_signalled() -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        pid = group[0].pid
        assert pid is not None
        unprotect(pid)
        seen = _see(pid, b"", 0, {}, ())
        assert seen is not None
        stray = Stray.catch(seen)
        assert stray is not None
        protect(pid)
        stray.signal(signal.SIGKILL)
        stray.close(asyncio.get_running_loop())
        assert group[0].send_signal(0)
        assert alive(pid)


async def test_a_restart_is_another_start(tmp_path: Path) -> None:
    """What the first attempt has left is ended, and the second one is not."""
    script = 'if [ "$AIOELASTIC_ATTEMPT" = 0 ]; then sleep 1000 & exit 1; fi; exec sleep 1000'
    restart = Restart(max=1, scope="one")
    async with Group(sh(script), n=2, logs=QUIET, restart=restart, check=False) as group:
        for rank in range(2):
            await event_of(group, Spawned, rank, 1)
        assert len({one.owner for one in (*group._supervisor.workers, *group._supervisor.attempts.ended)}) == 4
        assert all(one.exit is None for one in group)


async def test_two_groups_at_once() -> None:
    """One ends, and leaves children; nothing of the other one is touched."""
    async with Group(sh("sleep 1000 & wait"), n=3, logs=QUIET) as other:
        result = await supervise(sh("sleep 1000 & exit 0"), n=3, logs=QUIET)
        assert len(result.leaked) == 3
        assert all(one.exit is None for one in other)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
