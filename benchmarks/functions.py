"""Function workers: 8 that use torch, 8 that need nothing, large results, a restart, the caller's loop, memory.

Ours is one whole `await supervise(Function(...))` each time, by a zygote that was used before. Each peer runs in a
process of its own (`_function_peers.py`) that measures itself. "The machine alone" is a loop beside which another
process does the work: what the machine, busy as it is, makes any loop wait.
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import _functions
from _common import Gate, Report, available, main, on_loop, paired, percentile, scratch
from _function_peers import PRELOADED
from lag import ticking

import aioelastic
from aioelastic import Function, Group, Logs, Std, supervise
from aioelastic.events import Exited
from aioelastic.launch import end_helpers

QUIET = Logs(tee=Std.NONE)
TORCH = ("torch",)
KINDS = ("multiprocessing", "torch.multiprocessing")
MIB = 2**20


class Peer:
    """One of `_function_peers.py`, running."""

    def __init__(self, name: str) -> None:
        argv = [sys.executable, str(Path(__file__).with_name("_function_peers.py")), name]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a peer ended: {self._process.args!r}")
        return json.loads(answer)

    def close(self) -> None:
        """Returns when all that it has started is gone too: they hold its standard output."""
        self._process.communicate()


@contextmanager
def peers(*names: str) -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:
        running = {name: Peer(name) for name in names}
        for one in running.values():
            stack.callback(one.close)
        yield running


async def ours(function: Function, n: int, **options: Any) -> float:
    """Seconds of the whole call."""
    began = time.perf_counter()
    result = await supervise(function, n, logs=QUIET, **options)
    took = time.perf_counter() - began
    assert len(result) == n
    return took


def milliseconds(report: Report, seen: dict[str, list[float]], suffix: str = "") -> None:
    for name, seconds in seen.items():
        report.add(name + suffix, "ms", [s * 1e3 for s in seconds])


# --- start → all results ---


def torch_workers(report: Report, n: int, few: int, rounds: int, quick: bool) -> None:
    """Like with like: what has torch preloaded beside what has, and the rest beside the rest."""
    function = Function(_functions.with_torch, 2)

    def whole(**options: Any) -> float:
        return on_loop(lambda: ours(function, n, **options))

    first = []
    for _ in range(few):
        end_helpers()
        first.append(whole(preload=TORCH))
    report.add(f"ours, {n} with torch: the first call, which imports it", "ms", [s * 1e3 for s in first])
    mine, not_preloaded = "ours, torch preloaded", "ours"
    warm = [f"{kind}, forkserver{PRELOADED}" for kind in KINDS]
    slow = [f"torch.multiprocessing, {method}" for method in ("forkserver", "spawn")]
    if quick:  # each peer takes seconds to begin
        warm, slow = warm[:1], slow[-1:]
    cases: dict[str, Callable[[], float]] = {mine: lambda: whole(preload=TORCH)}
    with peers(*warm) as running:
        cases |= {name: lambda one=one: one(n) for name, one in running.items()}
        milliseconds(report, paired(cases, rounds))
    report.chart(
        "functions-torch-preloaded", f"{n} workers that use torch, start to results: preloaded", cases, strip=PRELOADED
    )
    cases = {not_preloaded: whole, "ours, by spawn": lambda: whole(start="spawn")}
    with peers(*slow) as running:
        cases |= {name: lambda one=one: one(n) for name, one in running.items()}
        # one of these takes as long as a hundred of the others
        beside = f"{mine}, beside these"
        cases[beside] = lambda: statistics.median(whole(preload=TORCH) for _ in range(5))
        milliseconds(report, {f"{name}, importing torch": s for name, s in paired(cases, few, warm=0).items()})
    names = [f"{name}, importing torch" for name in cases if name != beside]
    report.chart(
        "functions-torch", f"{n} workers that use torch, start to results: each imports it", names,
        strip=", importing torch",
    )  # fmt: skip
    report.notes.append(
        "spawn cannot preload anything. In the picture of workers that import torch themselves, ours do so too; with "
        f"torch preloaded ours took {report.words(f'{beside}, importing torch')} beside them"
    )
    work = f"{n} function workers that use torch, start → all results"
    for peer in warm:
        report.ratio(f"{work}, all preloaded", f"≤ 1.2 × {peer}, warm", 1.2, "low", mine, peer, ours=mine)
    report.ratio(
        f"{work}, ours preloaded, the peer cannot preload", "≥ 100 × faster than torch.multiprocessing, spawn", 100.0,
        "high", "torch.multiprocessing, spawn, importing torch", f"{beside}, importing torch",
        ours=f"{beside}, importing torch",
    )  # fmt: skip
    report.ratio(
        f"{work}, nobody preloaded", "≥ 1 × as fast as torch.multiprocessing, spawn", 1.0, "high",
        "torch.multiprocessing, spawn, importing torch", f"{not_preloaded}, importing torch",
        ours=f"{not_preloaded}, importing torch",
    )  # fmt: skip


def plain_workers(report: Report, n: int, rounds: int) -> None:
    function = Function(_functions.square, 3)
    with peers("forkserver", "spawn", "fork") as running:
        cases: dict[str, Callable[[], float]] = {
            f"ours, {n}": lambda: on_loop(lambda: ours(function, n)),
            f"ours, {n}, by spawn": lambda: on_loop(lambda: ours(function, n, start="spawn")),
            f"ours, {n}, by fork": lambda: on_loop(lambda: ours(function, n, start="fork")),
        }
        cases |= {f"multiprocessing, {name}": lambda one=one: one(n) for name, one in running.items()}
        milliseconds(report, paired(cases, rounds))
    report.chart("functions", f"{n} workers that need nothing, start to results; nothing preloaded", cases)
    work, mine = f"{n} function workers, nothing preloaded, start → all results", f"ours, {n}"
    report.ratio(
        work, "≤ 1.2 × multiprocessing's forkserver, warm", 1.2, "low", mine, "multiprocessing, forkserver", ours=mine
    )
    report.ratio(
        work, "≥ 2.5 × faster than multiprocessing's spawn", 2.5, "high", "multiprocessing, spawn", mine, ours=mine
    )


# --- results ---


async def our_array(size: int) -> list[float]:
    """As `_function_peers.pool`."""
    began = time.perf_counter()
    result = await supervise(Function(_functions.array, size), preload=["numpy"], logs=QUIET)
    made, returned = result[0].value
    assert _functions.read(made) == -(-size // 4096)
    now = time.perf_counter()
    return [now - began, now - returned]


def arrays(report: Report, sizes: dict[str, tuple[int, int]]) -> None:
    with peers("ProcessPoolExecutor") as running:
        pool = running["ProcessPoolExecutor"]
        for words, (size, rounds) in sizes.items():
            mine, theirs = f"ours, {words} array", f"ProcessPoolExecutor, {words} array"
            apart: dict[str, list[float]] = {mine: [], theirs: []}

            def call(name: str, run: Callable[[], list[float]], apart: dict[str, list[float]] = apart) -> float:
                whole, after = run()
                apart[name].append(after)
                return whole

            seen = paired(
                {
                    mine: lambda mine=mine, size=size, call=call: call(mine, lambda: on_loop(lambda: our_array(size))),
                    theirs: lambda theirs=theirs, size=size, call=call: call(theirs, lambda: pool(size)),
                },
                rounds,
            )
            milliseconds(report, seen)
            report.chart(
                f"functions-array-{words.replace(' ', '-')}",
                f"An array of {words} made, returned and read",
                seen,
                strip=f", {words} array",
            )
            milliseconds(report, {name: values[-rounds:] for name, values in apart.items()}, ": from return to here")
            report.ratio(
                f"a numpy array of {words} made, returned and read", "≥ 3 × faster than ProcessPoolExecutor", 3.0,
                "high", theirs, mine, ours=mine,
            )  # fmt: skip


# --- a restart ---


async def restarted() -> float:
    """Seconds from the exit of the first attempt to the moment the function of the second runs."""
    ended: list[int] = []

    def note(event: object) -> None:
        if isinstance(event, Exited) and event.attempt == 0:
            ended.append(event.exit.ended_ns)

    policy = aioelastic.Restart.on_failure(max=1)
    function = Function(_functions.fails_once)
    result = await supervise(function, preload=TORCH, logs=QUIET, restart=policy, on_event=note)
    began_ns: int = result[0].value
    return (began_ns - ended[0]) / 1e9


def restart(report: Report, rounds: int) -> None:
    name = "ours, a torch worker that failed: exit → its function runs again"
    if not hasattr(aioelastic, "Restart"):
        report.skipped[name] = "this aioelastic has no Restart"
        return
    milliseconds(report, paired({name: lambda: on_loop(restarted)}, rounds))
    report.plain("a torch worker that failed, exit → its function runs again", "≤ 50 ms", 50.0, name)


# --- the caller's loop ---


async def lag(n: int) -> float:
    """p99, in ms."""
    return percentile(await ticking(lambda: supervise(Function(_functions.square, 3), n, logs=QUIET)), 99)


async def lag_beside(peer: Peer, n: int) -> float:
    """The same work, done by another process."""
    loop = asyncio.get_running_loop()
    return percentile(await ticking(lambda: loop.run_in_executor(None, peer, n)), 99)


def lags(report: Report, n: int, rounds: int) -> None:
    with peers("ours") as running:
        alone = f"the machine alone, {n} start beside: lag, p99"
        cases: dict[str, Callable[[], float]] = {
            alone: lambda: on_loop(lambda: lag_beside(running["ours"], n)),
            f"ours (asyncio), {n} start: lag, p99": lambda: on_loop(lambda: lag(n)),
            f"ours (uvloop), {n} start: lag, p99": lambda: on_loop(lambda: lag(n), "uvloop"),
        }
        for name, values in paired(cases, rounds).items():
            report.add(name, "ms", values)
    for loop in ("asyncio", "uvloop"):
        report.plain(
            f"the caller's loop while {n} function workers start, on {loop}", "lag p99 ≤ 2 ms", 2.0,
            f"ours ({loop}), {n} start: lag, p99", alone,
        )  # fmt: skip


# --- memory ---


def pss(pids: set[int]) -> float:
    """Their proportional set size, in MiB: a page that k processes share counts 1/k in each of them."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


async def our_memory(n: int, home: Path, preload: Sequence[str]) -> float:
    """Of n workers and their zygote."""
    gate = Gate(home)
    function = Function(_functions.with_torch_at_gate, str(gate.home))
    async with Group(function, n, preload=preload, logs=QUIET) as group:
        await gate.wait_async(n)
        workers = set(group.pids.values())
        zygotes = {int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1]) for one in workers}
        size = pss(workers | zygotes)
        gate.open()
        await group.wait()
    return size


def memory_of(peer: Peer, n: int, home: Path) -> float:
    """Of n workers, and their fork server if they have one, without the process that has started them."""
    gate = Gate(home)
    pids = peer(n, str(gate.home))
    gate.wait(n)
    size = pss(set(pids))
    gate.open()
    peer()
    return size


def memory(report: Report, n: int, rounds: int, quick: bool) -> None:
    what = f": memory of {n}"
    mine = f"ours{PRELOADED}"
    cases: dict[str, Callable[[], float]] = {
        mine: lambda: on_loop(lambda: our_memory(n, home, TORCH)),
        "ours": lambda: on_loop(lambda: our_memory(n, home, ())),
    }
    methods = ("spawn", "forkserver", f"forkserver{PRELOADED}")
    asked = methods[:1] if quick else methods
    with scratch() as home, peers(*(f"at a gate, {method}" for method in asked)) as running:
        for name, one in running.items():
            cases[name.replace("at a gate", "torch.multiprocessing")] = lambda one=one: memory_of(one, n, home)
        for name, values in paired(cases, rounds, warm=0).items():
            report.add(name + what, "MiB", values)
    report.chart(
        "functions-memory", f"Memory (PSS) of {n} workers that use torch", [name + what for name in cases], strip=what
    )
    work = f"memory of {n} torch workers (proportional set size)"
    for peer, words in (("spawn", "spawn, which cannot preload"), (methods[2], methods[2])):
        report.ratio(
            f"{work}, ours preloaded", f"≤ {0.4 if peer == 'spawn' else 1.2} × torch.multiprocessing, {words}",
            0.4 if peer == "spawn" else 1.2, "low", mine + what, f"torch.multiprocessing, {peer}{what}",
            ours=mine + what,
        )  # fmt: skip


def measure(quick: bool) -> Report:
    n, many, few, rounds = (2, 8, 1, 2) if quick else (8, 100, 2, 15)
    sizes = {"1 MiB": (MIB, 2)} if quick else {"64 MiB": (64 * MIB, 9), "1 GiB": (1024 * MIB, 3)}
    report = Report("functions", rounds)
    report.notes += [
        "ours: a whole warm supervise() call, whose zygote was used before; so are the fork servers and the pool",
        f"beside workers that import torch themselves there are {few} rounds",
    ]
    try:
        plain_workers(report, n, rounds)
        lags(report, many, 2 if quick else 9)
        if available(report, "numpy", apart=True):
            arrays(report, sizes)
        if available(report, "torch", apart=True):
            torch_workers(report, n, few, rounds, quick)
            restart(report, rounds)
            memory(report, n, 1, quick)
    finally:
        end_helpers()
    return report


if __name__ == "__main__":
    main("functions", measure)
