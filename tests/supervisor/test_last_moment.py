"""A worker that dies by itself just when its block is left, or another ends, for that reason: it is not taken for one
that we stopped, and it is the root cause."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import QUIET, child_process, py, sh, until

from aioelastic import Group, Restart
from aioelastic.processes.proc_files import is_exiting, stat
from aioelastic.supervisor import worker_life

EXIT = {"x86_64": 60, "aarch64": 93}  # exit(2): of one thread

LEADER_GONE = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)
"""

ALL = Restart.on_failure(max=1, scope="all")

OBEYS = "import signal, sys; signal.signal(15, lambda *_: sys.exit(3)); print('up', flush=True); signal.pause()"


async def test_why_it_died_is_told_although_the_block_is_left_before_its_exit_is_known(tmp_path: Path) -> None:
    """A process closes its files before its exit is told: in one of four rounds this was quick enough to see it."""
    os.mkfifo(fifo := tmp_path / "fifo")

    async def lose_the_other_end() -> None:
        async with Group(sh(f"exec 3>{fifo}; kill -SEGV $$"), logs=QUIET):
            with fifo.open("rb") as file:  # the loop stands still meanwhile
                file.read()
            raise EOFError

    for _ in range(20):
        with pytest.raises(EOFError) as caught:
            await lose_the_other_end()
        assert "failed: SIGSEGV" in caught.value.__notes__[0]


@pytest.mark.parametrize("exiting", [True, False])
async def test_what_a_worker_that_is_exiting_does_is_its_own(exiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_life, "is_exiting", lambda pid: exiting)

    async def fail() -> None:
        async with Group(py(OBEYS), logs=QUIET) as group:
            await group.line("up")
            raise ValueError("whatever")

    with pytest.raises(ValueError, match="whatever") as caught:
        await fail()
    assert ["failed: exit code 3" in one for one in getattr(caught.value, "__notes__", [])] == [True] * exiting


async def test_the_end_of_a_pipe_is_not_blamed_on_who_writes_to_it() -> None:
    """Of a reader that crashes, the writer's SIGPIPE may be told before its own end."""
    for _ in range(20):
        ours, theirs = os.pipe()
        writer = sh(f"while :; do echo; done >/dev/fd/{theirs}", pass_fds=[theirs])
        reader = sh(f"read x </dev/fd/{ours}; kill -SEGV $$", pass_fds=[ours])
        async with Group([writer, reader], logs=QUIET, check=False) as group:
            os.close(ours)
            os.close(theirs)
            result = await group.wait()
        assert result.first_failure is not None
        assert result.first_failure.rank == 1
        assert [one.rank for one in result.failures if one.first] == [1]
        assert result.failures[0].first


@pytest.mark.parametrize("end", ["kill -PIPE $$", "exit 141"])
@pytest.mark.parametrize("exiting", [True, False])
async def test_whoever_exits_while_another_ends_by_sigpipe(
    end: str, exiting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_life, "is_exiting", lambda pid: exiting)
    async with Group([sh(f"read x; {end}", stdin="pipe"), py(OBEYS)], logs=QUIET, check=False) as group:
        await group.line("up")
        await group[0].stdin.aclose()
        result = await group.wait()
    wanted = [(1, True), (0, False)] if exiting else [(0, True)]
    assert [(one.rank, one.first) for one in result.failures] == wanted
    assert result[1].stopped is not exiting


async def test_the_root_cause_of_an_attempt_is_not_who_writes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_life, "is_exiting", lambda pid: True)
    again = '[ "$AIOELASTIC_ATTEMPT" = 1 ] && exit; '  # the second attempt succeeds
    reader = sh(again + "trap 'exit 3' TERM; echo up; while :; do sleep 0.01; done")
    group = Group([sh(again + "read x; kill -PIPE $$", stdin="pipe"), reader], logs=QUIET, restart=ALL)
    async with group:
        await group.line("up")
        await group[0].stdin.aclose()
        result = await group.wait()
    assert [(one.rank, one.first) for one in result.earlier] == [(1, True), (0, False)]


def test_who_is_exiting() -> None:
    assert not is_exiting(os.getpid())
    with child_process(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert is_exiting(ended.pid)
    assert not is_exiting(ended.pid)


@pytest.mark.skipif(platform.machine() not in EXIT, reason="the number of exit(2) is not known here")
async def test_a_process_whose_first_thread_has_ended_lives_on() -> None:
    argv = [sys.executable, "-S", "-c", LEADER_GONE, str(EXIT[platform.machine()])]
    with child_process(argv, stdin=subprocess.PIPE) as process:
        await until(lambda: (stat(process.pid) or "?")[0] == "Z")
        assert not is_exiting(process.pid)
        process.kill()
