"""Groups that are stopped, cancelled or killed in the middle of a restart: nothing starts and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from group_chaos import disturb
from helpers import QUIET, child_process, kill_and_see_it_dead, sh

from aioelastic import Group, GroupResult, Logs, Match, Restart, Std, Stop, supervise
from aioelastic.events import Drained, Event, Exited, GroupDone, Killed, Restarting, SinkTrouble, Spawned
from aioelastic.launch import DirectLauncher
from aioelastic.model.states import FINAL
from aioelastic.testing._fake_launcher import FakeLauncher, Life
from aioelastic.testing._misbehaving_workers import stubborn
from aioelastic.testing._recorder import Recorder

SLEEP = "exec sleep 1000"
SCOPES = [Restart.on_failure(max=50, scope="one"), Restart.on_failure(max=50, scope="all")]
both = pytest.mark.parametrize("policy", SCOPES, ids=["one", "all"])


def of_attempt(event: Event, kind: type[Event], attempt: int) -> bool:
    return isinstance(event, kind) and event.attempt == attempt


def at_rest(group: Group) -> None:
    assert all(worker.state in FINAL for worker in group)
    assert group.pids == {}


MOMENTS: list[tuple[type[Event], int]] = [
    (Exited, 0),
    (Drained, 0),
    (Restarting, 0),
    (Spawned, 1),
    (Exited, 1),
    (Restarting, 1),
]


@pytest.mark.long
@both
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda one: f"{one[0].__name__}{one[1]}")
@pytest.mark.parametrize("what", ["stop", "cancel", "hurry", "soon"])
async def test_stopped_in_the_middle_of_a_restart(
    policy: Restart, moment: tuple[type[Event], int], what: str, tmp_path: Path
) -> None:
    seen: list[Event] = []
    struck = 0

    def strike(event: Event) -> None:
        nonlocal struck
        seen.append(event)
        if struck or not of_attempt(event, *moment):
            return
        struck = len(seen)
        if what == "cancel":
            task.cancel()
        elif what == "soon":
            asyncio.get_running_loop().call_soon(group.begin_stop)
        else:
            group.begin_stop()
        if what == "hurry":
            group.hurry()

    logs = Logs(dir=tmp_path, tee=Std.NONE, match=Match())
    group = Group([sh("exit 3"), sh(SLEEP)], logs=logs, restart=policy, on_event=strike, check=False)

    async def main() -> GroupResult:
        async with group:
            return await group.wait()

    task = asyncio.create_task(main())
    result = None
    with contextlib.suppress(asyncio.CancelledError):
        result = await task
    assert struck
    at_rest(group)
    result = await group.wait()
    assert result.reason == "stopped"
    assert isinstance(seen[-1], GroupDone)
    if what in ("stop", "hurry"):
        late = [one for one in seen[struck:] if isinstance(one, Restarting | Spawned)]
        # a start that is under way cannot be taken back: it is stopped at once
        together = moment[0] is Exited or (moment[0] is Spawned and policy.scope == "all")
        assert [type(one) for one in late] in ([[], [Spawned]] if together else [[]])
    # a failure within the limits is told as such, however close it came to the stop
    assert result.ok
    attempts = [one.attempt for one in result[0].earlier]
    assert attempts == list(range(len(attempts)))
    assert attempts
    if result[0].exit is not None:
        assert (result[0].attempt in attempts) == (result[0].exit.stopped_by is None)


@both
async def test_leaving_the_block_between_two_attempts(policy: Restart) -> None:
    seen: list[Event] = []
    async with Group(sh("exit 3"), n=2, logs=QUIET, restart=policy, on_event=seen.append) as group:
        async for event in group.events():
            if isinstance(event, Drained):
                break
    at_rest(group)
    assert isinstance(seen[-1], GroupDone)
    assert (await group.wait()).ok


BLOWS = ["worker", "all", "stop", "cancel", "hurry"]


@pytest.mark.long
@both
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("first", BLOWS)
async def test_a_random_party_dies_at_a_random_event(policy: Restart, first: str, seed: int, tmp_path: Path) -> None:
    dice = random.Random(f"{first} {seed}")
    strikes = {dice.randrange(5, 60): dice.choice(BLOWS) for _ in range(3)}
    strikes[dice.randrange(1, 4)] = first  # the last rank starts after that
    count = 0
    task: asyncio.Task[Any] | None = None
    seen: list[Event] = []
    struck_by: set[str] = set()

    def strike(event: Event) -> None:
        nonlocal count
        seen.append(event)
        count += 1
        what = strikes.pop(count, None)
        if what is not None and disturb(what, group, task, dice):
            struck_by.add(what)
            (tmp_path / "struck").touch()
        elif what is not None:
            strikes[count + 1] = what  # there was nobody

    tree = "sleep 1000 & setsid sleep 1000 & sleep 1000 >/dev/null 2>&1 & "
    endings = ["exit 0", "exit 3", "kill -9 $$", '[ "$AIOELASTIC_ATTEMPT" -ge 3 ] || exit 1']
    plans = [(tree if dice.random() < 0.3 else "") + dice.choice(endings) for _ in range(4)]
    plans[3] = f"until [ -e {tmp_path}/struck ]; do sleep 0.01; done; {plans[3]}"
    group = Group(
        [sh(one) for one in plans],
        logs=Logs(dir=tmp_path / "logs", tee=Std.NONE, match=Match()),
        restart=Restart.on_failure(max=5, scope=policy.scope),
        stop=Stop(grace=0.2),
        on_event=strike,
        check=False,
    )

    async def main() -> None:
        async with group:
            await group.wait()

    task = asyncio.create_task(main())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert first in struck_by
    at_rest(group)
    result = await group.wait()
    for rank, one in enumerate(result):
        mine = [event for event in seen if event.rank == rank]
        starts = [event.attempt for event in mine if isinstance(event, Spawned)]
        assert starts == sorted(set(starts))
        assert one.attempt <= 5
        # each attempt is over before the next begins
        last = -1
        for event in mine:
            if isinstance(event, Restarting):
                assert event.attempt is not None
                assert event.next_attempt == event.attempt + 1
                last = event.attempt
            elif event.attempt is not None:
                assert event.attempt > last
        assert [past.attempt for past in one.earlier] == sorted({past.attempt for past in one.earlier})


class Striking(DirectLauncher):
    """Kills what it starts before anybody knows of it."""

    kills: Callable[[int, int], bool]

    def start(self, worker: Any) -> Any:
        started = super().start(worker)
        if self.kills(worker.rank, worker.attempt):
            kill_and_see_it_dead(started.result().pid, signal.SIGKILL)
        return started


@both
async def test_killed_while_it_starts(policy: Restart) -> None:
    launcher = Striking(dict(os.environ))
    launcher.kills = lambda rank, attempt: rank == 1 and 0 < attempt < 4
    script = 'case "$AIOELASTIC_ATTEMPT" in 0) exit 3;; 4) exit 0;; *) exec sleep 1000;; esac'
    result = await supervise([sh("exit 0"), sh(script)], logs=QUIET, restart=policy, launcher=launcher)
    assert result.ok
    assert [one.cause for one in result[1].earlier] == ["exit code 3", "SIGKILL", "SIGKILL", "SIGKILL"]
    assert result[1].attempt == 4


@both
async def test_fifty_restarts_hold_no_more_than_one(policy: Restart, tmp_path: Path) -> None:
    """Descriptors, threads, tasks and readers are the same at each start; every attempt's bytes are in its file."""
    held: list[tuple[int, int, int]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Spawned) and event.rank == 1 and event.attempt:
            fds, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
            held.append((fds, threading.active_count(), tasks))

    script = 'echo "$AIOELASTIC_ATTEMPT"; [ "$AIOELASTIC_ATTEMPT" -ge 50 ]'
    logs = Logs(dir=tmp_path, tee=Std.NONE, match=Match())
    result = await supervise(sh(script), n=2, logs=logs, restart=policy, on_event=watch)
    assert result.ok
    assert [one.attempt for one in result] == [50, 50]
    assert result.log_dir is not None
    for attempt in range(51):
        home = result.log_dir / f"attempt_{attempt}"
        if policy.scope == "one":
            assert [(home / f"{rank}/stdout.log").read_text() for rank in (0, 1)] == [f"{attempt}\n"] * 2
        assert (home / "1/stdout.log").is_file()
    assert len(held) == 50
    assert len({threads for _, threads, _ in held}) == 1
    # the other rank is somewhere between its exit and its next start: a few more or less; a leak would be 40 more
    early, late = held[:10], held[-10:]
    for which in (0, 2):
        assert max(one[which] for one in late) <= max(one[which] for one in early) + 10


def _is_epoll(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventpoll]"
    except FileNotFoundError:  # that of the listing itself
        return False


@both
async def test_alone_fifty_restarts_hold_exactly_the_same(policy: Restart, tmp_path: Path) -> None:
    held: list[tuple[set[str], int]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Spawned) and event.attempt:
            # the epoll(7) is there or not: of a worker that has ended by now, nothing is waited for
            fds = {fd for fd in os.listdir("/proc/self/fd") if not _is_epoll(fd)}
            held.append((fds, len(asyncio.all_tasks())))

    logs = Logs(dir=tmp_path, tee=Std.NONE, match=Match())
    result = await supervise(
        sh('[ "$AIOELASTIC_ATTEMPT" -ge 50 ]'), logs=logs, restart=policy, on_event=watch, check=False
    )
    assert result.ok
    assert len(held) == 50
    assert len({len(fds) for fds, _ in held}) == 1
    assert len({tasks for _, tasks in held}) == 1


@both
async def test_the_loop_cancels_all_tasks_between_two_attempts(policy: Restart) -> None:
    """What the end of `asyncio.run` does: a task that is cancelled before its first step does nothing at all."""
    seen: list[Event] = []
    me = asyncio.current_task()

    def watch(event: Event) -> None:
        seen.append(event)
        if of_attempt(event, Drained, 1):
            for later in range(4):
                cancel_all(later)

    def cancel_all(later: int) -> None:
        if later:
            asyncio.get_running_loop().call_soon(cancel_all, later - 1)
            return
        for task in asyncio.all_tasks() - {me}:
            task.cancel()

    group = Group(sh("exit 3"), logs=QUIET, restart=policy, on_event=watch, check=False)
    async with group:
        result = await group.wait()
    at_rest(group)
    assert result.reason == "stopped"
    assert not [one for one in seen if of_attempt(one, Spawned, 2)]


@both
@pytest.mark.parametrize("attempt", [0, 1])
async def test_a_launcher_that_raises_ends_the_group_with_its_error(policy: Restart, attempt: int) -> None:
    """Its error belongs into the future, but who writes a launcher will not always know."""

    class Raising(DirectLauncher):
        def start(self, worker: Any) -> Any:
            if worker.rank == 1 and worker.attempt == attempt:
                raise ZeroDivisionError("a bug")
            return super().start(worker)

    launcher = Raising(dict(os.environ))
    entry = [sh(SLEEP), sh("exit 3"), sh(SLEEP)]
    group = Group(entry, logs=QUIET, restart=policy, launcher=launcher)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        async with asyncio.timeout(150), group:
            await group.wait()
    at_rest(group)


@both
async def test_a_launcher_that_breaks_ends_the_group_with_its_error(policy: Restart) -> None:
    seen: list[Event] = []
    entry = [sh("exit 3"), sh(SLEEP)]
    bug = Life(refused=ZeroDivisionError("a bug"))
    launcher = FakeLauncher(lambda one: bug if one.attempt else None, otherwise=DirectLauncher(dict(os.environ)))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        async with Group(entry, logs=QUIET, restart=policy, launcher=launcher, on_event=seen.append) as group:
            await group.wait()
    at_rest(group)
    assert isinstance(seen[-1], GroupDone)


async def test_no_new_pass_beside_a_worker_that_would_not_die() -> None:
    """Rank 0 does not feel SIGKILL, as a process in uninterruptible sleep does not."""
    recorder = Recorder()
    launcher = FakeLauncher({0: Life(undying=True)}, otherwise=DirectLauncher(dict(os.environ)))
    result = await supervise(
        sh("exit 3"),
        n=2,
        logs=QUIET,
        stop=Stop(grace=0.01, bound=0.01),
        restart=SCOPES[1],
        launcher=launcher,
        on_event=recorder,
        check=False,
    )
    assert [one.rank for one in result.unkillable] == [0]
    assert result.reason == "failed"
    assert [(one.rank, one.cause) for one in result.failures] == [(1, "exit code 3")]
    assert result.earlier == ()
    recorder.never("restarting", "gave up")


async def test_a_disk_that_hangs_does_not_keep_a_restart_from_being_stopped(tmp_path: Path) -> None:
    """The files of the new attempt cannot be made; the group ends within its bound, and tells."""
    gate = threading.Event()
    seen: list[Event] = []

    def watch(event: Event) -> None:
        seen.append(event)
        if of_attempt(event, Exited, 0):
            group._supervisor.resources._files.put(lambda: gate.wait() and None)
        elif of_attempt(event, Drained, 0):
            asyncio.get_running_loop().call_later(0.02, group.begin_stop)

    before = set(threading.enumerate())
    logs = Logs(dir=tmp_path, tee=Std.NONE)
    group = Group(sh("exit 3"), logs=logs, stop=Stop(bound=0.05), restart=SCOPES[0], on_event=watch, check=False)
    try:
        async with group:
            result = await group.wait()
        assert result.reason == "stopped"
        assert "hangs" in next(one.problem for one in seen if isinstance(one, SinkTrouble))
        assert not [one for one in seen if isinstance(one, Restarting)]
    finally:
        gate.set()
        for thread in set(threading.enumerate()) - before:
            thread.join()


@both
async def test_hurry_holds_for_later_attempts(policy: Restart) -> None:
    """Who has no patience at the first attempt has none at the second."""
    seen: list[Event] = []
    entry = [stubborn(), sh(f'[ "$AIOELASTIC_ATTEMPT" -ge 1 ] || exit 3; {SLEEP}')]
    async with Group(entry, logs=QUIET, restart=policy, stop=Stop(grace=3600), on_event=seen.append) as group:
        group.hurry()
        async for event in group.events():
            if of_attempt(event, Spawned, 1) and event.rank == 1:
                break
    assert [one for one in seen if isinstance(one, Killed)]


def test_ctrl_c_during_endless_restarts() -> None:
    """The command line is interrupted while it begins again and again: it ends, and nothing begins any more."""
    for scope in ("one", "all"):
        command = [sys.executable, "-m", "aioelastic", "run", "-n", "3", "--max-restarts", "1000", "--prefix", ""]
        command += ["--restart-scope", scope, "--", "sh", "-c", "echo $AIOELASTIC_ATTEMPT; exit 3"]
        with child_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while int(process.stdout.readline()) < 3:
                pass
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=150)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert re.search(r"^rank +pid +attempts +outcome", errors, re.MULTILINE)
        assert "attempt 2: rank " in errors


def test_asyncio_run_that_is_interrupted_between_attempts() -> None:
    code = """
import asyncio, os, signal
from aioelastic import *
from aioelastic.events import Drained
def watch(event):
    if isinstance(event, Drained) and event.attempt == 2 and event.rank == 0:
        os.kill(os.getpid(), signal.SIGINT)
try:
    asyncio.run(supervise(Command("sh", "-c", "exit 3"), n=2, logs=Logs(tee=Std.NONE),
                          restart=Restart.on_failure(max=1000), on_event=watch))
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
