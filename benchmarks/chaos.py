"""Kill a random party at a random event, 1,000 times: what is left, what is lost, who else is hurt? Then fork storms.

This process is a child subreaper (prctl(2)): whatever survives a group and everybody who should have ended it becomes
its child. Rounds are seeded: `--round SEED` does one again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from _common import Report, main, on_loop, scratch
from _functions import forks_on, returns_it, takes_and_sends

from aioelastic import Command, Function, Group, GroupResult, Logs, Restart, Std, Stop, sharing, testing
from aioelastic.events import Drained, Event, Exited, Killed, Restarting, Spawned, Stopping
from aioelastic.testing import Holdings, bystanders, cool_down, daemon, pipe_holder, setsid_escape, stubborn

PARTIES = {"worker": testing.worker, "zygote": testing.zygote, "guardian": testing.guardian, "keeper": testing.keeper}
PARTIES["supervisor"] = testing.supervisor
MOMENTS: list[type[Event]] = [Spawned, Spawned, Spawned, Exited, Drained, Stopping, Killed, Restarting]
LAST = 10.0  # seconds for the end of what was killed
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
# writes numbered lines, and after each says in a file of its own how many it has written
WRITER = (
    "import os, sys, time\n"
    "who = os.environ['RANK'] + '-' + os.environ['AIOELASTIC_ATTEMPT']\n"
    "said = os.open(sys.argv[1] + who, os.O_CREAT | os.O_RDWR)\n"
    "for i in range(10**6):\n"
    "    os.write(1, b'line %d\\n' % i)\n"
    "    os.pwrite(said, b'%d' % (i + 1), 0)\n"
    "    if i % 20 == 0: time.sleep(0.001)\n"
)


# --- one round ---


async def strike(seed: int, home: Path, victim: str) -> tuple[GroupResult, int, int]:
    """One group, and one blow. Returns how it ended, how often the blow was struck, and how many leases on shared
    memory there were then."""
    dice = random.Random(seed)
    n = dice.randint(2, 5)
    writer = Command(sys.executable, "-S", "-E", "-c", WRITER, f"{home}/said-{seed}-")
    menu: list[Command | Function] = [writer, writer, setsid_escape("wait"), daemon("sleep 1000"), stubborn()]
    menu += [pipe_holder("wait"), Command("/bin/sh", "-c", "exit 3")]
    array = sharing.empty(dice.choice([1_000, 300_000]), "u1")
    queue = sharing.Queue(dice.choice([1, 4]))
    takes = Function(takes_and_sends, array, queue)
    functions = [takes, takes, Function(returns_it, array)]
    entries = [dice.choice(functions if victim == "zygote" or dice.random() < 0.3 else menu) for _ in range(n)]
    blow = testing.kill(PARTIES[victim])
    moment, nth = dice.choice(MOMENTS), dice.randint(1, n)
    again = Restart.on_failure(2, dice.choice(["one", "all"])) if dice.random() < 0.3 else Restart.never()
    done = asyncio.Event()
    seen = held = 0

    def listen(event: Event) -> None:
        nonlocal seen, held
        seen += isinstance(event, moment)
        if seen == nth and not blow.struck:
            held = len(sharing.leases())
            if held and victim == "supervisor":
                print("shares", flush=True)  # it says no more
            blow(event)
            done.set()

    group = Group(
        entries, logs=Logs(dir=home, tee=Std.NONE, drain=0.2), stop=Stop(grace=0.05, bound=LAST), restart=again,
        check=False, on_event=listen, name=f"round{seed}",
    )  # fmt: skip
    async with group:
        try:
            await asyncio.wait_for(done.wait(), dice.uniform(0.02, 0.2))
        except TimeoutError:
            pass
        await asyncio.sleep(dice.choice([0, 0, 0.002, 0.02]))
        if blow.struck and victim != "supervisor" and dice.random() < 0.5:
            group.hurry()
        group.begin_stop()
        result = await group.wait()
    return result, len(blow.struck), held


def lost(seed: int, home: Path, complete: bool) -> int:
    """Bytes of lines that a worker had written, and that are not in its log; of any, that are not as they were."""
    missing = 0
    for log in home.glob(f"*round{seed}-*/attempt_*/*/stdout.log"):
        attempt, rank = log.parent.parent.name.removeprefix("attempt_"), log.parent.name
        said = home / f"said-{seed}-{rank}-{attempt}"
        text = log.read_bytes()
        if not said.exists() or not (text or said.stat().st_size):
            continue  # no writer, or it never came so far
        count = int(said.read_bytes() or b"0") if complete else 0
        expected = b"".join(b"line %d\n" % i for i in range(max(count, text.count(b"\n") + 1)))
        if not expected.startswith(text):
            missing += len(text)  # torn
        missing += max(0, len(b"".join(b"line %d\n" % i for i in range(count))) - len(text))
    return missing


def clear(spared: set[int]) -> list[str]:
    """End what is kept warm and wait for what is on its way out; returns who is left all the same."""
    cool_down()
    until = time.monotonic() + LAST
    while left := children() - spared:
        for pid in left:
            os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > until:
            return [Path(f"/proc/{one}/comm").read_text().strip() for one in left]
        time.sleep(0.002)
    return []


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def rounds_of(count: int, found: collections.Counter[str]) -> None:
    """All of them, one after the other; what is found goes to `found`."""
    spared = children()
    with scratch() as home:
        strike_here(0, home, "worker")  # what is loaded once
        clear(spared)
        before = Holdings.now()
        for seed in range(count):
            victim = list(PARTIES)[seed % len(PARTIES)]
            if victim == "supervisor":
                argv = [sys.executable, __file__, "--round", str(seed), "--home", str(home)]
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
                if done.returncode not in (0, -signal.SIGKILL):
                    raise RuntimeError(done.stderr)
                struck = int(done.returncode != 0)
                found["with shares"] += struck and "shares" in done.stdout
                found[f"with shares: {victim}"] += struck and "shares" in done.stdout
            else:
                result, struck, held = strike_here(seed, home, victim)
                found["with shares"] += held > 0
                found[f"with shares: {victim}"] += held > 0
                found["clean" if result.clean else "unproven" if unproven(result) else "not clean"] += 1
                del result  # an array that a worker returned is ours for as long as we keep it
            found[f"blows: {victim}"] += struck
            if seed % 20 == 19 or seed == count - 1:
                found["process"] += len(clear(spared))
                for kind, left in Holdings.now().leaks(before).items():
                    found[kind] += len(left)
                found["lease"] += len(sharing.leases()) + len(sharing.audit())
            elif victim == "supervisor":
                time.sleep(0.05)  # its guardian still ends what writes there
            found["lost bytes"] += lost(seed, home, complete=victim != "supervisor")
            for path in home.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def strike_here(seed: int, home: Path, victim: str) -> tuple[GroupResult, int, int]:
    seen: list[tuple[GroupResult, int, int]] = []

    async def work() -> float:
        seen.append(await strike(seed, home, victim))
        return 0.0

    on_loop(work, "uvloop" if seed % 2 else "asyncio")
    return seen[0]


def unproven(result: GroupResult) -> bool:
    return {one.kind for one in result.remains} == {"unproven"}


async def in_a_storm(seed: int) -> float:
    """A worker that forks 200 times a second is killed in the middle of it. Whether nothing is left, by proof."""
    dice = random.Random(seed)
    how = dice.choice([{"start": "zygote"}, {"start": "spawn"}])
    async with Group(Function(forks_on), logs=Logs(tee=Std.NONE), stop=Stop(grace=0), check=False, **how) as group:
        async for _ in group.lines():
            break
        await asyncio.sleep(dice.uniform(0.1, 0.5))
        group[0].send_signal(signal.SIGKILL)
        result = await group.wait()
    return float(result.clean)


def in_a_storm_here(seed: int) -> bool:
    return bool(on_loop(lambda: in_a_storm(seed)))


def measure(quick: bool) -> Report:
    count, storms = (20, 1) if quick else (1000, 20)
    report = Report("chaos", count)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    found: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    hurt = 0
    done = False
    try:
        with bystanders():
            rounds_of(count, found)
            done = True
    except AssertionError as exc:
        if not done:
            raise
        hurt = 1
        report.notes.append(str(exc))
    report.add("seconds", "s", [time.monotonic() - began])
    struck = {name: found[f"blows: {name}"] for name in PARTIES}
    report.notes.append("blows: " + ", ".join(f"{words} {name}" for name, words in struck.items()))
    report.notes.append(
        f"of the groups whose program lived, {found['clean']} were clean by proof, {found['unproven']} without one "
        f"(their guardian was killed), {found['not clean']} were not"
    )
    kinds = {"processes": "process", "zombies": "zombie", "strays": "stray", "descriptors": "file descriptor"}
    kinds |= {"names of shared memory": "shared memory", "maps of memfds": "memfd map", "threads": "thread"}
    kinds |= {"leases on shared memory": "lease"}
    for words, kind in kinds.items():
        report.add(words, words, [float(found[kind])])
        report.plain(f"{count:,} random kills: {words} left", "0", 0, words)
    shares = ", ".join(f"{found[f'with shares: {name}']} {name}" for name in PARTIES)
    report.notes.append(f"blows while leases on shared memory were held: {shares}")
    report.add("rounds with shares", "rounds", [float(found["with shares"])])
    if not quick:
        words = f"{count:,} random kills: rounds in which leases were held at the blow"
        report.plain(words, "≥ 300", 300, "rounds with shares", best="high")
    report.add("bytes lost", "bytes", [float(found["lost bytes"])])
    report.plain(f"{count:,} random kills: bytes of completed log writes lost", "0", 0, "bytes lost")
    report.add("bystanders hurt", "bystanders", [float(hurt)])
    report.plain(f"{count:,} random kills: bystanders hurt", "0", 0, "bystanders hurt")
    proven = sum(in_a_storm_here(seed) for seed in range(storms))
    report.add("storms survived", f"of {storms} proven empty", [float(proven)])
    report.plain(
        f"{storms} workers that fork 200/s are killed: trees empty, proven", f"{storms} of {storms}", storms,
        "storms survived", best="high",
    )  # fmt: skip
    return report


if __name__ == "__main__":
    if "--round" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--round", type=int)
        parser.add_argument("--home", type=Path)
        given = parser.parse_args()
        victim = list(PARTIES)[given.round % len(PARTIES)]
        asyncio.run(strike(given.round, given.home, victim))
    else:
        main("chaos", measure)
