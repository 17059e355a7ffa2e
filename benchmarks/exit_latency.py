"""From SIGKILL to the moment the one who waits knows, with the worker's output quiet, and held by a grandchild."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import queue
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

from _common import NEVER, Report, available, main, on_loop, paired, scratch
from _peers import children, circusd, supervisord

from aioelastic import Command, Group, Logs, Std, Stop
from aioelastic.launch import By

SLEEP = "/bin/sleep"
# the shell becomes a sleep itself once its background child, which holds both pipes, runs
HOLDER = ["/bin/sh", "-c", "sleep 600 & echo $!; exec sleep 601"]
QUIET = Logs(tee=Std.NONE)
CUT_OFF = 1.0  # seconds after which "never" is said
TORCH = "torch elastic"
PATIENCE = 20.0  # seconds for a daemon to tell of an exit; after that it is an error
AGENT = 0.1  # seconds between two looks of torch elastic's agent, by default
SETTLE = 0.005  # seconds until the new process and its waiter sleep, as in real life
# a supervisord event listener that says at which moment it is told; argv[1] is a FIFO
LISTENER = """
import sys, time
told = open(sys.argv[1], "w", buffering=1)
while True:
    sys.stdout.write("READY\\n")
    sys.stdout.flush()
    head = sys.stdin.readline()
    now = time.perf_counter_ns()
    if not head:
        break
    sys.stdin.read(int(head.rpartition("len:")[2]))
    print(now, file=told)
    sys.stdout.write("RESULT 2\\nOK")
    sys.stdout.flush()
"""


# the leader of a session, as our workers are: its end alone takes the kernel a quarter longer
LIKE_OURS: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}


class Killer:
    """Kills a process from another thread, once it and its waiter have gone to sleep."""

    def __init__(self, pid: int, delay: float = SETTLE) -> None:
        self.began = 0
        self._pid = pid
        self._delay = delay
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> int:
        """When it was killed."""
        self._thread.join()
        return self.began

    def _run(self) -> None:
        time.sleep(self._delay)
        self.began = time.perf_counter_ns()
        os.kill(self._pid, signal.SIGKILL)


async def knows(pid: int, wait: Awaitable[object]) -> float:
    """Milliseconds from the kill until a task that already waits has its answer."""
    known = 0

    async def waiter() -> None:
        nonlocal known
        await wait
        known = time.perf_counter_ns()

    task = asyncio.ensure_future(waiter())
    await asyncio.sleep(0)
    killer = Killer(pid)
    _, pending = await asyncio.wait({task}, timeout=CUT_OFF)
    began = killer.join()
    if pending:
        task.cancel()
        await asyncio.wait({task})
        return NEVER
    task.result()
    return (known - began) / 1e6


async def bare_loop() -> float:
    """A pidfd, `add_reader`, `waitpid` and nothing more: the least that an event loop allows."""
    process = subprocess.Popen([SLEEP, "600"], **LIKE_OURS)
    pidfd = os.pidfd_open(process.pid)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def reap() -> None:
        loop.remove_reader(pidfd)
        process.wait()
        ended.set_result(None)

    loop.add_reader(pidfd, reap)
    took = await knows(process.pid, ended)
    os.close(pidfd)
    process.communicate()
    return took


async def ours(argv: list[str], launcher: By = "guardian") -> float:
    # what a killed worker leaves running is ended at once: its grace is not what is measured
    stop = Stop(grace=0)
    async with Group(Command(*argv), logs=QUIET, stop=stop, check=False, launcher=launcher) as group:
        pid = group[0].pid
        assert pid is not None
        if argv is HOLDER:
            async for _ in group.lines():
                break
        return await knows(pid, group[0].wait())


def waitpid() -> float:
    """A thread that does nothing else: the least the system allows."""
    process = subprocess.Popen([SLEEP, "600"], **LIKE_OURS)
    killer = Killer(process.pid)
    process.wait()
    known = time.perf_counter_ns()
    process.communicate()
    return (known - killer.join()) / 1e6


async def with_asyncio(argv: list[str]) -> float:
    process = await asyncio.create_subprocess_exec(*argv, **LIKE_OURS)
    grandchild = 0
    if argv is HOLDER:
        assert process.stdout is not None
        grandchild = int(await process.stdout.readline())
    try:
        return await knows(process.pid, process.wait())
    finally:
        if grandchild:
            os.kill(grandchild, signal.SIGKILL)  # now the pipes end
        await process.communicate()


async def with_anyio(argv: list[str]) -> float:
    import anyio

    async with await anyio.open_process(argv, start_new_session=True) as process:
        grandchild = 0
        if argv is HOLDER:
            assert process.stdout is not None
            grandchild = int(await process.stdout.receive())
        try:
            return await knows(process.pid, process.wait())
        finally:
            if grandchild:
                os.kill(grandchild, signal.SIGKILL)


async def with_processkit(argv: list[str]) -> float:
    import processkit

    process = await processkit.Command(argv[0], argv[1:]).astart()
    assert process.pid is not None
    held: list[int] = []
    while argv is HOLDER and not held:
        held = children(process.pid)
    try:
        return await knows(process.pid, process.aoutcome())
    finally:
        for grandchild in held:
            os.kill(grandchild, signal.SIGKILL)


def torch_elastic(delay: float) -> float:
    """Its wait, which looks as often as its agent does; killed from another thread `delay` seconds after it began."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells of the failure it should see
    with tempfile.TemporaryDirectory() as logs:
        context = start_processes("worker", SLEEP, {0: ("600",)}, {0: {}}, DefaultLogsSpecs(log_dir=logs))
        killer = Killer(context.pids()[0], delay)
        context.wait(period=AGENT)
        known = time.perf_counter_ns()
        return (known - killer.join()) / 1e6


def honcho_held() -> float:
    """honcho's own process class, in a thread instead of a process of its own."""
    from honcho.process import Process

    events: queue.Queue[object] = queue.Queue()
    process = Process(HOLDER[2], name="worker")
    runner = threading.Thread(target=process.run, args=(events,))
    runner.start()
    pid = grandchild = 0
    while not (pid and grandchild):
        event = events.get()
        if event.type == "start":  # type: ignore[attr-defined]
            pid = event.data["pid"]  # type: ignore[attr-defined]
        elif event.type == "line":  # type: ignore[attr-defined]
            grandchild = int(event.data)  # type: ignore[attr-defined]
    began = time.perf_counter_ns()
    os.kill(pid, signal.SIGKILL)
    try:
        events.get(timeout=CUT_OFF)
        took = (time.perf_counter_ns() - began) / 1e6
    except queue.Empty:
        took = NEVER
    os.kill(grandchild, signal.SIGKILL)
    runner.join()
    return took


def until(said: IO[str], pattern: str) -> str:
    """What the group of `pattern` stands for in the first line where it is found."""
    for line in said:
        if found := re.search(pattern, line):
            return found[1]
    raise RuntimeError(f"it ended before it said {pattern!r}")


def supervisord_log(home: Path, argv: list[str], delay: float) -> float:
    """The line "exited" on supervisord's own stdout: the first that anyone outside of it can know."""
    with supervisord(home, argv, told=True) as running:
        assert running.stdout is not None
        pid = int(until(running.stdout, "spawned: 'worker0' with pid ([0-9]+)"))
        killer = Killer(pid, delay)
        until(running.stdout, "(exited): worker0")
        known = time.perf_counter_ns()
        took = (known - killer.join()) / 1e6
        if argv is HOLDER:
            os.killpg(pid, signal.SIGKILL)
    return took


def supervisord_listener(home: Path, delay: float) -> float:
    """An event listener, supervisord's own way to tell a program; it takes the time itself, on the same clock."""
    fifo, script = home / "told", home / "listener.py"
    script.write_text(LISTENER)
    os.mkfifo(fifo)
    told = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
    try:
        listener = [sys.executable, "-S", str(script), str(fifo)]
        with supervisord(home, [SLEEP, "600"], listener=listener, told=True) as running:
            assert running.stdout is not None
            pid = int(until(running.stdout, "spawned: 'worker0' with pid ([0-9]+)"))
            killer = Killer(pid, delay)
            if not select.select([told], [], [], PATIENCE)[0]:
                raise RuntimeError("supervisord told its listener nothing")
            known = int(os.read(told, 100))
            return (known - killer.join()) / 1e6
    finally:
        os.close(told)
        fifo.unlink()


def circusd_subscriber(home: Path, delay: float) -> float:
    """A subscriber of what circusd publishes."""
    zmq: Any = importlib.import_module("zmq")  # its types do not know their own names
    with circusd(home, [SLEEP, "600"]) as running, zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.connect(running.events)
        events.subscribe("watcher.worker.reap")
        (pid,) = children(running.pid)
        killer = Killer(pid, delay)
        if not events.poll(PATIENCE * 1000):
            raise RuntimeError("circusd published nothing")
        known = time.perf_counter_ns()
        return (known - killer.join()) / 1e6


def measure(quick: bool) -> Report:
    with scratch() as home:
        return in_directory(home, quick)


def in_directory(home: Path, quick: bool) -> Report:
    each, rounds = (3, 2) if quick else (20, 5)
    report = Report("exit_latency", rounds)
    quiet = [SLEEP, "600"]

    samples: dict[Callable[[], float], list[float]] = {}

    def median_of(one: Callable[[], float]) -> Callable[[], float]:
        def case() -> float:
            values = [one() for _ in range(each)]
            samples[case] += values
            return statistics.median(values)

        samples[case] = []
        return case

    def spread(one: Callable[[float], float], period: float) -> Callable[[], float]:
        """One kill a time, at moments spread evenly over the period in which a peer looks."""
        turns = iter(range(10**6))
        return lambda: one(0.1 + (next(turns) * 0.3 * period) % period)

    cases: dict[str, Callable[[], float]] = {
        "blocking waitpid": median_of(waitpid),
        "a bare event loop and a pidfd": median_of(lambda: on_loop(bare_loop)),
        "ours (asyncio)": median_of(lambda: on_loop(lambda: ours(quiet))),
        "ours (uvloop)": median_of(lambda: on_loop(lambda: ours(quiet), "uvloop")),
        "ours, direct (asyncio)": median_of(lambda: on_loop(lambda: ours(quiet, "direct"))),
        "ours, direct (uvloop)": median_of(lambda: on_loop(lambda: ours(quiet, "direct"), "uvloop")),
        "asyncio": median_of(lambda: on_loop(lambda: with_asyncio(quiet))),
        "uvloop": median_of(lambda: on_loop(lambda: with_asyncio(quiet), "uvloop")),
    }
    if available(report, "anyio"):
        cases["anyio"] = median_of(lambda: on_loop(lambda: with_anyio(quiet)))
    if available(report, "processkit", "processkit-py"):
        cases["processkit-py"] = median_of(lambda: on_loop(lambda: with_processkit(quiet)))
    if available(report, "torch.distributed.elastic.multiprocessing", "torch"):
        # it looks ten times a second: kill it at moments spread evenly over that time
        cases[TORCH] = median_of(spread(torch_elastic, AGENT))
    held = "grandchild holds stdout: "
    if available(report, "circus.circusd", "circus", apart=True):
        cases["circusd, a subscriber"] = spread(lambda delay: circusd_subscriber(home, delay), 5.0)
        report.notes.append("circusd looks each 5 s, as it does unless its `check_delay` is set")
    with_supervisord = available(report, "supervisor.supervisord", "supervisor", apart=True)
    if with_supervisord:
        cases["supervisord, its log"] = spread(lambda delay: supervisord_log(home, quiet, delay), 1.0)
        cases["supervisord, an event listener"] = spread(lambda delay: supervisord_listener(home, delay), 1.0)
        report.notes.append(
            "supervisord hears of an exit by the end of the pipes, or once a second; it tells its listeners in the "
            "next turn of its loop, which is a second later when nothing else happens"
        )
    cases[held + "ours (asyncio)"] = median_of(lambda: on_loop(lambda: ours(HOLDER)))
    cases[held + "ours (uvloop)"] = median_of(lambda: on_loop(lambda: ours(HOLDER), "uvloop"))
    cases[held + "asyncio"] = lambda: on_loop(lambda: with_asyncio(HOLDER))
    cases[held + "uvloop"] = lambda: on_loop(lambda: with_asyncio(HOLDER), "uvloop")
    if "anyio" in cases:
        cases[held + "anyio"] = lambda: on_loop(lambda: with_anyio(HOLDER))
    if "processkit-py" in cases:
        cases[held + "processkit-py"] = lambda: on_loop(lambda: with_processkit(HOLDER))
    if available(report, "honcho.process", "honcho"):
        cases[held + "honcho"] = honcho_held
    if with_supervisord:
        cases[held + "supervisord, its log"] = spread(lambda delay: supervisord_log(home, HOLDER, delay), 1.0)
    for name, values in paired(cases, rounds).items():
        # without those of the round that warms up
        report.add(name, "ms", values, samples.get(cases[name], values)[-len(values) * each :])
    held_cases = [name for name in cases if name.startswith(held)]
    base = "blocking waitpid"
    report.chart(
        "exit-latency", "From SIGKILL of a worker until the one who waits knows",
        [name for name in cases if name not in held_cases],
        bounds=[base, "a bare event loop and a pidfd"],
    )  # fmt: skip
    report.chart(
        "exit-latency-pipe-held",
        "From SIGKILL until known, while a grandchild holds the stdout",
        held_cases,
        strip=held,
    )
    work, mine = "kill → known by the awaiting task", "ours (asyncio)"
    report.ratio(work, "≤ 1.5 × blocking waitpid", 1.5, "low", mine, base, ours=mine)
    report.ratio(f"{work}, on uvloop", "≤ 1.5 × blocking waitpid", 1.5, "low", "ours (uvloop)", base, "ours (uvloop)")
    for loop in ("asyncio", "uvloop"):
        direct = f"ours, direct ({loop})"
        report.ratio(
            f'{work}, launcher="direct", on {loop}', "≤ 1.5 × blocking waitpid", 1.5, "low", direct, base, direct
        )
    report.ratio(work, "≥ 100 × faster than torch elastic, polled each 0.1 s", 100, "high", TORCH, mine, ours=mine)
    strongest = report.strongest(name for name in held_cases if "ours" not in name)
    for loop in ("asyncio", "uvloop"):
        report.plain(
            f"exit while a grandchild holds stdout, on {loop}", "≤ 5 ms", 5.0, f"{held}ours ({loop})", strongest
        )
    if TORCH in cases:
        report.notes.append("torch elastic looks each 0.1 s, as its agent does (`monitor_interval`), and torchrun")
    report.notes.append(
        "the least that an event loop allows, asyncio's with one pidfd and nothing else, needs "
        f"{report.times('a bare event loop and a pidfd', base)} blocking waitpid"
    )
    report.notes.append(f'"never": not within {CUT_OFF:g} s')
    return report


if __name__ == "__main__":
    main("exit_latency", measure)
