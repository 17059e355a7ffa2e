"""The parallel search in docs/examples: every candidate is tried once, whoever tries it, and the best one wins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "search.py"
SHARE = re.compile(r"worker (\d): (\d+) candidates, best (\S+)")


def search(*options: str) -> list[str]:
    run = subprocess.run([sys.executable, EXAMPLE, *options], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout.splitlines()


def test_the_table_does_not_depend_on_who_searches() -> None:
    alone, together = search("-n", "1"), search("-n", "3")
    assert alone[1:] == together[3:]
    shares = [SHARE.fullmatch(line) for line in together[:3]]
    assert {one[1] for one in shares if one} == {"0", "1", "2"}
    assert sum(int(one[2]) for one in shares if one) == 45
    heading, *best = together[4:]
    assert heading.split() == ["degree", "penalty", "error"]
    assert len(best) == 5
    assert best[0].split()[0] == "5"
    assert float(best[0].split()[2]) == min(float(one[3]) for one in shares if one)
