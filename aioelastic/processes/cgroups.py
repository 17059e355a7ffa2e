"""Control groups (cgroups(7), version 2): one for each worker that asked for one, below one of the group's own.

What is in one stays in one, whatever it does: all of it is killed at the same moment, and the kernel says when none is
left. The group's own directory is locked (flock(2)) while this program lives: others are left-overs, to be removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path

from ..child.kernel.bounded_reads import lines, slurp
from ..model.errors import SpecError
from ..model.leftovers import Process, Remains
from ..system import forked_copies, shared_memory_names
from ..system.deadlines import Deadline
from ..system.descriptors import shut
from ..system.permissions import may
from .proc_files import describe

_NAME = "aioelastic-"
LOCKED = 5.0  # seconds for whoever makes or removes one in the same place
_REST = 0.01  # between two looks whether that is over
PROCS = 32 << 20  # bytes of a list of processes: there are 4 million at most
_HINT = "run as root, or where systemd was told Delegate=yes (systemd-run --user --scope -p Delegate=yes ...)"


class ControlGroups:
    """Those of one group, below one directory.

    Args:
        below: the control group to make it in; None: that of this process.

    Raises:
        SpecError: none can be made there; nothing was.
    """

    def __init__(self, below: str | None, run_id: str) -> None:
        try:
            parent = Path(below) if below is not None else own()
            if not (parent / "cgroup.procs").exists():
                raise OSError("it is no control group of version 2")
            with _one_at_a_time(parent):
                for old in parent.glob(f"{_NAME}*"):
                    _remove_if_left(old)
                if not may(parent / "cgroup.procs", os.W_OK):
                    raise OSError("it may not be written by this user")
                self.path = parent / f"{_NAME}{run_id}"
                self.path.mkdir()
                self._lock = shared_memory_names.locked(self.path)
            if not (self.path / "cgroup.kill").exists():
                self.path.rmdir()
                shut(self._lock)
                raise OSError("this kernel is older than Linux 5.14")
        except OSError as exc:
            problem = f"cannot be had: {exc.strerror or exc}"
            raise SpecError("Placement.cgroup", below or True, problem, _HINT) from None
        self._made: list[tuple[int, Path]] = []
        self._lost = False
        forked_copies.register(self)

    def make(self, rank: int, attempt: int) -> Path:
        """One for a worker. Raises `SpecError`: the system has no more of them."""
        path = self.path / f"{rank}-{attempt}"
        try:
            path.mkdir(exist_ok=True)  # it may have been made for that rank's plan, and not be used
        except OSError as exc:
            problem = f"of rank {rank} cannot be made in {self.path.parent}: {exc.strerror}"
            raise SpecError("Placement.cgroup", True, problem, "look at cgroup.max.descendants there") from None
        if (rank, path) not in self._made:
            self._made.append((rank, path))
        return path

    def remove(self, path: Path) -> None:
        """One of them, whose worker is over, if nothing runs in it."""
        for rank, one in self._made:
            if one == path and _rmdir(one):
                self._made.remove((rank, one))
                return

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        if self._lock < 0:
            return []
        self._lost = True
        return [self._lock]

    def left(self) -> list[Remains]:
        """What still runs in them."""
        found = []
        for rank, path in self._made:
            for one in members(path):
                words = f"process {one.pid} ({one.command or '?'}) still runs in its control group"
                found.append(Remains("process", words, rank, one.pid))
        return found

    def close(self) -> None:
        """Remove them, but for those in which something runs."""
        if self._lost:
            return
        for _, path in self._made:
            _rmdir(path)
        _rmdir(self.path)
        shut(self._lock)
        self._lock = -1


def own() -> Path:
    """That of this process. Raises `OSError` where there are none."""
    with open("/proc/self/cgroup", "rb") as file:  # names may hold any bytes but the end of a line
        mine = next((line[3:].rstrip(b"\n") for line in file if line.startswith(b"0::")), None)
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            words, _, kind = line.partition(b" - ")
            if mine is not None and kind.startswith(b"cgroup2 "):
                root, mounted = map(_unescaped, words.split()[3:5])
                # in a container only a part of the hierarchy may be mounted
                inside = mine if root == b"/" else mine.removeprefix(root)
                return Path(os.fsdecode(mounted)) / os.fsdecode(inside.lstrip(b"/"))
    raise OSError("control groups of version 2 are not mounted here")


def _unescaped(name: bytes) -> bytes:
    """As proc(5) writes it: white space and backslashes by their numbers."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), name)


def members(path: Path) -> list[Process]:
    """The processes in it, but for zombies."""
    try:
        pids = [int(one) for one in lines(str(path / "cgroup.procs"), PROCS)]
    except OSError:
        return []  # removed: it was empty
    return [one for one in map(describe, pids) if one.state not in "ZX?"]


def rank_of(pid: int, run_id: str) -> int | None:
    """Whose control group a process of that group is in; None: in none of ours."""
    # names of control groups may hold any bytes but the end of a line
    ours = rf"^0::(?:/.*)?/{_NAME}{re.escape(run_id)}/(\d{{1,9}})-\d+(?:/|$)"
    found = re.search(os.fsencode(ours), slurp(f"/proc/{pid}/cgroup", 65_536), re.MULTILINE)
    return None if found is None else int(found[1])


def is_populated(path: Path) -> bool:
    """Whether a process is left in it."""
    return b"populated 1" in slurp(str(path / "cgroup.events"))


def kill(path: Path) -> None:
    """SIGKILL to all that is in it, at one moment."""
    try:
        with open(path / "cgroup.kill", "wb") as file:
            file.write(b"1")
    except OSError:
        pass  # removed: it was empty


async def end(path: Path, deadline: Deadline, bound: float) -> bool:
    """Kill all that is in it, and wait until nothing is. False: something is after `bound` seconds."""
    loop = asyncio.get_running_loop()
    if not is_populated(path):
        return True
    try:
        fd = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    changes = select.epoll()
    try:
        changes.register(fd, select.EPOLLPRI)  # what changed since it was read last: never asked for in vain
        loop.add_reader(changes.fileno(), deadline.notice)
        kill(path)
        return await deadline.until(
            lambda: b"populated 1" not in os.pread(fd, 4096, 0), bound, grace=False, late=deadline.SWEPT
        )
    finally:
        loop.remove_reader(changes.fileno())
        changes.close()
        shut(fd)


@contextlib.contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    """Between its making and its lock, one looks like a left-over. Raises `OSError`: another keeps it locked."""
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    until = time.monotonic() + LOCKED
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(f"another process keeps {parent} locked (flock(2)), for {LOCKED:g} s now") from None
                time.sleep(_REST)
        yield
    finally:
        shut(fd)


def _remove_if_left(old: Path) -> None:
    try:
        lock = shared_memory_names.locked(old)
    except OSError:
        return  # in use, gone meanwhile, or another user's
    for one in old.glob("*-*"):
        _rmdir(one)
    _rmdir(old)
    shut(lock)


def _rmdir(path: Path) -> bool:
    """False: something runs in it."""
    try:
        path.rmdir()
    except OSError:
        return False
    return True
