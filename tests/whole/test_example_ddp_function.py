"""The training function in docs/examples: two ranks of torch.distributed on CPU, forked from a zygote with torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import needs

needs("torch")
pytestmark = [
    pytest.mark.torch,
]

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ddp_function.py"
DONE = re.compile(r"rank (\d): first_loss=(\S+) last_loss=(\S+)")


def train(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLE, *options], text=True, capture_output=True)


def test_both_ranks_converge_to_the_same_loss() -> None:
    run = train()
    assert run.returncode == 0, run.stderr
    assert "[worker1]: step 0 loss" in run.stdout
    done = {rank: (first, last) for rank, first, last in DONE.findall(run.stdout)}
    assert sorted(done) == ["0", "1"]
    assert done["0"] == done["1"]
    first, last = map(float, done["0"])
    assert last < 0.1 * first
    assert "a model of 129 weights" in run.stdout


def test_a_crash_is_told_with_its_traceback() -> None:
    run = train("--crash-rank", "1")
    assert run.returncode == 1, run.stderr
    lines = run.stderr.rstrip().splitlines()
    assert lines[0].startswith("rank 1 (pid")
    assert lines[-1].strip() == "RuntimeError: rank 1 was told to crash at step 5"
    assert "rank 0: first_loss" not in run.stdout
