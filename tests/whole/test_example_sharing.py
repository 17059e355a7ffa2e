"""The examples of sharing: a dataset that is there once, and frames that go through without a copy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *options], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_dataset_is_there_once() -> None:
    out = run("dataset.py", "-n", "3", "--mib", "32")
    trained = re.search(r"3 workers trained 20 steps on it, the largest error is ([0-9.]+)", out)
    assert trained
    assert float(trained[1]) <= 0.001
    together = re.search(r"all together: (\d+) MiB", out)
    assert together
    assert 30 <= int(together[1]) <= 40


def test_frames_come_through() -> None:
    out = run("frames.py", "--frames", "25")
    assert "25 frames of 720x1280 came through" in out
    found = re.search(r"by worker 1: (\d+), by worker 2: (\d+), segments of memory: (\d+)", out)
    assert found
    assert int(found[1]) + int(found[2]) == 25
    used = re.search(r"shared memory of all: (\d+) MiB, later (\d+) MiB", out)
    assert used
    assert int(used[2]) <= 16 * 3
    assert int(found[3]) <= 16  # in the queues, in the stages, and those on the way back
