"""Executors whose tasks fork, exit, die, close descriptors, raise what others do not, and return what cannot travel,
while a worker is killed now and then: what is left, which task is never answered, and which has a wrong answer?

This process is a child subreaper (prctl(2)): whatever survives becomes its child. Rounds are seeded: `--rounds N
--first SEED` does as many as are asked for.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import os
import random
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, CancelledError, Future, wait
from typing import Any, Literal

from _common import Report, main
from _odd_tasks import FAILS, KINDS, VALUE
from chaos import STRANGERS, SUBREAPER, children, clear

from aioelastic import Logs, Std, WorkerExecutor, WorkerFailed
from aioelastic.testing._leak_check import Holdings

TASKS = 16  # of a round
HANG = 60.0  # seconds for all of them
QUIET = Logs(tee=Std.NONE)
# the last takes ten times as long
STARTS: tuple[Literal["zygote", "fork", "spawn"], ...] = ("zygote", "zygote", "fork", "fork", "spawn")


def one_round(seed: int, found: collections.Counter[str]) -> None:
    """Some tasks of any kind; a worker may be killed, and a task cancelled, in the middle."""
    dice = random.Random(seed)
    kills, cancels = dice.random() < 0.5, dice.random() < 0.3
    start = STARTS[seed % len(STARTS)]
    chosen = [(dice.choice(KINDS), number) for number in range(TASKS)]
    with WorkerExecutor(2, start=start, tasks_per_worker=dice.choice([None, 3]), logs=QUIET) as executor:
        futures: list[Future[Any]] = []
        for number, (task, given) in enumerate(chosen):
            futures.append(executor.submit(task, given))
            found[task.__name__] += 1
            if cancels and number == TASKS // 2:
                found["cancelled"] += futures[dice.randrange(len(futures))].cancel()
        if kills:
            wait(futures[: dice.randrange(TASKS)], HANG)
            for pid in executor.pids[:1]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it was quicker
                found["killed"] += 1
        unanswered = wait(futures, HANG).not_done
        found["never answered"] += len(unanswered)
        for (task, given), future in zip(chosen, futures, strict=True):
            if future in unanswered:
                print(f"round {seed}: {task.__name__}({given}) by {start} is not answered", file=sys.stderr)
            elif wrong := judged(task, given, future, kills):
                found["wrong"] += 1
                print(f"round {seed}: {task.__name__}({given}) by {start}: {wrong}", file=sys.stderr)
        if unanswered:
            for pid in executor.pids:
                os.kill(pid, signal.SIGKILL)
            executor.shutdown(wait=False, cancel_futures=True)
    found[start] += 1


def judged(task: Any, given: int, future: Future[Any], kills: bool) -> str:
    """What is wrong with what came of it; empty: nothing."""
    try:
        problem = future.exception(0)
    except CancelledError:
        return ""
    if problem is not None:
        if task in FAILS or (kills and isinstance(problem, WorkerFailed | BrokenExecutor)):
            return ""
        return f"{type(problem).__name__}: {problem}"[:300]
    if task in FAILS:
        # the descriptors that it closed may have been of nobody
        return "" if task.__name__ == "closes_descriptors" and future.result() == 2 * given else "it did not fail"
    return "" if future.result() == VALUE[task](given) else f"{future.result()!r}"[:100]


def measure(quick: bool, count: int | None = None, first: int = 0) -> Report:
    count = count or (10 if quick else 500)
    report = Report("chaos_tasks", count)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    found: collections.Counter[str] = collections.Counter()
    spared = children()
    one_round(0, collections.Counter())  # what is loaded once
    clear(spared)
    before = Holdings.now()
    began = time.monotonic()
    for seed in range(first, first + count):
        faulthandler.dump_traceback_later(5 * HANG, exit=True)  # a hang shows where, and ends
        one_round(seed, found)
        if seed % 50 == 49 or seed == first + count - 1:
            left = clear(spared)
            leaks = Holdings.now().leaks(before, STRANGERS)
            found["left"] += len(left) + sum(map(len, leaks.values()))
            if left or leaks:
                print(f"rounds to {seed}: left {left} {leaks}", file=sys.stderr)
    faulthandler.cancel_dump_traceback_later()
    report.add("seconds", "s", [time.monotonic() - began])
    report.notes.append(f"workers that were killed besides: {found['killed']}; tasks that were cancelled: "
                        f"{found['cancelled']}; rounds by zygote, fork, spawn: "
                        f"{found['zygote']}, {found['fork']}, {found['spawn']}")  # fmt: skip
    never = [one for one in ("killed", "cancelled", *STARTS, *(task.__name__ for task in KINDS)) if not found[one]]
    report.add("kinds of blows never struck", "kinds", [float(len(never))])
    if count >= 50:  # by then each has had its turn
        report.plain(f"{count:,} rounds: kinds of blows never struck", "0", 0, "kinds of blows never struck")
        report.notes.extend(f"never struck: {one}" for one in never)
    for key, words in (("left", "left"), ("never answered", "tasks never answered"), ("wrong", "wrong answers")):
        report.add(words, words, [float(found[key])])
        report.plain(f"{count:,} rounds of {TASKS} odd tasks: {words}", "0", 0, words)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--first", type=int, default=0)
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    main("chaos_tasks", lambda quick: measure(quick, given.rounds, given.first))
