"""Parts of `aioelastic.testing` that break things at the moment that was named; and those that watch do see it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from helpers import QUIET, alive, gone, py, sh, stopped_itself, until

from aioelastic import Command, Function, Group, Logs, Restart, SpecError, Std, Stop, supervise
from aioelastic.events import Event, Exited, SinkTrouble, Spawned
from aioelastic.launch import end_helpers
from aioelastic.system.shared_memory_names import has_left, sweep
from aioelastic.testing._chaos import cont, kill, send, stop, when, worker, zygote
from aioelastic.testing._environment import Unavailable, clock_jump, file_limit, full_disk, pid_namespace
from aioelastic.testing._misbehaving_workers import daemon, fork_storm, made, pipe_holder, setsid_escape, stubborn
from aioelastic.testing._recorder import Recorder
from aioelastic.testing._supervisor_process import Program
from aioelastic.testing._unrelated_processes import bystanders

SLEEP = sh("exec sleep 1000")


# --- strikes ---


async def test_kill_a_worker_at_an_event() -> None:
    blow = kill(worker)
    recorder = Recorder(when(Spawned, blow, rank=2))
    result = await supervise(SLEEP, n=4, logs=QUIET, on_event=recorder, check=False)
    assert result.first_failure is not None
    assert (result.first_failure.rank, result.first_failure.cause) == (2, "SIGKILL")
    assert blow.struck == [result[2].pid]
    recorder.in_order("rank 2 spawned", "rank 2 exited", "rank 0 stopping", "group done")


async def test_the_nth_of_an_attempt_once() -> None:
    blow = send(signal.SIGUSR1, worker)
    policy = Restart.on_failure(max=3)
    listen = when(Spawned, blow, attempt=1, nth=2)
    entry = sh('[ "$AIOELASTIC_ATTEMPT" = 2 ] && exit 0; [ "$AIOELASTIC_ATTEMPT" = 1 ] && exec sleep 0.3; exit 1')
    result = await supervise(entry, n=3, logs=QUIET, restart=policy, on_event=listen, check=False)
    assert len(blow.struck) == 1
    assert [one.cause for one in result.earlier].count("SIGUSR1") == 1


async def test_a_stopped_worker_ends_all_the_same() -> None:
    blow = stop(worker)
    async with Group(SLEEP, logs=QUIET, on_event=when(Spawned, blow)) as group:
        await stopped_itself(blow.struck[0])
    assert group[0].exit is not None
    assert group[0].exit.signal == signal.SIGTERM


@pytest.mark.fresh
async def test_the_zygote_dies() -> None:
    blow = kill(zygote)
    result = await supervise(Function(jobs.sleeps), n=3, logs=QUIET, on_event=when(Spawned, blow, rank=1), check=False)
    assert len(blow.struck) == 1
    assert blow.struck[0] not in [one.pid for one in result]
    assert result.failures
    assert (await supervise(Function(jobs.parent), logs=QUIET)).ok  # by another one


@pytest.mark.fresh
async def test_the_zygote_hangs_for_a_while() -> None:
    hang, go_on = stop(zygote), cont(zygote)
    recorder = Recorder(when(Spawned, hang), when(Exited, go_on, rank=1))
    entries = [Function(jobs.parent), SLEEP]  # only a command can end while it hangs
    async with Group(entries, logs=QUIET, on_event=recorder, stop=Stop(grace=5), check=False) as group:
        await stopped_itself(hang.struck[0])
        assert group[0].exit is None
        group[1].send_signal(signal.SIGKILL)
        await group.wait()
    recorder.in_order("rank 1 exited", "rank 0 exited")
    assert go_on.struck == hang.struck


@pytest.mark.fresh
async def test_any_party() -> None:
    """One that comes later is a function of the event, no more."""
    async with Group(SLEEP, n=2, logs=QUIET, check=False) as group:
        blow = kill(lambda event: group[1].pid)
        recorder = Recorder(when(Spawned, blow))
        recorder(Spawned(0, group[0].pid, 0, 0.0))
        assert blow.struck == [group[1].pid]
        await group[1].wait()
    assert group[1].exit is not None
    assert group[1].exit.signal == signal.SIGKILL


@pytest.mark.fresh
@pytest.mark.parametrize("party", [lambda event: None, lambda event: 2**22 + 1, zygote])
async def test_nobody_is_struck(party: object) -> None:
    blow = kill(party)  # type: ignore[arg-type]
    await supervise(sh("exit 0"), logs=QUIET, on_event=when(Spawned, blow))
    assert blow.struck == []


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("kind", lambda: when("spawned", kill(worker))),  # type: ignore[arg-type]
        ("kind", lambda: when(int, kill(worker))),  # type: ignore[arg-type]
        ("do", lambda: when(Spawned, None)),  # type: ignore[arg-type]
        ("nth", lambda: when(Spawned, kill(worker), nth=0)),
        ("room", lambda: full_disk(10).__enter__()),
        ("size", lambda: file_limit(-1).__enter__()),
        ("most", lambda: fork_storm(0)),
        ("stdout", lambda: Program("", stdout="gone")),  # type: ignore[arg-type]
        ("bound", lambda: Program("", bound=-1)),
    ],
)
def test_wrong_words(field: str, make: Callable[[], object]) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert caught.value.field == field


# --- bad workers ---


@pytest.mark.parametrize("body", [pipe_holder(), setsid_escape(), daemon(clean=False), fork_storm(5, then="exit 0")])
async def test_what_they_leave_is_told_and_found(body: Command) -> None:
    with bystanders():
        result = await supervise(body, logs=QUIET, stop=Stop(grace=0.5))
    pids = made(result[0].stdout)
    assert len(pids) == (5 if "$i" in str(body.argv) else 1)
    assert {one.pid for one in result.leaked} == set(pids)
    assert not any(map(alive, pids))


async def test_a_daemon_with_a_clean_environment() -> None:
    """Whether it is found is the supervisor's business; that it is made, has no mark and no session of ours is ours."""
    result = await supervise(daemon(), logs=QUIET, stop=Stop(scope="leader"))
    (pid,) = made(result[0].stdout)
    try:
        assert alive(pid)
        assert b"AIOELASTIC" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.getsid(pid) not in (result[0].pid, os.getsid(0))
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    finally:
        os.kill(pid, signal.SIGKILL)
        await gone(pid)


async def test_a_fork_storm_during_the_kill() -> None:
    async with Group(fork_storm(), logs=QUIET, stop=Stop(grace=0)) as group:
        async for _ in group.lines():
            break  # it is in the middle of it
    assert group[0].exit is not None
    pids = made((await group.wait())[0].stdout)
    assert pids
    assert not any(map(alive, pids))


async def test_a_stubborn_one() -> None:
    recorder = Recorder()
    async with Group(stubborn(), logs=QUIET, stop=Stop(grace=0.05), on_event=recorder) as group:
        async for line in group.lines():
            assert line.text == "up"
            break
    recorder.in_order("rank 0 stopping", "rank 0 killed", "rank 0 exited")


def test_made() -> None:
    assert made("made 12 13\nnot made 14\nmade 15\nmade\n") == [12, 13, 15]


# --- bystanders ---


@pytest.mark.parametrize("kind", ["child", "group", "session", "stranger", "stopped", "orphan"])
async def test_a_bystander_that_was_hit_is_named(kind: str) -> None:
    async def shoot() -> None:
        with bystanders() as pids:
            os.kill(pids[kind], signal.SIGKILL)
            await gone(pids[kind])

    with pytest.raises(AssertionError, match=rf"bystanders were ended: {kind} \d+"):
        await shoot()


async def test_a_bystander_that_was_continued_is_named() -> None:
    def wake() -> None:
        with bystanders() as pids:
            os.kill(pids["stopped"], signal.SIGCONT)
            os.waitid(os.P_PID, pids["stopped"], os.WCONTINUED)

    with pytest.raises(AssertionError, match=r"was continued: stopped \d+"):
        wake()


# --- worse places ---


async def test_a_full_disk(full_disk: Path) -> None:
    recorder = Recorder()
    logs = Logs(dir=full_disk, tee=Std.NONE)
    result = await supervise(py("print('x' * 100_000)"), logs=logs, on_event=recorder)
    assert result[0].stdout.total == 100_001
    trouble = recorder.of(SinkTrouble)[0]
    assert "No space left" in trouble.problem
    assert result[0].stdout.lost > 0


async def test_a_limit_on_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder()
    with file_limit(10_000):
        await supervise(py("print('x' * 100_000)"), logs=Logs(dir=tmp_path, tee=Std.NONE), on_event=recorder)
        with pytest.raises(OSError, match="too large") as caught:
            (tmp_path / "mine").write_bytes(bytes(10_001))
        assert caught.value.errno == errno.EFBIG
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert "too large" in recorder.of(SinkTrouble)[0].problem


@pytest.mark.parametrize("seconds", [-86_400.0, 86_400.0])
async def test_the_clock_jumps_while_a_worker_runs(seconds: float) -> None:
    """What is measured and decided does not follow the wall clock."""
    before = time.time()
    with clock_jump() as jump:

        def leap(event: Event) -> None:
            jump(seconds)
            assert abs(time.time() - before - seconds) < 60
            assert abs(time.time_ns() / 1e9 - before - seconds) < 60

        recorder = Recorder(when(Spawned, leap))
        async with Group(
            [stubborn(), sh("sleep 0.02; exit 3")], logs=QUIET, stop=Stop(grace=0.05), check=False
        ) as group:
            async for event in group.events():
                recorder(event)
        result = await group.wait()
    assert abs(time.time() - before) < 60
    assert result.duration < 60
    assert all(one.exit is not None and 0 < one.exit.duration < 60 for one in result)
    assert result.first_failure is not None
    assert result.first_failure.rank == 1


@pytest.mark.parametrize("place", [full_disk, pid_namespace])
def test_what_cannot_be_had_says_why(place: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def enter() -> None:
        got = place()  # type: ignore[operator]
        if isinstance(got, contextlib.AbstractContextManager):
            got.__enter__()

    word = "mount" if place is full_disk else "unshare"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=rf"^{word}: No such file or directory$"):
        enter()
    (tmp_path / word).write_text("#!/bin/sh\necho not for you >&2; exit 1\n")
    (tmp_path / word).chmod(0o755)
    with pytest.raises(Unavailable, match=r"^not for you$"):
        enter()


# --- a supervisor of its own ---

COMMANDS = """
import asyncio
from aioelastic import *
async def main():
    async with Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE), check=False) as group:
        print("workers", *group.pids.values(), flush=True)
        result = await group.wait()
        print("ended", *(one.exit for one in result), sep="; ", flush=True)
asyncio.run(main())
"""
FUNCTIONS = """
import asyncio, time
from aioelastic import *
async def main():
    async with Group(Function(time.sleep, 1000), n=2, logs=Logs(tee=Std.NONE)) as group:
        print("workers", *group.pids.values(), flush=True)
        await group.wait()
if __name__ == "__main__":
    asyncio.run(main())
"""


STRIKES_ITSELF = """
import asyncio, time
from aioelastic import *
from aioelastic.events import Spawned
from aioelastic.testing import kill, supervisor, when
def told(event):
    print(event.pid, flush=True)
    strike(event)
if __name__ == "__main__":
    strike = when(Spawned, kill(supervisor), rank=1)
    asyncio.run(supervise(Function(time.sleep, 1000), n=3, logs=Logs(tee=Std.NONE), on_event=told))
"""


async def test_a_supervisor_that_is_killed_at_an_event() -> None:
    with Program(STRIKES_ITSELF) as program:
        assert program.wait() == -signal.SIGKILL
        pids = [int(one) for one in program.output.split()]
        assert len(pids) == 2
        for pid in pids:
            await gone(pid)


async def test_a_supervisor_that_is_killed_takes_its_functions_with_it() -> None:
    with Program(FUNCTIONS) as program:
        pids = [int(one) for one in program.line("workers").split()]
        assert all(map(alive, pids))
        program.kill()
        assert program.code == -signal.SIGKILL
        for pid in pids:
            await gone(pid)


def test_a_supervisor_that_hangs_tells_what_happened_meanwhile() -> None:
    with Program(COMMANDS) as program:
        pids = [int(one) for one in program.line("workers").split()]
        program.stop()
        os.kill(pids[1], signal.SIGKILL)
        program.cont()
        assert program.line("ended; ") == "stopped (SIGTERM); SIGKILL"
        assert program.wait() == 0
    assert not any(map(alive, pids))


def test_what_a_program_says_and_how_it_ends() -> None:
    source = "import sys; print('one'); print('two 2'); sys.stderr.write('oh'); sys.exit(int(sys.argv[0] == '-c') + 4)"
    with Program(source) as program:
        assert program.line("two") == "2"
        assert program.wait() == 5
        assert (program.output, program.errors, program.code) == ("one\ntwo 2\n", "oh", 5)
        with pytest.raises(AssertionError, match=r"no line 'three'; output:\none\ntwo 2\n\nerrors:\noh"):
            program.line("three")


def test_a_program_that_does_not_end() -> None:
    with Program("import time; print('up', flush=True); time.sleep(1000)", bound=0.5) as program:
        program.line("up")
        with pytest.raises(AssertionError, match="no line 'more'"):
            program.line("more")
        with pytest.raises(AssertionError, match="did not end"):
            program.wait()
    assert program.code == -signal.SIGKILL


TEE = """
import asyncio, sys
from aioelastic import *
result = asyncio.run(supervise(Command("/bin/sh", "-c", "echo hello; echo world >&2"), n=2))
sys.stderr.write(f"total {result[1].stdout.total} {result.ok}\\n")
"""


@pytest.mark.parametrize("stdout", ["closed", "full"])
def test_a_supervisor_that_cannot_print(stdout: str) -> None:
    with Program(TEE, stdout=stdout) as program:  # type: ignore[arg-type]
        assert program.wait() == 0, program.errors
        assert program.output == ""
        assert "total 6 True" in program.errors
        assert program.errors.count("world") == 2


async def test_a_supervisor_in_a_namespace_of_its_own() -> None:
    try:
        before = pid_namespace()
    except Unavailable as exc:
        pytest.skip(f"no PID namespace: {exc}")
    with Program(f"import os; print('pid', os.getpid())\n{COMMANDS}", before=before) as program:
        assert program.line("pid") == "1"
        first, second = program.line("workers").split()
        assert int(first) < int(second) < 100
    # nobody was left to do it: what the next program does, once that first process is gone
    await until(lambda: not sweep(tempfile.gettempdir()) and not has_left(tempfile.gettempdir(), 1))


# --- the mark ---


@pytest.mark.fresh
@pytest.mark.pid_namespace
async def test_as_the_first_process_of_a_container() -> None:
    """PID 1 would get the orphans of all, and have to wait for them: the guardian is nearer, and does."""
    assert os.getpid() == 1
    result = await supervise(setsid_escape(), n=2, logs=QUIET, stop=Stop(grace=0.5))
    assert len({one.pid for one in result.leaked}) == 2
    end_helpers()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_mark_skips_with_the_reason(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(pytester.path))
    pytester.makeconftest('pytest_plugins = ["aioelastic.testing.plugin"]')
    pytester.makepyfile(
        "import pytest\n@pytest.mark.pid_namespace\ndef test_it(): assert False\ndef test_disk(full_disk): assert False"
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*no PID namespace: unshare: No such file*", "*no full disk: mount: No such file*"])
