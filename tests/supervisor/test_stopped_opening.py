"""What is made ready before the first start (imports of the zygote, looks at the machine) ends with the group, whoever
ends it, and a time-out counts from the call."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import QUIET, sh
from test_executor import Gate

from aioelastic import Function, Group, GroupResult, GroupTimeout, Logs, WorkerExecutor, supervise
from aioelastic.events import Event, GroupDone
from aioelastic.launch import end_helpers
from aioelastic.planning import LaunchPlan
from aioelastic.supervisor.resources import Resources

HANGS = "hangs_while_opening"


class Preload:
    """A module that hangs in its import."""

    def __init__(self, home: Path) -> None:
        self.gate = Gate(home)
        (home / f"{HANGS}.py").write_text(f"open({self.gate.path!r}).read()\nimport signal\nsignal.pause()\n")

    async def hangs(self) -> None:
        """Wait until it does."""
        await asyncio.to_thread(self.gate.entered)
        self.gate.open()


@pytest.fixture
def preload(modules: Path) -> Iterator[Preload]:
    yield Preload(modules)
    end_helpers()  # or the zygote would hang until the end of the tests


def never_started(result: GroupResult, reason: str) -> bool:
    seen = [one.outcome == "never started" and one.pid is None for one in result]
    return len(seen) == 2 and all(seen) and not result.failures and result.reason == reason and result.clean


async def test_a_timeout_counts_from_the_call(preload: Preload) -> None:
    with pytest.raises(GroupTimeout, match="no worker was started by then") as caught:
        await supervise(Function(os.getpid), 2, preload=[HANGS], logs=QUIET, timeout=0.2)
    assert never_started(caught.value.result, "timeout")
    assert caught.value.result.timeout == 0.2


async def test_a_timeout_that_is_over_before_all_is_ready_as_a_result(preload: Preload, tmp_path: Path) -> None:
    logs = Logs(dir=tmp_path / "logs", tee=QUIET.tee)
    result = await supervise(Function(os.getpid), 2, preload=[HANGS], logs=logs, timeout=0.2, check=False)
    assert never_started(result, "timeout")
    assert result.log_dir is None


async def test_a_stop_reaches_an_import_that_hangs(preload: Preload) -> None:
    events: list[Event] = []
    group = Group(Function(os.getpid), 2, logs=QUIET, on_event=events.append, preload=[HANGS])
    entering = asyncio.ensure_future(group.__aenter__())
    await preload.hangs()
    group.begin_stop()
    await entering
    assert (group.pids, [one.pid for one in group]) == ({}, [None, None])
    assert [line async for line in group.lines()] == []
    assert never_started(await group.wait(), "stopped")
    await group.__aexit__(None, None, None)
    assert [type(one) for one in events] == [GroupDone]


async def test_a_stop_reaches_a_file_system_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, answers = threading.Event(), threading.Event()

    def hangs(self: Resources, planned: LaunchPlan, looking: object) -> LaunchPlan:
        looks.set()
        answers.wait()
        return planned

    monkeypatch.setattr(Resources, "_check", hangs)
    group = Group(sh("exit 1"), 2, logs=QUIET)
    entering = asyncio.ensure_future(group.__aenter__())
    try:
        await asyncio.to_thread(looks.wait)
        group.begin_stop()
        await entering
    finally:
        answers.set()
    assert never_started(await group.wait(), "stopped")


async def test_one_that_is_stopped_before_it_is_entered() -> None:
    group = Group(sh("exit 1"), 2, logs=QUIET)
    group.begin_stop()
    async with group:
        assert never_started(await group.wait(), "stopped")


@pytest.mark.parametrize("how", ["timeout", "signal"])
def test_the_command_line(preload: Preload, tmp_path: Path, how: str) -> None:
    (tmp_path / "jobs_of_it.py").write_text("def job(): pass\n")
    options = ["--timeout", "0.2"] if how == "timeout" else []
    command = [sys.executable, "-m", "aioelastic", "run", "-n", "2", "--preload", HANGS, *options]
    child = subprocess.Popen(
        [*command, "-m", "jobs_of_it:job"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    if how == "signal":
        asyncio.run(preload.hangs())
        child.send_signal(signal.SIGINT)
    told = child.communicate(timeout=150)[1]
    assert child.returncode == (124 if how == "timeout" else 130)
    assert told.count("never started") == 2


async def test_leaving_the_block_of_an_executor_that_warms_up(preload: Preload) -> None:
    async def body() -> None:
        async with WorkerExecutor(1, preload=[HANGS]) as executor:
            await executor.run(os.getpid)

    work = asyncio.ensure_future(body())
    await preload.hangs()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
