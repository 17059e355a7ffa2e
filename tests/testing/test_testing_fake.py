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
from aioelastic.testing._fake_launcher import FakeLauncher, Life
from aioelastic.testing._recorder import Recorder

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
    assert str(group[0].exit) == "stopped (SIGTERM): exit code 0"


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
        ("Life.handles", {"handles": {signal.SIGSTOP: (1.0, 0)}}),
        ("Life.handles", {"handles": {signal.SIGTERM: 1.0}}),
        ("Life.handles", {"handles": {signal.SIGTERM: (1.0,)}}),
        ("Life.handles", {"handles": {signal.SIGTERM: (1.0, 256)}}),
        ("Life.handles", {"handles": [signal.SIGTERM]}),
        ("Life.ignores", {"ignores": signal.SIGTERM}),
        ("Life.ignores", {"ignores": "SIGTERM"}),
        ("Life.ignores", {"ignores": {"SIGNONE"}}),
        ("Life.ignores", {"ignores": {99}}),
        ("Life.ignores", {"ignores": {signal.SIGKILL}}),
        ("Life.ignores", {"ignores": range(20)}),
        ("Life.code", {"code": -signal.SIGSTOP}),
        ("Life.refused", {"refused": "no"}),
    ],
)
def test_wrong_lives(field: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        Life(**wrong)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "wrong", "otherwise"),
    [
        ("life", 3, None),
        ("life[1]", {0: Life(), 1: None}, None),
        ("rank of life", {"0": Life()}, None),
        ("rank of life", {-1: Life()}, None),
        ("otherwise", None, "guardian"),
    ],
)
def test_wrong_launchers(field: str, wrong: Any, otherwise: Any) -> None:
    with pytest.raises(SpecError) as caught:
        FakeLauncher(wrong, otherwise)
    assert caught.value.field == field


async def test_a_function_that_gives_no_life() -> None:
    wrong: Any = lambda worker: 3  # noqa: E731
    with pytest.raises(SpecError, match=r"^life=3 of rank 0 is no Life; give one like"):
        await supervise(TRUE, logs=QUIET, launcher=FakeLauncher(wrong))


# --- misused ---


async def test_names_of_signals_are_signals() -> None:
    words: Any = {"ignores": {"SIGTERM", "HUP"}, "handles": {"SIGCONT": (0.0, 4), "TSTP": (0.0, 5)}}
    launcher = FakeLauncher(Life(lasts=None, **words))
    async with Group(TRUE, n=2, logs=QUIET, launcher=launcher, stop=Stop(grace=0), check=False) as group:
        for signum in (signal.SIGTERM, signal.SIGHUP):
            launcher[0].send_signal(signum)
        group[0].send_signal(signal.SIGCONT)
        assert str(await group[0].wait()) == "exit code 4"
        group[1].send_signal(signal.SIGTSTP)
        await group.wait()
    assert launcher[0].signals == [signal.SIGTERM, signal.SIGHUP, signal.SIGCONT]


@pytest.mark.parametrize("what", [lambda one: one.exit(), lambda one: one.write(b"more")], ids=["exit", "write"])
async def test_what_has_ended_does_nothing_more(what: Any) -> None:
    launcher = FakeLauncher({0: FOR_EVER, 1: Life(lasts=0.0, code=-9), 2: FOR_EVER})
    async with Group(TRUE, n=3, logs=QUIET, launcher=launcher, check=False) as group:
        launcher[0].exit(7)
        with pytest.raises(
            RuntimeError, match=r"rank 0 \(attempt 0\) cannot .*: it has ended already, with exit code 7$"
        ):
            what(launcher[0])
        await group.wait()
        assert group[0].exit is not None
        assert group[0].exit.code == 7
        for rank, end in ((1, "SIGKILL"), (2, "SIGTERM")):
            with pytest.raises(RuntimeError, match=f"rank {rank} .* ended already, with {end}$"):
                what(launcher[rank])


@pytest.mark.parametrize("what", [lambda one: one.exit(), lambda one: one.write(b"more")], ids=["exit", "write"])
async def test_what_was_given_up_does_nothing_more(what: Any) -> None:
    launcher = FakeLauncher(Life(undying=True))
    async with Group(TRUE, logs=QUIET, launcher=launcher, stop=Stop(grace=0, bound=0), check=False) as group:
        pass
    with pytest.raises(RuntimeError, match="its group has given it up"):
        what(launcher[0])
    assert [one.rank for one in (await group.wait()).unkillable] == [0]


async def test_an_undying_one_ends_when_it_is_told_to() -> None:
    launcher = FakeLauncher(Life(undying=True))
    async with Group(TRUE, logs=QUIET, launcher=launcher, check=False) as group:
        group[0].send_signal(signal.SIGKILL)
        launcher[0].exit(-signal.SIGKILL)
        assert str(await group[0].wait()) == "SIGKILL"


async def test_of_another_thread() -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, logs=QUIET, launcher=launcher, check=False) as group:
        with pytest.raises(RuntimeError, match=r"in the thread of its loop only: use loop\.call_soon_thr"):
            await asyncio.to_thread(launcher[0].exit)
        await asyncio.to_thread(asyncio.get_running_loop().call_soon_threadsafe, launcher[0].exit, 3)
        assert str(await group[0].wait()) == "exit code 3"


def test_of_a_loop_that_is_closed() -> None:
    launcher = FakeLauncher(FOR_EVER)
    loop = asyncio.new_event_loop()
    group = Group(TRUE, logs=QUIET, launcher=launcher)
    loop.run_until_complete(group.__aenter__())
    other = FakeLauncher(FOR_EVER)
    assert group.plan is not None

    async def start() -> Any:
        return await other.start(group.plan.workers[0])  # type: ignore[union-attr]

    process = loop.run_until_complete(start())
    loop.run_until_complete(group.__aexit__(None, None, None))
    loop.close()
    with pytest.raises(RuntimeError, match="its event loop is closed"):
        process.exit()
    process.abandon()
    for fd in (process.stdout, process.stderr):
        os.close(fd)


async def test_outside_of_a_group() -> None:
    launcher = FakeLauncher({0: Life(lasts=None), 3: Life(lasts=None)}, otherwise=DirectLauncher(dict(os.environ)))
    with pytest.raises(IndexError, match=r"^no fake process of rank 0 was started; .*: none$"):
        launcher[0]
    with pytest.raises(SpecError, match="is no plan; give the launcher to Group"):
        launcher.start(3)  # type: ignore[arg-type]
    async with Group(sh("exec sleep 1000"), n=4, logs=QUIET, launcher=launcher) as group:
        with pytest.raises(IndexError, match=r"^no fake process of rank 1 was started; .*: 0, 3$"):
            launcher[1]
        assert group.plan is not None
        planned = group.plan.workers[0]
        with pytest.raises(RuntimeError, match="give the launcher to Group"):
            await asyncio.to_thread(launcher.start, planned)
    assert len(launcher.started) == 2


@pytest.mark.parametrize("signum", [99, -1, "SIGNONE", None, 9.5])
async def test_a_signal_that_there_is_not(signum: Any) -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, logs=QUIET, launcher=launcher) as group:
        for send in (launcher[0].send_signal, launcher[0].signal_group, group[0].send_signal):
            with pytest.raises(SpecError, match="is not a signal of this system"):
                send(signum)
        assert launcher[0].send_signal(0)
    assert launcher[0].signals == [0, signal.SIGTERM]


@pytest.mark.parametrize("code", [256, -65, True, "0", -signal.SIGCONT])
async def test_an_end_that_there_is_not(code: Any) -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, logs=QUIET, launcher=launcher):
        with pytest.raises(SpecError, match="is no way to end"):
            launcher[0].exit(code)


async def test_what_cannot_be_written() -> None:
    launcher = FakeLauncher(FOR_EVER)
    async with Group(TRUE, logs=QUIET, launcher=launcher) as group:
        with pytest.raises(SpecError, match="is not bytes"):
            launcher[0].write("text")  # type: ignore[arg-type]
        data = bytes(1_048_576)
        with pytest.raises(BlockingIOError, match=r"rank 0 had written: \d+ of 1048576 bytes") as caught:
            launcher[0].write(data)
        assert 0 < caught.value.characters_written < len(data)
        with pytest.raises(BlockingIOError, match=r": 0 of 3 bytes") as nothing:
            launcher[0].write(b"one")
        assert nothing.value.characters_written == 0
    result = await group.wait()
    assert result[0].stdout.total == caught.value.characters_written


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
