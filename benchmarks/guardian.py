"""What the guardian costs and gives: starts from a small and a huge program, the caller's loop meanwhile, its own
memory and wake-ups, its hidden start, and the end of everything after a SIGKILL of the program."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import psutil
from _common import Report, main, on_loop, paired, percentile
from idle import memory, say, supervisors, switches
from lag import ticking
from start_reap import create_subprocess, popen
from start_reap import ours as start_and_reap

TRUE = "/bin/true"
TREE = "sleep 6000 & setsid sleep 6000 & env -i setsid /bin/sh -c 'sleep 6000 >/dev/null 2>&1 & echo up' & wait; wait"


# --- programs: each does on stdin's word what it is for, and says how long it took ---


def host(gibibytes: float, threads: int) -> None:
    """Start and reap commands, as the words on stdin say, beside so much touched memory and so many threads."""
    heap = bytearray(int(gibibytes * 2**30))
    heap[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(heap[:: os.sysconf("SC_PAGE_SIZE")])
    ended = threading.Event()
    crew = [threading.Thread(target=ended.wait) for _ in range(threads)]
    for one in crew:
        one.start()
    ways: dict[str, Callable[[int], float]] = {
        "popen": popen,
        "ours-asyncio": lambda n: on_loop(lambda: start_and_reap(n)),
        "ours-uvloop": lambda n: on_loop(lambda: start_and_reap(n), "uvloop"),
        "asyncio": lambda n: on_loop(lambda: create_subprocess(n)),
        "uvloop": lambda n: on_loop(lambda: create_subprocess(n), "uvloop"),
    }
    say("up")
    for line in sys.stdin:
        way, n = line.split()
        say(repr(ways[way](int(n))))
    ended.set()


async def first() -> None:
    """How long the first worker of a running program takes, from the call."""
    from aioelastic import Command, Group, Logs, Std

    group = Group(Command(TRUE), logs=Logs(tee=Std.NONE))
    await asyncio.sleep(0.05)
    began = time.perf_counter()
    async with group:
        say(repr(time.perf_counter() - began))
        await group.wait()


async def idle(n: int) -> None:
    """Own idle workers until stdin ends."""
    from aioelastic import Command, Group, Logs, Std, Stop

    async with Group(Command("/bin/sleep", "6000"), n=n, logs=Logs(tee=Std.NONE), stop=Stop(grace=5)):
        say("up")
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def trees(n: int) -> None:
    """Own workers with three descendants each: in their session, in another one, and a daemon without variables."""
    from aioelastic import Command, Group, Logs, Std

    async with Group(Command("/bin/sh", "-c", TREE), n=n, logs=Logs(tee=Std.NONE)) as group:
        up = 0
        async for _ in group.lines():
            up += 1
            if up == n:
                say("up")


def program(*words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, __file__, "--program", *words]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


# --- what is measured from outside ---


class Host:
    """One such program, which lives over all rounds."""

    def __init__(self, gibibytes: float, threads: int) -> None:
        self._process = program("host", str(gibibytes), str(threads))
        assert self._answer() == "up"

    def run(self, way: str, n: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way} {n}\n")
        return float(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def first_worker() -> float:
    with program("first") as process:
        out, _ = process.communicate()
    return float(out)


def cost(seconds: float) -> tuple[float, float]:
    """MiB of the guardian and its keeper, and how often they were woken while 50 workers were idle."""
    with program("idle", "50") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(1.0)
        helpers = [one for one in supervisors(process.pid) if one != process.pid]
        assert len(helpers) == 2
        woken = sum(map(switches, helpers))
        time.sleep(seconds)
        woken = sum(map(switches, helpers)) - woken
        used = sum(map(memory, helpers)) / 2**20
        process.stdin.close()
        assert process.wait() == 0
    return used, woken


def tree(pid: int, n: int) -> list[psutil.Process]:
    """All that such a program has, once the last daemon has changed its parent and the shell between them is gone."""
    names: list[str] = []
    for _ in range(200):
        try:
            family = psutil.Process(pid).children(recursive=True)
            names = [one.name() for one in family]
        except psutil.NoSuchProcess:
            continue  # it went while we looked
        if names.count("sleep") == 3 * n and len(names) == 4 * n + 2:  # the workers, the guardian and its keeper
            return family
        time.sleep(0.01)
    raise RuntimeError(f"what it started does not come to rest: {names}")


def killed(n: int) -> float:
    """From SIGKILL of the program until nothing of it is left."""
    with program("trees", str(n)) as process, ExitStack() as stack:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        stack.callback(process.kill)
        family = tree(process.pid, n)
        poll = select.poll()
        waiting = set()
        for one in family:
            fd = os.pidfd_open(one.pid)
            stack.callback(os.close, fd)
            poll.register(fd, select.POLLIN)
            waiting.add(fd)
        began = time.perf_counter()
        process.send_signal(signal.SIGKILL)
        while waiting:
            for fd, _ in poll.poll():
                poll.unregister(fd)
                waiting.discard(fd)
        return time.perf_counter() - began


def lag(n: int) -> float:
    """p99 of how late the caller's loop runs its own timers while so many commands start."""

    async def work() -> float:
        return percentile(await ticking(lambda: start_and_reap(n)), 99)

    return on_loop(work)


def lag_beside(n: int) -> float:
    """The same of a loop in another process than the one that starts them: what the machine makes any loop wait."""
    small = Host(0, 0)

    async def work() -> float:
        return percentile(await ticking(lambda: asyncio.to_thread(small.run, "ours-asyncio", n)), 99)

    try:
        return on_loop(work)
    finally:
        small.close()


def measure(quick: bool) -> Report:
    n, gibibytes, threads, rounds = (20, 0.25, 5, 2) if quick else (200, 8.0, 50, 7)
    report = Report("guardian", rounds)
    hosts = {"small": Host(0, 0), f"{gibibytes:g} GiB, {threads} threads": Host(gibibytes, threads)}
    names = {"popen": "Popen loop", "ours-asyncio": "ours (asyncio)", "ours-uvloop": "ours (uvloop)"}
    names |= {"asyncio": "asyncio", "uvloop": "uvloop"}
    *_, huge = hosts
    cases: dict[str, Callable[[], float]] = {
        f"{words}, {where}": lambda one=one, way=way: one.run(way, n)
        for where, one in hosts.items()
        for way, words in names.items()
    }
    slow = f"uvloop, {huge}"  # it forks a process of that size each time, which takes a minute
    once = {slow: cases.pop(slow)}
    try:
        for name, seconds in (paired(cases, rounds) | paired(once, 1, warm=0)).items():
            report.add(name, "ms", [s * 1e3 for s in seconds])
    finally:
        for one in hosts.values():
            one.close()
    report.chart(
        "start-from-huge-program", f"Start and reap {n} commands from a program with {huge}",
        [f"{one}, {huge}" for one in names.values()], strip=f", {huge}", bounds=["Popen loop"],
    )  # fmt: skip
    bare = "Popen loop, small"
    for where in hosts:
        for loop in ("asyncio", "uvloop"):
            report.ratio(
                f"start + reap {n} commands from a program that is {'small' if where == 'small' else 'huge'} "
                f"({where}), on {loop}", "≤ 1.3 × a bare Popen loop in a small one", 1.3, "low",
                f"ours ({loop}), {where}", bare, ours=f"ours ({loop}), {where}",
            )  # fmt: skip

    many, few = (50, 2) if quick else (1000, 7)
    starts = {"ours: lag, p99": lambda: lag(many), "the machine alone: lag, p99": lambda: lag_beside(many)}
    for name, values in paired(starts, few).items():
        report.add(name, "ms", values)
    report.plain(
        f"the caller's loop while {many:,} commands start", "lag p99 ≤ 1 ms", 1.0, "ours: lag, p99",
        "the machine alone: lag, p99",
    )  # fmt: skip

    report.add("first worker of a program", "ms", [first_worker() * 1e3 for _ in range(rounds)])
    report.plain("from the call in a running program to its first worker", "≤ 40 ms", 40, "first worker of a program")

    costs = [cost(0.2 if quick else 10) for _ in range(1 if quick else 3)]
    report.add("guardian and keeper: memory", "MiB", [one for one, _ in costs])
    report.add("guardian and keeper: wake-ups", "wake-ups", [one for _, one in costs])
    report.plain("guardian and keeper, 50 idle workers", "≤ 10 MiB PSS", 10, "guardian and keeper: memory")
    report.plain("guardian and keeper, 50 idle workers", "0 wake-ups in 10 s", 0, "guardian and keeper: wake-ups")

    workers = 4 if quick else 64
    report.add("all gone after SIGKILL", "ms", [killed(workers) * 1e3 for _ in range(2 if quick else 11)])
    report.plain(
        f"SIGKILL of the program until {workers} workers with 3 descendants each are gone", "≤ 500 ms", 500,
        "all gone after SIGKILL",
    )  # fmt: skip
    return report


PROGRAMS: dict[str, Callable[..., None]] = {
    "host": lambda size, threads: host(float(size), int(threads)),
    "first": lambda: asyncio.run(first()),
    "idle": lambda n: asyncio.run(idle(int(n))),
    "trees": lambda n: asyncio.run(trees(int(n))),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--program"]:
        PROGRAMS[sys.argv[2]](*sys.argv[3:])
    else:
        main("guardian", measure)
