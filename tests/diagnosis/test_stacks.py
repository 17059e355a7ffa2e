"""Python stacks of live workers: on demand, and before they are stopped."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, event_of, kill_and_see_it_dead, lacks, sh, stopped_itself

from aioelastic import (
    Command,
    Function,
    Group,
    GroupResult,
    Logs,
    Output,
    Restart,
    Result,
    SpecError,
    Std,
    Stop,
    plan,
    supervise,
)
from aioelastic.child.worker import stack_dump as offering
from aioelastic.cli._stacks import short_form
from aioelastic.diagnosis.stacks import _file_changes, _py_spy, _self_dump
from aioelastic.events import Spawned
from aioelastic.model.group_spec import GroupSpec

STARTS = ["zygote", "spawn", "fork"]
DUMP = Stop(dump=True)
LONG = 150.0  # seconds: a busy machine is no reason to fail
RECORDED = """
import os
from aioelastic import record
@record
def main():
    reader, _ = os.pipe()
    print("here")
    os.read(reader, 1)
main()
"""
PLAIN = RECORDED.replace("@record", "")


@pytest.fixture(autouse=True)
def patient(monkeypatch: Any) -> None:
    monkeypatch.setattr("aioelastic.supervisor.attempts.BOUND", LONG)


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> Any:
    return request.param


def python(code: str) -> Command:
    """A worker that can import what is installed."""
    return Command(sys.executable, "-c", code)


async def here(group: Group, count: int = 1) -> None:
    """Wait until so many lines say that a worker is where it will hang."""
    async for _ in group.lines():
        count -= 1
        if count == 0:
            return


def spy_or_skip() -> None:
    """Whether it may look at processes shows later."""
    if _py_spy.program() is None:
        pytest.skip(lacks("py-spy"))


# --- function workers ---


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (Function(jobs.hangs_in_python), ["in hangs_in_python"]),
        (Function(jobs.hangs_in_c, True), ["in hangs_in_c"]),
        (Function(jobs.hangs_in_c, False), ["in hangs_in_c"]),
        (Function(jobs.hangs_in_a_loop), ["in run\n"]),
        (Function(jobs.hangs_in_threads), ["in waits_for_a_lock", "in waits_for_a_queue", "in hangs_in_threads"]),
    ],
    ids=["python", "c-with-lock", "c", "loop", "threads"],
)
async def test_functions_show_where_they_hang(start: Any, function: Function, where: list[str]) -> None:
    async with Group(function, start=start, logs=QUIET) as group:
        await here(group)
        stacks = await group.dump_stacks(LONG)
        assert list(stacks) == [0]
        for one in where:
            assert one in stacks[0]
        assert stacks[0].count("Current thread") == 1
        assert stacks[0].endswith("\n")
        assert "in work\n" in stacks[0]  # the outermost frame of the main thread: it is whole
    result = await group.wait()
    assert result[0].stacks == stacks[0]
    assert result[0].stopped


async def test_all_ranks_in_parallel_and_again_and_at_once() -> None:
    async with Group(Function(jobs.hangs_in_c, False), 8, logs=QUIET) as group:
        await here(group, 8)
        first = await group.dump_stacks(LONG)
        assert sorted(first) == list(range(8))
        again, meanwhile = await asyncio.gather(group.dump_stacks(LONG), group.dump_stacks(LONG))
        assert again == meanwhile
        for stacks in (first, again):
            assert all(text.count("in hangs_in_c") == 1 for text in stacks.values())


async def test_a_dump_needs_no_inotify(monkeypatch: Any) -> None:
    def refuse(self: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(_file_changes.Changes, "_open", refuse)
    async with Group(Function(jobs.hangs_in_c, False), 2, logs=QUIET) as group:
        await here(group, 2)
        stacks = await group.dump_stacks(LONG)
        assert all("in hangs_in_c" in text for text in stacks.values())


async def test_many_dumps_take_no_more_room() -> None:
    async with Group(Function(jobs.hangs_in_c, False), logs=QUIET) as group:
        await here(group)
        for _ in range(3):
            await group.dump_stacks(LONG)
        offer = _self_dump.look(group.pids[0])
        assert isinstance(offer, _self_dump.Offer)
        assert os.stat(offer.path).st_size < 4096


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_a_worker_of_a_worker(start: Any) -> None:
    """Its own is a copy of it, which must not write where the first one does."""
    async with Group(Function(jobs.supervises_a_fork), start=start, logs=QUIET) as group:
        async for line in group.lines():
            assert line.text.count("in hangs_in_c") == 1
            break
        assert "in supervises_a_fork" in (await group.dump_stacks(LONG))[0]


# --- commands ---


async def test_a_recorded_command() -> None:
    async with Group(python(RECORDED), 2, logs=QUIET) as group:
        await here(group, 2)
        stacks = await group.dump_stacks(LONG)
    for text in stacks.values():
        assert "in main" in text
        assert "Current thread" in text


async def test_a_recorded_async_command() -> None:
    code = (
        "import asyncio\nfrom aioelastic import record\n"
        "@record\nasync def main():\n    print('here')\n    await asyncio.Event().wait()\nasyncio.run(main())"
    )
    async with Group(python(code), logs=QUIET) as group:
        await here(group)
        assert "in run_until_complete" in (await group.dump_stacks(LONG))[0]


async def test_another_python_command_by_py_spy() -> None:
    spy_or_skip()
    async with Group(python(PLAIN), 2, logs=QUIET) as group:
        await here(group, 2)
        stacks = await group.dump_stacks(LONG)
        if "ermission" in stacks[0]:
            pytest.skip("py-spy may not look at processes here")
        assert all("main" in text for text in stacks.values())


async def test_py_spy_may_be_missing(monkeypatch: Any) -> None:
    monkeypatch.setattr(_py_spy, "program", lambda: None)
    async with Group(python(PLAIN), logs=QUIET) as group:
        await here(group)
        text = (await group.dump_stacks(LONG))[0]
    assert "no Python stack" in text
    assert "aioelastic.record" in text
    assert "not installed" in text


async def test_py_spy_may_fail(monkeypatch: Any, tmp_path: Path) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho Permission Denied: try sudo >&2\nexit 3\n")
    spy.chmod(0o755)
    monkeypatch.setattr(_py_spy, "program", lambda: str(spy))
    async with Group(python(PLAIN), logs=QUIET) as group:
        await here(group)
        text = (await group.dump_stacks(LONG))[0]
    assert "no Python stack" in text
    assert "exit code 3" in text
    assert "Permission Denied: try sudo" in text


async def test_py_spy_may_not_start(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(_py_spy, "program", lambda: str(tmp_path / "gone"))
    async with Group(python(PLAIN), logs=QUIET) as group:
        await here(group)
        assert "No such file" in (await group.dump_stacks(LONG))[0]


async def test_py_spy_may_hang(monkeypatch: Any, tmp_path: Path) -> None:
    spy, fifo = tmp_path / "py-spy", tmp_path / "fifo"
    os.mkfifo(fifo)
    spy.write_text(f"#!/bin/sh\necho up > {fifo}\nexec sleep 1000\n")
    spy.chmod(0o755)
    monkeypatch.setattr(_py_spy, "program", lambda: str(spy))
    async with Group(python(PLAIN), 6, logs=QUIET) as group:
        await here(group, 6)
        stacks = await group.dump_stacks(timeout=0.05)
        assert sorted(stacks) == [0, 1, 2, 3, 4, 5]
        assert all("within 0.05 s" in text for text in stacks.values()), stacks
        up = os.open(fifo, os.O_RDWR)  # so that none of them writes in vain
        dump = asyncio.create_task(group.dump_stacks(LONG))
        await asyncio.to_thread(os.read, up, 1)  # one has started, and hangs
        await group.stop()
        assert all("it ended" in text for text in (await dump).values()), dump.result()
    os.close(up)
    # and nothing of any of them is left, as every test checks


@pytest.mark.parametrize("command", [Command("/bin/sleep", "1000"), sh("echo here; exec sleep 1000")])
async def test_no_python_no_stack(command: Command) -> None:
    async with Group(command, 2, logs=QUIET) as group:
        await event_of(group, Spawned, 1)
        stacks = await group.dump_stacks(LONG)
        assert sorted(stacks) == [0, 1]
        assert all("is no Python program" in text for text in stacks.values())
        assert sorted(group.pids) == [0, 1]  # nobody was hurt


async def test_a_wrapper_is_not_killed_for_what_it_runs() -> None:
    code = "echo $$; " + f'"{sys.executable}" -c "$CODE"; true'
    async with Group(sh(code, env={"CODE": RECORDED}), logs=QUIET) as group:
        await here(group, 2)
        assert "is no Python program" in (await group.dump_stacks(LONG))[0]
        assert group.pids


# --- those that cannot answer ---


async def test_one_that_has_become_another_program(start: Any) -> None:
    async with Group(Function(jobs.becomes_another_program), start=start, logs=QUIET) as group:
        await here(group, 2)
        text = (await group.dump_stacks(LONG))[0]
        assert "is no Python program" in text
        assert group.pids


async def test_one_that_took_its_handler_away(monkeypatch: Any) -> None:
    monkeypatch.setattr(_py_spy, "program", lambda: None)
    function = Function(jobs.lets_the_signal_kill, int(offering.SIGNAL))
    async with Group(function, logs=QUIET) as group:
        await here(group)
        assert "no Python stack" in (await group.dump_stacks(LONG))[0]
        assert group.pids


async def test_one_that_blocks_the_signal(monkeypatch: Any) -> None:
    monkeypatch.setattr(_py_spy, "program", lambda: None)
    async with Group(Function(jobs.blocks_the_signal, int(offering.SIGNAL)), logs=QUIET) as group:
        await here(group)
        assert "blocks signal" in (await group.dump_stacks(LONG))[0]


async def test_one_that_stands_still(monkeypatch: Any) -> None:
    monkeypatch.setattr(_py_spy, "program", lambda: None)
    async with Group(Function(jobs.hangs_in_c, False), 2, start="spawn", logs=QUIET) as group:
        await here(group, 2)
        os.kill(group.pids[0], signal.SIGSTOP)
        await stopped_itself(group.pids[0])
        stacks = await group.dump_stacks(LONG)
        assert "is stopped" in stacks[0]
        assert "in hangs_in_c" in stacks[1]


async def test_py_spy_sees_one_that_stands_still() -> None:
    spy_or_skip()
    async with Group(Function(jobs.hangs_in_c, False), start="spawn", logs=QUIET) as group:
        await here(group)
        os.kill(group.pids[0], signal.SIGSTOP)
        await stopped_itself(group.pids[0])
        text = (await group.dump_stacks(LONG))[0]
        if "ermission" in text:
            pytest.skip("py-spy may not look at processes here")
        assert "hangs_in_c" in text


async def test_one_that_does_not_answer(monkeypatch: Any) -> None:
    async with Group(Function(jobs.hangs_in_c, False), 2, logs=QUIET) as group:
        await here(group, 2)
        monkeypatch.setattr(group[1]._life, "send_signal", lambda signum: True)  # it never arrives
        timeout, stacks = 0.1, {0: ""}
        while "in hangs_in_c" not in stacks[0]:  # on a busy machine the other takes longer
            timeout *= 2
            stacks = await group.dump_stacks(timeout)
        assert f"within {timeout:g} s" in stacks[1]


async def test_one_that_dies_of_it(start: Any, monkeypatch: Any) -> None:
    async with Group(Function(jobs.hangs_in_c, False), 2, start=start, logs=QUIET, check=False) as group:
        await here(group, 2)
        real = group[1]._life.send_signal
        monkeypatch.setattr(group[1]._life, "send_signal", lambda signum: real(signal.SIGKILL))
        stacks = await group.dump_stacks(LONG)
        assert "it ended" in stacks[1]
        assert 0 in stacks


async def test_one_that_has_just_died(start: Any) -> None:
    async with Group(Function(jobs.hangs_in_c, False), start=start, logs=QUIET, check=False) as group:
        await here(group)
        kill_and_see_it_dead(group.pids[0], signal.SIGKILL)
        stacks = await group.dump_stacks(LONG)
        assert "it ended" in stacks[0]


async def test_a_dump_is_not_cut_while_the_worker_is_in_its_handler(monkeypatch: Any) -> None:
    """Whoever is slow in the middle of its dump is waited for: the kernel tells, not a clock."""
    real, said = _self_dump.Offer.read, []

    def slow(self: Any) -> tuple[str, bool]:
        text, busy = real(self)
        if len(said) < 3:
            said.append(text)
            return text[:9], True
        return text, busy

    monkeypatch.setattr(_self_dump.Offer, "read", slow)
    async with Group(Function(jobs.hangs_in_c, False), logs=QUIET) as group:
        await here(group)
        assert "in work\n" in (await group.dump_stacks(LONG))[0]
    assert len(said) == 3


async def test_what_came_before_the_time_was_over_is_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(_self_dump.Offer, "read", lambda self: ("half of it", True))
    async with Group(Function(jobs.hangs_in_c, False), logs=QUIET) as group:
        await here(group)
        timeout, text = 0.1, ""
        while not text.startswith("half of it\n"):  # on a busy machine the first half, too, takes longer
            timeout *= 2
            text = (await group.dump_stacks(timeout))[0]
    assert f"within {timeout:g} s" in text


def test_a_thread_in_the_handler_is_seen() -> None:
    """While a handler runs, its signal is blocked in that thread: that is how we know."""
    fd = os.memfd_create(offering.NAME)
    try:
        offer = _self_dump.Offer(os.getpid(), fd, frozenset(_self_dump._blocking(os.getpid())))
        assert offer.read() == ("", True)
        os.write(fd, b"text")
        assert offer.read() == ("text", False)
        signal.pthread_sigmask(signal.SIG_BLOCK, [offering.SIGNAL])
        try:
            assert offer.read() == ("text", True)
            mine = offer.blockers | {threading.get_native_id()}
            assert _self_dump.Offer(os.getpid(), fd, mine).read() == ("text", False)  # it had done so before
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [offering.SIGNAL])
    finally:
        os.close(fd)


def test_what_was_put_in_the_place_of_an_offer_is_not_touched(tmp_path: Path) -> None:
    """A worker of another user may name any file that it can open, to have it emptied; or a pipe, to make us wait."""
    (tmp_path / "file").write_text("theirs")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "fifo"):
        fd = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with pytest.raises(FileNotFoundError):
                _self_dump._opened(f"/proc/self/fd/{fd}", os.O_RDWR)
            with pytest.raises(FileNotFoundError):
                _self_dump.Offer(os.getpid(), fd, frozenset()).read()
        finally:
            os.close(fd)
    assert (tmp_path / "file").read_text() == "theirs"


# --- when ---


async def test_of_an_empty_or_ended_group() -> None:
    group = Group(sh("exit 0"), logs=QUIET)
    with pytest.raises(RuntimeError, match="enter the Group first"):
        await group.dump_stacks(LONG)
    async with group:
        result = await group.wait()
        assert await group.dump_stacks(LONG) == {}
    assert result[0].stacks is None


async def test_the_group_may_end_meanwhile() -> None:
    async with Group(Function(jobs.hangs_in_c, False), 4, logs=QUIET) as group:
        await here(group, 4)
        dump = asyncio.create_task(group.dump_stacks(LONG))
        await asyncio.sleep(0)
        await group.stop()
        assert sorted(await dump) == [0, 1, 2, 3]


async def test_cancelling_leaves_nothing(monkeypatch: Any, tmp_path: Path) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\nexec sleep 1000\n")
    spy.chmod(0o755)
    monkeypatch.setattr(_py_spy, "program", lambda: str(spy))
    async with Group([python(PLAIN), Function(jobs.hangs_in_c, False)], logs=QUIET) as group:
        await here(group, 2)
        dump = asyncio.create_task(group.dump_stacks(LONG))
        await asyncio.sleep(0)
        dump.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dump


@pytest.mark.parametrize("value", [-1, "1", float("nan")])
async def test_a_bad_timeout(value: Any) -> None:
    async with Group(Command("/bin/sleep", "1000"), logs=QUIET) as group:
        with pytest.raises(SpecError, match="timeout"):
            await group.dump_stacks(timeout=value)


# --- before the cascade ---


async def test_survivors_of_a_failure(start: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    function = Function(jobs.hangs_or_fails, str(fifo))
    result = await supervise(
        function, 3 - 1, start=start, logs=Logs(dir=tmp_path, tee=Std.NONE), stop=DUMP, check=False
    )
    assert [one.rank for one in result.failures] == [1]
    assert result[1].stacks is None
    assert result[0].stopped
    assert result[0].stacks is not None
    assert "in hangs_or_fails" in result[0].stacks
    assert result.log_dir is not None
    file = result.log_dir / "attempt_0" / "0" / "stacks.txt"
    assert result[0].stacks in file.read_text()
    assert not (result.log_dir / "attempt_0" / "1" / "stacks.txt").exists()


async def test_nobody_asks_by_default(tmp_path: Path) -> None:
    async with Group(Function(jobs.hangs_in_c, False), logs=Logs(dir=tmp_path, tee=Std.NONE)) as group:
        await here(group)
        result = await group.stop()
    assert result[0].stacks is None
    assert list(tmp_path.rglob("stacks.txt")) == []


async def test_each_dump_is_added_to_the_file(tmp_path: Path) -> None:
    async with Group(Function(jobs.hangs_in_c, False), logs=Logs(dir=tmp_path, tee=Std.NONE), stop=DUMP) as group:
        await here(group)
        await group.dump_stacks(LONG)
        await group.stop()
    (file,) = tmp_path.rglob("stacks.txt")
    assert file.read_text().count("in hangs_in_c") == 2


async def test_a_log_directory_that_is_gone_costs_the_file_only(tmp_path: Path) -> None:
    troubles = []
    logs = Logs(dir=tmp_path / "runs", tee=Std.NONE)
    async with Group(Function(jobs.hangs_in_c, False), logs=logs, on_event=troubles.append) as group:
        await here(group)
        shutil.rmtree(tmp_path / "runs")
        assert "in hangs_in_c" in (await group.dump_stacks(LONG))[0]
    told = any("stacks.txt" in getattr(one, "sink", "") for one in troubles)
    assert told or list(tmp_path.rglob("stacks.txt"))  # the log files may have made the directory anew by then


async def test_a_timeout_shows_where() -> None:
    async with Group(Function(jobs.hangs_in_c, False), 2, logs=QUIET, stop=DUMP, check=False) as group:
        await here(group, 2)
        group.limit(0)
        result = await group.wait()
    assert result.reason == "timeout"
    assert all(one.stacks for one in result)


async def test_stopping_one_worker() -> None:
    async with Group(Function(jobs.hangs_in_c, False), 2, logs=QUIET, stop=DUMP) as group:
        await here(group, 2)
        await group[1].stop()
        assert "in hangs_in_c" in (group[1].stacks or "")
        assert group[0].stacks is None


async def test_the_signal_comes_after_all_dumps(monkeypatch: Any) -> None:
    seen: list[Any] = []
    async with Group(Function(jobs.hangs_in_c, False), 3, logs=QUIET, stop=DUMP) as group:
        await here(group, 3)
        group._supervisor.event_bus._hook = lambda event: seen.append([one.stacks for one in group])
        await group.stop()
    assert all(text is not None for text in seen[0])


async def test_one_that_dies_during_the_dump_failed_by_itself(monkeypatch: Any) -> None:
    async with Group(Function(jobs.hangs_in_c, False), 2, logs=QUIET, stop=DUMP, check=False) as group:
        await here(group, 2)
        real = group[1]._life.send_signal
        monkeypatch.setattr(group[1]._life, "send_signal", lambda signum: real(signal.SIGKILL))
        result = await group.stop()
    assert [one.rank for one in result.failures] == [1]
    assert result[0].stopped
    assert result[0].stacks is not None


async def test_hurrying_does_not_wait_for_the_dump(monkeypatch: Any) -> None:
    async with Group(Function(jobs.hangs_in_c, False), 2, logs=QUIET, stop=DUMP) as group:
        await here(group, 2)
        for one in group:
            monkeypatch.setattr(one, "send_signal", lambda signum: True)
        group.begin_stop()
        await asyncio.sleep(0)
        group.hurry()
        result = await group.wait()
    assert all(one.stopped for one in result)


async def test_a_stop_without_dump_overrides_one_with_it(monkeypatch: Any) -> None:
    async with Group(Function(jobs.hangs_in_c, False), logs=QUIET, stop=DUMP) as group:
        await here(group)
        group.begin_stop("stopped", Stop())
        await group.wait()
    result = await group.wait()
    assert result[0].stacks is None


def test_the_loop_may_be_shut_down_during_the_dump(monkeypatch: Any) -> None:
    pids: list[int] = []

    async def main() -> None:
        async with Group(Function(jobs.hangs_in_c, False), 2, start="spawn", logs=QUIET, stop=DUMP) as group:
            await here(group, 2)
            pids.extend(group.pids.values())
            for one in group:
                monkeypatch.setattr(one, "send_signal", lambda signum: True)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:  # none of ours yet
                task.cancel()
            group.begin_stop()
            await asyncio.sleep(0)
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert len(pids) == 2


async def test_before_all_begin_again(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    result = await supervise(
        Function(jobs.hangs_or_fails, str(fifo)),
        2,
        start="spawn",
        logs=Logs(dir=tmp_path, tee=Std.NONE),
        stop=DUMP,
        restart=Restart.on_failure(max=1, scope="all"),
        check=False,
    )
    assert result.log_dir is not None
    for attempt in (0, 1):
        assert "in hangs_or_fails" in (result.log_dir / f"attempt_{attempt}" / "0" / "stacks.txt").read_text()


# --- the words ---


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_dump_is_a_bool(value: Any) -> None:
    with pytest.raises(SpecError, match=r"Stop\.dump"):
        Stop(dump=value)


def test_the_plan_tells_it() -> None:
    assert "stacks" in str(plan(GroupSpec.of(sh("exit 0"), stop=DUMP)))
    assert "stacks" not in str(plan(GroupSpec.of(sh("exit 0"))))


def test_a_recorded_program_outside_a_worker_offers_nothing() -> None:
    code = (
        "import os\nfrom aioelastic import record\n@record\ndef main():\n"
        "    assert not any('memfd' in os.readlink(f'/proc/self/fd/{n}') for n in range(3, 9)"
        " if os.path.exists(f'/proc/self/fd/{n}'))\nmain()"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("AIOELASTIC_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_a_handler_of_the_users_own_stays() -> None:
    code = (
        "import signal\nfrom aioelastic import record\n"
        "from aioelastic.child.worker import stack_dump as _stacks\ncame = []\n"
        "signal.signal(_stacks.SIGNAL, lambda *_: came.append(1))\n"
        "@record\ndef main():\n    signal.raise_signal(_stacks.SIGNAL)\n    assert came\nmain()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "AIOELASTIC_RANK": "0"})


# --- on the command line ---


def test_the_command_line_shows_them(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = f"""
import os, sys
from aioelastic import rank, record
@record
def main():
    if rank() == 1:
        open({str(fifo)!r}).read()
        sys.exit(7)
    with open({str(fifo)!r}, "w"):
        pass
    hangs()
def hangs():
    reader, _ = os.pipe()
    os.read(reader, 1)
main()
"""
    run = [sys.executable, "-m", "aioelastic", "run", "-n", "2", "--log-dir", str(tmp_path / "runs")]
    done = subprocess.run([*run, "--dump-stacks", "--", sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7
    failure, _, stacks = done.stderr.partition("stacks of rank 0, before we stopped it:\n")
    assert "rank 1" in failure
    assert "in main" in stacks
    assert "stacks of" not in stacks
    (file,) = tmp_path.rglob("stacks.txt")
    assert "in main" in file.read_text()


def test_the_short_form() -> None:
    def one(rank: int, stacks: str | None) -> Result:
        return Result(rank, "worker", ("python",), 1, 0, None, None, Output(), Output(), stacks=stacks)

    same = "Thread 0x00007f{0} (most recent call first):\n  File a, line 1 in waits\n\n"
    same += "Current thread 0x00007f{0} (most recent call first):\n  File b, line 2 in main\n"
    long = "\n".join(f"  line {number}" for number in range(30))
    given = [None, same.format(1), same.format(2), long, same.format(3), *(f"other {word}" for word in "abc")]
    lines = short_form(GroupResult("worker", "run", "failed", tuple(one(*item) for item in enumerate(given))))
    text = "\n".join(lines)
    assert "stacks of rank 3, before we stopped it:" in text
    assert "    … 10 more lines" in lines
    assert "  line 20" not in text
    assert "ranks 1-2, 4" in text
    assert "left out" not in text
    assert text.index("in main") < text.index("in waits")
    given += ["other e", "other f"]
    lines = short_form(GroupResult("worker", "run", "failed", tuple(one(*item) for item in enumerate(given))))
    assert "left out" in lines[-1]
    assert short_form(GroupResult("worker", "run", "done", (one(0, None),))) == []
