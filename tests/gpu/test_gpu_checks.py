"""The checks for a real GPU can fail: a driver that does the very thing wrong does not pass.

They run against the fake driver here, as it is and broken; those that need torch or pools of cuda.core need a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_gpu
import gpu_checks
import pytest
from test_gpu_real import environ

pytestmark = pytest.mark.long

# what a driver does wrong, or what of ours does nothing any more, and what the check says then
BROKEN: dict[str, tuple[dict[str, str], str, str]] = {
    "probe": ({"FAKE_CUDA_MISSING": "cuMemCreate"}, "", "AssertionError"),
    "memory_by_descriptor": ({"FAKE_CUDA_BROKEN": "imports"}, "", "AssertionError"),
    "producer_dies": ({"FAKE_CUDA_BROKEN": "imports"}, "", "AssertionError"),
    "memory_returns": ({"FAKE_CUDA_BROKEN": "memory"}, "", "AssertionError"),
    "consumer_dies": ({"FAKE_CUDA_BROKEN": "memory"}, "", "AssertionError"),
    "events": ({"FAKE_CUDA_BROKEN": "events"}, "", "AssertionError"),
    "order": ({"FAKE_CUDA_BROKEN": "events"}, "", "AssertionError"),
    "given_back": ({"FAKE_CUDA_BROKEN": "default"}, "", "AssertionError"),
    "captures": ({"FAKE_CUDA_BROKEN": "relaxed"}, "", "CudaError: .*900"),
    "refusals": ({"FAKE_CUDA_BROKEN": "visible"}, "", "AssertionError"),
    "managed": ({"FAKE_CUDA_BROKEN": "managed"}, "", "AssertionError"),
    "inventory": ({"FAKE_CUDA_BACKWARDS": "1"}, "gpu.devices = gpu.inventory", "AssertionError"),
    "many_sends": (
        {},
        "from aioelastic.memory import shared_segments\nshared_segments._over = lambda one: None",
        "AssertionError",
    ),
}
ON_A_GPU_ONLY = {"torch_tensors", "torch_echo", "pool"}


def test_all_are_seen_to() -> None:
    assert BROKEN.keys() | ON_A_GPU_ONLY == gpu_checks.CHECKS.keys()


@pytest.fixture(scope="module")
def libraries(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    management = fake_gpu.compiled(tmp_path_factory.mktemp("nvml"), "libnvidia-ml")
    names = (fake_gpu.PATH, fake_gpu.NAME)
    return {**{name: os.environ[name] for name in names}, "FAKE_NVML_LIBRARY": str(management)}


def run(name: str, env: dict[str, str], before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import gpu_checks\nfrom aioelastic import gpu\ngpu_checks.SENDS = 300\n{before}\ngpu_checks.run({name!r})"
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, env=environ() | env, cwd=Path(__file__).parent)


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_passes(libraries: dict[str, str], name: str) -> None:
    done = run(name, libraries)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_can_fail(libraries: dict[str, str], name: str) -> None:
    env, before, words = BROKEN[name]
    done = run(name, libraries | env, before)
    assert done.returncode not in (0, gpu_checks.SKIP), done.stdout + done.stderr
    assert re.search(words, done.stderr), done.stderr
