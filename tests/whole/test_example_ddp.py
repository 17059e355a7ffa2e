"""The training example, run as the documentation says: two ranks of torch.distributed on CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import needs

needs("torch")
pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
DONE = re.compile(r"\[worker(\d)\]: done rank=(\d) pid=\d+ first_loss=(\S+) last_loss=(\S+)")


def train(logs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    worker = [sys.executable, "docs/examples/ddp.py", *options]
    return subprocess.run(
        [sys.executable, "-m", "aioelastic", "run", "-n", "2", "--log-dir", logs, "--", *worker],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


def test_both_ranks_converge_to_the_same_loss(tmp_path: Path) -> None:
    run = train(tmp_path)
    assert run.returncode == 0, run.stderr
    done = {match[1]: match for match in DONE.finditer(run.stdout)}
    assert sorted(done) == ["0", "1"]
    assert all(match[1] == match[2] for match in done.values())  # the prefix tells the rank that it believes to be
    (first_0, last_0), (first_1, last_1) = ((m[3], m[4]) for m in (done["0"], done["1"]))
    assert (first_0, last_0) == (first_1, last_1)
    assert float(last_0) < 0.1 * float(first_0)
    for rank in ("0", "1"):  # the file holds the worker's own bytes: the same lines, without the prefix
        (log,) = tmp_path.glob(f"*/attempt_0/{rank}/stdout.log")
        lines = [one for one in run.stdout.splitlines() if one.startswith(f"[worker{rank}]: ")]
        assert log.read_text().splitlines() == [one.removeprefix(f"[worker{rank}]: ") for one in lines]


def test_a_crash_shows_its_traceback_last_and_stops_the_other_rank(tmp_path: Path) -> None:
    run = train(tmp_path, "--crash-rank", "1", "--crash-step", "5")
    assert run.returncode == 1, run.stderr
    lines = run.stderr.rstrip().splitlines()
    assert lines[-1].strip() == "RuntimeError: rank 1 was told to crash at step 5"
    # rank 0 waits for rank 1 in a collective. Most often we stop it; now and then it has seen the connection close, and
    # has raised by itself, before we came: then it is a second failure, and rank 1 is marked as the cause
    heads = [index for index, one in enumerate(lines) if re.match(r"(root cause: )?rank 1 \(pid", one)]
    report = "\n".join(lines[heads[-1] :])
    assert "failed: exit code 1" in report
    assert "Traceback (most recent call last)" in report
    assert "raise RuntimeError" in report
    rank_0 = next(one for one in lines if re.match(r"0 +\d+ ", one))
    by_itself = [one for one in lines if one.startswith("rank 0 (pid")]
    assert by_itself or "stopped (SIGTERM)" in rank_0, run.stderr
    assert not by_itself or lines[heads[-1]].startswith("root cause: "), run.stderr
