"""How long whole processes take that use us for the first time, beside one that only imports asyncio."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial

from _common import Report, main, paired

ASYNCIO = "python -c 'import asyncio'"
NAMES = "python -c 'from aioelastic import Command, supervise'"
PROGRAM = "python -c '... asyncio.run(supervise(Command(\"true\")))'"
LINE = "aioelastic run -- true"
SUPERVISE = "import asyncio; from aioelastic import Command, supervise; asyncio.run(supervise(Command('true')))"
CASES = {
    ASYNCIO: [sys.executable, "-c", "import asyncio"],
    NAMES: [sys.executable, "-c", "from aioelastic import Command, supervise"],
    PROGRAM: [sys.executable, "-c", SUPERVISE],
    LINE: [sys.executable, "-c", "from aioelastic.cli import program; program()", "run", "--", "true"],
}


def seconds(argv: list[str]) -> float:
    """Of a whole process; bytecode is cached, as it is for who installs us."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def measure(quick: bool) -> Report:
    rounds = 3 if quick else 41
    report = Report("startup", rounds)
    for name, found in paired({one: partial(seconds, argv) for one, argv in CASES.items()}, rounds).items():
        report.add(name, "ms", [one * 1e3 for one in found])
    report.chart("startup", "Whole processes", CASES, bounds=[ASYNCIO])
    for case, limit in ((NAMES, 1.3), (PROGRAM, 1.8), (LINE, 1.8)):
        report.ratio(case, f"≤ {limit} × {ASYNCIO}", limit, "low", case, ASYNCIO, ours=case)
    return report


if __name__ == "__main__":
    main("startup", measure)
