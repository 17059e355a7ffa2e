"""What the end of one means for the others: `on_failure`, `on_success`, and failures among what has come of each
(`as_completed`)."""

from __future__ import annotations

import signal
from typing import Any

import jobs
import pytest
from helpers import QUIET, event_of, kill_and_see_it_dead, sh, stopped_itself
from helpers_streams import Gate, gate

from aioelastic import Function, Group, GroupFailed, Restart, SpecError, WorkerFailed, plan, supervise
from aioelastic.events import Drained, Exited, GaveUp, Restarting
from aioelastic.model.group_spec import GroupSpec

__all__ = ["gate"]  # a fixture


async def test_the_others_go_on(gate: Gate) -> None:
    workers = [sh("exit 3"), sh(f"read x < {gate.path}; echo done"), sh("kill -9 $$")]
    async with Group(workers, logs=QUIET, on_failure="continue", check=False) as group:
        for rank in (0, 2):
            await event_of(group, Exited, rank=rank)
        assert list(group.pids) == [1]
        gate.open()
        result = await group.wait()
    assert result.reason == "done"
    assert not result.ok
    assert sorted(one.rank for one in result.failures) == [0, 2]
    assert [one.stopped for one in result] == [False] * 3
    assert result[1].stdout.tail == b"done\n"


async def test_all_that_failed_is_raised_at_the_end_and_none_is_the_root_cause() -> None:
    with pytest.raises(GroupFailed) as caught:
        await supervise([sh("exit 3"), sh("exit 0"), sh("exit 4")], logs=QUIET, on_failure="continue")
    assert sorted(one.failure.exit.code for one in caught.value.exceptions if one.failure.exit) == [3, 4]
    assert not any("root cause" in note for one in caught.value.exceptions for note in getattr(one, "__notes__", ()))
    assert all(one.failure.first for one in caught.value.exceptions)


async def test_a_rank_that_gave_up_ends_nobody_else(gate: Gate) -> None:
    workers = [sh("exit 3"), sh(f"read x < {gate.path}")]
    policy = Restart.on_failure(max=2)
    async with Group(workers, logs=QUIET, on_failure="continue", restart=policy, check=False) as group:
        await event_of(group, GaveUp, rank=0)
        assert list(group.pids) == [1]
        gate.open()
        result = await group.wait()
    assert result[0].attempt == 2
    assert [one.rank for one in result.failures] == [0]


async def test_leaving_the_block_and_stop_still_stop() -> None:
    async with Group([sh("exit 3"), sh("exec sleep 1000")], logs=QUIET, on_failure="continue", check=False) as group:
        await event_of(group, Exited, rank=0)
        result = await group.stop()
    assert result[1].stopped
    assert [one.rank for one in result.failures] == [0]


async def test_the_default_stops_them() -> None:
    result = await supervise([sh("exit 3"), sh("exec sleep 1000")], logs=QUIET, check=False)
    assert result[1].stopped


@pytest.mark.parametrize("answers", [["continue", "stop", "stop"], lambda rank: "stop" if rank else "continue"])
async def test_each_rank_has_its_own_answer(answers: Any, gate: Gate) -> None:
    workers = [sh("exit 3"), sh(f"read x < {gate.path}; exit 4"), sh("exec sleep 1000")]
    async with Group(workers, logs=QUIET, on_failure=answers, check=False) as group:
        await event_of(group, Exited, rank=0)
        assert list(group.pids) == [1, 2]
        gate.open()
        result = await group.wait()
    assert result.reason == "failed"
    assert [one.rank for one in result.failures] == [1, 0]  # the one that ended the group is to blame for that
    assert all(one.first for one in result.failures)  # the one is not what the other comes from
    assert result[2].stopped
    with pytest.raises(GroupFailed, match=r"rank 1 \(.*\) failed: exit code 4.*; 1 of 3 were stopped"):
        result.raise_for_failures()


async def test_of_those_that_stop_the_others_the_first_is_the_root_cause(gate: Gate) -> None:
    """The second fails by itself, too, before anybody could stop it."""
    workers = [sh("kill -STOP $$; exit 3"), sh("kill -STOP $$; exit 4"), sh("kill -STOP $$; exit 5")]
    answers: Any = ["stop", "continue", "stop"]
    async with Group(workers, logs=QUIET, on_failure=answers, check=False) as group:
        pids = [group[rank].pid for rank in range(3)]
        for pid in pids:
            await stopped_itself(pid)
        for pid in pids:
            kill_and_see_it_dead(pid, signal.SIGCONT)
        result = await group.wait()
    assert [(one.rank, one.first) for one in result.failures] == [(0, True), (1, True), (2, False)]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"on_failure": "ignore"}, "on_failure"),
        ({"on_failure": None}, "on_failure"),
        ({"on_failure": ["stop", "stop"]}, "on_failure"),
        ({"on_failure": [1]}, "on_failure[0]"),
        ({"on_failure": lambda rank: rank}, "on_failure(rank=0)"),
        ({"on_failure": lambda rank: rank / 0}, "on_failure(rank=0)"),
        ({"on_failure": ["continue"], "restart": Restart.on_failure(max=1, scope="all")}, "on_failure"),
        ({"on_success": "ignore"}, "on_success"),
    ],
)
async def test_what_makes_no_sense_is_refused(more: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        await supervise(sh("exit 0"), logs=QUIET, **more)
    assert caught.value.field == field


def test_a_plan_tells_it() -> None:
    mixed = str(plan(GroupSpec.of(sh("true"), 3, on_failure=["stop", "continue", "continue"])))
    assert "fails for good: the others are stopped, but go on when it is ranks 1, 2\n" in mixed
    assert "when one fails for good: the others go on\n" in str(plan(GroupSpec.of(sh("true"), on_failure="continue")))
    assert "when one fails for good: the others are stopped\n" in str(plan(GroupSpec.of(sh("true"))))
    assert "when one succeeds: the others are stopped\n" in str(plan(GroupSpec.of(sh("true"), on_success="stop")))
    assert "when one succeeds" not in str(plan(GroupSpec.of(sh("true"))))


# --- on_success ---


async def test_a_success_stops_the_others() -> None:
    result = await supervise(
        [sh("exec sleep 1000"), sh("exit 0"), sh("exec sleep 1000")], logs=QUIET, on_success="stop"
    )
    assert (result.reason, result.ok) == ("done", True)
    assert result[1].exit is not None
    assert result[1].exit.stopped_by is None
    assert not any(one.exit is not None and one.exit.ok for one in (result[0], result[2]))


async def test_the_first_to_succeed_is_all_that_is_wanted(gate: Gate) -> None:
    """Those that fail before it end nobody."""
    trials = [sh("exit 3"), sh(f"read x < {gate.path}"), sh("exec sleep 1000")]
    async with Group(trials, logs=QUIET, on_success="stop", on_failure="continue", check=False) as group:
        await event_of(group, Exited, rank=0)
        assert sorted(group.pids) == [1, 2]
        gate.open()
        result = await group.wait()
    assert (result.reason, [one.rank for one in result.failures]) == ("done", [0])
    assert result[2].stopped


async def test_a_failure_that_is_answered_is_no_end() -> None:
    script = "[ $AIOELASTIC_ATTEMPT = 2 ] || exit 3"
    workers = [sh(script), sh("exec sleep 1000")]
    result = await supervise(workers, logs=QUIET, on_success="stop", restart=Restart.on_failure(max=2))
    assert (result.reason, result[0].attempt, result[1].stopped) == ("done", 2, True)


async def test_who_is_stopped_by_itself_has_not_succeeded(gate: Gate) -> None:
    polite = sh("trap 'exit 0' TERM; echo up; while :; do sleep 1000 & wait; done")
    async with Group([polite, sh(f"read x < {gate.path}")], logs=QUIET, on_success="stop") as group:
        await group.line("up")
        await group[0].stop()
        await event_of(group, Drained, rank=0)
        assert list(group.pids) == [1]
        gate.open()
        result = await group.wait()
    assert result[1].ok


async def test_a_value_stops_the_others() -> None:
    async with Group([Function(jobs.product, 4, 2), sh("exec sleep 1000")], logs=QUIET, on_success="stop") as group:
        assert [one async for one in group.as_completed()] == [(0, 8)]


# --- as_completed(errors="value") ---


async def test_failures_among_the_values() -> None:
    trials = [Function(jobs.product, 4, 2), Function(jobs.fails), sh("kill -KILL $$"), sh("echo last; exit 5")]
    found: dict[int, Any] = {}
    async with Group(trials, logs=QUIET, on_failure="continue") as group:
        async for rank, value in group.as_completed(errors="value"):
            found[rank] = value
    assert found[0] == 8
    for rank in (1, 2, 3):
        assert isinstance(found[rank], WorkerFailed)
    assert isinstance(found[1].__cause__.exception, ValueError)
    assert found[2].failure.exit.signal == signal.SIGKILL
    assert found[3].failure.stdout.tail == b"last\n"
    assert len(found) == 4


async def test_a_failure_comes_while_others_run(gate: Gate) -> None:
    async with Group([sh("exit 3"), sh(f"read x < {gate.path}")], logs=QUIET, on_failure="continue") as group:
        coming = group.as_completed(errors="value")
        rank, value = await anext(coming)
        assert (rank, value.failure.exit.code) == (0, 3)
        gate.open()
        assert [one async for one in coming] == [(1, None)]


async def test_only_the_last_failure_of_a_rank_counts() -> None:
    async with Group(sh("exit 3"), logs=QUIET, restart=Restart.on_failure(max=2), on_failure="continue") as group:
        found = [(rank, value.failure.attempt) async for rank, value in group.as_completed(errors="value")]
        assert found == [(0, 2)]
        await event_of(group, Restarting)


async def test_who_was_stopped_is_not_told() -> None:
    async with Group([sh("exit 3"), sh("exec sleep 1000")], logs=QUIET) as group:
        assert [rank async for rank, _ in group.as_completed(errors="value")] == [0]


async def test_an_unknown_way_to_tell_errors() -> None:
    async with Group(sh("exit 0"), logs=QUIET) as group:
        with pytest.raises(SpecError, match="errors"):
            await anext(group.as_completed(errors="ignore"))  # type: ignore[arg-type]
