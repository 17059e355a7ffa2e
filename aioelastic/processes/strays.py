"""Left-over processes that are not our children, held so that a signal can reach no other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import NamedTuple

from ..child.kernel.child_processes import send_signal
from ..model.leftovers import Process
from ..system import forked_copies
from ..system.descriptors import shut
from .proc_files import describe, stat


class Seen(NamedTuple):
    """One process at one moment. `started` (clock ticks since boot) and pid together name it for ever."""

    pid: int
    state: str
    group: int
    session: int
    started: int
    lineage: tuple[str, ...]
    mark: int = 0


# pids of this program's workers that live, of all its groups, executors and threads, and of its zygotes: no look,
# however mistaken, makes one of them, or what is in its session, a left-over that is signalled
_protected: set[int] = set()


def protect(pid: int | None) -> None:
    """That one lives, and starts what is in its session."""
    if pid is not None:
        _protected.add(pid)


def unprotect(pid: int | None) -> None:
    """It has ended, or nobody waits for its end any more."""
    _protected.discard(pid or 0)


# what tells the sessions of guardians, which start workers
sessions_of_guardians: list[Callable[[], set[int]]] = []


def _is_protected(pid: int, session: int) -> bool:
    return not _protected.isdisjoint((pid, session)) or any(session in tell() for tell in sessions_of_guardians)


class Stray:
    """A process that is not our child, held by a pidfd, so that a signal can reach no other."""

    __slots__ = ("__weakref__", "_pidfd", "lineage", "pid", "process")

    def __init__(self, pidfd: int, process: Process, lineage: tuple[str, ...]) -> None:
        self._pidfd = pidfd
        self.pid = process.pid
        self.process = process
        self.lineage = lineage
        forked_copies.register(self)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fds, self._pidfd = [self._pidfd], -1
        return [fd for fd in fds if fd >= 0]

    @classmethod
    def catch(cls, seen: Seen) -> Stray | None:
        """None: it is gone, or no left-over, or this kernel has no pidfd (then it cannot be signalled safely)."""
        try:
            pidfd = os.pidfd_open(seen.pid)
        except OSError:
            return None
        fields = stat(seen.pid)
        if (
            fields is None
            or int(fields[19]) != seen.started
            or fields[0] in "ZX"
            or _is_protected(seen.pid, int(fields[3]))
        ):
            shut(pidfd)
            return None
        return cls(pidfd, describe(seen.pid), seen.lineage)

    def signal(self, signum: int) -> None:
        if self.pid in _protected or self._pidfd < 0:
            return
        try:
            send_signal(self._pidfd, self.pid, signum)
        except (ProcessLookupError, PermissionError):
            pass  # gone meanwhile, or changed its user: then it is only reported

    def watch(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[Stray], None]) -> None:
        """Call `on_end` once when it has ended (a pidfd of a process that is no child tells that too)."""

        def ended() -> None:
            loop.remove_reader(self._pidfd)
            on_end(self)

        loop.add_reader(self._pidfd, ended)

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pidfd >= 0:  # else this is a forked copy
            loop.remove_reader(self._pidfd)
            shut(*self.disown())
