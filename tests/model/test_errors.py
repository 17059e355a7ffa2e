"""Errors: one tree, root cause last for the reader, first for the program, and they travel."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import traceback
from typing import Any

import pytest
from helpers import QUIET, gone, kill_and_see_it_dead, sh
from test_outcome import failure_of, group_of

from aioelastic import Group, GroupFailed, GroupResult, GroupTimeout, SpecError, WorkerFailed, supervise
from aioelastic.errors import LaunchFailed
from aioelastic.model.exits import Output


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("cwd", "cwd=7"),
        ("cwd of rank 1", "cwd=7 of rank 1"),
        ("args[0] of f of rank 1", "args[0]=7 of f of rank 1"),
        ("env['a of b']", "env['a of b']=7"),
        ("env['a of b'] of rank 1", "env['a of b']=7 of rank 1"),
        ("entry(rank=1): env['a of b']", "entry(rank=1): env['a of b']=7"),
    ],
)
def test_the_value_of_a_field_stands_beside_its_name(field: str, shown: str) -> None:
    assert str(SpecError(field, 7, "is odd", "mend it")) == f"{shown} is odd; mend it"


def failed(count: int) -> GroupFailed:
    failures = [
        failure_of(rank=count - 1 - i, first=i == 0, stderr=Output(tail=f"words of {count - 1 - i}".encode()))
        for i in range(count)
    ]
    with pytest.raises(GroupFailed) as caught:
        group_of(*failures).raise_for_failures()
    return caught.value


def same(one: BaseException, two: BaseException) -> bool:
    return type(one) is type(two) and str(one) == str(two) and vars(one).keys() == vars(two).keys()


@pytest.mark.parametrize(
    "error",
    [
        SpecError("n", 0, "is less than 1", "give more"),
        LaunchFailed(1, ["prog"], FileNotFoundError(2, "No such file", "prog")),
        WorkerFailed(failure_of()),
        GroupTimeout(1.5, GroupResult("g", "r", "timeout", ())),
        failed(1),
        failed(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel(error: Any) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert same(again, error)
        assert again is not error
    if isinstance(error, GroupFailed):
        again = pickle.loads(pickle.dumps(error))
        assert again.result == error.result
        assert [one.failure for one in again.exceptions] == [one.failure for one in error.exceptions]
        assert [getattr(one, "__notes__", None) for one in again.exceptions] == [
            getattr(one, "__notes__", None) for one in error.exceptions
        ]


def test_notes_travel() -> None:
    error = failed(1)
    error.add_note("seen by the scheduler")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen by the scheduler"]


def test_kinds() -> None:
    """What somebody may already catch."""
    assert issubclass(SpecError, ValueError)
    assert issubclass(GroupTimeout, TimeoutError)
    assert issubclass(GroupFailed, ExceptionGroup)


def test_launch_failed_says_who_what_why() -> None:
    text = str(LaunchFailed(2, ("prog", "x"), PermissionError(13, "Permission denied", "prog")))
    assert "rank 2" in text
    assert "['prog', 'x']" in text
    assert "Permission denied" in text


def test_timeout_says_how_many_ran() -> None:
    error = GroupTimeout(1.5, GroupResult("g", "r", "timeout", ()))
    assert "1.5 s" in str(error)
    assert "0 of 0" in str(error)


async def test_except_star() -> None:
    caught: list[BaseException] = []
    try:
        await supervise(sh("exit 3"), 1, logs=QUIET)
    except* WorkerFailed as group:
        caught.append(group)
    (error,) = caught
    assert isinstance(error, GroupFailed)
    assert error.exceptions[0].failure.status == 3
    assert error.result.failures[0].status == 3


async def test_inside_a_task_group() -> None:
    """The neighbour is cancelled by the task group, and stopped."""

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervise(sh("exit 3"), logs=QUIET))
            tasks.create_task(supervise(sh("exec sleep 1000"), logs=QUIET))

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    ours, rest = caught.value.split(GroupFailed)
    assert rest is None
    assert ours is not None
    assert isinstance(ours.exceptions[0], GroupFailed)


def test_split_and_derive_keep_the_result() -> None:
    error = failed(3)
    some, rest = error.split(lambda one: isinstance(one, WorkerFailed) and one.failure.rank == 2)
    assert isinstance(some, GroupFailed)
    assert isinstance(rest, GroupFailed)
    assert some.result is rest.result is error.result
    assert [one.failure.rank for one in some.exceptions] == [2]
    assert [one.failure.rank for one in rest.exceptions] == [1, 0]
    assert error.subgroup(KeyError) is None
    whole = error.subgroup(WorkerFailed)
    assert whole is not None
    assert len(whole.exceptions) == 3


def test_first_cause_first_in_the_tree() -> None:
    error = failed(3)
    assert [one.failure.first for one in error.exceptions] == [True, False, False]
    assert "rank 2 (pid 42 on here) failed: exit code 3" in str(error)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 40])
def test_the_traceback_ends_with_the_root_cause(count: int) -> None:
    """Python shows a group's first 15 members only: the root cause must be the last of what is shown."""
    printed = "".join(traceback.format_exception(failed(count)))
    lines = [line.strip(" |") for line in printed.splitlines()]
    words = [line for line in lines if line.startswith("words of")]
    assert words[-1] == f"words of {count - 1}"


async def test_the_traceback_of_a_real_group_ends_with_the_root_cause() -> None:
    script = 'echo "words of $RANK" >&2; exec sleep 1000'
    async with Group(sh(script), 3, logs=QUIET) as group:
        said = 0
        async for _ in group.lines():
            said += 1
            if said == 3:
                break
        for rank in (1, 2, 0):
            kill_and_see_it_dead(group[rank].pid, 9)
        with pytest.raises(GroupFailed) as caught:
            await group.wait()
    printed = "".join(traceback.format_exception(caught.value))
    words = [line for line in printed.splitlines() if "words of" in line]
    assert words[-1].endswith("words of 1")
    assert printed.rindex("root cause") > printed.rindex("words of 2")


def test_as_an_uncaught_error_of_a_program() -> None:
    code = """
import asyncio
from aioelastic import Command, Logs, Std, supervise
asyncio.run(supervise(Command("/bin/sh", "-c", "echo the reason >&2; exit 3"), logs=Logs(tee=Std.NONE)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    shown = [line.strip(" |") for line in done.stderr.splitlines()]
    assert "the reason" in shown[-3:]
    assert "exit code 3" in done.stderr


async def test_what_a_failure_shows() -> None:
    script = "for i in $(seq 100); do echo line $i >&2; done; exit 3"
    with pytest.raises(GroupFailed) as caught:
        await supervise([sh(script), sh("exec sleep 1000")], logs=QUIET)
    text = str(caught.value.exceptions[0])
    pid = caught.value.result[0].pid
    for word in ("rank 0", f"pid {pid}", "exit code 3", "/bin/sh -c", "line 81", "line 100"):
        assert word in text, word
    assert "line 80\n" not in text  # the last 20 lines
    assert text.endswith("line 100")
    assert "1 of 2 were stopped" in str(caught.value)
    assert pid is not None
    await gone(pid)
