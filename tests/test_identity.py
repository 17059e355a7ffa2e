"""Nobody's end touches another: each start has an identity, and what lives is no left-over."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, alive, event_of, gone, sh
from test_executor import Gate

from aioelastic import (
    Command,
    Function,
    Group,
    Placement,
    Restart,
    SpecError,
    WorkerExecutor,
    WorkerFailed,
    cgroups,
    supervise,
)
from aioelastic.events import Spawned
from aioelastic.launch import TAG, Identity, plan
from aioelastic.spec import GroupSpec
from aioelastic.thread import HelperThread
from aioelastic.watch import Census, Stray, protect, unprotect
from aioelastic.watch._proc import _see


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
        assert not (cgroups.own() / f"aioelastic-{executor._pool._owner.run_id}").exists()


def test_each_start_is_another(tmp_path: Path) -> None:
    """Of an executor, as it is of a group."""
    with WorkerExecutor(1, tasks_per_worker=1) as executor:
        lineages = [executor.submit(os.getenv, TAG).result() for _ in range(3)]
        marks = {executor.submit(resource.getrlimit, resource.RLIMIT_RTTIME).result()[0] for _ in range(3)}
    assert len(set(lineages)) == 3
    assert [one.rpartition("/")[0].rpartition("/")[2] for one in lineages] == ["0", "1", "2"]
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
    later = first.as_start(7)
    assert (later.rank, later.identity) == (7, Identity.of("r", 7, 0, "above/3/0"))
    assert later.environ({})[TAG] == "above/3/0:r/7/0"
    assert later.environ({})["RANK"] == later.environ({})["AIOELASTIC_LOCAL_RANK"] == "7"
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
                resource.prlimit(pid, resource.RLIMIT_RTTIME, (group[0].plan.mark, resource.RLIM_INFINITY))
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
        assert len({one.owner for one in (*group, *group._passes.ended)}) == 4
        assert all(one.exit is None for one in group)


async def test_two_groups_at_once() -> None:
    """One ends, and leaves children; nothing of the other one is touched."""
    async with Group(sh("sleep 1000 & wait"), n=3, logs=QUIET) as other:
        result = await supervise(sh("sleep 1000 & exit 0"), n=3, logs=QUIET)
        assert len(result.leaked) == 3
        assert all(one.exit is None for one in other)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
