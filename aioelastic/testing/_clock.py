"""An event loop whose time passes as usual, and jumps to the next timer when nobody does anything."""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..planning import TAG
from ._process_tree import descendants, read_stat

PAUSE = 0.0005  # seconds of real waiting between two looks, at first
LONGEST = 0.02  # ... and at most


class VirtualLoop(asyncio.SelectorEventLoop):
    """`loop.time()` is the monotonic clock plus the jumps that were made.

    When is a jump safe? An event comes through a file descriptor, and only somebody who runs can make one ready. So
    before each timer we look at all threads of ours and of every process that descends from us (or is a part of a
    group, wherever it has gone): if all of them sleep in the kernel, and none has run since the look before, and no
    descriptor is ready, then nothing will happen until a timer ends, and that may as well be now. As long as somebody
    runs, time passes as it does for everybody; so a timer is never later than on any other loop.

    Limits: timers of *others* are not known. A worker in `sleep 1` sleeps for a real second, and looks like one that
    sleeps for ever: timers of this loop come first. So do answers from processes that do not descend from us, and
    from the network. What is computed from `time.monotonic()`, such as durations in results, is real.

    Example::

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(supervise(stubborn(), stop=Stop(grace=30), timeout=1))
    """

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    @property
    def jumped(self) -> float:
        """Seconds that were skipped so far."""
        return self._clock.jumped

    def time(self) -> float:
        """Seconds, monotonic."""
        return super().time() + self._clock.jumped


class _Selector(selectors.DefaultSelector):
    """Waits as its elder does, but no longer than somebody runs."""

    def __init__(self) -> None:
        super().__init__()
        self.jumped = 0.0
        self._quiet = _Quiet()

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        deadline = time.monotonic() + timeout
        pause = PAUSE
        before: object = None
        while (left := deadline - time.monotonic()) > 0:
            if events := super().select(min(pause, left)):
                return events
            now = self._quiet.look()
            if now is not None and now == before:
                if events := super().select(0):
                    return events
                self.jumped += max(deadline - time.monotonic(), 0.0)
                return []
            before = now
            pause = min(pause * 2, LONGEST)
        return super().select(0)


class _Quiet:
    """Who is awake, of us and ours."""

    def __init__(self) -> None:
        self._since = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") - 1
        self._strangers: dict[tuple[str, str], bool] = {}  # pid and start → whether it is of a group

    def look(self) -> Mapping[str, str] | None:
        """thread → what the scheduler has counted of it; None if one of them runs."""
        family = descendants()
        pids = [str(os.getpid()), *map(str, family), *self._strays(family)]
        found: dict[str, str] = {}
        for pid in pids:
            try:
                threads = os.listdir(f"/proc/{pid}/task")
            except OSError:
                return None  # it has just gone: that makes an event
            for thread in threads:
                path = f"{pid}/task/{thread}"
                if int(thread) == threading.get_native_id():
                    continue
                stat = read_stat(path)
                if stat is None or stat[1] not in "STtZX":
                    return None  # R: it runs. D: it waits for a disk, or for its child's exec
                found[path] = f"{stat[1]} {stat[20]} {_counted(path)}"
        return found

    def _strays(self, family: Mapping[int, object]) -> list[str]:
        """Parts of a group that descend from us no more: those that started since, and carry its mark."""
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) in family or int(name) == os.getpid():
                continue
            stat = read_stat(name)
            if stat is None or float(stat[20]) < self._since or stat[1] in "ZX":
                continue
            who = (name, stat[20])
            if not self._strangers.get(who):  # in the middle of an execve(2) the environment cannot be read
                self._strangers[who] = _has_mark(name)
            if self._strangers[who]:
                found.append(name)
        return found


def _has_mark(pid: str) -> bool:
    # of any group, if we have no mark of our own: then we wait for more than need be
    mark = f"{TAG}={os.environ.get(TAG, '')}".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read()
    except OSError:
        return False


def _counted(path: str) -> str:
    """Time on a CPU and turns there (Documentation/scheduler/sched-stats); where there are none, context switches."""
    try:
        with open(f"/proc/{path}/schedstat", encoding="utf-8") as file:
            return file.read()
    except OSError:
        pass
    try:
        with open(f"/proc/{path}/status", encoding="utf-8", errors="replace") as file:
            return "".join(line for line in file if "ctxt" in line)
    except OSError:
        return ""
