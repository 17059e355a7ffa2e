"""Arrays on a GPU between processes: handed over, many small ones, and memory after processes were killed.

A transfer is timed from the call that sends it to the acknowledgement of the process that has mapped it. Ours goes
between two event loops (uvloop). Without a GPU there is nothing to measure: it is skipped, with the reason in words.
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from typing import Any

import _gpu
from _common import Report, available, main, paired
from sharing import MIB, Samples, Torch, milliseconds, ours

from aioelastic import gpu
from aioelastic import sharing as shares
from aioelastic.launch import end_helpers

QUEUE = "torch's CUDA Queue"


def used() -> int:
    """Bytes of the first GPU that are in use."""
    return gpu.devices()[0].used or 0


def handed_over(report: Report, sizes: dict[str, int], rounds: int, torch: Any) -> None:
    with ours(_gpu.answers) as mine:
        theirs = Torch(_gpu.torch_answers) if torch else None
        try:
            for words, size in sizes.items():
                born = shares.empty(size, "u1", device="cuda:0")
                name, peer = f"ours, {words} on a GPU", f"{QUEUE}, {words}"
                # one is short: a round is the median of many
                samples, own = Samples(), f"ours, torch's {words}"
                cases: dict[str, Callable[[], float]] = {
                    name: samples.case(name, 20, lambda born=born: mine.each(born, 20))
                }
                if theirs is not None:
                    tensor = torch.zeros(size, dtype=torch.uint8, device="cuda")
                    torch.cuda.synchronize()
                    cases[peer] = samples.case(peer, 20, lambda tensor=tensor: [theirs(tensor) for _ in range(20)])
                    cases[own] = samples.case(own, 20, lambda tensor=tensor: mine.each(tensor, 20))
                milliseconds(report, paired(cases, rounds, warm=2), samples)
                report.chart(
                    f"gpu-{words.replace(' ', '-')}", f"An array of {words} on a GPU, process to process", cases,
                    strip=f", {words}",
                )  # fmt: skip
                work = f"an array of {words} on a GPU, process → process, mapped and acknowledged"
                report.ratio(work, f"≤ 0.5 × {QUEUE}", 0.5, "low", name, peer, ours=name)
                del born
        finally:
            if theirs is not None:
                theirs.close()
    shares.trim()


def small_ones(report: Report, count: int) -> None:
    with ours(_gpu.answers) as mine:
        for _ in range(500):
            mine(shares.empty(16, "f4", device="cuda:0"))
        shares.trim()
        before, made = used(), gpu.stats().made
        for _ in range(count):
            mine(shares.empty(16, "f4", device="cuda:0"))
        shares.trim()
        report.add("MiB of the GPU more after them", "MiB", [(used() - before) / MIB])
        report.add("blocks made for them", "blocks", [float(gpu.stats().made - made)])
    work = f"{count:,} sends of a small array on a GPU"
    report.plain(work + ": its memory", "≤ 4 MiB more", 4, "MiB of the GPU more after them")
    report.plain(work + ": blocks", "≤ 2 more", 2, "blocks made for them")


def killed(report: Report, size: int, rounds: int) -> None:
    """What the GPU has in use more than before, when a consumer was killed and our own arrays are gone."""
    name = "MiB of the GPU more after a consumer was killed"
    shares.empty(1, device="cuda:0")
    shares.trim()
    before = used()

    def once() -> float:
        born = shares.empty(size, "u1", device="cuda:0")
        with ours(_gpu.keeps) as mine:
            mine(born)
            os.kill(mine.pid, signal.SIGKILL)
        del born
        shares.trim()
        return (used() - before) / MIB

    report.add(name, "MiB", paired({name: once}, rounds)[name])
    report.plain(f"SIGKILL of a consumer of {size // MIB} MiB on a GPU", "its memory is back", 4, name)


def measure(quick: bool) -> Report:
    report = Report("gpu", 3 if quick else 15)
    found = gpu.probe()
    if not found.ok:
        report.skipped["all of it"] = str(found)
        return report
    report.notes.append(str(found))
    torch: Any = None
    if not quick and available(report, "torch"):
        torch = importlib.import_module("torch")

        if not torch.cuda.is_available():
            report.skipped["torch"] = "it sees no GPU"
            torch = None
    full = {"1 MiB": MIB, "64 MiB": 64 * MIB, "1 GiB": 1024 * MIB}
    handed_over(report, {"1 MiB": MIB, "2 MiB": 2 * MIB} if quick else full, 3 if quick else 15, torch)
    small_ones(report, 500 if quick else 10_000)
    killed(report, (4 if quick else 1024) * MIB, 2 if quick else 5)
    gpu.end()
    end_helpers()
    return report


if __name__ == "__main__":
    main("gpu", measure)
