"""64 workers, one is killed: when was SIGTERM sent to each of the 63 others, and when did each of them get it?

Times are taken from just before the kill, so noticing the failure is in them. "Sent" is read in our own `Stopping`
event, which comes right after the signal was sent; "received" by each worker itself, asleep in `sigwait`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _common import Gate, Report, available, main, muted, on_loop, paired, percentile, scratch

from aioelastic import Command, Group, Logs, Std, events

# Blocks SIGTERM, says that it is there, sleeps until SIGTERM comes, takes the time (monotonic, ns), and writes it a
# moment later: 63 interpreters that shut down must not compete with the one that still sends.
WORKER = (
    "import os, signal, sys, time\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
    "open(sys.argv[1] + '/ready', 'wb', buffering=0).write(b'.')\n"
    "signal.sigwait({signal.SIGTERM})\n"
    "at = time.monotonic_ns()\n"
    "time.sleep(0.3)\n"
    "open(f'{sys.argv[1]}/{os.getpid()}', 'w').write(str(at))\n"
)


PLAIN, TORCH = "waitpid, then a loop over kill", "torch elastic"


def worker(gate: Gate) -> list[str]:
    return [sys.executable, "-S", "-c", WORKER, str(gate.home)]


def received(home: Path, began: int) -> list[float]:
    """Milliseconds until each worker had its signal."""
    return [(int(one.read_text()) - began) / 1e6 for one in home.iterdir() if one.name.isdigit()]


async def ours(home: Path, n: int, sent: list[float], got: list[float]) -> float:
    gate = Gate(home)
    stamps: list[int] = []

    def note(event: events.Event) -> None:
        if isinstance(event, events.Stopping):
            stamps.append(time.monotonic_ns())

    quiet = Logs(tee=Std.NONE)
    async with Group(Command(*worker(gate)), n=n, logs=quiet, check=False, on_event=note) as group:
        await gate.wait_async(n)
        time.sleep(0.05)  # a worker is at its gate a moment before it sleeps
        began = time.monotonic_ns()
        os.kill(group.pids[n // 2], signal.SIGKILL)
        await group.wait()
    gate.open()
    mine = [(at - began) / 1e6 for at in stamps]
    assert len(mine) == n - 1
    sent += mine
    got += received(gate.home, began)
    return percentile(mine, 99)


def plain_loop(home: Path, n: int, got: list[float]) -> float:
    """waitpid, then a loop over kill: the least that Python can do."""
    gate = Gate(home)
    started = [subprocess.Popen(worker(gate), stdin=subprocess.DEVNULL) for _ in range(n)]
    gate.wait(n)
    time.sleep(0.05)
    began = time.monotonic_ns()
    first = started[n // 2]
    first.kill()
    first.wait()
    stamps = []
    for one in started:
        if one is not first:
            one.terminate()
            stamps.append(time.monotonic_ns())
    for one in started:
        one.wait()
    gate.open()
    got += received(gate.home, began)
    return percentile([(at - began) / 1e6 for at in stamps], 99)


def torch_elastic(home: Path, n: int, got: list[float]) -> float:
    """p99 of received: it tells nobody when it sends. It waits as its agent does, looking each 0.1 s."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    gate = Gate(home)
    argv = worker(gate)
    logs = DefaultLogsSpecs(log_dir=str(home / "torch"))
    args = {rank: tuple(argv[1:]) for rank in range(n)}
    envs: dict[int, dict[str, str]] = {rank: {} for rank in range(n)}
    with muted():
        context = start_processes("worker", argv[0], args, envs, logs)
        gate.wait(n)
        time.sleep(0.05)
        began = time.monotonic_ns()
        os.kill(context.pids()[n // 2], signal.SIGKILL)
        context.wait(period=0.1)
    gate.open()
    mine = received(gate.home, began)
    got += mine
    return percentile(mine, 99)


def measure(quick: bool) -> Report:
    n, rounds = (8, 2) if quick else (64, 5)
    report = Report("cascade", rounds)
    sent: dict[str, list[float]] = {"asyncio": [], "uvloop": []}
    got: dict[str, list[float]] = {"ours (asyncio)": [], "ours (uvloop)": [], PLAIN: [], TORCH: []}
    with scratch() as home:
        cases: dict[str, Callable[[], float]] = {
            f"{PLAIN}: sent, p99": lambda: plain_loop(home, n, got[PLAIN]),
            "ours (asyncio): sent, p99": lambda: on_loop(lambda: ours(home, n, sent["asyncio"], got["ours (asyncio)"])),
            "ours (uvloop): sent, p99": lambda: on_loop(
                lambda: ours(home, n, sent["uvloop"], got["ours (uvloop)"]), "uvloop"
            ),
        }
        if available(report, "torch.distributed.elastic.multiprocessing", "torch"):
            cases[f"{TORCH}: received, p99"] = lambda: torch_elastic(home, n, got[TORCH])
        for name, values in paired(cases, rounds).items():
            report.add(name, "ms", values)
    many = rounds * (n - 1)  # without those of the round that warms up
    for loop, values in sent.items():
        report.add(f"ours ({loop}): sent, all", "ms", values[-many:])
    for name, values in got.items():
        if values:
            report.add(f"{name}: received", "ms", values[-many:])
    report.chart(
        "cascade", f"One of {n} workers is killed: until each of the others has SIGTERM",
        [f"{name}: received" for name in got], strip=": received", bounds=[PLAIN],
    )  # fmt: skip
    base = f"{PLAIN}: sent, p99"
    for loop in ("asyncio", "uvloop"):
        report.plain(
            f"first failure → SIGTERM sent to {n - 1} others, on {loop}", "p99 ≤ 5 ms", 5.0,
            f"ours ({loop}): sent, p99", base,
        )  # fmt: skip
    return report


if __name__ == "__main__":
    main("cascade", measure)
