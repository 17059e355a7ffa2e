"""Kill a random party at a random event, 500 times, and in four of five rounds make more trouble at another one: a
debugger holds a worker, a file system hangs, or the program or the guardian runs out of descriptors (`_blows.py`). What
is left, what is lost, who else is hurt, and which stop is late? Then fork storms.

This process is a child subreaper (prctl(2)): whatever survives a group and everybody who should have ended it becomes
its child. Rounds are seeded: `--round SEED` does one again, `--rounds N --first SEED` as many as are asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import dataclasses
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _blows import KINDS, FileSystem, make
from _common import Report, main, on_loop, scratch
from _functions import forks_on, returns_it, takes_and_sends

from aioelastic import Command, Function, Group, GroupFailed, GroupResult, Logs, Restart, Std, Stop, sharing, testing
from aioelastic.errors import SpecError
from aioelastic.events import Drained, Event, Exited, Killed, Restarting, SinkTrouble, Spawned, Stopping
from aioelastic.testing._leak_check import Holdings, cool_down
from aioelastic.testing._misbehaving_workers import daemon, pipe_holder, setsid_escape, stubborn
from aioelastic.testing._unrelated_processes import bystanders

PARTIES = {"worker": testing.worker, "zygote": testing.zygote, "guardian": testing.guardian, "keeper": testing.keeper}
PARTIES["supervisor"] = testing.supervisor
MOMENTS: list[type[Event]] = [Spawned, Spawned, Spawned, Exited, Drained, Stopping, Killed, Restarting]
OTHERS: list[type[Event]] = [Spawned, Spawned, Spawned, Exited, Stopping]
LAST = 10.0  # seconds for the end of what was killed
OPENS = 2.0  # seconds that a group may take to come up
SHORT = 0.5  # ... where a file system keeps it from ending
STRANGERS = ("aioelastic-bench*", "aioelastic-leak-*")  # names of other benchmarks and tests on this machine
HANG = 60.0  # seconds for the end of a group
LATE = 1.0  # seconds that a stop may take beyond its grace and bound
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


@dataclasses.dataclass
class Round:
    """How one group ended.

    Attributes:
        struck: how often the blow was.
        troubled: how often more trouble was made.
        held: leases on shared memory that there were then.
        late: seconds that its stop took longer than it may.
        told: bytes of which it was told that they are lost.
    """

    result: GroupResult | None = None
    struck: int = 0
    troubled: int = 0
    held: int = 0
    late: float = 0.0
    told: int = 0


async def strike(seed: int, home: Path, victim: str, where: Path | None) -> Round:
    """One group, one blow, and perhaps more trouble; in the file system `where`, if that."""
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
    kind = kind_of(seed)
    trouble = make(kind, dice, where)
    if (more := trouble.entry()) is not None:
        entries[dice.randrange(n)] = more
        again = Restart.on_failure(2, dice.choice(["one", "all"]))
    stop = Stop(grace=0.05, bound=SHORT if kind == "file system" else LAST)
    other, mth = dice.choice(OTHERS), dice.randint(1, n)
    entered, done = asyncio.Event(), asyncio.Event()
    got = Round()
    seen: collections.Counter[str] = collections.Counter()
    made = False
    began: list[float] = []

    def listen(event: Event) -> None:
        nonlocal made
        if isinstance(event, SinkTrouble):
            got.told += event.lost
        seen["blow"] += isinstance(event, moment)
        seen["trouble"] += isinstance(event, other)
        if seen["blow"] == nth and not blow.struck:
            with trouble.lifted():
                got.held = len(sharing.leases())
                if got.held and victim == "supervisor":
                    print("shares", flush=True)  # it says no more
                blow(event)
            done.set()
        if seen["trouble"] == mth and not made:
            made = True
            trouble.strike(event)

    async def stop_it(group: Group) -> None:
        """Also while it is being entered, if a start hangs."""
        for what, seconds in ((entered, OPENS), (done, dice.uniform(0.02, 0.2))):
            try:
                await asyncio.wait_for(what.wait(), seconds)
            except TimeoutError:
                pass
        await asyncio.sleep(dice.choice([0, 0, 0.002, 0.02]))
        if dice.random() < 0.5 and kind.startswith("descriptors"):
            trouble.over()
        if blow.struck and victim != "supervisor" and dice.random() < 0.5:
            group.hurry()
        while group.plan is None:  # a busy machine: it is opened, which has no limit
            await asyncio.sleep(0.01)
        began.append(time.monotonic())
        group.begin_stop()

    try:
        group = Group(
            entries, logs=Logs(dir=home, tee=Std.NONE, drain=0.2), stop=stop, restart=again, check=False,
            on_event=listen, name=f"round{seed}",
        )  # fmt: skip
        stopping = asyncio.create_task(stop_it(group))
        try:
            async with asyncio.timeout(HANG), group:
                entered.set()
                got.result = await group.wait()
        except TimeoutError:
            raise RuntimeError(f"round {seed} ({victim}, {kind}) hangs: {list(group)}") from None
        finally:
            stopping.cancel()
        if began:
            got.late = time.monotonic() - began[0] - (stop.grace + stop.bound + LATE)
    except (GroupFailed, SpecError):
        if not kind.startswith("descriptors"):
            raise
    finally:
        trouble.over()
    got.struck, got.troubled = len(blow.struck), trouble.struck
    return got


def kind_of(seed: int) -> str:
    return KINDS[seed // len(PARTIES) % len(KINDS)]


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


def rounds_of(seeds: range, found: collections.Counter[str], files: FileSystem | None) -> None:
    """All of them, one after the other; what is found goes to `found`."""
    spared = children()
    where = None if files is None else files.where
    with scratch() as home:
        strike_here(0, home, "worker", where)  # what is loaded once
        clear(spared)
        empty(home)
        before = Holdings.now()
        for seed in seeds:
            victim = list(PARTIES)[seed % len(PARTIES)]
            if victim == "supervisor":
                argv = [
                    sys.executable,
                    __file__,
                    "--round",
                    str(seed),
                    "--home",
                    str(home),
                    "--where",
                    str(where or ""),
                ]
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
                if done.returncode not in (0, -signal.SIGKILL):
                    raise RuntimeError(done.stderr)
                struck = int(done.returncode != 0)
                found["with shares"] += struck and "shares" in done.stdout
                found[f"with shares: {victim}"] += struck and "shares" in done.stdout
                found["late"] += "late" in done.stdout
            else:
                one = strike_here(seed, home, victim, where)
                struck = one.struck
                found["with shares"] += one.held > 0
                found[f"with shares: {victim}"] += one.held > 0
                found[verdict(one.result)] += 1
                found["late"] += one.late > 0
                if one.late > 0:
                    print(f"round {seed}: {one.late:.2f} s late", file=sys.stderr)
                found[f"trouble: {kind_of(seed)}"] += one.troubled
                found["told bytes"] += one.told
                del one  # an array that a worker returned is ours for as long as we keep it
            found[f"blows: {victim}"] += struck
            if files is not None and kind_of(seed) == "file system":
                files.release()
            if seed % 20 == 19 or seed == seeds[-1]:
                faulthandler.dump_traceback_later(600, exit=True)  # a hang shows where, and ends
                left = clear(spared)
                found["process"] += len(left)
                leaks = Holdings.now().leaks(before, STRANGERS)
                for kind, more in leaks.items():
                    found[kind] += len(more)
                found["lease"] += len(sharing.leases()) + len(sharing.audit())
                if left or leaks:
                    print(f"rounds to {seed}: left {left} {leaks}", file=sys.stderr)
            elif victim == "supervisor":
                time.sleep(0.05)  # its guardian still ends what writes there
            missing = lost(seed, home, complete=victim != "supervisor")
            found["lost bytes"] += missing
            if missing:
                print(f"round {seed}: {missing} bytes lost", file=sys.stderr)
            empty(home)


def empty(home: Path) -> None:
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def strike_here(seed: int, home: Path, victim: str, where: Path | None) -> Round:
    seen: list[Round] = []

    async def work() -> float:
        seen.append(await strike(seed, home, victim, where))
        return 0.0

    on_loop(work, "uvloop" if seed % 2 else "asyncio")
    return seen[0]


def verdict(result: GroupResult | None) -> str:
    if result is None:
        return "refused"
    return "clean" if result.clean else "unproven" if unproven(result) else "not clean"


def unproven(result: GroupResult) -> bool:
    return {one.kind for one in result.remains} == {"unproven"}


async def in_a_storm(seed: int) -> float:
    """A worker that forks 200 times a second is killed in the middle of it. Whether nothing is left, by proof."""
    dice = random.Random(seed)
    how: dict[str, Any] = dice.choice([{"start": "zygote"}, {"start": "spawn"}])
    async with Group(Function(forks_on), logs=Logs(tee=Std.NONE), stop=Stop(grace=0), check=False, **how) as group:
        async for _ in group.lines():
            break
        await asyncio.sleep(dice.uniform(0.1, 0.5))
        group[0].send_signal(signal.SIGKILL)
        result = await group.wait()
    return float(result.clean)


def in_a_storm_here(seed: int) -> bool:
    return bool(on_loop(lambda: in_a_storm(seed)))


def measure(quick: bool, count: int | None = None, first: int = 0) -> Report:
    storms = 1 if quick else 20
    count = count or (25 if quick else 500)
    report = Report("chaos", count)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    found: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    hurt = 0
    done = False
    files: FileSystem | None = None
    try:
        files = FileSystem()
    except OSError as exc:
        report.skipped["a file system that hangs"] = f"cannot be had here: {exc}"
    try:
        with bystanders():
            rounds_of(range(first, first + count), found, files)
            done = True
    except AssertionError as exc:
        if not done:
            raise
        hurt = 1
        report.notes.append(str(exc))
    finally:
        if files is not None:
            files.close()
    report.add("seconds", "s", [time.monotonic() - began])
    struck = {name: found[f"blows: {name}"] for name in PARTIES}
    report.notes.append("blows: " + ", ".join(f"{words} {name}" for name, words in struck.items()))
    report.notes.append(
        f"of the groups whose program lived, {found['clean']} were clean by proof, {found['unproven']} without one "
        f"(their guardian was killed, or something hung), {found['not clean']} were not (what a file system or a "
        f"debugger held was told as left), {found['refused']} could not be opened for want of descriptors"
    )
    troubled = {kind: found[f"trouble: {kind}"] for kind in KINDS[1:] if files is not None or kind != "file system"}
    made = ", ".join(f"{times} {kind}" for kind, times in troubled.items())
    report.notes.append(f"more trouble, in rounds whose program lived: {made}")
    never = [kind for kind, times in {**struck, **troubled}.items() if not times]
    report.add("kinds of blows never struck", "kinds", [float(len(never))])
    if count >= len(PARTIES) * len(KINDS):  # each has had its turn
        report.plain(f"{count:,} random kills: kinds of blows never struck", "0", 0, "kinds of blows never struck")
        report.notes.extend(f"never struck: {kind}" for kind in never)
    report.notes.append(f"bytes that were told as lost: {found['told bytes']}")
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
        words, least = f"{count:,} random kills: rounds in which leases were held at the blow", count * 3 // 10
        report.plain(words, f"≥ {least}", least, "rounds with shares", best="high")
    report.add("bytes lost", "bytes", [float(found["lost bytes"])])
    report.plain(f"{count:,} random kills: bytes of completed log writes lost", "0", 0, "bytes lost")
    report.add("stops that came late", "stops", [float(found["late"])])
    report.plain(f"{count:,} random kills: stops later than grace + bound + 1 s", "0", 0, "stops that came late")
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
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--round", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--where", default="")
    given, rest = parser.parse_known_args()
    if given.round is not None:
        victim = list(PARTIES)[given.round % len(PARTIES)]
        one = asyncio.run(strike(given.round, given.home, victim, Path(given.where) if given.where else None))
        print("late" if one.late > 0 else "in time")
    else:
        sys.argv[1:] = rest
        main("chaos", lambda quick: measure(quick, given.rounds, given.first))
