"""What all benchmarks share: paired runs, figures against goals, the machine in words, and a check for left-overs.

A benchmark is a file with `measure(quick) -> Report`; `main` makes a command of it. Ours and each peer run in turn
within the same round, in an order that rotates, so that a machine whose speed wanders is the same for all; a figure
is the median, over the rounds, of a ratio within one round.
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

TAG = "AIOELASTIC_BENCHMARK"


@dataclass
class Figure:
    """One row of the results. `value` is what is compared with `limit`; `low` and `high` are its spread."""

    work: str
    goal: str
    value: float
    low: float
    high: float
    limit: float
    best: Literal["low", "high"]
    unit: str
    ours: str
    peer: str

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.best == "low" else self.value >= self.limit

    @property
    def score(self) -> float:
        """How many times better than the goal; below 1 it is missed."""
        good, bad = (self.limit, self.value) if self.best == "low" else (self.value, self.limit)
        if not bad:
            return 1.0 if not good else float("inf")
        return good / bad


@dataclass
class Report:
    """What one benchmark saw."""

    name: str
    rounds: int
    figures: list[Figure] = field(default_factory=list)
    # name → unit and all values, medians of which are shown beside the figures
    series: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # words, where figures do not say it: the head, then the rows
    table: list[list[str]] = field(default_factory=list)

    def add(self, name: str, unit: str, values: Sequence[float]) -> None:
        self.series[name] = (unit, list(values))

    def ratio(
        self,
        work: str,
        goal: str,
        limit: float,
        best: Literal["low", "high"],
        over: str,
        under: str,
        ours: str,
    ) -> None:
        """A figure from two series of the same rounds, `over` / `under`. Nothing when a peer was skipped."""
        if over not in self.series or under not in self.series:
            return
        pairs = self.pairs(over, under)
        peer = under if ours == over else over
        self.figures.append(
            Figure(
                work=work,
                goal=goal,
                value=statistics.median(pairs),
                low=min(pairs),
                high=max(pairs),
                limit=limit,
                best=best,
                unit="×",
                ours=self.words(ours),
                peer=f"{peer}: {self.words(peer)}",
            )
        )

    def plain(
        self, work: str, goal: str, limit: float, ours: str, peer: str = "", best: Literal["low", "high"] = "low"
    ) -> None:
        """A figure that is compared with a fixed limit."""
        unit, values = self.series[ours]
        self.figures.append(
            Figure(
                work=work,
                goal=goal,
                value=statistics.median(values),
                low=min(values),
                high=max(values),
                limit=limit,
                best=best,
                unit=unit,
                ours=self.words(ours),
                peer=f"{peer}: {self.words(peer)}" if peer in self.series else peer,
            )
        )

    def pairs(self, over: str, under: str) -> list[float]:
        """The ratio within each round."""
        return [a / b for a, b in zip(self.series[over][1], self.series[under][1], strict=True)]

    def times(self, over: str, under: str) -> str:
        """Their median, in words."""
        return amount(statistics.median(self.pairs(over, under)), "×")

    def words(self, name: str) -> str:
        unit, values = self.series[name]
        return amount(statistics.median(values), unit)


def amount(value: float, unit: str) -> str:
    """`12.3 ms`; a time that never came is "never"."""
    if value == float("inf"):
        return "never"
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def paired(cases: dict[str, Callable[[], float]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Run all cases `rounds` times, one after the other within a round, each round starting with another one."""
    names = list(cases)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm, rounds):
        for shift in range(len(names)):
            name = names[(turn + shift) % len(names)]
            gc.collect()
            value = cases[name]()
            if turn >= 0:
                seen[name].append(value)
    return seen


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least `q` per cent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * q // 100).__int__() - 1))]


def on_loop(work: Callable[[], Coroutine[Any, Any, float]], loop: Literal["asyncio", "uvloop"] = "asyncio") -> float:
    """Run a coroutine on a fresh event loop."""
    factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())


def available(report: Report, module: str, package: str | None = None, apart: bool = False) -> bool:
    """Whether a peer can be imported; when not, it is skipped by name, with the reason.

    `apart`: try it in another process, for a peer that changes the process that imports it.
    """
    reason = ""
    if apart:
        tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
        if tried.returncode:
            reason = (tried.stderr.strip() or f"exit code {tried.returncode}").splitlines()[-1]
    else:
        try:
            importlib.import_module(module)
        except Exception as exc:  # a peer may be broken in any way: that is its reason
            reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
    if reason:
        report.skipped[package or module] = reason
    return not reason


def machine() -> dict[str, str]:
    """The machine, in words that name no machine."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            cpu = value.strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = re.match(r"\d+\.\d+", platform.release())
    return {
        "CPU": cpu or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "kernel": f"Linux {kernel.group() if kernel else platform.release()}",
        "Python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for files, in memory where that exists, so that the disk is not what is measured."""
    shm = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="aioelastic-bench-", dir=shm if os.access(shm, os.W_OK) else None))
    held = os.open(home, os.O_RDONLY)  # for those who look for what has been left behind
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
        os.close(held)


@contextmanager
def muted() -> Iterator[None]:
    """Point `sys.stdout` and `sys.stderr` to /dev/null: a tee without a reader."""
    out, err = sys.stdout, sys.stderr
    with open("/dev/null", "w") as null_out, open("/dev/null", "w") as null_err:
        sys.stdout, sys.stderr = null_out, null_err
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err


class Gate:
    """Holds workers back until all are there, so that their start is not in the measured time.

    A worker opens the FIFO `gate`, writes one byte to the FIFO `ready`, then reads `gate` to its end.
    """

    # for Python workers; `sys` is imported, argv[1] is the directory of the FIFOs
    WORKER = (
        "gate = open(sys.argv[1] + '/gate', 'rb')\n"
        "open(sys.argv[1] + '/ready', 'wb', buffering=0).write(b'.')\n"
        "gate.read()\n"
    )

    def __init__(self, home: Path) -> None:
        self.home = home / f"gate-{uuid.uuid4().hex[:8]}"
        self.home.mkdir()
        for name in ("ready", "gate"):
            os.mkfifo(self.home / name)
        # read-write, so that neither side waits for the other to open
        self._ready = os.open(self.home / "ready", os.O_RDWR | os.O_CLOEXEC)
        self._gate = os.open(self.home / "gate", os.O_RDWR | os.O_CLOEXEC)

    def wait(self, count: int) -> None:
        """Block until `count` workers are at the gate."""
        while count:
            count -= len(os.read(self._ready, count))

    async def wait_async(self, count: int) -> None:
        await asyncio.to_thread(self.wait, count)

    def open(self) -> None:
        """Let them all go."""
        os.close(self._gate)
        os.close(self._ready)


def main(name: str, measure: Callable[[bool], Report]) -> None:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small runs: does it work at all?")
    parser.add_argument("--json", type=Path, help="write the report here too")
    args = parser.parse_args()
    os.environ[TAG] = uuid.uuid4().hex
    load = os.getloadavg()[0]
    faulthandler.dump_traceback_later(120 if args.quick else 900, exit=True)  # a hang shows where, and ends
    report = measure(args.quick)
    faulthandler.cancel_dump_traceback_later()
    from aioelastic.launch import end_helpers

    end_helpers()  # ours that stay warm; a peer's are its own
    left = leftovers(os.environ[TAG])
    text = {
        **asdict(report),
        "machine": machine(),
        "versions": versions(
            *("aioelastic", "uvloop", "anyio", "processkit-py", "torch", "numpy", "honcho", "circus", "supervisor"),
            *("loky", "pebble", "mpire", "psutil", "trio", "simpervisor"),
        ),
        "load before": round(load, 2),
        "quick": args.quick,
        "left behind": left,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(text, indent=1) + "\n")
    show(report)
    if left:
        sys.exit(f"{name} left processes behind: {left}")


def show(report: Report) -> None:
    """The report, for people."""
    print(f"{report.name} ({report.rounds} paired runs)")
    for name, (unit, values) in report.series.items():
        spread = f"{amount(min(values), unit)} to {amount(max(values), unit)}"
        print(f"  {name:<44} {amount(statistics.median(values), unit):>14}   ({spread})")
    for name, reason in report.skipped.items():
        print(f"  {name:<44} skipped: {reason}")
    for row in report.table:
        print("  " + " | ".join(f"{cell:<34}" for cell in row))
    for one in report.figures:
        verdict = "met" if one.met else "MISSED"
        spread = f"{one.low:.2f} to {one.high:.2f}"
        print(f"  {verdict:>6}: {one.work}: {amount(one.value, one.unit)} ({spread}), goal {one.goal}")
    for note in report.notes:
        print(f"  note: {note}")


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Processes that carry this run's mark in their environment: a pidfd, closed after its turn, and the command."""
    wanted = f"{TAG}={mark}".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            if wanted not in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                continue
            command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield pidfd, command.strip()
        except OSError:
            continue
        finally:
            os.close(pidfd)


def leftovers(mark: str) -> list[str]:
    """The commands of those that carry it; they are ended, and it is an error."""
    found = []
    for pidfd, command in marked(mark):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue
        found.append(command)
    return found
