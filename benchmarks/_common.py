"""What all benchmarks share: paired runs, figures against goals, the machine in words, and a check for left-overs.

A benchmark is a file with `measure(quick) -> Report`; `main` makes a command of it. Ours and each peer run in turn
within the same round, in an order that rotates, so that a machine whose speed wanders is the same for all; a figure
is the median, over the rounds, of a ratio within one round. `save` puts what a benchmark saw into a data file
(`results.json`), of which `plot.py` makes all tables and pictures.
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
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

TAG = "AIOELASTIC_BENCHMARK"
NEVER = float("inf")


@dataclass
class Figure:
    """A goal. `value`, the median over the rounds, is compared with `limit`; `low` and `high` are the rounds' range."""

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


@dataclass
class Chart:
    """One picture: all that was measured doing the same work, ours and each peer."""

    file: str
    title: str
    # as it is called in the picture → the name of its series. The first of ours is the one by default
    parties: dict[str, str]
    # those of them that are no peer, but the least that the work can cost
    bounds: list[str]


@dataclass
class Report:
    """What one benchmark saw."""

    name: str
    rounds: int
    figures: list[Figure] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    # name → unit and a value for each round; ratios are taken within a round
    series: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    # where a round's value is the median of several samples: all of them
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # words, where figures do not say it: the head, then the rows
    table: list[list[str]] = field(default_factory=list)

    def add(self, name: str, unit: str, values: Sequence[float], samples: Sequence[float] = ()) -> None:
        self.series[name] = (unit, list(values))
        self.samples[name] = list(samples or values)

    def chart(self, file: str, title: str, names: Iterable[str], strip: str = "", bounds: Sequence[str] = ()) -> None:
        """A picture of the series `names`; one whose peer was skipped is left out. `strip` is no part of its label."""
        parties = {name.replace(strip, ""): name for name in names if name in self.series}
        self.charts.append(Chart(file, title, parties, [one for one in bounds if one in parties]))

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

    def strongest(self, names: Iterable[str]) -> str:
        """That of these series, as far as they are there, with the best median."""
        here = [name for name in names if name in self.series]
        best = max if here and is_rate(self.series[here[0]][0]) else min
        return best(here, key=lambda name: statistics.median(self.samples[name]), default="")

    def pairs(self, over: str, under: str) -> list[float]:
        """The ratio within each round."""
        return [a / b for a, b in zip(self.series[over][1], self.series[under][1], strict=True)]

    def times(self, over: str, under: str) -> str:
        """Their median, in words."""
        return amount(statistics.median(self.pairs(over, under)), "×")

    def words(self, name: str) -> str:
        return amount(statistics.median(self.samples[name]), self.series[name][0])


def amount(value: float, unit: str) -> str:
    """`12.3 ms`; a time that never came is "never"."""
    if value == NEVER:
        return "never"
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def is_rate(unit: str) -> bool:
    """More of it is better."""
    return unit.endswith("/s") or unit.startswith("of ")


def paired(cases: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
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


def on_loop(work: Callable[[], Coroutine[Any, Any, T]], loop: Literal["asyncio", "uvloop"] = "asyncio") -> T:
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
        tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
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
    parser.add_argument("--json", type=Path, help="put what it saw into this data file, beside that of others")
    args = parser.parse_args()
    os.environ[TAG] = uuid.uuid4().hex
    load, began = os.getloadavg()[0], time.monotonic()
    faulthandler.dump_traceback_later(120 if args.quick else 900, exit=True)  # a hang shows where, and ends
    report = measure(args.quick)
    faulthandler.cancel_dump_traceback_later()
    from aioelastic.launch import end_helpers

    end_helpers()  # ours that stay warm; a peer's are its own
    left = leftovers(os.environ[TAG])
    if args.json is not None:
        save(report, args.json, load=load, seconds=time.monotonic() - began, quick=args.quick, left=left)
    show(report)
    if left:
        sys.exit(f"{name} left processes behind: {left}")


def summary(unit: str, samples: Sequence[float]) -> dict[str, Any]:
    """What the data file keeps of one party. `p99` is what 99 of 100 samples keep to: of a rate, the 1st percentile."""
    worst = 1 if is_rate(unit) else 99
    told = {"median": statistics.median(samples), "p99": percentile(samples, worst)}
    told |= {"min": min(samples), "max": max(samples)}
    return {"unit": unit, "n": len(samples)} | {name: _number(value) for name, value in told.items()}


def _number(value: float) -> float | str:
    return "never" if value == NEVER else float(f"{value:.5g}")


def save(report: Report, path: Path, load: float, seconds: float, quick: bool, left: list[str]) -> None:
    """Put it into the data file, in the place of what the same benchmark saw before."""
    data = json.loads(path.read_text()) if path.exists() else {"history": [], "benchmarks": {}}
    data["benchmarks"][report.name] = {
        "about": (sys.modules["__main__"].__doc__ or "").strip(),
        "machine": ", ".join(f"{key} {text}" for key, text in machine().items()),
        "with": ", ".join(
            f"{name} {text}"
            for name, text in versions(
                *("aioelastic", "uvloop", "anyio", "processkit-py", "torch", "numpy", "honcho", "circus", "supervisor"),
                *("loky", "pebble", "mpire", "psutil", "trio", "simpervisor"),
            ).items()
        ),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load before": round(load, 2),
        "seconds": round(seconds),
        "quick": quick,
        "rounds": report.rounds,
        "charts": [asdict(one) for one in report.charts],
        "figures": [
            {key: _number(value) if isinstance(value, float) else value for key, value in asdict(one).items()}
            for one in report.figures
        ],
        "series": {name: summary(unit, report.samples[name]) for name, (unit, _) in report.series.items()},
        "table": report.table,
        "notes": report.notes,
        "skipped": report.skipped,
        "left behind": left,
    }
    path.write_text(packed(data))


def packed(data: dict[str, Any]) -> str:
    """As JSON, each object or list that holds no other on a line of its own."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return re.sub(r"[{\[]\n[^{}\[\]]*[}\]]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


def commit() -> str:
    """Which version this is, and whether the package or a benchmark differs from it; where git cannot tell, that."""

    def git(*argv: str) -> str:
        done = subprocess.run(["git", *argv], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../aioelastic", "*.py")  # not the data, which changes meanwhile
    return (git("rev-parse", "--short", "HEAD") or "not known") + (" with changes" if changed else "")


def show(report: Report) -> None:
    """The report, for people."""
    print(f"{report.name} ({report.rounds} paired runs)")
    for name, (unit, _) in report.series.items():
        seen = report.samples[name]
        spread = f"{amount(min(seen), unit)} to {amount(max(seen), unit)}"
        print(f"  {name:<44} {amount(statistics.median(seen), unit):>14}   ({len(seen)}: {spread})")
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
