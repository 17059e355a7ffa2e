"""Sharing on a real GPU: each check of `gpu_checks.py` in a process of its own, the most telling first.

Skipped by name where there is no GPU: `pytest -m gpu` runs them wherever one is at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_checks
import pytest
from helpers import needs

import aioelastic

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parents[1]


def environ() -> dict[str, str]:
    """That of a process which finds all of this."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(aioelastic.__file__).parents[1]), str(HERE)])}


@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_on_a_gpu(name: str) -> None:
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("needs an NVIDIA GPU: there is no /dev/nvidiactl")
    needs("cuda.bindings.driver")
    argv = [sys.executable, gpu_checks.__file__, name]
    done = subprocess.run(argv, capture_output=True, text=True, env=environ(), timeout=120, check=False)
    if done.returncode == gpu_checks.SKIP:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
