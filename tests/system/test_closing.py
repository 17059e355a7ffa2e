"""Errors of close(2): they stop no clean-up, and those of a log file are told."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import numpy as np
import pytest
from helpers import sh

import aioelastic
from aioelastic import Command, Function, Logs, Std, WorkerExecutor, sharing, supervise
from aioelastic.events import Event, SinkTrouble
from aioelastic.system.descriptors import shut

HOUSE = str(Path(aioelastic.__file__).parent)
CODES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR]


@pytest.fixture(params=CODES, ids=errno.errorcode.get)
def closing_fails(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Each close(2) of ours closes, and fails. Which descriptors those were."""
    close, closed = os.close, list[int]()

    def fails(fd: int) -> None:
        close(fd)
        if sys._getframe(1).f_code.co_filename.startswith(HOUSE):
            closed.append(fd)
            raise OSError(request.param, os.strerror(request.param))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fails)
        yield closed


async def test_groups_and_what_they_leave(closing_fails: list[int], tmp_path: Path) -> None:
    troubles = list[Event]()

    def note(event: Event) -> None:
        if isinstance(event, SinkTrouble):
            troubles.append(event)

    logs = Logs(dir=tmp_path, tee=Std.NONE)
    result = await supervise([sh("echo one"), sh("echo two; sleep 1000 & exit 0")], logs=logs, on_event=note)
    assert [one.stdout.last_lines(1) for one in result.results] == [["one"], ["two"]]
    assert {one.exit.code for one in result.results if one.exit is not None} == {0}
    assert {Path(one.sink).name for one in troubles if isinstance(one, SinkTrouble)} == {"stdout.log", "stderr.log"}
    assert closing_fails


@pytest.mark.long
@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
async def test_functions(closing_fails: list[int], start: str) -> None:
    result = await supervise(Function(jobs.product, 2, 3), 2, start=start, logs=Logs(tee=Std.NONE))  # type: ignore[arg-type]
    assert [one.value for one in result.results] == [6, 7]
    assert closing_fails


async def test_a_program_that_is_not_there(closing_fails: list[int]) -> None:
    result = await supervise(Command("true"), launcher="direct", logs=Logs(tee=Std.NONE))
    assert result.ok
    assert closing_fails


def test_executors_and_arrays(closing_fails: list[int]) -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(np.sum, np.ones(1 << 17)).result() == 1 << 17
        assert executor.submit(np.ones, 1 << 17).result().shape == (1 << 17,)
    sharing.trim()
    assert closing_fails


def test_what_is_no_descriptor() -> None:
    one = os.open(os.devnull, os.O_RDONLY)
    shut(-1, one)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(one)
