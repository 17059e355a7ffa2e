"""Restarts: which failure is answered by a new attempt, what a new attempt is, what its result tells."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import QUIET, alive, event_of, gone, kill_and_see_it_dead, py, sh

from aioelastic import (
    Command,
    Group,
    GroupFailed,
    GroupTimeout,
    Line,
    Logs,
    Match,
    Restart,
    Rotate,
    SpecError,
    Std,
    Stop,
    plan,
    supervise,
)
from aioelastic.events import (
    Drained,
    Event,
    Exited,
    GaveUp,
    GroupDone,
    Leaked,
    Restarting,
    SinkTrouble,
    Spawned,
    Stopping,
)
from aioelastic.launch import DirectLauncher
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.restart_policy import MOST, Verdict, decide
from aioelastic.model.states import State
from aioelastic.testing._fake_launcher import FakeLauncher, Life

SLEEP = "exec sleep 1000"
ONE, ALL = Restart.on_failure(max=3, scope="one"), Restart.on_failure(max=3, scope="all")


def until(attempt: int, then: str = "exit 0", code: int = 3) -> str:
    """Fails in every attempt before this one."""
    return f'[ "$AIOELASTIC_ATTEMPT" -ge {attempt} ] || exit {code}; {then}'


def story(seen: list[Event], rank: int | None) -> list[tuple[type[Event], int | None]]:
    """The events of one rank with their attempts."""
    return [(type(one), one.attempt) for one in seen if one.rank == rank]


# --- the value and the decision ---


def test_a_policy_is_a_value() -> None:
    policy = Restart.on_failure(max=3, scope="all")
    assert (policy.max, policy.scope) == (3, "all")
    assert Restart.on_failure(max=3).scope == "one"
    assert policy == Restart.on_failure(max=3, scope="all") != Restart.never()
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert len({policy, copy.copy(policy)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.max = 4  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "3", None, MOST + 1])
def test_a_wrong_limit(value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        Restart.on_failure(max=value)
    assert (caught.value.field, caught.value.value) == ("Restart.max", value)
    assert caught.value.problem
    assert "whole number" in caught.value.remedy
    Restart.on_failure(max=MOST)


@pytest.mark.parametrize("value", ["both", "", None, 1])
def test_a_wrong_scope(value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        Restart.on_failure(max=1, scope=value)
    assert (caught.value.field, caught.value.value) == ("Restart.scope", value)
    assert '"one"' in caught.value.remedy
    assert '"all"' in caught.value.remedy


@pytest.mark.parametrize("make", [Group, supervise, GroupSpec.of])
@pytest.mark.parametrize("value", ["always", 3, True, Restart])
def test_not_a_policy(make: Callable[..., Any], value: Any) -> None:
    if make is supervise:
        with pytest.raises(SpecError) as caught:
            asyncio.run(supervise(sh("exit 0"), restart=value))
    else:
        with pytest.raises(SpecError) as caught:
            make(sh("exit 0"), restart=value)
    assert caught.value.field == "restart"
    assert "Restart.on_failure" in caught.value.remedy


def test_the_default_is_never() -> None:
    assert GroupSpec.of(sh("exit 0")).restart == Restart.never()
    assert Group(sh("exit 0"))._supervisor.spec.restart == Restart.never()
    assert GroupSpec.of(sh("exit 0"), restart=ALL).restart is ALL


@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("refused", [False, True])
def test_the_decision(limit: int, refused: bool) -> None:
    policy = Restart.on_failure(max=limit)
    for attempt in range(limit + 3):
        verdict = decide(policy, attempt, refused)
        if attempt == 0 and refused:
            assert verdict is Verdict.FAIL
        else:
            assert verdict is (Verdict.AGAIN if attempt < limit else Verdict.GIVE_UP)
    assert decide(Restart.never(), 0, refused) is Verdict.FAIL


def test_a_plan_tells_the_policy_and_the_attempt() -> None:
    spec = GroupSpec.of(Command("x"), 3, restart=ALL)
    assert "restart: never" in str(plan(GroupSpec.of(Command("x"))))
    assert "restart: all ranks when one fails, at most 3 times" in str(plan(spec))
    assert "restart: a rank that fails, at most 3 times each" in str(plan(GroupSpec.of(Command("x"), restart=ONE)))
    for attempt in (0, 2):
        for worker in plan(spec, attempt=attempt).workers:
            env = worker.environ({})
            assert env["AIOELASTIC_ATTEMPT"] == env["TORCHELASTIC_RESTART_COUNT"] == str(attempt)
            assert env["TORCHELASTIC_MAX_RESTARTS"] == "3"
    assert [one.rank for one in plan(spec, ranks={1}).workers] == [1]
    assert plan(spec, ranks={1}).workers == plan(spec).workers[1:2]


# --- one rank ---


async def test_one_failed_rank_begins_again_and_the_others_run_on() -> None:
    seen: list[Event] = []
    entry = [sh(SLEEP), sh(until(2, "echo up; " + SLEEP), name="job"), sh(SLEEP)]
    async with Group(entry, logs=QUIET, restart=ONE, on_event=seen.append) as group:
        others = {rank: group[rank] for rank in (0, 2)}
        async for line in group.lines():
            assert (line.rank, line.data) == (1, b"up")
            break
        assert [one.attempt for one in group] == [0, 2, 0]
        assert all(group[rank] is one and one.state is State.RUNNING for rank, one in others.items())
        assert alive(group.pids[1])
        result = await group.stop()
    assert result.ok
    assert [one.attempt for one in result] == [0, 2, 0]
    assert [len(one.earlier) for one in result] == [0, 2, 0]
    again = [Spawned, Exited, Drained, Restarting]
    assert story(seen, 1) == [
        *((kind, 0) for kind in again),
        *((kind, 1) for kind in again),
        *((kind, 2) for kind in (Spawned, Stopping, Exited, Drained)),
    ]
    assert story(seen, 0) == [(kind, 0) for kind in (Spawned, Stopping, Exited, Drained)]
    told = [one for one in seen if isinstance(one, Restarting)]
    assert [(one.attempt, one.next_attempt, one.reason) for one in told] == [
        (0, 1, "job: exit code 3"),
        (1, 2, "job: exit code 3"),
    ]
    ended = [one for one in seen if isinstance(one, Exited) and one.rank == 1]
    assert [one.pid for one in told] == [one.pid for one in ended[:2]]
    assert isinstance(seen[-1], GroupDone)


async def test_a_restarted_worker_that_succeeds_is_a_success() -> None:
    result = await supervise([sh("exit 0"), sh("echo $AIOELASTIC_ATTEMPT; " + until(1))], logs=QUIET, restart=ONE)
    assert result.ok
    assert result.reason == "done"
    assert not result.failures
    assert result[0].earlier == ()
    assert result[1].attempt == 1
    assert result[1].exit is not None
    assert result[1].exit.code == 0
    assert result[1].failure is None
    assert str(result[1].stdout) == "1\n"
    (failure,) = result[1].earlier
    assert (failure.rank, failure.attempt, failure.cause, failure.first) == (1, 0, "exit code 3", True)
    assert str(failure.stdout) == "0\n"
    assert failure.pid not in (None, result[1].pid)
    assert result.earlier == (failure,)


async def test_the_limit_is_per_rank() -> None:
    result = await supervise(sh(until(2)), n=3, logs=QUIET, restart=Restart.on_failure(max=2))
    assert result.ok
    assert [one.attempt for one in result] == [2, 2, 2]
    assert [[one.attempt for one in each.earlier] for each in result] == [[0, 1]] * 3


@pytest.mark.parametrize("scope", ["one", "all"])
async def test_past_the_limit_the_group_fails_with_every_exit(scope: Any) -> None:
    seen: list[Event] = []
    entry = [sh(SLEEP), sh("exit $((10 + AIOELASTIC_ATTEMPT))")]
    policy = Restart.on_failure(max=2, scope=scope)
    with pytest.raises(GroupFailed) as caught:
        await supervise(entry, logs=QUIET, restart=policy, on_event=seen.append)
    text, result = str(caught.value), caught.value.result
    assert result.reason == "failed"
    assert [one.cause for one in result.failures] == ["exit code 12"]
    assert result.failures[0].first
    assert result.failures[0].attempt == 2
    assert [one.cause for one in result[1].earlier] == ["exit code 10", "exit code 11"]
    assert result[0].earlier == ()
    assert result[0].stopped
    found = [text.index(f"attempt {i}: rank 1") for i in range(3)]
    assert found == sorted(found)
    codes = [text.index(f"exit code {10 + i}") for i in range(3)]
    assert codes == sorted(codes)
    (gave_up,) = [one for one in seen if isinstance(one, GaveUp)]
    assert (gave_up.rank, gave_up.attempt, gave_up.attempts) == (1, 2, 3)
    assert gave_up.pid == result[1].pid
    kinds = [type(one) for one in seen]
    assert kinds.index(GaveUp) < kinds.index(Stopping, kinds.index(GaveUp))
    assert story(seen, 1)[-3:] == [(Exited, 2), (GaveUp, 2), (Drained, 2)]


async def test_without_a_policy_nothing_is_new() -> None:
    seen: list[Event] = []
    result = await supervise(sh("exit 3"), logs=QUIET, check=False, on_event=seen.append)
    assert [type(one) for one in seen] == [Spawned, Exited, Drained, GroupDone]
    assert result[0].earlier == result.earlier == ()
    with pytest.raises(GroupFailed, match=r"rank 0 \(pid \d+ on \S+\) failed: exit code 3") as caught:
        result.raise_for_failures()
    assert "attempt" not in str(caught.value)


@pytest.mark.parametrize("policy", [ONE, ALL], ids=["one", "all"])
async def test_who_succeeds_or_was_stopped_is_not_restarted(policy: Restart) -> None:
    seen: list[Event] = []
    async with Group([sh("exit 0"), sh(SLEEP)], logs=QUIET, restart=policy, on_event=seen.append) as group:
        await group[0].wait()
        await group[1].stop()
        result = await group.wait()
    assert result.ok
    assert not [one for one in seen if isinstance(one, Restarting)]
    assert [one.attempt for one in result] == [0, 0]


async def test_old_handles_keep_their_own_answers() -> None:
    async with Group(sh(until(1, SLEEP)), logs=QUIET, restart=ONE) as group:
        old = group[0]
        first = await old.wait()
        await event_of(group, Spawned, attempt=1)
        again = await old.wait()
        assert first is again is old.exit
        assert first is not None
        assert first.code == 3
        assert (old.attempt, old.state) == (0, State.FAILED)
        assert not old.send_signal(signal.SIGKILL)
        assert await old.stop() is first
        assert (group[0].attempt, group[0].exit) == (1, None)
        assert group.pids == {0: group[0].pid}
        assert group.send_signal(signal.SIGCONT) == 1


# --- all ranks ---


async def test_all_ranks_begin_again_once_nothing_of_the_old_attempt_is_left() -> None:
    seen: list[Event] = []
    running: set[int] = set()

    def watch(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Spawned):
            running.add(event.pid or 0)
        elif isinstance(event, Drained):
            running.discard(event.pid or 0)
        elif isinstance(event, Restarting):
            assert running == set()

    entry = [sh('[ "$AIOELASTIC_ATTEMPT" = 2 ] || ' + SLEEP), sh(until(2)), sh("exit 0")]
    result = await supervise(entry, logs=QUIET, restart=ALL, on_event=watch)
    assert result.ok
    assert [one.attempt for one in result] == [2, 2, 2]
    assert [[one.cause for one in each.earlier] for each in result] == [[], ["exit code 3"] * 2, []]
    assert [one.rank for one in result.earlier] == [1, 1]
    told = [(one.rank, one.attempt, one.next_attempt, one.reason) for one in seen if isinstance(one, Restarting)]
    assert told == [(rank, i, i + 1, "rank 1: exit code 3") for i in (0, 1) for rank in (0, 1, 2)]
    for rank in (0, 1, 2):
        kinds = [kind for kind, attempt in story(seen, rank) if attempt == 0]
        assert kinds[0] is Spawned
        assert kinds[-3:] == [Exited, Drained, Restarting]


async def test_the_others_are_stopped_politely_first() -> None:
    saves = (
        "import os, signal\n"
        "if os.environ['AIOELASTIC_ATTEMPT'] == '0':\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "    print('up', flush=True)\n"
        "    signal.sigwait([signal.SIGTERM])\n"
        "    print('saved', flush=True)"
    )
    entry = [py(saves), sh(f'[ "$AIOELASTIC_ATTEMPT" = 1 ] || {SLEEP}')]
    lines: list[bytes] = []

    def watch(line: Line) -> None:
        lines.append(line.data)
        if line.data == b"up":
            group[1].send_signal(signal.SIGKILL)

    async with Group(entry, logs=Logs(tee=Std.NONE, callback=watch), restart=ALL) as group:
        result = await group.wait()
    assert lines == [b"up", b"saved"]
    assert result.ok
    assert [[one.cause for one in each.earlier] for each in result] == [[], ["SIGKILL"]]


@pytest.mark.parametrize(("policy", "restarts"), [(ONE, [1, 1, 0]), (ALL, [1, 1, 1])], ids=["one", "all"])
async def test_two_ranks_fail_at_the_same_moment(policy: Restart, restarts: list[int]) -> None:
    """One restart of the group, or one of each rank."""
    async with Group(sh(SLEEP), n=3, logs=QUIET, restart=policy) as group:
        for rank in (1, 0):
            kill_and_see_it_dead(group[rank].pid, signal.SIGKILL)
        up = 0
        async for event in group.events():
            up += isinstance(event, Spawned) and event.attempt == 1
            if up == sum(restarts):
                break
        result = await group.stop()
    assert [one.attempt for one in result] == restarts
    assert [[one.cause for one in each.earlier] for each in result] == [["SIGKILL"], ["SIGKILL"], []]
    firsts = [each.earlier[0].first for each in result if each.earlier]
    assert firsts == ([True, True] if policy is ONE else [False, True])
    assert result.ok


async def test_a_new_pass_has_a_new_port_and_one_rank_keeps_it() -> None:
    ports: dict[str, list[str]] = {}
    for policy in (ONE, ALL):
        result = await supervise(
            sh("echo $MASTER_PORT $AIOELASTIC_MASTER_PORT; " + until(2)), logs=QUIET, restart=policy
        )
        texts = [*(str(one.stdout) for one in result[0].earlier), str(result[0].stdout)]
        assert all(len(set(text.split())) == 1 for text in texts)
        ports[policy.scope] = [text.split()[0] for text in texts]
    assert len(set(ports["one"])) == 1
    assert ports["all"][0] != ports["all"][1] != ports["all"][2]


@pytest.mark.parametrize("policy", [ONE, ALL], ids=["one", "all"])
async def test_the_attempt_is_told_to_the_worker(policy: Restart) -> None:
    script = "echo $AIOELASTIC_ATTEMPT $TORCHELASTIC_RESTART_COUNT $TORCHELASTIC_MAX_RESTARTS $RANK $WORLD_SIZE; "
    result = await supervise(sh(script + until(2)), n=2, logs=QUIET, restart=policy)
    for rank, each in enumerate(result):
        failed = [str(one.stdout) for one in each.earlier]
        assert str(each.stdout) == f"2 2 3 {rank} 2\n"
        assert set(failed) <= {f"{i} {i} 3 {rank} 2\n" for i in (0, 1)}


# --- what a worker leaves behind ---


@pytest.mark.parametrize("policy", [ONE, ALL], ids=["one", "all"])
@pytest.mark.parametrize("how", ["", "setsid ", "holding "])
async def test_what_an_attempt_left_running_is_gone_before_the_next(policy: Restart, how: str, tmp_path: Path) -> None:
    away = "" if how == "holding " else ">/dev/null 2>&1 "
    stray = f"{how.replace('holding ', 'setsid ')}sleep 1000 {away}& echo $! > {tmp_path}/pid"
    # dead, or a zombie that nobody has reaped yet
    check = f'case "$(cut -d" " -f3 /proc/$(cat {tmp_path}/pid)/stat 2>/dev/null)" in ""|Z|X) exit 0;; esac; exit 9'
    script = f'[ "$AIOELASTIC_ATTEMPT" = 1 ] && {{ {check}; }}; {stray}; exit 3'
    seen: list[Event] = []
    result = await supervise(sh(script), logs=QUIET, restart=policy, on_event=seen.append)
    assert result.ok
    assert result[0].attempt == 1
    (leaked,) = [one for one in seen if isinstance(one, Leaked)]
    assert leaked.process.pid == int((tmp_path / "pid").read_text())
    kinds = [type(one) for one in seen]
    assert kinds.index(Leaked) < kinds.index(Restarting)


async def test_scope_leader_leaves_them_alone_and_reports_them_once() -> None:
    script = until(1, code=3, then="exit 0").replace("exit 3", "{ setsid sleep 1000 >/dev/null 2>&1 & exit 3; }")
    result = await supervise(sh(script), logs=QUIET, restart=ONE, stop=Stop(scope="leader"))
    assert result.ok
    (stray,) = result.leaked
    os.kill(stray.pid, signal.SIGKILL)
    await gone(stray.pid)


# --- files, lines, reports ---


@pytest.mark.parametrize("policy", [ONE, ALL], ids=["one", "all"])
async def test_each_attempt_has_its_own_files(policy: Restart, tmp_path: Path) -> None:
    script = "echo out $RANK $AIOELASTIC_ATTEMPT; echo err $AIOELASTIC_ATTEMPT >&2; printf loss; "
    entry = [sh(script), sh(script + until(2))]
    logs = Logs(dir=tmp_path, tee=Std.NONE, match=Match("o", file="o.log"), rotate=Rotate(), prefix="{rank}.{attempt} ")
    result = await supervise(entry, logs=logs, restart=policy)
    assert result.log_dir is not None
    both = range(3) if policy is ALL else range(1)
    for attempt in range(3):
        home = result.log_dir / f"attempt_{attempt}"
        ranks = [0, 1] if attempt in both else [1]
        merged = (home / "o.log").read_text().splitlines()
        for rank in ranks:
            out, err = ((home / f"{rank}/std{one}.log").read_text() for one in ("out", "err"))
            if attempt < 2 and policy is ALL and rank == 0:  # it may have been stopped before it had said all
                assert f"out 0 {attempt}\nloss".startswith(out)
            else:
                assert (out, err) == (f"out {rank} {attempt}\nloss", f"err {attempt}\n")
            mine = [one for one in merged if one.startswith(f"{rank}.{attempt} ")]
            assert mine == [f"{rank}.{attempt} {one}" for one in out.splitlines()]
    assert sorted(os.listdir(result.log_dir)) == ["attempt_0", "attempt_1", "attempt_2"]
    assert result[1].stdout.path == result.log_dir / "attempt_2/1/stdout.log"
    assert [one.stdout.path for one in result[1].earlier] == [
        result.log_dir / f"attempt_{i}/1/stdout.log" for i in (0, 1)
    ]
    assert result[1].stdout.lost == 0


async def test_ranks_that_reach_an_attempt_one_after_another_share_its_merged_file(tmp_path: Path) -> None:
    """Its first user has long gone on when the second comes: the file goes on too."""
    entry = [sh("echo $RANK $AIOELASTIC_ATTEMPT; " + until(2, SLEEP)), sh("echo $RANK $AIOELASTIC_ATTEMPT; " + SLEEP)]
    async with Group(entry, logs=Logs(dir=tmp_path, tee=Std.NONE, match=Match(), prefix=""), restart=ONE) as group:
        home = group.plan.run_dir if group.plan is not None else None
        assert home is not None
        wanted = [b"0 2", b"1 0", b"1 1", b"1 2"]
        feed = group.lines()
        seen: list[bytes] = []
        async for line in feed:
            seen.append(line.data)
            if line.data == b"0 2" or line.data[:1] == b"1":
                if b"0 2" in seen and b"1 0" in seen and b"1 2" not in seen:
                    group[1].send_signal(signal.SIGKILL)
                if set(wanted) <= set(seen):
                    break
        await group.stop()
    for attempt in range(3):
        lines = sorted((home / f"attempt_{attempt}/matched.log").read_text().splitlines())
        assert lines == [f"0 {attempt}", f"1 {attempt}"]


async def test_every_failure_has_its_own_report(tmp_path: Path) -> None:
    code = (
        "import json, os, time\n"
        "text = 'E' + os.environ['AIOELASTIC_ATTEMPT']\n"
        "report = {'aioelastic': {'message': text, 'traceback': '', 'time': time.time()}}\n"
        "open(os.environ['AIOELASTIC_ERROR_FILE'], 'w').write(json.dumps(report))\n"
        "os._exit(1)"
    )
    for logs in (QUIET, Logs(dir=tmp_path, tee=Std.NONE)):
        result = await supervise(py(code), logs=logs, restart=ONE, check=False)
        failures = [*result[0].earlier, *result.failures]
        assert [one.error.message for one in failures if one.error] == ["E0", "E1", "E2", "E3"]
        if result.log_dir is not None:
            assert all((result.log_dir / f"attempt_{i}/0/error.json").is_file() for i in range(4))


async def test_who_had_raised_before_it_was_stopped_failed_in_that_attempt() -> None:
    """Rank 0 raises first and ends last: it is the first failure of the first attempt, and no more."""
    code = (
        "import json, os, signal, sys, time\n"
        "if os.environ['AIOELASTIC_ATTEMPT'] == '1': sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(1))\n"
        "report = {'aioelastic': {'message': 'bad', 'traceback': '', 'time': time.time()}}\n"
        "open(os.environ['AIOELASTIC_ERROR_FILE'], 'w').write(json.dumps(report))\n"
        "print('raised', flush=True)\n"
        "signal.pause()"
    )
    entry = [py(code), sh(until(1).replace("exit 3", SLEEP))]
    async with Group(entry, logs=QUIET, restart=ALL) as group:
        async for line in group.lines():
            assert line.data == b"raised"
            group[1].send_signal(signal.SIGKILL)
            break
        result = await group.wait()
    assert result.ok
    assert [(one.rank, one.first) for one in result.earlier] == [(0, True), (1, False)]


async def test_lines_go_on_and_prefixes_tell_the_attempt(tmp_path: Path) -> None:
    called: list[tuple[int, bytes]] = []
    logs = Logs(tee=Std.NONE, callback=lambda line: called.append((line.rank, line.data)))
    async with Group(sh("printf a$AIOELASTIC_ATTEMPT; " + until(2)), n=2, logs=logs, restart=ONE) as group:
        lines = [(line.rank, line.data) async for line in group.lines()]
    for rank in (0, 1):
        assert [data for r, data in lines if r == rank] == [b"a0", b"a1", b"a2"]
        assert [data for r, data in called if r == rank] == [b"a0", b"a1", b"a2"]


async def test_a_log_directory_that_is_gone_is_made_again(tmp_path: Path) -> None:
    script = until(1, "echo here").replace("exit 3", f"{{ rm -rf {tmp_path}/runs; exit 3; }}")
    result = await supervise(sh(script), logs=Logs(dir=tmp_path / "runs", tee=Std.NONE), restart=ONE)
    assert result.ok
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_text() == "here\n"


@pytest.mark.parametrize("rotate", [None, Rotate(size=4)])
async def test_files_that_cannot_be_made_are_told_and_the_attempt_goes_on(
    rotate: Rotate | None, tmp_path: Path
) -> None:
    """A file stands where the directory should be: the bytes are counted, the worker is not hurt."""
    seen: list[Event] = []
    blocks = 'touch "${AIOELASTIC_ERROR_FILE%/attempt_0/*}/attempt_1"; exit 3'
    script = f'[ "$AIOELASTIC_ATTEMPT" = 1 ] && {{ echo 45678; exit 0; }}; {blocks}'
    logs = Logs(dir=tmp_path, tee=Std.NONE, rotate=rotate, match=Match())
    result = await supervise(sh(script), logs=logs, restart=ONE, on_event=seen.append)
    assert result.ok
    assert str(result[0].stdout) == "45678\n"
    assert result[0].stdout.lost == 6
    troubles = [one for one in seen if isinstance(one, SinkTrouble)]
    assert {Path(one.sink).name for one in troubles} == {"matched.log", "stderr.log", "stdout.log"}
    assert [one.lost for one in troubles if one.sink == str(result[0].stdout.path)] == [0, 6]
    assert {one.problem for one in troubles} == {"Not a directory"}


# --- refused by the system ---


def refusing(refuses: Callable[[int, int], bool]) -> FakeLauncher:
    """Refuses what `refuses(rank, attempt)` says, as a system that is out of processes does."""
    no = Life(refused=BlockingIOError(11, "Resource temporarily unavailable"))
    real = DirectLauncher(dict(os.environ))
    return FakeLauncher(lambda one: no if refuses(one.rank, one.attempt) else None, otherwise=real)


@pytest.mark.parametrize("policy", [ONE, ALL], ids=["one", "all"])
async def test_a_first_start_that_is_refused_is_final(policy: Restart) -> None:
    launcher = refusing(lambda rank, attempt: rank == 1)
    result = await supervise(sh(SLEEP), n=3, logs=QUIET, restart=policy, launcher=launcher, check=False)
    assert [(one.rank, one.attempt) for one in result.failures] == [(1, 0)]
    assert "temporarily unavailable" in result.failures[0].cause
    assert result.earlier == ()


@pytest.mark.parametrize("policy", [ONE, ALL], ids=["one", "all"])
async def test_a_later_start_that_is_refused_is_a_failed_attempt(policy: Restart) -> None:
    seen: list[Event] = []
    launcher = refusing(lambda rank, attempt: rank == 1 and attempt in (1, 2))
    entry = [sh(until(0)), sh(until(3)), sh(until(0))]
    result = await supervise(entry, logs=QUIET, restart=policy, launcher=launcher, on_event=seen.append)
    assert result.ok
    assert result[1].attempt == 3
    causes = [one.cause for one in result[1].earlier]
    assert causes[0] == "exit code 3"
    assert all("temporarily unavailable" in one for one in causes[1:])
    assert len(causes) == 3
    assert [one.pid is None for one in result[1].earlier] == [False, True, True]
    told = [one for one in seen if isinstance(one, Restarting) and one.rank == 1]
    assert "could not start" in told[1].reason


async def test_refused_for_ever_is_given_up() -> None:
    seen: list[Event] = []
    launcher = refusing(lambda rank, attempt: attempt > 0)
    with pytest.raises(GroupFailed) as caught:
        await supervise(sh("exit 3"), logs=QUIET, restart=ONE, launcher=launcher, on_event=seen.append)
    result = caught.value.result
    assert [one.attempt for one in result[0].earlier] == [0, 1, 2]
    assert result.failures[0].attempt == 3
    assert "temporarily unavailable" in result.failures[0].cause
    assert [one.attempts for one in seen if isinstance(one, GaveUp)] == [4]


async def test_the_program_of_a_later_attempt_may_be_gone(tmp_path: Path) -> None:
    program = tmp_path / "prog"
    program.write_text("#!/bin/sh\nrm $0\nexit 3\n")
    program.chmod(0o755)
    result = await supervise(Command(program), logs=QUIET, restart=ONE, check=False)
    assert result[0].attempt == 3
    assert "No such file" in result.failures[0].cause


# --- stopped ---


async def test_a_timeout_ends_all_attempts() -> None:
    with pytest.raises(GroupTimeout) as caught:
        await supervise(sh(until(1, SLEEP)), n=2, logs=QUIET, restart=ONE, timeout=0.2)
    assert caught.value.result.reason == "timeout"


async def test_one_rank_gives_up_while_another_begins_again() -> None:
    """The failure that was to be answered by a new attempt is not the reason of the end."""
    seen: list[Event] = []
    policy = Restart.on_failure(max=1)
    async with Group(sh(SLEEP), n=2, logs=QUIET, restart=policy, on_event=seen.append, check=False) as group:
        kill_and_see_it_dead(group[1].pid, signal.SIGKILL)
        await event_of(group, Spawned, attempt=1)
        pids, guardian = [*group.pids.values()], psutil.Process(group[0].pid).parent()
        for pid in pids:
            kill_and_see_it_dead(pid, signal.SIGKILL)
        while any(map(psutil.pid_exists, pids)) or guardian.status() != "sleeping":
            pass  # it has not told us of both
        result = await group.wait()
    assert result.reason == "failed"
    assert [(one.rank, one.attempt) for one in result.failures] == [(1, 1)]
    assert [(one.rank, one.attempt) for one in result.earlier] == [(0, 0), (1, 0)]
    assert result[0].failure is None
    assert result[0].attempt == 0
