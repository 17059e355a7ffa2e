"""10,000 tiny tasks on a warm executor, one by one and in chunks: ours beside the pools that people use; and Ctrl-C."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from _common import Report, available, main, on_loop, paired, scratch

from aioelastic import WorkerExecutor
from aioelastic.launch import end_helpers

WORKERS = 4
CHUNK = 50
HOLD = 15  # seconds that an interrupted task would take


def mapped(executor: Executor, tasks: int) -> float:
    """Tasks per second of `executor.map`, each of them a message."""
    began = time.perf_counter()
    results = list(executor.map(abs, range(tasks)))
    took = time.perf_counter() - began
    assert results == list(range(tasks))
    return tasks / took


def in_chunks(results: Callable[..., Any], tasks: int) -> float:
    """Calls per second of a map, of which `CHUNK` are a message."""
    began = time.perf_counter()
    found = list(results(abs, range(tasks), chunksize=CHUNK))
    took = time.perf_counter() - began
    assert sorted(found) == list(range(tasks))
    return tasks / took


def interrupted(kind: str, hold: float, home: Path) -> float:
    """Milliseconds from Ctrl-C, which a terminal sends to all of its program, to the prompt."""
    fifo = home / "begun"
    if not fifo.exists():
        os.mkfifo(fifo)
    begun = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
    argv = [sys.executable, str(Path(__file__).with_name("_interrupted.py")), kind, str(hold), str(fifo)]
    null = subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True) as program:
        try:
            left = WORKERS
            while left:
                left -= len(os.read(begun, left))
            began = time.perf_counter()
            os.killpg(program.pid, signal.SIGINT)
            program.wait()
            return (time.perf_counter() - began) * 1e3
        finally:
            os.close(begun)


async def anyio_tasks(tasks: int) -> float:
    """`anyio.to_process.run_sync`, as many at a time as there are workers."""
    import anyio
    from anyio import to_process

    limiter = anyio.CapacityLimiter(WORKERS)
    await asyncio.gather(*(to_process.run_sync(abs, i, limiter=limiter) for i in range(WORKERS)))  # warm
    began = time.perf_counter()
    results = await asyncio.gather(*(to_process.run_sync(abs, i, limiter=limiter) for i in range(tasks)))
    took = time.perf_counter() - began
    assert results == list(range(tasks))
    return tasks / took


@contextmanager
def warm(executor: Executor) -> Iterator[Executor]:
    """All its workers have run something."""
    with executor:
        list(executor.map(abs, range(100)))
        yield executor


def end_helpers_of_others() -> None:
    """The processes that multiprocessing and loky keep for as long as the interpreter lives."""
    from multiprocessing import forkserver, resource_tracker

    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
    with suppress(ImportError):
        from loky.backend import resource_tracker as lokys

        lokys._resource_tracker._stop()


def measure(quick: bool) -> Report:
    tasks, rounds = (200, 2) if quick else (10_000, 7)
    report = Report("executor", rounds)
    cases: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:

        def add(name: str, executor: Any, count: int = tasks) -> None:
            one = stack.enter_context(warm(executor))
            cases[name] = lambda: mapped(one, count)

        add("ours", WorkerExecutor(WORKERS))
        context = multiprocessing.get_context("forkserver")
        add("ProcessPoolExecutor", ProcessPoolExecutor(WORKERS, mp_context=context))
        if available(report, "loky"):
            import loky

            add("loky", loky.ProcessPoolExecutor(WORKERS))
        if available(report, "pebble"):
            import pebble

            pool = stack.enter_context(pebble.ProcessPool(max_workers=WORKERS, context=context))

            def pebbles(count: int) -> float:
                began = time.perf_counter()
                futures = [pool.schedule(abs, args=(i,)) for i in range(count)]
                assert [one.result() for one in futures] == list(range(count))
                return count / (time.perf_counter() - began)

            pebbles(100)
            cases["pebble"] = lambda: pebbles(tasks // 4)
        if available(report, "mpire"):
            import mpire

            crew = stack.enter_context(mpire.WorkerPool(n_jobs=WORKERS, start_method="forkserver", keep_alive=True))

            def mpires(count: int) -> float:
                began = time.perf_counter()
                assert crew.map(abs, range(count), chunk_size=1) == list(range(count))
                return count / (time.perf_counter() - began)

            mpires(100)
            cases["mpire"] = lambda: mpires(tasks)
        if available(report, "anyio"):
            cases["anyio.to_process"] = lambda: on_loop(lambda: anyio_tasks(tasks // 4))
        for name, values in paired(cases, rounds).items():
            report.add(name, "tasks/s", values)
    report.chart("executor-tasks", f"{tasks:,} tiny tasks on a warm executor of {WORKERS}, one per message", cases)
    mine, theirs = WorkerExecutor(WORKERS), ProcessPoolExecutor(WORKERS, mp_context=context)
    chunks = {
        f"ours, map_unordered, chunks of {CHUNK}": lambda: in_chunks(mine.map_unordered, tasks),
        f"ours, map, chunks of {CHUNK}": lambda: in_chunks(mine.map, tasks),
        f"ProcessPoolExecutor, chunks of {CHUNK}": lambda: in_chunks(theirs.map, tasks),
    }
    with warm(mine), warm(theirs):
        for name, values in paired(chunks, rounds).items():
            report.add(name, "calls/s", values)
    title = f"{tasks:,} tiny calls on a warm executor of {WORKERS}, {CHUNK} per message"
    report.chart("executor-chunks", title, chunks)
    end_helpers()
    end_helpers_of_others()
    hold = 0.5 if quick else HOLD
    stops = {one: f"{one}: Ctrl-C to the prompt" for one in ("ours", "ProcessPoolExecutor")}
    with scratch() as home:
        for one, name in stops.items():
            times = 3 if one == "ours" and not quick else 1
            report.add(name, "ms", [interrupted(one, hold, home) for _ in range(times)])
    work = "10,000 tiny tasks on a warm executor, one per message"
    ours = "ours"
    report.ratio(work, "≥ 1.5 × ProcessPoolExecutor's throughput", 1.5, "high", ours, "ProcessPoolExecutor", ours=ours)
    for peer in ("loky", "pebble", "anyio.to_process", "mpire"):
        if peer in cases:
            report.ratio(work, f"≥ 1 × {peer}'s throughput", 1.0, "high", ours, peer, ours=ours)
    chunked = "10,000 tiny calls on a warm executor, 50 per message"
    first, second, peer = chunks
    report.ratio(chunked, "≥ 2 × ProcessPoolExecutor's throughput", 2.0, "high", first, peer, ours=first)
    report.ratio(chunked, "≥ 1 × ProcessPoolExecutor's throughput, in order", 1.0, "high", second, peer, ours=second)
    interrupts = f"Ctrl-C while tasks of {HOLD} s run, to the prompt"
    report.plain(interrupts, "≤ 1 s", 1_000, stops["ours"], stops["ProcessPoolExecutor"])
    report.notes.append(f"{WORKERS} workers each; pebble and anyio.to_process ran a quarter of the tasks")
    return report


if __name__ == "__main__":
    main("executor", measure)
