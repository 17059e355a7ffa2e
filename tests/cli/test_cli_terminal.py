"""What the command line says to a person at a terminal, and to a program that reads JSON."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest
from helpers import QUIET
from test_cli import BOUND, RUN, STUBBORN, run

from aioelastic import Command, Group, GroupFailed, supervise

pytestmark = pytest.mark.one_loop


def worker(code: str) -> list[str]:
    return ["--", sys.executable, "-S", "-u", "-c", code]


async def test_the_first_ctrl_c_is_answered_and_the_second_kills() -> None:
    command = Command(*RUN, "-n", "2", "--grace", "1000", "--prefix", "", *worker(STUBBORN), tty=True)
    async with Group(command, logs=QUIET, check=False) as group:
        async with group[0].dialogue() as talk:
            for _ in range(2):
                await talk.read_until("up\n", BOUND)
            await talk.send("\x03")  # as the key does
            await talk.read_until(
                r"aioelastic: stopping \(SIGINT\): 2 workers, up to 1000 s; Ctrl-C again kills them\n", BOUND
            )
            await talk.send("\x03")
            await talk.read_until(r"\n1 +\d+ +stopped \(SIGKILL\) ", BOUND)
        result = await group.wait()
    assert result[0].exit is not None
    assert result[0].exit.code == 128 + signal.SIGINT


async def test_a_restart_is_told() -> None:
    code = "import os; os._exit(3 * (os.environ['AIOELASTIC_ATTEMPT'] == '0'))"
    command = Command(*RUN, "--max-restarts", "1", *worker(code), tty=True)
    (one,) = await supervise(command, logs=QUIET)
    assert re.search(r"^aioelastic: rank 0: exit code 3: restarting, attempt 2\r?$", str(one.stdout), re.MULTILINE)


def test_where_nobody_looks_neither_is_told() -> None:
    code = "import os; os._exit(3 * (os.environ['AIOELASTIC_ATTEMPT'] == '0'))"
    done = run("--max-restarts", "1", *worker(code))
    assert done.returncode == 0
    assert "restarting" not in done.stderr


@pytest.mark.parametrize(
    ("given", "meant"), [("--gracee=3", "--grace"), ("--log-dri", "--log-dir"), ("--qqqqq", ""), ("-Z", "")]
)
def test_an_option_that_there_is_not(given: str, meant: str) -> None:
    done = run(given, "--", "true")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: aioelastic run ")
    last = done.stderr.splitlines()[-1]
    assert last == f"aioelastic run: error: unrecognized arguments: {given}{meant and f' (is it {meant}?)'}"


def test_json_tells_of_failures_and_of_the_end() -> None:
    code = "import os, sys; print('in', os.environ['RANK'], file=sys.stderr); sys.exit(3 * (os.environ['RANK'] == '1'))"
    done = run("-n", "2", "--on-failure", "continue", "--json", *worker(code))
    assert done.returncode == 3
    lines = [json.loads(one) for one in done.stderr.splitlines()]
    assert sorted(one["line"] for one in lines if "line" in one) == ["in 0", "in 1"]
    failure, result = (one for one in lines if "event" in one)
    assert (failure["event"], failure["rank"], failure["root_cause"]) == ("failure", 1, True)
    assert failure["headline"].startswith(f"rank 1 (pid {failure['pid']} on ")
    assert failure["stderr"] == ["in 1"]
    assert failure["command"][:3] == [sys.executable, "-S", "-u"]
    assert (result["event"], result["ok"], result["reason"]) == ("result", False, "done")
    assert [one["code"] for one in result["workers"]] == [0, 3]
    assert [one["outcome"] for one in result["workers"]] == ["exit code 0", "exit code 3"]


async def test_results_show_what_the_command_line_shows() -> None:
    script = "import os; os._exit(int(os.environ['RANK']) % 7 == 5 and 4)"
    with pytest.raises(GroupFailed) as caught:
        await supervise(Command(sys.executable, "-S", "-c", script), n=20, on_failure="continue", logs=QUIET)
    result = caught.value.result
    shown = str(result)
    rows = re.findall(r"^(\S+) +(\d+ workers|\d+) +(exit code \d) ", shown, re.MULTILINE)
    assert [(rank, outcome) for rank, _, outcome in rows] == [
        ("0-4", "exit code 0"),
        ("5", "exit code 4"),
        ("6-11", "exit code 0"),
        ("12", "exit code 4"),
        ("13-18", "exit code 0"),
        ("19", "exit code 4"),
    ]
    assert rows[0][1] == "5 workers"
    first = result.failures[0]
    assert str(first) == first.describe()
    assert all(str(one) in shown for one in result.failures)
