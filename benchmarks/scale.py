"""500 and 5,000 workers that sleep: start all, one fails, the cascade, all reaped. Is the cost per worker flat?"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable

from _common import Report, main, on_loop, paired

from aioelastic import Command, Group, Logs, Std, Stop

SLEEP = "/bin/sleep"
FDS = 3  # of ours per worker: two pipes and a pidfd
SPARE = 100


async def ours(n: int) -> float:
    """Seconds from nothing to the result."""
    began = time.perf_counter()
    quiet = Logs(tee=Std.NONE)
    async with Group(Command(SLEEP, "6000"), n=n, logs=quiet, stop=Stop(grace=60), check=False) as group:
        os.kill(group.pids[n // 2], signal.SIGKILL)
        result = await group.wait()
    took = time.perf_counter() - began
    assert len(result) == n
    assert [one.rank for one in result.failures] == [n // 2]
    assert all(one.stopped for one in result if one.rank != n // 2)
    return took


def popen(n: int) -> float:
    """A loop over Popen, kill, a loop over terminate, a loop over communicate."""
    began = time.perf_counter()
    started = [
        subprocess.Popen([SLEEP, "6000"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(n)
    ]
    started[n // 2].kill()
    started[n // 2].communicate()
    for one in started:
        one.terminate()
    for one in started:
        one.communicate()
    return time.perf_counter() - began


async def create_subprocess(n: int) -> float:
    began = time.perf_counter()
    started = [
        await asyncio.create_subprocess_exec(
            SLEEP, "6000", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(n)
    ]
    ends = [asyncio.create_task(one.communicate()) for one in started]
    started[n // 2].kill()
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for one in started:
        if one.returncode is None:
            one.terminate()
    await asyncio.gather(*ends)
    return time.perf_counter() - began


def measure(quick: bool) -> Report:
    small, large, rounds = (10, 40, 1) if quick else (500, 5000, 3)
    report = Report("scale", rounds)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = large * FDS + SPARE
    if hard != resource.RLIM_INFINITY and hard < need:
        report.skipped[f"{large} workers"] = f"needs {need} open files, the hard limit is {hard}"
        return report
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    cases: dict[str, Callable[[], float]] = {}
    for n in (small, large):
        cases[f"ours (asyncio), {n}"] = lambda n=n: on_loop(lambda: ours(n))
        cases[f"ours (uvloop), {n}"] = lambda n=n: on_loop(lambda: ours(n), "uvloop")
        cases[f"subprocess.Popen loop, {n}"] = lambda n=n: popen(n)
        cases[f"asyncio, {n}"] = lambda n=n: on_loop(lambda: create_subprocess(n))
    for name, seconds in paired(cases, rounds, warm=0).items():
        n = int(name.rpartition(" ")[2])
        report.add(f"{name}: per worker", "ms", [s * 1e3 / n for s in seconds])
    report.chart(
        "scale", f"{large:,} workers: start, one fails, stop the rest, reap all; per worker",
        [f"{name}: per worker" for name in cases if name.endswith(f", {large}")], strip=f", {large}: per worker",
        bounds=["subprocess.Popen loop"],
    )  # fmt: skip
    for loop in ("asyncio", "uvloop"):
        mine = f"ours ({loop}), {large}: per worker"
        report.ratio(
            f"{large:,} workers (sleep): start, one fails, cascade, all reaped, on {loop}",
            f"cost per worker ≤ 1.3 × that at {small}", 1.3, "low", mine, f"ours ({loop}), {small}: per worker",
            ours=mine,
        )  # fmt: skip
    return report


if __name__ == "__main__":
    main("scale", measure)
