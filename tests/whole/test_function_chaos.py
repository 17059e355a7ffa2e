"""Function workers and executors at random deaths of workers and zygotes, cancellations and stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import jobs
import pytest
from group_chaos import assert_over, disturb
from helpers import QUIET, seen_dead

from aioelastic import Function, Group, Restart, SpecError, Stop, WorkerExecutor, WorkerFailed, supervise
from aioelastic.events import Event
from aioelastic.launch import end_helpers
from aioelastic.testing._chaos import kill, zygote

pytestmark = pytest.mark.fresh

BLOWS = ["worker", "zygote", "cancel", "stop", "hurry", "pause"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("start", "what"),
    [(start, what) for start in ("zygote", "spawn", "fork") for what in BLOWS if start == "zygote" or what != "zygote"],
)
async def test_a_random_party_dies_at_a_random_event(start: Any, what: str) -> None:
    dice = random.Random(f"{start} {what}")
    moment = dice.randrange(12 if what in ("cancel", "stop", "hurry") else 5)  # later, somebody may be gone
    count = done = 0
    task: asyncio.Task[Any] | None = None
    group: Group

    def strike(event: Event) -> None:
        nonlocal count, done
        count += 1
        if count > moment and not done and task is not None:
            done = blow(event)

    def blow(event: Event) -> bool:
        if what == "zygote":
            deadly = kill(zygote)
            deadly(event)
            return bool(deadly.struck)
        return disturb(what, group, task, dice)

    kinds = [Function(jobs.parent), Function(jobs.fails), Function(jobs.sleeps), Function(jobs.vanishes, 0)]
    kinds += [Function(jobs.crashes), Function(jobs.stops_when_asked)]

    async def main() -> None:
        nonlocal group
        group = Group(
            [Function(jobs.sleeps), *(dice.choice(kinds) for _ in range(4))],
            logs=QUIET,
            start=start,
            stop=Stop(grace=0.2),
            restart=Restart.on_failure(max=2, scope=dice.choice(["one", "all"])),
            on_event=strike,
            check=False,
        )
        async with group:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(group.wait(), 1.0)

    task = asyncio.create_task(main())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert done
    assert_over(group)


async def test_cancelled_while_a_zygote_is_warming_up(tmp_path: Path, monkeypatch: Any) -> None:
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow_module.py").write_text(f"open({str(tmp_path / 'gate')!r}).read()")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = asyncio.create_task(supervise(Function(jobs.parent), 2, preload=["slow_module"], logs=QUIET))
    gate = await asyncio.to_thread(os.open, tmp_path / "gate", os.O_WRONLY)  # it is in the middle of its import
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(gate)
    again = await supervise(Function(jobs.parent), preload=["slow_module"], logs=QUIET)  # the same one, warm by now
    assert again.ok


async def test_a_zygote_that_dies_while_it_warms_up(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "deadly_module.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError, match="killed the zygote"):
        await supervise(Function(jobs.parent), 2, preload=["deadly_module"], logs=QUIET)


async def test_junk_on_the_channel() -> None:
    result = await supervise(Function(jobs.talks_nonsense), logs=QUIET, check=False)
    assert result[0].failure is not None
    assert "could not be unpickled here: UnpicklingError" in result[0].failure.cause
    assert (await supervise(Function(jobs.parent), logs=QUIET)).ok


async def test_a_worker_that_is_killed_in_the_middle_of_a_large_result() -> None:
    result = await supervise(Function(jobs.dies_while_it_sends), 2, logs=QUIET, check=False)
    assert result.first_failure is not None
    assert result.first_failure.cause == "SIGKILL"


@pytest.mark.parametrize("seed", range(4))
def test_workers_of_an_executor_die_at_random(seed: int) -> None:
    """Each task ends one way or the other, and only as many are lost as workers were killed."""
    dice = random.Random(seed)
    with WorkerExecutor(3) as executor:
        assert executor.submit(abs, -1).result() == 1  # it has a worker to kill
        futures = []
        killed = 0
        for i in range(300):
            futures.append(executor.submit(abs, -i))
            if dice.random() < 0.03 and executor.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(dice.choice(executor.pids), signal.SIGKILL)
                    killed += 1
        lost = 0
        for i, one in enumerate(futures):
            try:
                assert one.result() == i
            except (WorkerFailed, BrokenExecutor):
                lost += 1
        assert lost <= killed
        assert killed


def test_shutdown_from_a_callback_and_from_many_threads() -> None:
    executor = WorkerExecutor(2)
    executor.submit(abs, -1).add_done_callback(lambda _: executor.shutdown(wait=False))
    threads = [threading.Thread(target=executor.shutdown) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


def test_zygotes_may_be_ended_under_an_executor() -> None:
    with WorkerExecutor(2) as executor:
        for _ in range(3):
            assert executor.submit(abs, -1).result() == 1
            with seen_dead(executor.pids):  # else they may still take the next task
                end_helpers()
        assert executor.submit(abs, -1).result() == 1
