"""Every wait has a deadline: what hangs costs an answer, never the end of a group."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, event_of, gone, sh, stopped_itself
from helpers_streams import tee_to

from aioelastic import Command, Group, Logs, Placement, Restart, SpecError, Std, Stop, plan, supervise
from aioelastic.events import Exited, Restarting, SinkTrouble
from aioelastic.launch._guardian import Guardian
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.states import State
from aioelastic.planning import _machine_checks
from aioelastic.processes import census as census_module
from aioelastic.processes.census import _see
from aioelastic.processes.proc_files import pipe_holders
from aioelastic.streams import _routing
from aioelastic.supervisor import resources
from aioelastic.system.helper_thread import STUCK, HelperThread
from aioelastic.testing._chaos import guardian

pytestmark = pytest.mark.fresh

SHORT = Stop(grace=0.1, bound=0.3)
SLEEP = Command("/bin/sleep", "600")


class Hang:
    """A call that does not return before `end`, as on a file system that has gone away."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self._end = threading.Event()

    def __call__(self) -> None:
        self.began.set()
        self._end.wait()

    def around(self, real: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                self()
            return real(*args, **kwargs)

        return call

    def end(self) -> None:
        self._end.set()


@pytest.fixture
def hang() -> Iterator[Hang]:
    one = Hang()
    yield one
    one.end()
    for thread in threading.enumerate():  # those that were left behind end with their job
        if thread.name.startswith("aioelastic-"):
            thread.join()


async def test_a_thread_that_hangs_is_relieved(hang: Hang) -> None:
    thread = HelperThread(asyncio.get_running_loop(), "aioelastic-test")
    order: list[str] = []
    first = thread.submit(lambda: (hang(), order.append("first"))[1])
    assert await thread.known(thread.submit(lambda: 1), 2 * STUCK, 0) == 0
    assert await thread.known(thread.submit(lambda: order.append("next") or 2), 60, 0) == 2
    assert not first.done()
    hang.end()
    await first
    assert await thread.submit(lambda: 3) == 3
    await thread.end()
    assert order == ["next", "first"]


async def test_a_thread_that_is_only_asked_too_early_goes_on(hang: Hang) -> None:
    thread = HelperThread(asyncio.get_running_loop(), "aioelastic-test")
    who: list[threading.Thread] = []
    asked = thread.submit(lambda: (hang(), who.append(threading.current_thread()))[1])
    assert await thread.known(asked, 0.0, "not known") == "not known"
    hang.end()
    await thread.submit(lambda: who.append(threading.current_thread()))
    assert len(set(who)) == 1
    await thread.end()


async def test_a_cancellation_waits_for_the_answer() -> None:
    thread = HelperThread(asyncio.get_running_loop(), "aioelastic-test")
    begun, go = threading.Event(), threading.Event()

    def job() -> int:
        begun.set()
        go.wait()
        return 1

    task = asyncio.create_task(thread.known(thread.submit(job), 60, 0))
    await asyncio.to_thread(begun.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    go.set()
    assert await task == 1
    await thread.end()


async def test_a_look_at_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    """The left-over that cannot be looked at is told as a doubt; the one beside it is found and ended."""
    script = "setsid sleep 600 & echo $!; setsid sleep 600 & echo $!; exec sleep 600"
    seen: list[int] = []
    monkeypatch.setattr(census_module, "_see", hang.around(_see, lambda pid, *_: seen[:1] == [pid]))
    async with Group(sh(script), logs=QUIET, stop=SHORT) as group:
        async for line in group.lines():
            seen.append(int(line.text))
            if len(seen) == 2:
                break
        result = await group.stop()
    assert hang.began.is_set()
    assert not result.clean
    assert any("hangs" in one.words or "in time" in one.words for one in result.remains), result.remains
    with_us = [one.pid for one in result.leaked]
    assert seen[0] not in with_us
    hang.end()
    os.kill(seen[0], signal.SIGKILL)
    if seen[1] not in with_us:  # the time was over before the next look
        os.kill(seen[1], signal.SIGKILL)
    for pid in seen:
        await gone(pid)


async def test_what_a_worker_wrote_of_its_error_cannot_be_read(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    monkeypatch.setattr(resources, "read_report", hang.around(resources.read_report))
    async with Group(SLEEP, 2, logs=QUIET, stop=SHORT, check=False) as group:
        os.kill(group.pids[0], signal.SIGKILL)
        result = await group.wait()
    assert hang.began.is_set()
    assert [one.exit.signal for one in result if one.exit] == [signal.SIGKILL, signal.SIGTERM]
    hang.end()


async def test_ports_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    monkeypatch.setattr(resources, "ports_left", hang.around(resources.ports_left))
    async with Group(SLEEP, logs=QUIET, stop=SHORT) as group:
        result = await group.stop()
    assert [one.kind for one in result.remains] == ["unproven"]
    assert "did not answer in time" in result.remains[0].words
    hang.end()


async def test_who_holds_a_pipe_cannot_be_found(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    monkeypatch.setattr(census_module, "pipe_holders", hang.around(pipe_holders))
    logs, leader = Logs(tee=Std.NONE, drain=0.05), Stop(grace=0, bound=0.3, scope="leader")
    async with Group(sh("sleep 600 & echo $!; exec sleep 600"), logs=logs, stop=leader) as group:
        pid = int((await anext(aiter(group.lines()))).text)
        result = await group.stop()
    assert result[0].stdout.holders == ()
    hang.end()
    os.kill(pid, signal.SIGKILL)
    await gone(pid)


async def test_opening_that_hangs_can_be_cancelled(monkeypatch: pytest.MonkeyPatch, hang: Hang, tmp_path: Path) -> None:
    """The directory that is made in the end is removed by the same thread: the fixture of every test looks."""
    monkeypatch.setattr(resources, "preflight", hang.around(resources.preflight))
    task = asyncio.create_task(supervise(SLEEP, logs=QUIET))
    await asyncio.to_thread(hang.began.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hang.end()


@pytest.mark.parametrize("what", ["cwd", "program", "path"])
async def test_a_look_at_where_workers_are_to_run_that_hangs(
    monkeypatch: pytest.MonkeyPatch, hang: Hang, tmp_path: Path, what: str
) -> None:
    """It says which, and what to do."""
    (tmp_path / "gone").mkdir()
    program, environ, cwd = "/bin/sleep", {"PATH": f"{tmp_path / 'gone'}:/bin"}, None
    if what == "cwd":
        cwd, field, value = tmp_path / "gone", "cwd of rank 0", str(tmp_path / "gone")
        monkeypatch.setattr(
            _machine_checks.os.path, "exists", hang.around(os.path.exists, lambda path: str(path) == value)
        )
    elif what == "program":
        field, value = "program of rank 0", "/bin/sleep"
        monkeypatch.setattr(_machine_checks.os, "stat", hang.around(os.stat, lambda path, *_: path == value))
    else:
        program, field, value = "sleep", "program of rank 0", str(tmp_path / "gone" / "sleep")
        monkeypatch.setattr(_machine_checks, "may", hang.around(_machine_checks.may, lambda path, _: path == value))
    monkeypatch.setattr(resources, "PREFLIGHT", 0.2)
    with pytest.raises(SpecError, match="does not answer") as caught:
        await supervise(Command(program, "600", env=environ, cwd=cwd), logs=QUIET)
    assert hang.began.is_set()
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "mount" in caught.value.remedy
    hang.end()


async def test_a_control_group_of_an_executor_that_hangs(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    spec = GroupSpec.of(SLEEP, logs=QUIET)
    (worker,) = plan(spec).workers
    monkeypatch.setattr(resources.Resources, "_boxed", hang.around(lambda self, fresh: fresh))
    monkeypatch.setattr(resources, "PREFLIGHT", 0.2)
    one = resources.Resources(asyncio.get_running_loop(), spec, lambda *_: None)
    try:
        with pytest.raises(SpecError, match="could not be made") as caught:
            await one.another(dataclasses.replace(worker, placement=Placement(cgroup=True)), 1, 0, 2)
        assert (caught.value.field, caught.value.value) == ("Placement.cgroup", True)
    finally:
        hang.end()
        one.census.close()
        await one._proc.end()


async def test_the_trial_of_a_place_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object) -> tuple[int, str]:
        raise TimeoutError("the guardian does not answer within 10 s")

    monkeypatch.setattr(Guardian, "refuses", hangs)
    with pytest.raises(SpecError, match="could not be tried") as caught:
        await supervise(SLEEP, logs=QUIET, placement=Placement(nice=1))
    assert caught.value.field == "placement of rank 0"
    assert "leave out" in caught.value.remedy


async def test_log_files_that_hang_while_they_are_made(
    monkeypatch: pytest.MonkeyPatch, hang: Hang, tmp_path: Path
) -> None:
    monkeypatch.setattr(_routing.Sinks, "_probe", hang.around(_routing.Sinks._probe))
    task = asyncio.create_task(supervise(SLEEP, logs=Logs(dir=tmp_path, tee=Std.NONE)))
    await asyncio.to_thread(hang.began.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hang.end()


async def test_a_later_attempt_that_cannot_be_prepared(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    monkeypatch.setattr(resources.Resources, "_prepare_again", hang.around(resources.Resources._prepare_again))
    async with Group(SLEEP, 2, logs=QUIET, stop=SHORT, restart=Restart.on_failure(1), check=False) as group:
        os.kill(group.pids[0], signal.SIGKILL)
        await asyncio.to_thread(hang.began.wait)
        result = await group.stop()
    assert [one.exit.signal for one in result if one.exit] == [signal.SIGKILL, signal.SIGTERM]
    hang.end()


async def test_another_group_does_not_notice(monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    stuck: list[int] = []
    monkeypatch.setattr(
        census_module, "_see", hang.around(_see, lambda pid, *_: pid in stuck and not hang.began.is_set())
    )
    async with Group(sh("sleep 600 & echo $!; exec sleep 600"), logs=QUIET, stop=SHORT) as group:
        pid = int((await anext(aiter(group.lines()))).text)
        stuck.append(pid)
        stop = asyncio.create_task(group.stop())
        await asyncio.to_thread(hang.began.wait)
        beside = await supervise(sh("echo fine"), n=3, logs=QUIET)
        assert [str(one.stdout) for one in beside] == ["fine\n"] * 3
        await stop
    hang.end()
    with contextlib.suppress(ProcessLookupError):  # the look came back early enough
        os.kill(pid, signal.SIGKILL)
    await gone(pid)


async def test_a_reader_of_stdout_that_is_slow_does_not_delay_a_stop() -> None:
    """It takes a little all the time: what it has not taken by the deadline is counted, and told."""
    size = 20_000_000
    with tee_to() as (out, _):
        over = threading.Event()
        got = bytearray()

        def read() -> None:
            while not over.wait(0.001):
                got.extend(os.read(out.read_fd, 512))

        reader = threading.Thread(target=read)
        logs = Logs(prefix="", when_full="drop", tee=Std.OUT)
        async with Group(
            sh(f"head -c {size} /dev/zero | tr '\\0' x; echo >&2; exec sleep 600"), logs=logs, stop=SHORT
        ) as group:
            async for line in group.lines(when_full="drop"):
                if line.stream == "stderr":
                    break
            reader.start()
            result = await group.stop()
            *_, trouble = [one async for one in group.events() if isinstance(one, SinkTrouble)]
        over.set()
        await asyncio.to_thread(reader.join)
        got += await out.all()
    assert trouble.sink == "stdout"
    assert trouble.lost > 0
    assert result[0].stdout.total == size
    assert len(got) + trouble.lost >= size


async def test_the_time_of_a_dump_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks are taken before anybody is asked to stop: workers have their whole grace after that."""
    script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    async with Group(sh(script), logs=QUIET, stop=Stop(grace=30, bound=1, dump=True)) as group:
        await anext(aiter(group.lines()))
        result = await group.stop()
    assert result[0].exit is not None
    assert result[0].exit.code == 0
    assert "bye" in str(result[0].stdout)


async def test_a_restart_has_no_deadline_of_its_own_stop() -> None:
    """What stopped the old attempt does not hold for the new one."""
    script = 'test "$AIOELASTIC_ATTEMPT" = 0 && exit 1; echo up; exec sleep 600'
    async with Group(
        [sh(script), sh("trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done")],
        logs=QUIET,
        stop=Stop(grace=5, bound=0.1),
        restart=Restart.on_failure(1, scope="all"),
    ) as group:
        await event_of(group, Restarting)
        async for line in group.lines():
            if line.rank == 0:
                break
        result = await group.stop()
    assert [one.attempt for one in result] == [1, 1]
    assert not any(one.unkillable for one in result)
    assert await event_of(group, Exited, 0, 1)


@pytest.mark.parametrize("before", [True, False], ids=["before the stop", "by the stop"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, None), (signal.SIGUSR1, 0)], ids=["killed", "ended"])
async def test_a_guardian_that_hangs_knows_of_an_end_what_nobody_waits_for(
    before: bool, signum: int, code: int | None
) -> None:
    """The kernel says that a worker has ended, and how, unless that is 0; all else its guardian would say."""
    script = (
        "trap 'exit 0' USR1 TERM; echo up; while :; do sleep 0.01; done" if code == 0 else "echo up; exec sleep 600"
    )
    async with Group([sh(script), SLEEP], logs=QUIET, stop=SHORT, check=False) as group:
        await anext(aiter(group.lines()))
        halted = guardian(None)  # type: ignore[arg-type]
        assert halted is not None
        os.kill(halted, signal.SIGSTOP)
        await stopped_itself(halted)
        pid = group[0].pid
        assert pid is not None
        if before:
            os.kill(pid, signum)
            await gone(pid)
        try:
            result = await group.stop()
        finally:
            os.kill(halted, signal.SIGCONT)
    exit = result[0].exit
    assert exit is not None
    assert group[0].state in (State.SUCCEEDED, State.FAILED, State.STOPPED)
    if code is None:
        assert exit.signal == (signal.SIGKILL if before else signal.SIGTERM)
    else:
        assert exit.code is exit.signal is None
        assert "does not answer" in str(group[0]._life.cause)
    assert result[0].usage is None
    assert "whether other processes are left is not known" in str(result.remains[0])
