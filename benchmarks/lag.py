"""How late the caller's event loop runs its own timers while 500 commands start and 200 MB/s of logs flow.

A task of the caller asks to be woken after 1 ms, again and again, and notes how late it was. The same ticking is done
beside the same work in another process: what the machine itself, busy as it is, makes a loop wait. Then the same while
workers end whose children flood their channels.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from _common import Gate, Report, main, muted, on_loop, paired, percentile, scratch
from _functions import leaves_floods

from aioelastic import Command, Function, Group, Logs, Std, supervise

TRUE = "/bin/true"
TICK = 0.001
# prints argv[2] MB/s of 81-byte lines, 32 KiB at a time, until it is stopped
PACED = (
    "import os, sys, time\n" + Gate.WORKER + "block = (b'x' * 80 + b'\\n') * 404\n"
    "pause = len(block) / (float(sys.argv[2]) * 1e6)\n"
    "due = time.monotonic()\n"
    "while True:\n"
    "    rest = block\n"
    "    while rest:\n"
    "        rest = rest[os.write(1, rest):]\n"
    "    due += pause\n"
    "    time.sleep(max(0.0, due - time.monotonic()))\n"
)


def paced(gate: Gate, rate: float) -> list[str]:
    return [sys.executable, "-S", "-c", PACED, str(gate.home), str(rate)]


async def ticking(work: Callable[[], Awaitable[object]]) -> list[float]:
    """Milliseconds that a timer of the caller was late, again and again while `work` was done."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append((time.perf_counter() - due) * 1e3)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    late.clear()
    await work()
    ticker.cancel()
    await asyncio.wait({ticker})
    return late


async def ours(home: Path, commands: int, writers: int, rate: float, flowed: list[float]) -> float:
    """p99 of the lag."""
    gate = Gate(home)
    group = Group(Command(*paced(gate, rate / writers)), n=writers, logs=Logs(dir=home / "runs"), check=False)

    async def start() -> None:
        await supervise(Command(TRUE), n=commands, logs=Logs(tee=Std.NONE))

    with muted():
        async with group:
            await gate.wait_async(writers)
            began = time.perf_counter()
            gate.open()
            await asyncio.sleep(0.3)  # the logs flow
            late = await ticking(start)
        took = time.perf_counter() - began
        result = await group.wait()
    flowed.append(sum(one.stdout.total for one in result) / took / 1e6)
    for one in result:
        assert one.stdout.path is not None
        one.stdout.path.unlink()
    return percentile(late, 99)


async def create_subprocess(home: Path, commands: int, writers: int, rate: float, flowed: list[float]) -> float:
    """The same by hand, with asyncio: read chunks, to a file and to /dev/null."""
    gate = Gate(home)
    total = 0

    async def copy(process: asyncio.subprocess.Process, number: int) -> None:
        nonlocal total
        assert process.stdout is not None
        path = home / f"asyncio-{number}.log"
        with open(path, "wb", buffering=0) as file, open(os.devnull, "wb", buffering=0) as out:
            while data := await process.stdout.read(65536):
                file.write(data)
                out.write(data.replace(b"\n", b"\n[worker0]: "))
                total += len(data)
        path.unlink()

    async def one() -> None:
        process = await asyncio.create_subprocess_exec(
            TRUE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        await process.communicate()

    async def start() -> None:
        await asyncio.gather(*(one() for _ in range(commands)))

    started = [
        await asyncio.create_subprocess_exec(*paced(gate, rate / writers), stdout=subprocess.PIPE)
        for _ in range(writers)
    ]
    copies = [asyncio.create_task(copy(process, number)) for number, process in enumerate(started)]
    await gate.wait_async(writers)
    began = time.perf_counter()
    gate.open()
    await asyncio.sleep(0.3)
    late = await ticking(start)
    took = time.perf_counter() - began
    flowed.append(total / took / 1e6)
    for process in started:
        process.kill()
    await asyncio.gather(*copies)
    for process in started:
        await process.wait()
    return percentile(late, 99)


async def flooded(ends: int) -> float:
    """p99 of the lag while so many workers, one after the other, end, and four children of each flood its channel, half
    of them by many small messages: from 0.05 s before the end to that of the group."""
    late: list[float] = []
    for number in range(ends):
        group = Group(Function(leaves_floods, 4, number % 2 == 1), logs=Logs(tee=Std.NONE), check=False)
        async with group:
            late += await ticking(group.wait)
    return percentile(late, 99)


async def worker_of_flood(ends: int) -> None:
    """The other process of `beside`: says when it begins, and when it is done."""
    print("begins", flush=True)
    await flooded(ends)
    print("done", flush=True)


async def beside(option: str, *words: float) -> float:
    """The ticking alone; the work is done by another process."""
    argv = [sys.executable, __file__, option, json.dumps(words)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stdout = process.stdout
    assert stdout is not None
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, stdout.readline)  # its logs flow

    async def other() -> None:
        done = asyncio.Event()
        loop.add_reader(stdout, done.set)
        await done.wait()
        loop.remove_reader(stdout)

    late = await ticking(other)
    process.communicate()
    assert process.returncode == 0
    return percentile(late, 99)


async def worker_of_beside(commands: int, writers: int, rate: float) -> None:
    """The other process of `beside`: says when its logs flow, and when its commands are done."""
    with scratch() as home:
        gate = Gate(home)
        out = sys.stdout
        with muted():
            logs = Logs(dir=home / "runs")
            async with Group(Command(*paced(gate, rate / writers)), n=writers, logs=logs, check=False):
                await gate.wait_async(writers)
                gate.open()
                await asyncio.sleep(0.3)
                print("flows", file=out, flush=True)
                await supervise(Command(TRUE), n=commands, logs=Logs(tee=Std.NONE))
                print("done", file=out, flush=True)


def measure(quick: bool) -> Report:
    commands, writers, rate, rounds = (20, 2, 20.0, 2) if quick else (500, 4, 200.0, 5)
    report = Report("lag", rounds)
    flowed: dict[str, list[float]] = {name: [] for name in ("ours (asyncio)", "ours (uvloop)", "asyncio")}
    with scratch() as home:
        size = (home, commands, writers, rate)
        cases: dict[str, Callable[[], float]] = {
            "the machine alone": lambda: on_loop(lambda: beside("--beside", commands, writers, rate)),
            "ours (asyncio)": lambda: on_loop(lambda: ours(*size, flowed["ours (asyncio)"])),
            "ours (uvloop)": lambda: on_loop(lambda: ours(*size, flowed["ours (uvloop)"]), "uvloop"),
            "asyncio": lambda: on_loop(lambda: create_subprocess(*size, flowed["asyncio"])),
        }
        for name, values in paired(cases, rounds).items():
            report.add(f"{name}: lag, p99", "ms", values)
    report.chart(
        "loop-lag", f"Lag of the caller's loop (each round's p99): {commands} start, {rate:g} MB/s of logs flow",
        [f"{name}: lag, p99" for name in cases], strip=": lag, p99", bounds=["the machine alone"],
    )  # fmt: skip
    ends = 2 if quick else 10
    floods: dict[str, Callable[[], float]] = {
        "flooded, the machine alone": lambda: on_loop(lambda: beside("--flood", ends)),
        "flooded (asyncio)": lambda: on_loop(lambda: flooded(ends)),
        "flooded (uvloop)": lambda: on_loop(lambda: flooded(ends), "uvloop"),
    }
    for name, values in paired(floods, rounds).items():
        report.add(f"{name}: lag, p99", "ms", values)
    for loop in ("asyncio", "uvloop"):
        report.plain(
            f"the caller's loop while four children flood the channel of an ended worker, on {loop}",
            "lag p99 ≤ 10 ms", 10.0, f"flooded ({loop}): lag, p99", "flooded, the machine alone: lag, p99",
        )  # fmt: skip
    for name, values in flowed.items():
        report.add(f"{name}: logs", "MB/s", values)
    for loop in ("asyncio", "uvloop"):
        report.plain(
            f"the caller's loop while {commands} start and {rate:g} MB/s of logs flow, on {loop}", "lag p99 ≤ 5 ms",
            5.0, f"ours ({loop}): lag, p99", "asyncio: lag, p99",
        )  # fmt: skip
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--beside"]:
        asyncio.run(worker_of_beside(*json.loads(sys.argv[2])))
    elif sys.argv[1:2] == ["--flood"]:
        asyncio.run(worker_of_flood(*json.loads(sys.argv[2])))
    else:
        main("lag", measure)
