"""The exit status: a table, each line of it, and that what is told as failed is no success."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import run
from test_outcome import exit_with, failure_of, group_of

from aioelastic import SpecError, Unkillable
from aioelastic.cli._exit_status import RULES, Facts, of_error, of_run, table
from aioelastic.model.leftovers import Remains
from aioelastic.model.results import GroupResult


def failed(**more: Any) -> GroupResult:
    return group_of(failure_of(**more))


def ended(reason: Any, **more: Any) -> GroupResult:
    return GroupResult("g", "run", reason, (), **more)


STUCK = (Unkillable(0, 42, "D", ""),)
LEFT = (Remains("port", "port 80 is taken"),)

# (what happened, the status, which rule said so)
CASES: list[tuple[Facts, int, int | None]] = [
    (Facts(ended("done")), 0, None),
    (Facts(ended("done", remains=LEFT)), 0, None),
    (Facts(ended("done", remains=LEFT), require_clean=True), 1, 5),
    (Facts(ended("stopped"), [15]), 143, 0),
    (Facts(ended("stopped"), [2, 15]), 130, 0),
    (Facts(ended("done"), [15]), 0, None),  # it came when all had succeeded
    (Facts(ended("timeout")), 124, 3),
    (Facts(ended("done", unkillable=STUCK)), 1, 4),
    (Facts(ended("stopped"), reader_gone=True, lost=9), 141, 2),
    (Facts(ended("stopped"), [15], reader_gone=True), 143, 0),
    (Facts(ended("done"), lost=1), 1, 6),
    (Facts(failed(exit=exit_with(7)), lost=1), 7, 1),
    (Facts(failed(exit=exit_with(7))), 7, 1),
    (Facts(failed(exit=exit_with(7)), [15]), 7, 1),
    (Facts(failed(exit=exit_with(signal=11))), 139, 1),
    (Facts(failed(exit=exit_with(0))), 1, 1),  # a function that did not return, or whose value cannot be rebuilt
    (Facts(failed(exit=exit_with())), 255, 1),
    (Facts(failed(exit=exit_with(0, stopped_by=15))), 1, 1),
    (Facts(failed(exit=exit_with(signal=15, stopped_by=15))), 1, 1),
    (Facts(failed(exit=None)), 127, 1),
    (Facts(failed(exit=None, errno=errno.EAGAIN)), 127, 1),
    (Facts(failed(exit=None, errno=errno.ENOENT)), 127, 1),
    (Facts(failed(exit=None, errno=errno.ENOEXEC)), 126, 1),
    (Facts(failed(exit=None, errno=errno.EACCES)), 126, 1),
    (Facts(failed(exit=exit_with(3)), require_clean=True), 3, 1),
]


@pytest.mark.parametrize(("facts", "status", "rule"), CASES)
def test_the_table(facts: Facts, status: int, rule: int | None) -> None:
    assert of_run(facts) == status
    applies = [index for index, one in enumerate(RULES) if one.of(facts)]
    assert (applies[0] if applies else None) == rule


def test_each_rule_has_a_case() -> None:
    assert {rule for _, _, rule in CASES} == {None, *range(len(RULES))}


@pytest.mark.parametrize("code", [*range(4), 255, None])
@pytest.mark.parametrize("number", [None, 2, 9, 15, 64])
@pytest.mark.parametrize("stopped_by", [None, 15])
def test_a_failure_is_never_a_success(code: int | None, number: int | None, stopped_by: int | None) -> None:
    """Whatever its exit was."""
    result = failed(exit=exit_with(code, None if code is not None else number, stopped_by=stopped_by))
    assert 0 < of_run(Facts(result)) < 256


def test_errors_that_keep_it_from_beginning() -> None:
    assert of_error(SpecError("n", 0, "is wrong", "mend it")) == 2
    assert of_error(SpecError("argv[0]", "x", "was not found", "mend it", status=127)) == 127
    assert of_error(OSError(errno.EMFILE, "no more")) == 1
    assert of_error(KeyboardInterrupt()) == 130


def test_the_table_is_in_the_help() -> None:
    text = re.sub(r"\s+", " ", run("--help").stdout)
    for status, when in table():
        assert f"{status} {when}" in text


# --- real ones ---

JOB = """
import os, sys
class Odd:
    def __reduce__(self): return rebuild, (os.getpid(),)
def rebuild(pid):
    if os.getpid() != pid: raise ValueError("not here")
def quits(): os._exit(0)
def execs(): os.execvp("true", ["true"])
def odd(): return Odd()
def wraps(): sys.exit(256)
def says(): sys.exit("no")
def three(): sys.exit(3)
def none(): sys.exit()
def fine(): return 1
def hangs():
    if os.environ["RANK"] == "1": os._exit(0)
    import time; time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("quits", 1),
        ("execs", 1),
        ("odd", 1),
        ("wraps", 0),
        ("says", 1),
        ("three", 3),
        ("none", 0),
        ("fine", 0),
        ("hangs", 1),
    ],
)
def test_functions(name: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    done = run("-n", "2" if name == "hangs" else "1", "-m", f"job:{name}", cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert (" failed: " in done.stderr) == bool(status)


def test_programs_that_are_not_found_or_cannot_be_run(tmp_path: Path) -> None:
    def made(name: str, data: bytes, mode: int = 0o755) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        path.chmod(mode)
        return str(path)

    cases = {
        "no-such-program-here": 127,
        str(tmp_path / "absent"): 127,
        str(tmp_path): 126,
        made("file", b"#!/bin/sh\n", 0o644): 126,
        f"{made('plain', b'x')}/below": 126,
        made("script", b"#!/no/such/interpreter\n"): 126,
        made("empty", b""): 126,
        "/dev/null": 126,
    }
    for program, status in cases.items():
        for more in ((), ("--dry-run",)):
            done = run(*more, "--", program)
            assert done.returncode == status, (program, done.stderr)
            assert len(done.stderr.splitlines()) == 1
            assert program in done.stderr
