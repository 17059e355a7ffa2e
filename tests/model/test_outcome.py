"""Results are values, and their words are what a person needs."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, sh

from aioelastic import (
    Cause,
    Command,
    Exit,
    Failure,
    GroupFailed,
    GroupResult,
    Logs,
    Output,
    Result,
    Std,
    Stop,
    Unkillable,
    Usage,
    events,
    plan,
    supervise,
)
from aioelastic.diagnosis import Evidence, Facts, Kills
from aioelastic.model.exits import LINE_SHOWN, TAIL_LINES
from aioelastic.model.failures import ErrorReport
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.leftovers import Process
from aioelastic.model.results import ATTEMPTS_SHOWN
from aioelastic.model.signal_names import signal_name
from aioelastic.streams import Line


def exit_with(code: int | None = None, signal: int | None = None, **more: Any) -> Exit:
    fields = {"core_dumped": False, "started_ns": 10**9, "ended_ns": 3 * 10**9, "started_at": 1.0, "ended_at": 3.0}
    return Exit(code, signal, **{**fields, **more})


def failure_of(**more: Any) -> Failure:
    fields: dict[str, Any] = {
        "rank": 1,
        "name": "worker",
        "pid": 42,
        "host": "here",
        "attempt": 0,
        "argv": ("prog", "a b"),
        "cwd": None,
        "exit": exit_with(3),
        "cause": "exit code 3",
        "error": None,
        "stdout": Output(),
        "stderr": Output(),
        "first": True,
    }
    return Failure(**{**fields, **more})


def test_a_failure_can_be_printed_whatever_is_in_it() -> None:
    """File names, and what a worker writes about itself, may hold what no encoding can carry."""
    report = ErrorReport("no \ud800", "Traceback …\nOSError: no \ud800")
    failure = failure_of(argv=("prog", "a\udcff"), cwd="/b\udcff", error=report)
    for text in (failure.headline, failure.describe()):
        assert r"no \ud800" in text
        text.encode()
    assert r"a\udcff" in failure.describe()


@pytest.mark.parametrize(
    ("pid", "words"),
    [(42, "web.1 (rank 1, pid 42 on here) failed: exit code 3"), (None, "web.1 (rank 1) failed: exit code 3")],
)
def test_a_failure_says_the_name_of_its_worker(pid: int | None, words: str) -> None:
    assert failure_of(worker="web.1", pid=pid).headline.startswith(words)


def result_of(failure: Failure) -> Result:
    return Result(
        failure.rank,
        "worker",
        failure.argv,
        failure.pid,
        0,
        failure.exit,
        None,
        failure.stdout,
        failure.stderr,
        failure,
    )


def group_of(*failures: Failure, **more: Any) -> GroupResult:
    return GroupResult("g", "run", "failed", tuple(map(result_of, failures)), failures, **more)


# --- words ---


@pytest.mark.parametrize(
    ("given", "words", "status", "ok"),
    [
        (exit_with(0), "exit code 0", 0, True),
        (exit_with(3), "exit code 3", 3, False),
        (exit_with(signal=11), "SIGSEGV", 139, False),
        (exit_with(signal=11, core_dumped=True), "SIGSEGV (core dumped)", 139, False),
        (exit_with(signal=15, stopped_by=15), "stopped (SIGTERM)", 143, False),
        (exit_with(0, stopped_by=2), "stopped (SIGINT): exit code 0", 0, True),
        (exit_with(signal=signal.SIGRTMIN + 3), "SIGRTMIN+3", 128 + signal.SIGRTMIN + 3, False),
        (exit_with(), "another waiter", 255, False),
    ],
)
def test_exit(given: Exit, words: str, status: int, ok: bool) -> None:
    assert words in str(given)
    assert given.status == status
    assert given.ok is ok
    assert given.duration == 2.0


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 127),
        (exit_with(3), 3),
        (exit_with(signal=15), 143),
        (exit_with(4, stopped_by=15), 4),
        (exit_with(signal=15, stopped_by=15), 1),  # it had failed before: the signal is ours and says nothing
    ],
)
def test_the_status_of_a_failure(given: Exit | None, status: int) -> None:
    assert failure_of(exit=given).status == status


def test_signal_names() -> None:
    assert signal_name(9) == "SIGKILL"
    assert signal_name(999) == "signal 999"


def test_output() -> None:
    out = Output(tail=b"a\nb\xff\n")
    assert str(out) == "a\nb\N{REPLACEMENT CHARACTER}\n"
    many = Output(tail="".join(f"{i}\n" for i in range(100)).encode())
    assert many.last_lines() == [str(i) for i in range(100 - TAIL_LINES, 100)]
    assert many.last_lines(2) == ["98", "99"]
    assert Output(tail=b"x" * 10_000).last_lines() == ["x" * LINE_SHOWN + "…"]
    assert Output().last_lines() == []


def test_a_failure_says_all_and_the_reason_last() -> None:
    failure = failure_of(
        cwd="/somewhere", stderr=Output(Path("e.log"), b"first\nlast words\n"), stdout=Output(Path("o.log"))
    )
    text = failure.describe()
    first, *_, last = text.splitlines()
    assert first == "rank 1 (pid 42 on here) failed: exit code 3 after 2.00 s"
    for word in ("prog 'a b'", "in: /somewhere", "log: o.log", "log: e.log", "last lines of stderr:"):
        assert word in text
    assert last.strip() == "last words"


def test_stdout_when_stderr_is_silent() -> None:
    text = failure_of(stdout=Output(tail=b"only this\n")).describe()
    assert text.endswith("last lines of stdout:\n    only this")


def test_traceback_is_shown_once_and_last() -> None:
    trace = "Traceback (most recent call last):\n  File\nValueError: x"
    error = ErrorReport("ValueError: x\nmore", trace + "\n")
    text = failure_of(error=error, stderr=Output(tail=trace.encode() + b"\n")).describe()
    assert text.count("ValueError: x") == 2  # in the headline and at the end
    assert text.endswith("ValueError: x")
    both = failure_of(error=error, stderr=Output(tail=b"a warning\n")).describe()
    assert both.index("a warning") < both.index("its traceback")
    assert both.endswith("ValueError: x")
    assert "more" not in failure_of(error=error).headline


def test_long_words_are_cut() -> None:
    error = ErrorReport("x" * 100_000)
    assert len(failure_of(error=error).headline) < LINE_SHOWN + 100
    assert len(failure_of(argv=("prog", "y" * 1_000_000)).describe()) < 50_000


def test_never_started() -> None:
    failure = failure_of(pid=None, exit=None, cause="could not start: [Errno 2] No such file")
    assert failure.status == 127
    assert failure.headline == "rank 1 failed: could not start: [Errno 2] No such file"
    one = result_of(failure)
    assert one.outcome == failure.cause
    assert not one.ok
    assert not one.stopped
    assert dataclasses.replace(one, failure=None).outcome == "never started"


# --- order ---


async def test_words_and_order_of_a_real_group() -> None:
    """Rank 1 fails first, by its own doing; 0 is stopped; the pipe between them is the order."""
    result = await supervise(
        lambda rank: sh("echo 'last words' >&2; exit 9" if rank == 1 else "exec sleep 1000"), 2, logs=QUIET, check=False
    )
    assert [one.rank for one in result.failures] == [1]
    assert result.first_failure is result.failures[0]
    assert result.first_failure.first
    assert result.first_failure.status == 9
    assert result[1].outcome == "exit code 9"
    assert result[0].outcome == "stopped (SIGTERM)"
    assert result[0].failure is None
    assert "last words" in result.failures[0].describe()


def with_earlier(last: Failure, *earlier: Failure) -> GroupResult:
    return GroupResult("g", "run", "failed", (dataclasses.replace(result_of(last), earlier=earlier),), (last,))


def test_earlier_attempts_come_first_and_the_root_cause_last() -> None:
    past = [failure_of(attempt=i, pid=50 + i, cause=f"exit code {i}", first=True) for i in (0, 1)]
    result = with_earlier(failure_of(attempt=2, pid=60), *past)
    assert result.earlier == tuple(past)
    with pytest.raises(GroupFailed) as caught:
        result.raise_for_failures()
    assert caught.value.message.splitlines() == [
        "group 'g': failed after 3 attempts:",
        "  attempt 0: rank 1 (pid 50 on here) failed: exit code 0 after 2.00 s",
        "  attempt 1: rank 1 (pid 51 on here) failed: exit code 1 after 2.00 s",
        "  attempt 2: rank 1 (pid 60 on here) failed: exit code 3 after 2.00 s",
    ]
    assert [one.failure.attempt for one in caught.value.exceptions] == [2]


def test_earlier_attempts_of_several_ranks() -> None:
    """By attempt, and in each the first to fail first."""
    results = [
        dataclasses.replace(
            result_of(failure_of(rank=rank)),
            earlier=tuple(failure_of(rank=rank, attempt=i, first=rank == 1) for i in (0, 1)),
        )
        for rank in (0, 1)
    ]
    result = GroupResult("g", "run", "done", tuple(results))
    assert [(one.attempt, one.rank) for one in result.earlier] == [(0, 1), (0, 0), (1, 1), (1, 0)]
    assert result.ok


def test_very_many_attempts_are_not_all_listed() -> None:
    result = with_earlier(failure_of(attempt=900), *(failure_of(attempt=i, first=True) for i in range(900)))
    lines = result.history()
    assert len(lines) == ATTEMPTS_SHOWN + 1
    assert lines[0].startswith("attempt 0: ")
    assert lines[-1].startswith("attempt 899: ")
    assert lines[ATTEMPTS_SHOWN // 2] == "… 800 more, see `earlier` of the result"
    assert group_of(failure_of()).history() == []


# --- values ---


def test_group_result_is_a_sequence() -> None:
    group = group_of(failure_of(rank=0), failure_of(rank=1, first=False))
    assert isinstance(group, Sequence)
    assert len(group) == 2
    assert [one.rank for one in group] == [0, 1]
    assert group[-1].rank == 1
    assert [one.rank for one in group[:1]] == [0]
    assert group[0] in group
    assert next(reversed(group)).rank == 1
    with pytest.raises(IndexError):
        group[2]


def test_ok() -> None:
    assert GroupResult("g", "r", "done", ()).ok
    assert GroupResult("g", "r", "stopped", ()).ok
    assert not GroupResult("g", "r", "timeout", ()).ok
    assert not GroupResult("g", "r", "stopped", (), unkillable=(Unkillable(0, 1, "D", ""),)).ok
    assert not group_of(failure_of()).ok
    GroupResult("g", "r", "done", ()).raise_for_failures()


USAGE = Usage(0.1, 0.2, 3, True, 4, 5, 6, 7, 8, 9)
COMMON: tuple[Any, ...] = (0, 42, 0, 1.5)
VALUES: list[Any] = [
    exit_with(3),
    USAGE,
    Output(Path("x"), b"tail", 4, 0, (7,)),
    ErrorReport("m", "t", 1.0),
    failure_of(error=ErrorReport("m")),
    Process(1, "sleep", "S"),
    Cause("crash", "crashed", ("a line",), certain=False, core=Path("core")),
    Kills(1, 2),
    Evidence(ErrorReport("m"), Kills(1), ("a line",), Path("core"), "core dump: core"),
    Facts(exit_with(3), sent=frozenset({9})),
    failure_of(why=Cause("exit_code", "ended")),
    Unkillable(0, 1, "D", "nfs"),
    result_of(failure_of()),
    dataclasses.replace(result_of(failure_of()), earlier=(failure_of(),)),
    group_of(failure_of(), log_dir=Path("x"), leaked=(Process(1, "x"),)),
    plan(GroupSpec.of(Command("x", env={"A": "1"}), 2, logs=Logs(dir="d"))),
    plan(GroupSpec.of(Command("x"), 1)).workers[0],
    Line(0, "stdout", b"x", 1.0),
    events.Spawned(*COMMON),
    events.Ready(*COMMON),
    events.Exited(*COMMON, exit_with(0)),
    events.Drained(*COMMON, (5,)),
    events.Stopping(*COMMON, 15),
    events.Killed(*COMMON),
    events.Restarting(*COMMON, 1, "rank 0: exit code 3"),
    events.GaveUp(*COMMON, 4),
    events.SinkTrouble(*COMMON, "stdout", "is closed", 5),
    events.Leaked(*COMMON, Process(1, "x")),
    events.GroupDone(*COMMON, group_of(failure_of())),
]


def test_every_event_is_here() -> None:
    kinds = {one for one in vars(events).values() if isinstance(one, type) and issubclass(one, events.Event)}
    assert kinds - {type(one) for one in VALUES} == {events.Event}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values(value: Any) -> None:
    """Each travels to another process, is equal to its copies, and cannot be changed."""
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.copy(value) == value
    assert copy.deepcopy(value) == value
    assert type(value).__name__ in repr(value)
    names = getattr(value, "_fields", None) or [one.name for one in dataclasses.fields(value)]
    for name in names:
        with pytest.raises(AttributeError):  # FrozenInstanceError is one
            setattr(value, name, None)


async def test_real_results_travel_too(tmp_path: Path) -> None:
    entry = [sh("echo out; echo err >&2; exit 3"), sh("exec sleep 1000")]
    seen: list[events.Event] = []
    logs = Logs(dir=tmp_path, tee=Std.NONE)
    result = await supervise(entry, logs=logs, stop=Stop(grace=1), check=False, on_event=seen.append)
    again = pickle.loads(pickle.dumps(result))
    assert again == result
    assert again.failures[0].describe() == result.failures[0].describe()
    assert pickle.loads(pickle.dumps(seen)) == seen
    assert seen[-1] == events.GroupDone(None, None, None, seen[-1].time, result)
