"""What /proc says: which processes descend from a worker, who holds a pipe, why one does not die.

Reads only; runs in a helper thread. Signals go through pidfds that were checked to be the process that was seen.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..child import _mark
from ..outcome import Process
from ..thread import HelperThread

LOOKS = 3
EXEC_LOOKS = 30  # with the pauses between them, about 40 ms: an execve(2) takes less
PF_KTHREAD = 0x00200000  # linux/sched.h


class Seen(NamedTuple):
    """One process at one moment. `started` (clock ticks since boot) and pid together name it for ever."""

    pid: int
    state: str
    group: int
    session: int
    started: int
    lineage: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """The processes of this machine that started after a given time, findable by whom they belong to."""

    by_owner: dict[str, list[Seen]] = field(default_factory=dict)
    by_session: dict[int, list[Seen]] = field(default_factory=dict)

    def of(self, owner: str, leader: int | None = None, ended: int | None = None) -> list[Seen]:
        """Those that carry `owner` in their lineage, or are in the session of `leader`, without `leader` itself.

        Once the leader is reaped and its session empty, its pid may become the session of strangers: those started
        after `ended` (in ticks, see `ticks_now`).
        """
        found = {one.pid: one for one in self.by_owner.get(owner, ())}
        if leader is not None:
            here = self.by_session.get(leader, ())
            found.update((one.pid, one) for one in here if ended is None or one.started <= ended)
            found.pop(leader, None)
        return list(found.values())


def ticks_now() -> int:
    """The present in the unit and on the clock of the start times of proc(5): clock ticks since boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


class Census:
    """Looks through /proc for a whole group: questions asked while one look is under way share the next."""

    def __init__(self, thread: HelperThread, tag: str) -> None:
        self._thread = thread
        self._tag = tag.encode() + b"="
        # one tick less: a process may start within the tick in which we look at the clock
        self._since = ticks_now() - 1
        self._marks: dict[int, str] = {}
        self._spared = 0
        self._next: asyncio.Future[Snapshot] | None = None
        self._looking = False

    def know(self, mark: int, owner: str) -> None:
        """What carries this mark (`child/_mark.py`) is that owner's, whatever became of its variables."""
        self._marks[mark] = owner

    def spare(self, session: int) -> None:
        """A mark counts for nothing there: a guardian carries that of a worker while it starts it."""
        self._spared = session

    def take(self) -> asyncio.Future[Snapshot]:
        """A snapshot that begins after this call."""
        asked = self._next
        if asked is None:
            asked = self._next = asyncio.get_running_loop().create_future()
            if not self._looking:
                self._look()
        return asked

    def catch(self, found: list[Seen]) -> asyncio.Future[list[Stray]]:
        """Hold those of them that still live; the receiver closes them."""
        return self._thread.submit(lambda: [stray for one in found if (stray := Stray.catch(one)) is not None])

    def look(self, pid: int) -> asyncio.Future[tuple[str, str]]:
        """The state letter of a process and the kernel function in which it sleeps."""
        return self._thread.submit(lambda: (describe(pid).state, wchan(pid)))

    def holders(self, read_ends: list[int]) -> asyncio.Future[dict[int, tuple[int, ...]]]:
        """Who else has these pipes open; see `pipe_holders`."""
        return self._thread.submit(lambda: pipe_holders(read_ends))

    def _look(self) -> None:
        asked, self._next = self._next, None
        self._looking = asked is not None
        if asked is None:
            return

        marks, spared = dict(self._marks), self._spared

        def job() -> None:
            try:
                found = snapshot(self._tag, self._since, marks, spared)
            except OSError:
                found = Snapshot()  # no /proc, no census: nothing is found, and nothing is signalled
            self._thread.tell(self._done, asked, found)

        self._thread.put(job)

    def _done(self, asked: asyncio.Future[Snapshot], found: Snapshot) -> None:
        if not asked.done():
            asked.set_result(found)
        self._look()


def snapshot(tag: bytes, since: int, marks: Mapping[int, str], spared: int) -> Snapshot:
    """Read /proc. Zombies are left out: they hold nothing.

    A process that forks while we read may hide its child behind us and end before we reach it: as long as new pids
    were given meanwhile, look again (a few times: on a busy machine they always are).
    """
    seen: dict[tuple[int, int], Seen] = {}
    for _ in range(LOOKS):
        newest = _newest_pid()
        for pid in _pids():
            one = _see(pid, tag, since, marks, spared)
            if one is not None:
                seen[one.pid, one.started] = one
        if newest == _newest_pid():
            break
    out = Snapshot()
    for one in seen.values():
        out.by_session.setdefault(one.session, []).append(one)
        for item in one.lineage:
            out.by_owner.setdefault(item, []).append(one)
            out.by_owner.setdefault(item.split("/", 1)[0], []).append(one)
    return out


class Stray:
    """A process that is not our child, held by a pidfd, so that a signal can reach no other."""

    __slots__ = ("_pidfd", "pid", "process")

    def __init__(self, pidfd: int, process: Process) -> None:
        self._pidfd = pidfd
        self.pid = process.pid
        self.process = process

    @classmethod
    def catch(cls, seen: Seen) -> Stray | None:
        """None: it is gone already, or this kernel has no pidfd (then it cannot be signalled safely)."""
        try:
            pidfd = os.pidfd_open(seen.pid)
        except OSError:
            return None
        fields = _stat(seen.pid)
        if fields is None or int(fields[19]) != seen.started or fields[0] in "ZX":
            os.close(pidfd)
            return None
        return cls(pidfd, describe(seen.pid))

    def signal(self, signum: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except (ProcessLookupError, PermissionError):
            pass  # gone meanwhile, or changed its user: then it is only reported

    def watch(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[Stray], None]) -> None:
        """Call `on_end` once when it has ended (a pidfd of a process that is no child tells that too)."""

        def ended() -> None:
            loop.remove_reader(self._pidfd)
            on_end(self)

        loop.add_reader(self._pidfd, ended)

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)


def describe(pid: int) -> Process:
    """Its command line and state, as far as they can be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).rstrip(b"\0").split(b"\0")
        command = b" ".join(words).decode(errors="backslashreplace")
    except OSError:
        command = ""
    fields = _stat(pid)
    return Process(pid, command, fields[0] if fields else "?")


def wchan(pid: int) -> str:
    """The kernel function in which a process sleeps (proc(5)), "" when it cannot be read."""
    try:
        with open(f"/proc/{pid}/wchan") as file:
            return file.read().strip("0 \n")
    except OSError:
        return ""


def caught_signals(pid: int) -> set[int]:
    """The signals for which a process has a handler of its own (SigCgt of proc(5))."""
    try:
        with open(f"/proc/{pid}/status") as file:
            mask = next((int(line.split()[1], 16) for line in file if line.startswith("SigCgt:")), 0)
    except OSError:
        mask = 0
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def pipe_holders(read_ends: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """For each read end of a pipe: the pids of other processes that have the pipe open (as far as we may look)."""
    wanted: dict[str, int] = {}
    for fd in read_ends:
        try:
            wanted[os.readlink(f"/proc/self/fd/{fd}")] = fd
        except OSError:
            pass
    found: dict[int, set[int]] = {fd: set() for fd in wanted.values()}
    me = os.getpid()
    for pid in _pids():
        if pid == me:
            continue
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    try:
                        ours = wanted.get(os.readlink(entry.path))
                    except OSError:
                        continue
                    if ours is not None:
                        found[ours].add(pid)
        except OSError:
            continue  # gone, or another user's
    return {fd: tuple(sorted(pids)) for fd, pids in found.items()}


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the third on (state, ppid, pgrp, session, …), None when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)
    # the second field, the name, is in parentheses and may hold anything
    return data[data.rindex(b")") + 2 :].decode().split()


def _newest_pid() -> bytes:
    """The pid that was given last on this machine (proc(5), loadavg)."""
    try:
        with open("/proc/loadavg", "rb") as file:
            return file.read().split()[-1]
    except (OSError, IndexError):
        return b""


def _see(pid: int, tag: bytes, since: int, marks: Mapping[int, str], spared: int) -> Seen | None:
    """One process, if it lives and started since."""
    attempt = 0
    while True:
        fields = _stat(pid)
        if fields is None or int(fields[19]) < since or fields[0] in "ZX":
            return None
        owner = marks.get(_mark.read(pid) or 0) if int(fields[3]) != spared else None
        lineage = _lineage(pid, tag)
        if owner is not None and owner not in lineage:
            lineage += (owner,)
        # in the middle of execve(2) a process has no environment yet: it is read as if it had none; it is stable when
        # env_start and env_end (proc(5)) are there, and are the same before and after
        known = lineage or int(fields[6]) & PF_KTHREAD or not _readable(pid) or attempt == EXEC_LOOKS
        again = fields if known else _stat(pid)
        if again is not None and (known or (again[47:49] == fields[47:49] and again[48] != "0")):
            return Seen(pid, fields[0], int(fields[2]), int(fields[3]), int(fields[19]), lineage)
        attempt += 1
        time.sleep(0.0001 * attempt)


def _readable(pid: int) -> bool:
    return os.access(f"/proc/{pid}/environ", os.R_OK)


def _lineage(pid: int, tag: bytes) -> tuple[str, ...]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            data = file.read()
    except OSError:
        return ()
    for item in data.split(b"\0"):
        if item.startswith(tag):
            return tuple(item[len(tag) :].decode(errors="replace").split(":"))
    return ()
