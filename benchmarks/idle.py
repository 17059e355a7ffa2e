"""1,000 idle workers: how often is the supervising process woken, and how much memory does it use per worker?

Each supervisor is a fresh process that is looked at from outside, through /proc: its threads' context switches (a
thread that never runs has none) and its proportional set size. What a supervisor uses without workers is not counted:
ours and the libraries are looked at before they start them, the daemons a first time with one worker only.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
from _common import Report, available, main, paired, scratch
from _peers import Daemon, children, circusd, supervisord

SLEEP = "/bin/sleep"
BARE = "bare Popen objects"


def say(word: str) -> None:
    print(word, flush=True)


# --- the supervisors: say "base", start when told to, say "up", be idle until stdin ends, stop all ---


async def until_told() -> None:
    """One byte, or the end, of stdin; asleep until then."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_reader(0, told.set)
    await told.wait()
    loop.remove_reader(0)
    os.read(0, 1)


async def ours(n: int) -> None:
    from aioelastic import Command, Group, Logs, Std, Stop

    settings: dict[str, Any] = {"logs": Logs(tee=Std.NONE), "stop": Stop(grace=5), "check": False}
    async with Group(Command(SLEEP, "0"), **settings) as first:  # what is loaded once is not per worker
        await first.wait()
    say("base")
    await until_told()
    async with Group(Command(SLEEP, "6000"), n=n, **settings):
        await asyncio.sleep(0)
        say("up")
        await until_told()


async def with_asyncio(n: int) -> None:
    async def start(seconds: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            SLEEP, seconds, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    await (await start("0")).communicate()
    say("base")
    await until_told()
    started = [await start("6000") for _ in range(n)]
    waiting = [asyncio.create_task(one.communicate()) for one in started]
    await asyncio.sleep(0)
    say("up")
    await until_told()
    for one in started:
        one.terminate()
    await asyncio.gather(*waiting)


def popen(n: int) -> None:
    """Nothing but the objects: it would not even notice an exit."""

    def start(seconds: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([SLEEP, seconds], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    start("0").communicate()
    say("base")
    os.read(0, 1)
    started = [start("6000") for _ in range(n)]
    say("up")
    os.read(0, 1)
    for one in started:
        one.terminate()
    for one in started:
        one.communicate()


def torch_elastic(n: int) -> None:
    import logging
    import tempfile
    import threading

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    def start(count: int, seconds: str) -> Any:
        args = dict.fromkeys(range(count), (seconds,))
        envs: dict[int, dict[str, str]] = {rank: {} for rank in range(count)}
        return start_processes("worker", SLEEP, args, envs, DefaultLogsSpecs(log_dir=tempfile.mkdtemp(dir=home)))

    with tempfile.TemporaryDirectory() as home:
        start(1, "0").wait(period=0.01)
        say("base")
        os.read(0, 1)
        context = start(n, "6000")
        waiter = threading.Thread(target=context.wait, kwargs={"period": 0.1})  # as its agent, and so torchrun
        waiter.start()
        say("up")
        os.read(0, 1)
        context.close()
        waiter.join()


SUPERVISORS = {
    "ours-asyncio": lambda n: asyncio.run(ours(n)),
    "ours-uvloop": lambda n: _on_uvloop(ours(n)),
    "asyncio": lambda n: asyncio.run(with_asyncio(n)),
    "popen": popen,
    "torch": torch_elastic,
}


def _on_uvloop(work: Coroutine[Any, Any, None]) -> None:
    import uvloop

    uvloop.run(work)


# --- looking at one of them ---


def switches(pid: int) -> int:
    """How often the threads of a process have given up the processor to wait, so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total


def memory(pid: int) -> int:
    """Proportional set size in bytes: private memory, and its share of what others map too."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("smaps_rollup has no Pss")


def supervisors(pid: int) -> list[int]:
    """The supervisor, and its guardian and keeper if it has them: their memory and wake-ups are its own."""
    helpers = [one.pid for one in psutil.Process(pid).children(recursive=True) if one.name().startswith("aio-")]
    return [pid, *helpers]


def look(which: str, n: int, seconds: float, found: dict[str, list[float]]) -> float:
    """Wake-ups in `seconds` of idleness; memory per worker goes to `found`."""
    argv = [sys.executable, __file__, "--supervise", which, str(n)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "base\n"
        before = memory(process.pid)  # before the first group: without a guardian, which counts as the workers' cost
        process.stdin.write(".")
        assert process.stdout.readline() == "up\n"
        time.sleep(1.0)  # what was put off by the start may still run now
        family = supervisors(process.pid)
        assert len([one for pid in family for one in children(pid) if one not in family]) == n
        found.setdefault(which, []).append((sum(map(memory, family)) - before) / n / 1024)
        woken = sum(map(switches, family))
        time.sleep(seconds)
        woken = sum(map(switches, family)) - woken
        process.stdin.close()
        assert process.wait() == 0
    return float(woken)


def look_at_daemon(start: Daemon, home: Path, n: int, seconds: float, memories: list[float]) -> float:
    """The same of a daemon, whose workers are in its configuration."""
    used = {}
    for count in (1, n):
        with start(home, [SLEEP, "6000"], count) as running:
            time.sleep(1.0)
            assert len(children(running.pid)) == count
            used[count] = memory(running.pid)
            if count == n:
                before = switches(running.pid)
                time.sleep(seconds)
                woken = switches(running.pid) - before
    memories.append((used[n] - used[1]) / (n - 1) / 1024)
    return float(woken)


def measure(quick: bool) -> Report:
    n, seconds, rounds = (20, 0.5, 1) if quick else (1000, 10.0, 2)
    report = Report("idle", rounds)
    found: dict[str, list[float]] = {}
    names = {
        "ours (asyncio)": "ours-asyncio",
        "ours (uvloop)": "ours-uvloop",
        "asyncio": "asyncio",
        BARE: "popen",
    }
    if available(report, "torch.distributed.elastic.multiprocessing", "torch"):
        names["torch elastic"] = "torch"
    cases: dict[str, Callable[[], float]] = {
        name: lambda which=which: look(which, n, seconds, found) for name, which in names.items()
    }
    daemons: dict[str, Daemon] = {}
    if available(report, "supervisor.supervisord", "supervisor", apart=True):
        daemons["supervisord"] = supervisord
    if available(report, "circus.circusd", "circus", apart=True):
        daemons["circusd"] = circusd
    with scratch() as home:
        for name, start in daemons.items():
            names[name], found[name] = name, []
            cases[name] = lambda start=start, used=found[name]: look_at_daemon(start, home, n, seconds, used)
        for name, values in paired(cases, rounds, warm=0).items():
            report.add(f"{name}: wake-ups", "wake-ups", values)
            report.add(f"{name}: memory per worker", "KiB", found[names[name]])
    if daemons:
        report.notes.append(
            "memory per worker of a daemon: what it uses beyond what it uses with one worker; both read, and keep "
            "nothing of, the workers' output"
        )
    for file, what, title in (
        ("idle-wake-ups", ": wake-ups", f"Wake-ups of the supervisor of {n:,} idle workers in {seconds:g} s"),
        ("idle-memory", ": memory per worker", f"Memory of the supervisor per worker, of {n:,} idle ones"),
    ):
        report.chart(file, title, [name + what for name in names], strip=what, bounds=[BARE])
    if "torch elastic" in names:
        report.notes.append(
            "torch elastic's workers write to the standard streams or files themselves: it has no pipes, and keeps "
            "nothing for their output; it looks each 0.1 s, as its agent does"
        )
    for loop in ("asyncio", "uvloop"):
        work = f"{n:,} idle workers, {seconds:g} s, on {loop}"
        peers = [name for name in names if "ours" not in name and name != BARE]
        for what, goal, most in (
            ("wake-ups", "0 wake-ups of the supervisor", 0),
            ("memory per worker", "≤ 40 KiB of its memory per worker", 40),
        ):
            report.plain(
                work, goal, most, f"ours ({loop}): {what}", report.strongest(f"{one}: {what}" for one in peers)
            )
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--supervise"]:
        SUPERVISORS[sys.argv[2]](int(sys.argv[3]))
    else:
        main("idle", measure)
