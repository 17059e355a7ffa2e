"""What is told about a worker was told by that worker and attempt: not by a group inside of it, a child or a copy."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import QUIET, needs
from test_outcome import exit_with, failure_of
from test_record import python

from aioelastic import Command, Function, Logs, Std, WorkerExecutor, plan, supervise
from aioelastic.diagnosis import read_report
from aioelastic.model.failures import ErrorReport
from aioelastic.model.group_spec import GroupSpec
from aioelastic.planning import ERROR_FILES

RECORDED = "from aioelastic import record\n@record\ndef main(): raise ValueError('of the inner one')\nmain()\n"
TORCH = "from torch.distributed.elastic.multiprocessing.errors import record\n" + RECORDED.partition("\n")[2]
# a worker that runs a group where no temp directory can be written, copes with its failure, and fails by itself
OUTER = """
import asyncio, sys, tempfile
tempfile.tempdir = '/proc'
from aioelastic import Command, Logs, Std, Function, supervise
r = asyncio.run(supervise(Command(sys.executable, '-c', {code!r}), logs=Logs(tee=Std.NONE), check=False))
sys.exit(9 if r.ok else 3)
"""


@pytest.mark.parametrize("inner", [RECORDED, pytest.param(TORCH, marks=pytest.mark.torch)], ids=["ours", "torch's"])
@pytest.mark.parametrize("logs", [True, False])
async def test_an_error_of_a_group_inside_a_worker_is_not_its_own(inner: str, logs: bool, tmp_path: Path) -> None:
    if inner is TORCH:
        needs("torch")
    where = Logs(dir=tmp_path if logs else None, tee=Std.NONE)
    result = await supervise(python(OUTER.format(code=inner)), logs=where, check=False)
    (failure,) = result.failures
    assert failure.exit is not None
    assert failure.exit.code == 3
    assert failure.error is None
    assert "inner" not in failure.headline


def test_no_variable_of_an_outer_worker_reaches_an_inner_one(tmp_path: Path) -> None:
    """Whatever the plan of a worker sets, the plan of a group inside of it sets anew, or unsets."""
    spec = GroupSpec.of(Command("true"))
    (outer,) = plan(spec, error_dir=tmp_path).workers
    environ = outer.environ({})
    ours = {key for key in environ if key.startswith(("AIOELASTIC_", "TORCHELASTIC_"))} | {"RANK", "WORLD_SIZE"}
    assert set(ERROR_FILES) <= ours
    (inner,) = plan(spec, environ=environ).workers
    assert ours <= set(inner.overlay)
    assert not set(ERROR_FILES) & set(inner.environ(environ))
    (alone,) = plan(spec, environ={}).workers
    assert not set(ERROR_FILES) & set(alone.overlay)  # nothing to unset


def test_tasks_of_an_executor_inside_a_worker_write_no_file() -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(os.getenv, "AIOELASTIC_ERROR_FILE").result() is None


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [("rank", "1", False), ("attempt", "2", False), ("run_id", "other", False), ("rank", None, True), ("x", "y", True)],
)
def test_a_report_that_names_another_worker_is_not_taken(key: str, value: Any, taken: bool, tmp_path: Path) -> None:
    """As of an older version of ours, which has inherited the variable."""
    path = tmp_path / "error.json"
    data = {"message": "m", "run_id": "run", "rank": "0", "attempt": "0", key: value}
    path.write_text(json.dumps({"aioelastic": data}))
    report = read_report(path, "", {"run_id": "run", "rank": "0", "attempt": "0"})
    assert (report is not None) == taken


# --- children ---

CHILD = (
    "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}], stderr=subprocess.DEVNULL)\n"
    "sys.exit({status})"
)


async def test_a_child_whose_error_the_worker_copes_with_is_not_its_reason() -> None:
    result = await supervise(python(CHILD.format(code=RECORDED, status=3)), logs=QUIET, check=False)
    (failure,) = result.failures
    assert "inner" not in failure.headline
    assert failure.why is not None
    assert failure.why.kind == "exit_code"
    assert failure.error is not None
    assert failure.error.pid != failure.pid
    assert f"  a child's (pid {failure.error.pid}) traceback:" in failure.describe()


async def test_a_wrapper_passes_on_what_its_child_has_raised() -> None:
    """A shell script around a recorded program: told as probable."""
    script = '"$0" -c "$1"; exit $?'
    result = await supervise(Command("sh", "-c", script, sys.executable, RECORDED), logs=QUIET, check=False)
    (failure,) = result.failures
    assert failure.headline.endswith(": ValueError: of the inner one")
    assert failure.why is not None
    assert str(failure.why) == "probably raised: ValueError: of the inner one"


async def test_what_a_child_raised_makes_no_failure_of_a_stop() -> None:
    code = CHILD.format(code=RECORDED, status="1 if signal.pause() is None else 0").replace(
        "import subprocess", "import signal, subprocess"
    )
    code = code.replace("\nsys.exit", "\nsignal.signal(15, lambda *_: sys.exit(1))\nprint('up', flush=True)\nsys.exit")
    from test_root_cause import stopped

    from aioelastic import Group

    result = await stopped(python(code), Group.begin_stop)
    assert result.failures == ()


def test_whose_report_it_is() -> None:
    for pid, worker, exit, own in [
        (42, 42, exit_with(3), True),
        (None, 42, exit_with(3), True),  # torch's, or an older one
        (7, None, exit_with(3), True),  # in an executor
        (7, 42, exit_with(3), False),
        (7, 42, exit_with(1), True),
        (7, 42, exit_with(1, stopped_by=15), False),
        (7, 42, exit_with(signal=9), False),
        (7, 42, None, False),
    ]:
        assert ErrorReport("m", pid=pid).is_of(worker, exit) is own
    text = failure_of(error=ErrorReport("ValueError: x", "Traceback\nValueError: x", pid=42)).describe()
    assert "  its traceback:" in text


@pytest.mark.parametrize("start", ["zygote", "spawn"])
@pytest.mark.parametrize("child", ["returns", "raises", "leaves"])
async def test_a_forked_copy_of_a_function_speaks_for_nobody(start: Any, child: str) -> None:
    """The copy comes out of the function too; the worker itself ends without a word."""
    result = await supervise(Function(jobs.forks, child), logs=QUIET, check=False, start=start)
    (failure,) = result.failures
    assert failure.exception is None
    assert failure.error is None
    assert result[0].value is None
    assert "ended without returning" in failure.cause
