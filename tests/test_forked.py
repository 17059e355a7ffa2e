"""The program forks while groups run: the copy owns nothing of them, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forked_host
import pytest

LOOPS = ["asyncio", "uvloop"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["command", "direct", "zygote", "spawn", "fork"])
def test_the_original_goes_on(kind: str, loop: str, tmp_path: Path) -> None:
    """Its workers live, its pids are complete, its output goes on and is whole in the log files, in `lines()` and in
    the tee; it stops as ever. In the copy each call tells why it is none, and new groups work."""
    argv = [sys.executable, forked_host.__file__, loop, kind, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    *shown, last = done.stdout.splitlines()
    texts = ["up", *(f"line {number + 1}" for number in range(len(forked_host.HOWS)))]
    assert sorted(shown) == sorted(f"[w{rank}]: {text}" for rank in range(2) for text in texts)
    assert last == "original"
    assert done.stderr == ""
