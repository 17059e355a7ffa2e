"""System calls of aioelastic that are made to fail: only those, only so often, only in this process."""

from __future__ import annotations

import errno
import os
import select
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, kill_and_see_it_dead, sh

from aioelastic import Logs, SpecError, Std, supervise
from aioelastic.child.guardian import process_start
from aioelastic.child.guardian.children import Children
from aioelastic.child.wire import requests
from aioelastic.launch import _pipe_ends
from aioelastic.streams import _files
from aioelastic.system import shared_memory_names
from aioelastic.testing import _failing_calls
from aioelastic.testing._failing_calls import failing


async def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    logs = Logs(dir=tmp_path, tee=Std.NONE)
    with failing("os.write", "os.writev", error=errno.ENOSPC, times=None, within="aioelastic.streams") as fault:
        result = await supervise(sh("echo lost"), logs=logs)
    assert set(fault.struck) == {"aioelastic.streams._files"}
    assert result[0].stdout.lost == result[0].stdout.total == len("lost\n")
    result = await supervise(sh("echo kept"), logs=logs)
    assert result[0].stdout.lost == 0
    assert _files.os is os


async def test_no_descriptors_for_a_start() -> None:
    with failing("os.pipe2", error=errno.EMFILE) as fault:
        result = await supervise(sh("exit 0"), 2, logs=QUIET, check=False)
        for fd in os.pipe2(os.O_CLOEXEC):  # that of others works all the while
            os.close(fd)
    assert len(fault.struck) == 1
    assert [one.errno for one in result.failures] == [errno.EMFILE]


@pytest.mark.parametrize(("error", "count"), [(errno.EMFILE, 1), (errno.ENOENT, 100)])
def test_a_directory_that_cannot_be_locked(error: int, count: int, tmp_path: Path) -> None:
    """It does not stay, and is not made again without an end."""
    words = str(tmp_path) if count > 1 else "Too many open files"
    strike = failing("os.open", error=error, times=None, within="aioelastic.system.shared_memory_names")
    with strike as fault, pytest.raises(OSError, match=words):
        shared_memory_names.own_directory(str(tmp_path))
    assert fault.struck == ["aioelastic.system.shared_memory_names"] * len(fault.struck)
    assert len(fault.struck) >= count
    assert list(tmp_path.iterdir()) == []


async def test_once_and_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(_failing_calls.time, "sleep", slept.append)
    with failing("open", seconds=5) as fault, failing("os.pipe2", error=errno.EMFILE) as other:
        for _ in range(2):
            with open_as_they_do(requests) as file:
                assert file.read() == b""
        assert other.struck == []
        with pytest.raises(OSError, match="Too many open files"):
            _pipe_ends.os.pipe2(0)
        with failing("os.pipe2", error=errno.ENFILE), pytest.raises(OSError, match="Too many open files in system"):
            _pipe_ends.os.pipe2(0)
    assert fault.struck == ["aioelastic.child.wire.requests"]
    assert slept == [5, 0.0, 0.0]
    assert "open" not in vars(requests)


def open_as_they_do(module: Any) -> Any:
    return vars(module)["open"]("/dev/null", "rb")


def test_a_forked_copy_is_not_struck() -> None:
    with failing("os.getpid", error=errno.EIO, times=None) as fault:
        pid = os.fork()
        if not pid:
            os._exit(int(_pipe_ends.os.getpid() != os.getpid()))
        assert os.waitpid(pid, 0)[1] == 0
        with pytest.raises(OSError, match="Input/output"):
            _pipe_ends.os.getpid()
    assert fault.struck == [_pipe_ends.__name__]


@pytest.mark.parametrize(
    ("calls", "options", "field"),
    [
        ((), {"error": 5}, "calls"),
        (("os.nothing",), {"error": 5}, "calls"),
        (("subprocess.run",), {"error": 5}, "calls"),
        (("os.open", "writev"), {"error": 5}, "calls"),
        ((5,), {"error": 5}, "calls"),
        (("os.open",), {"error": -1}, "error"),
        (("os.open",), {}, "error"),
        (("os.open",), {"error": 5, "times": 0}, "times"),
        (("os.open",), {"seconds": -1}, "seconds"),
        (("os.open",), {"error": 5, "within": "asyncio"}, "within"),
        (("os.open",), {"error": 5, "within": "aioelastic.stream"}, "within"),
    ],
)
def test_what_cannot_be(calls: tuple[Any, ...], options: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught, failing(*calls, **options):
        pass
    assert caught.value.field == field


async def test_who_holds_a_pipe_cannot_be_looked_for() -> None:
    """That is one answer less, and not the end of the group by an error."""
    with failing("os.listdir", error=errno.EMFILE, times=None, within="aioelastic.processes") as fault:
        left = sh("setsid sleep 600 & echo $!")
        result = await supervise(left, logs=Logs(tee=Std.NONE, drain=0.01), launcher="direct")
    kill_and_see_it_dead(int(str(result[0].stdout)), signal.SIGKILL)
    assert "aioelastic.processes.proc_files" in fault.struck
    assert result[0].stdout.holders == ()
    assert "is not known" in str(result.remains[0])


def test_a_number_that_was_closed_is_not_closed_again() -> None:
    """The guardian closes a descriptor for each look, and may not get it back."""
    with select.epoll() as epoll:
        family = Children(epoll)
        with failing("os.open", error=errno.EMFILE, times=None, within="aioelastic.child.guardian.children") as fault:
            family._mark(os.getpid())
            mine = os.dup(family._list)
            family._mark(os.getpid())
        assert len(fault.struck) == 2
        os.close(mine)
        os.close(family._list)


def test_a_process_that_was_started_is_not_lost_with_a_close() -> None:
    with failing("os.close", error=errno.EIO, times=None, within="aioelastic.system.descriptors") as fault:
        pid, pipe = process_start.trial((((), (), None, None, ()), ""), None)
    assert fault.struck
    assert os.waitpid(pid, 0)[0] == pid
    assert process_start.outcome(pipe) == (0, "")
    os.close(pipe)
