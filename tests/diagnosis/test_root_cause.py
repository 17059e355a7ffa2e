"""The root cause among failures: what we had stopped has not failed, whatever the clock says; the first was first."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, kill_and_see_it_dead, until
from test_outcome import exit_with
from test_record import python

from aioelastic import Function, Group, GroupResult, Restart, Stop
from aioelastic.child.worker.error_record import clock, write_error
from aioelastic.diagnosis import Moment, read_report
from aioelastic.launch import CallOutcome
from aioelastic.launch._helper_process import ServedProcess
from aioelastic.model.exits import Exit
from aioelastic.model.failures import ErrorReport
from aioelastic.supervisor.result_builder import _exit, failed_at
from aioelastic.supervisor.worker_life import WorkerLife
from aioelastic.testing._environment import clock_jump

# a worker that says it is up and waits; its main function is recorded
WAITS = "from aioelastic import record\nimport os, signal, sys, time\n{setup}\n@record\ndef main():\n    {body}\nmain()"
SAYS = "print('up', flush=True); signal.pause()"
RAISES = "signal.signal(signal.SIGTERM, lambda *_: 1 / 0)"
# time.time() of the worker is an hour off
LIES = "real = time.time; time.time = lambda: real() {by}; "


async def stopped(entry: Any, act: Callable[[Group], Any], n: int = 1, **more: Any) -> GroupResult:
    """What comes of workers that have said `up` before `act` stops them."""
    async with Group(entry, n, logs=QUIET, check=False, **more) as group:
        up = 0
        async for _ in group.lines():
            up += 1
            if up == n:
                break
        act(group)
        return await group.wait()


def wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker has answered our stop signal, to its end, before the call that sends it returns."""
    send = ServedProcess.send_signal

    def send_and_wait(self: ServedProcess, signum: int) -> bool:
        sent = send(self, signum)
        while sent and signum == signal.SIGINT and not self._has_ended():
            pass
        return sent

    monkeypatch.setattr(ServedProcess, "send_signal", send_and_wait)


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_an_answer_that_is_quicker_than_we_are_is_no_failure(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_the_end(monkeypatch)
    result = await stopped(Function(jobs.says_up), Group.begin_stop, 2, stop=Stop(signal="SIGINT"), start=start)
    assert result.failures == ()
    assert all(one.stopped and one.why is not None and one.why.kind == "our_signal" for one in result)


STOPS: dict[str, tuple[dict[str, Any], Callable[[Group], Any]]] = {
    "group": ({}, Group.begin_stop),
    "leader": ({"stop": Stop(scope="leader")}, Group.begin_stop),
    "process group": ({"stop": Stop(scope="group")}, Group.begin_stop),
    "one worker": ({}, lambda group: group[0]._life.begin_stop()),
    "timeout": ({}, lambda group: group.begin_stop("timeout")),
    "hurried": ({}, lambda group: (group.begin_stop(), group.hurry())),
}


@pytest.mark.parametrize("by", ["- 3600", "+ 3600", "+ 0"])
@pytest.mark.parametrize("how", STOPS)
async def test_an_exception_that_answers_our_signal_is_no_failure(how: str, by: str) -> None:
    """It is raised by the handler, and written down by `record`, with whatever time."""
    more, act = STOPS[how]
    result = await stopped(python(WAITS.format(setup=RAISES, body=LIES.format(by=by) + SAYS)), act, **more)
    assert result.failures == ()
    assert result[0].stopped


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
async def test_our_own_clock_is_set_while_they_run(seconds: float) -> None:
    with clock_jump() as jump:

        def act(group: Group) -> None:
            jump(seconds)
            group.begin_stop()

        result = await stopped(python(WAITS.format(setup=RAISES, body=SAYS)), act)
    assert result.failures == ()


async def test_the_others_of_a_restart_were_stopped() -> None:
    """All begin again for the failure of rank 1: what the handler of rank 0 raises is no failure of that attempt."""
    setup = f"{RAISES}\nif os.environ['AIOELASTIC_ATTEMPT'] == '1': sys.exit()"

    def act(group: Group) -> None:
        kill_and_see_it_dead(group[1].pid, signal.SIGKILL)

    code = WAITS.format(setup=setup, body=SAYS)
    result = await stopped(python(code), act, 2, restart=Restart.on_failure(1, "all"))
    assert result.ok
    assert [one.rank for one in result.earlier] == [1]


async def test_one_that_raises_for_our_signal_and_then_hangs_was_stopped() -> None:
    code = WAITS.format(setup=RAISES, body=SAYS).removesuffix("main()")
    code += "try:\n    main()\nexcept ZeroDivisionError:\n"
    code += "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    signal.pause()"
    result = await stopped(python(code), Group.begin_stop, stop=Stop(grace=0.2, scope="leader"))
    assert result.failures == ()
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGKILL


@pytest.mark.parametrize("by", ["- 3600", "+ 3600", "+ 0"])
async def test_who_had_failed_before_our_signal_has_failed(by: str) -> None:
    """Its clock says another hour, and it lingers until we stop it."""
    body = LIES.format(by=by) + "raise ValueError('its own')"
    code = WAITS.format(setup="", body=body).removesuffix("main()")
    code += "try:\n    main()\nexcept ValueError:\n    print('up', flush=True)\n    signal.pause()"
    result = await stopped(python(code), Group.begin_stop)
    (failure,) = result.failures
    assert failure.error is not None
    assert failure.error.message == "ValueError: its own"
    assert failure.exit is not None
    assert failure.exit.stopped_by == signal.SIGTERM


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
async def test_a_function_that_had_raised_before_our_signal_has_failed(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the stamp of its message: no error file can be written here, and our clock is set meanwhile."""

    def no_place(*args: Any, **more: Any) -> str:
        raise OSError("no place")

    monkeypatch.setattr("tempfile.mkdtemp", no_place)
    with clock_jump() as jump:
        async with Group([Function(jobs.fails_and_lingers), Function(jobs.sleeps)], logs=QUIET, check=False) as group:
            await until(lambda: group[0]._life.error is not None)
            jump(seconds)
            kill_and_see_it_dead(group[1].pid, signal.SIGKILL)
            result = await group.wait()
    assert [(one.rank, one.first) for one in result.failures] == [(0, True), (1, False)]
    assert result[0].exit is not None
    assert result[0].exit.stopped_by == signal.SIGTERM


async def test_a_file_of_torchs_is_a_guess() -> None:
    """Its clock has whole seconds: within the second in which we stop it, it is stopped."""
    code = (
        "import json, os, signal, time\n"
        "file = open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w')\n"
        "json.dump({'message': {'message': 'x', 'extraInfo': {'timestamp': str(int(time.time()))}}}, file)\n"
        "file.close()\nprint('up', flush=True)\nsignal.pause()"
    )
    result = await stopped(python(code), Group.begin_stop)
    assert result.failures == ()


# --- the rule itself ---

S = 10**9  # nanoseconds of a second


def worker(exit: Exit, stopped_ns: int = 0, stopped_at: float = 0.0, answer: CallOutcome | None = None) -> WorkerLife:
    one = object.__new__(WorkerLife)
    one.exit, one.ended_ns, one.parent, one.pid = exit, exit.ended_ns, "", 42
    one.refused, one.answer = None, answer
    one.first_signal = Moment(stopped_ns, stopped_at)
    return one


def wall(time: float, exact: bool = True) -> ErrorReport:
    return ErrorReport("m", "", time, exact)


# it lives from second 100 to second 110 of the monotonic clock, and from 1000 to 1010 of the other; stopped at 106
LIFE = {"started_ns": 100 * S, "ended_ns": 110 * S, "started_at": 1000.0, "ended_at": 1010.0}


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        (ErrorReport("m", monotonic=105 * S), 105),
        (ErrorReport("m", monotonic=106 * S), None),  # an answer to our signal
        (ErrorReport("m", monotonic=99 * S), None),  # not in its life
        (ErrorReport("m", time=1001.0, monotonic=107 * S), None),  # the wall clock has no say then
        (ErrorReport("m", time=9001.0, monotonic=105 * S), 105),
        (wall(1004.0), 104),
        (wall(1007.0), None),
        (wall(1004.0, exact=False), 105),  # one second later, at the latest
        (wall(1005.0, exact=False), None),  # perhaps
        (wall(999.0), None),
        (None, None),
    ],
)
def test_stopped_or_failed(report: ErrorReport | None, wanted: int | None) -> None:
    one = worker(exit_with(1, stopped_by=15, **LIFE), 106 * S, 1006.0)
    assert failed_at(one, report) == (None if wanted is None else wanted * S)


@pytest.mark.parametrize("by", [-3600.0, 3600.0, -3.0])
@pytest.mark.parametrize("when", ["before the stop", "after the stop"])
def test_a_wall_clock_that_was_set_decides_nothing(by: float, when: str) -> None:
    life = {**LIFE, "ended_at": LIFE["ended_at"] + by}
    stopped_at = 1006.0 + by if when == "before the stop" else 1006.0
    one = worker(exit_with(1, stopped_by=15, **life), 106 * S, stopped_at)
    for report in (wall(1007.0), wall(1007.0 + by), wall(1005.5, exact=False), wall(1005.5 + by, exact=False)):
        assert failed_at(one, report) is None


def test_the_order_of_those_that_failed_by_themselves() -> None:
    one = worker(exit_with(1, **LIFE))
    assert failed_at(one, ErrorReport("m", monotonic=103 * S)) == 103 * S
    assert failed_at(one, wall(1003.0)) == 103 * S
    assert failed_at(one, wall(1003.0, exact=False)) == 104 * S
    assert failed_at(one, wall(1009.9, exact=False)) == 110 * S
    for impossible in (ErrorReport("m", monotonic=1), wall(0.0), wall(1e300), wall(-1e300)):
        assert failed_at(one, impossible) == 110 * S


def test_a_functions_own_message_counts_before_the_file() -> None:
    answer = CallOutcome()
    answer.raised_ns = 102 * S
    one = worker(exit_with(1, stopped_by=15, **LIFE), 106 * S, 1006.0, answer)
    assert failed_at(one, ErrorReport("m", monotonic=107 * S)) == 102 * S


# --- the stamp ---


def test_stamps_of_another_clock_say_nothing(tmp_path: Path) -> None:
    """Of another machine, boot or time namespace."""
    path = tmp_path / "error.json"
    before = time.monotonic_ns()
    write_error(ValueError("x"), str(path))
    report = read_report(path, clock())
    assert report is not None
    assert report.monotonic is not None
    assert before <= report.monotonic <= time.monotonic_ns()
    other = read_report(path, "another")
    assert other is not None
    assert other.monotonic is None
    data = json.loads(path.read_text())
    for key, junk in (("monotonic", True), ("monotonic", 1.5), ("monotonic", "1"), ("clock", None), ("clock", [])):
        path.write_text(json.dumps({"aioelastic": {**data["aioelastic"], key: junk}}))
        odd = read_report(path, clock())
        assert odd is not None
        assert odd.monotonic is None


def test_who_does_not_know_its_clock_compares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text(json.dumps({"aioelastic": {"message": "m", "monotonic": 5, "clock": ""}}))
    report = read_report(path, "")
    assert report is not None
    assert report.monotonic is None


async def test_a_worker_in_a_time_namespace() -> None:
    """Its monotonic clock is another one, 1000 seconds ahead: it is stopped by us all the same."""
    code = WAITS.format(setup=RAISES, body=SAYS)
    shifted = ("unshare", "--time", "--fork", "--monotonic", "1000", "--kill-child")
    tried = await asyncio.create_subprocess_exec(*shifted, "true", stderr=asyncio.subprocess.DEVNULL)
    if await tried.wait():
        pytest.skip("needs root")
    from aioelastic import Command

    entry = python(code)
    result = await stopped(Command(*shifted, *entry.argv), Group.begin_stop, stop=Stop(scope="group"))
    assert result.failures == ()


@pytest.mark.parametrize(("first", "told"), [(109 * S, 109 * S), (110 * S, 110 * S), (111 * S, 110 * S), (0, 110 * S)])
def test_a_result_has_the_earliest_stamp(first: int, told: int) -> None:
    """0: its exit is known, and what follows one has not been done yet."""
    one = worker(Exit(1, None, False, **LIFE))
    one.ended_ns = first
    seen = _exit(one)
    assert seen is not None
    assert seen.ended_ns == told
