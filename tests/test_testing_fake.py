"""Fake processes live as they are told, and a group cannot tell them from real ones."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
from helpers import QUIET, sh

from aioelastic import Command, Function, Group, GroupFailed, Restart, SpecError, Stop, supervise
from aioelastic.events import Spawned
from aioelastic.launch import DirectLauncher
from aioelastic.testing import FakeLauncher, Life, Recorder

TRUE = Command("true")
FOR_EVER = Life(lasts=None)


async def test_nothing_is_started() -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, n=3, logs=QUIET, launcher=launcher) as group:
        pids = group.pids
        assert [one.pid for one in launcher.started] == [*pids.values()]
        for pid in pids.values():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    assert [one.signals for one in launcher.started] == [[signal.SIGTERM]] * 3


async def test_ends_and_output() -> None:
    for life, end in ((Life(), "exit code 0"), (Life(lasts=0.01, code=-11), "SIGSEGV"), (Life(code=3), "exit code 3")):
        life = replace(life, stdout=b"out\n", stderr=b"err\n")
        result = await supervise(TRUE, logs=QUIET, launcher=FakeLauncher(life), check=False)
        assert (str(result[0].stdout), str(result[0].stderr)) == ("out\n", "err\n")
        assert str(result[0].exit) == end
        assert result[0].usage is None


async def test_much_output() -> None:
    data = bytes(1_048_576)
    result = await supervise(TRUE, logs=QUIET, launcher=FakeLauncher(Life(stdout=data, stderr=data)))
    assert (result[0].stdout.total, result[0].stderr.total) == (len(data), len(data))


async def test_a_function_has_its_value() -> None:
    life = Life(value={"loss": 0.5})
    result = await supervise(Function(print), n=2, start="spawn", logs=QUIET, launcher=FakeLauncher(life))
    assert [one.value for one in result] == [{"loss": 0.5}] * 2


async def test_a_function_that_ends_without_a_value() -> None:
    launcher = FakeLauncher(Life(code=-9))
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await supervise(Function(print), start="spawn", logs=QUIET, launcher=launcher)


async def test_told_to_write_and_to_end() -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, n=2, logs=QUIET, launcher=launcher, check=False) as group:
        lines = group.lines()
        launcher[1].write(b"one\ntwo\n")
        launcher[1].exit(7)
        launcher[1].exit(8)  # once is enough
        result = await group.wait()
        assert [(line.rank, line.text) async for line in lines] == [(1, "one"), (1, "two")]
    assert result.failures[0].cause == "exit code 7"
    assert result[0].stopped


async def test_one_that_ignores_the_signal_is_killed() -> None:
    recorder = Recorder()
    launcher = FakeLauncher(Life(lasts=None, ignores={signal.SIGTERM}))
    async with Group(TRUE, logs=QUIET, launcher=launcher, stop=Stop(grace=0.01), on_event=recorder):
        pass
    recorder.in_order("rank 0 stopping", "rank 0 killed", "rank 0 exited", "group done")
    assert launcher[0].signals[-1] == signal.SIGKILL


async def test_one_that_saves_its_work_first() -> None:
    recorder = Recorder()
    launcher = FakeLauncher(Life(lasts=None, handles={signal.SIGTERM: (0.01, 0)}))
    async with Group(TRUE, logs=QUIET, launcher=launcher, on_event=recorder) as group:
        pass
    recorder.never("killed")
    assert str(group[0].exit) == "exit code 0, stopped by us with SIGTERM"


async def test_one_in_uninterruptible_sleep() -> None:
    launcher = FakeLauncher({0: Life(undying=True), 1: FOR_EVER})
    stop = Stop(grace=0.01, bound=0.01)
    async with Group(TRUE, n=2, logs=QUIET, launcher=launcher, stop=stop, check=False) as group:
        pass
    result = await group.wait()
    assert [(one.rank, one.pid) for one in result.unkillable] == [(0, launcher[0].pid)]
    assert result[1].stopped


async def test_refused() -> None:
    refused = BlockingIOError(errno.EAGAIN, "no more processes")
    lives = {0: FOR_EVER, 1: Life(refused=refused)}
    result = await supervise(TRUE, n=2, logs=QUIET, launcher=FakeLauncher(lives), check=False)
    assert "no more processes" in result.failures[0].cause
    assert result[0].stopped


async def test_some_are_real() -> None:
    def life(worker: Any) -> Life | None:
        return Life(code=3) if worker.rank == 1 and worker.attempt == 0 else None

    launcher = FakeLauncher(life, otherwise=DirectLauncher(dict(os.environ)))
    policy = Restart.on_failure(max=1)
    result = await supervise(sh("echo real"), n=2, logs=QUIET, launcher=launcher, restart=policy)
    assert [str(one.stdout) for one in result] == ["real\n", "real\n"]
    assert [(one.rank, one.attempt, one.cause) for one in result.earlier] == [(1, 0, "exit code 3")]


async def test_group_signals_and_harmless_ones() -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, logs=QUIET, launcher=launcher) as group:
        for signum in (signal.SIGCONT, signal.SIGSTOP, signal.SIGWINCH):
            assert group[0].send_signal(signum)
        await asyncio.sleep(0)
        assert group[0].exit is None
        assert group[0].signal_group(signal.SIGUSR1)
        assert str(await group[0].wait()) == "SIGUSR1"
        assert not launcher[0].send_signal(signal.SIGTERM)
        with pytest.raises(GroupFailed):
            await group.wait()


async def test_without_a_life_and_without_another_launcher() -> None:
    with pytest.raises(SpecError, match="rank 1"):
        await supervise(TRUE, n=2, logs=QUIET, launcher=FakeLauncher({0: FOR_EVER}))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("Life.lasts", {"lasts": -1}),
        ("Life.lasts", {"lasts": float("nan")}),
        ("Life.code", {"code": 256}),
        ("Life.code", {"code": True}),
        ("Life.stdout", {"stdout": "text"}),
        ("Life.stderr", {"stderr": bytes(1_048_577)}),
        ("Life.handles", {"handles": {signal.SIGKILL: (1.0, 0)}}),
        ("Life.handles", {"handles": {signal.SIGTERM: (-1.0, 0)}}),
        ("Life.handles", {"handles": {99: (1.0, 0)}}),
        ("Life.handles", {"handles": [signal.SIGTERM]}),
        ("Life.ignores", {"ignores": signal.SIGTERM}),
        ("Life.refused", {"refused": "no"}),
    ],
)
def test_wrong_lives(field: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        Life(**wrong)
    assert caught.value.field == field


def test_wrong_launcher() -> None:
    with pytest.raises(SpecError, match="is no Life"):
        FakeLauncher(3)  # type: ignore[arg-type]


async def test_out_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that cannot be made is the system's refusal, and what was made before it is closed."""
    real, made = os.pipe2, []

    def pipe2(flags: int) -> tuple[int, int]:
        if made:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(real(flags))
        return made[0]

    launcher = FakeLauncher(FOR_EVER)
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        assert group.plan is not None
        monkeypatch.setattr(os, "pipe2", pipe2)
        future = launcher.start(group.plan.workers[0])
        monkeypatch.undo()
    with pytest.raises(OSError, match="Too many"):
        await future
    assert len(made) == 1
    assert launcher.started == []


async def test_the_same_events_as_with_real_ones() -> None:
    """One story, told with real processes and with fake ones."""
    stories = []
    for fake in (False, True):
        launcher = FakeLauncher({0: FOR_EVER, 1: Life(lasts=0.01, code=3)}) if fake else "guardian"
        recorder = Recorder()
        entry = [sh("exec sleep 1000"), sh("exit 3")]
        await supervise(entry, logs=QUIET, launcher=launcher, on_event=recorder, check=False)
        assert len(recorder.of(Spawned)) == 2
        stories.append(str(recorder))
    assert stories[0] == stories[1]
