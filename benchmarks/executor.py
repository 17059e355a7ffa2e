"""10,000 tiny tasks on a warm executor, one task per message: ours beside the pools that people use."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from _common import Report, available, main, on_loop, paired

from aioelastic import WorkerExecutor
from aioelastic.launch import end_helpers

WORKERS = 4


def mapped(executor: Executor, tasks: int) -> float:
    """Tasks per second of `executor.map`, each of them a message."""
    began = time.perf_counter()
    results = list(executor.map(abs, range(tasks)))
    took = time.perf_counter() - began
    assert results == list(range(tasks))
    return tasks / took


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
    end_helpers()
    end_helpers_of_others()
    work = "10,000 tiny tasks on a warm executor, one per message"
    ours = "ours"
    report.ratio(work, "≥ 1.5 × ProcessPoolExecutor's throughput", 1.5, "high", ours, "ProcessPoolExecutor", ours=ours)
    for peer in ("loky", "pebble", "anyio.to_process", "mpire"):
        if peer in cases:
            report.ratio(work, f"≥ 1 × {peer}'s throughput", 1.0, "high", ours, peer, ours=ours)
    report.notes.append(f"{WORKERS} workers each; pebble and anyio.to_process ran a quarter of the tasks")
    return report


if __name__ == "__main__":
    main("executor", measure)
