"""Who holds what: the kernel's view, a scope that warns of what was left, and where memory comes from."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import psutil

from .. import gpu, memory, shm
from ..checks import check_bool, check_path, check_whole
from ..child._read import lines
from ..errors import SpecError

_LISTS = 1 << 28  # bytes of a list of the kernel's that are looked through


@dataclass(frozen=True)
class Lease:
    """One hold on one segment.

    Attributes:
        segment: its name, as `/proc/PID/maps` shows it.
        size: its bytes.
        owner: process id of who made it.
        holder: process id of who holds it: a process that uses it, or one whose message is under way.
        age: seconds since this process knows the segment.
    """

    segment: str
    size: int
    owner: int
    holder: int
    age: float


@dataclass(frozen=True)
class Held:
    """One segment, as the kernel sees it.

    Attributes:
        segment: its name.
        owner: process id of who made it.
        size: the most bytes of it that a process has mapped; of a GPU's memory, all of it.
        mapped: process ids of those that have it mapped.
        leased: process ids of those that have a lease, and of senders of messages under way.
        unexplained: those that have it mapped, and are neither its owner nor have a lease: nothing keeps its owner from
            using the memory for something else. A process that was forked is one of them: what it inherited is held for
            it in the name of the process it was copied from.
    """

    segment: str
    owner: int
    size: int
    mapped: tuple[int, ...]
    leased: tuple[int, ...]

    @property
    def unexplained(self) -> tuple[int, ...]:
        return tuple(pid for pid in self.mapped if pid != self.owner and pid not in self.leased)


def leases() -> list[Lease]:
    """All leases on the segments that this process has, its own and others', from `/proc/locks`."""
    mine = {one.key[1]: one for one in memory.segments()}
    now = time.monotonic()
    found = []
    for inode, holder in _locks():
        one = mine.get(inode)
        if one is not None:
            found.append(Lease(one.name, one.size, _owner(one.name), holder, now - one.born))
    return found


def audit(pids: Collection[int] | None = None) -> list[Held]:
    """What processes have mapped, by `/proc/PID/maps`, against the leases they have.

    Args:
        pids: which processes; this one and all that descend from it when not given. Those of other users are left out.

    Raises:
        SpecError: `pids` are no numbers of processes.
    """
    if pids is not None and not (isinstance(pids, Collection) and all(type(pid) is int for pid in pids)):
        raise SpecError("pids", pids, "are not the numbers of processes", "give them in a list")
    if pids is None:
        me = psutil.Process()
        pids = [me.pid, *(one.pid for one in me.children(recursive=True))]
    leased: dict[int, set[int]] = {}
    for inode, holder in _locks():
        leased.setdefault(inode, set()).add(holder)
    seen: dict[int, tuple[str, dict[int, int]]] = {}
    for pid in pids:
        for line in _mapped(pid):
            where, _, _, _, number, *rest = line.split(None, 5)
            name = memory.named(rest[0]) if rest else ""
            if memory.made_by(name) is not None:
                low, _, high = where.partition("-")
                _, sizes = seen.setdefault(int(number), (name, {}))
                _, on_gpu, size = name.rpartition("-gpu-")  # of those, only a page is mapped here
                sizes[pid] = int(size) if on_gpu else sizes.get(pid, 0) + int(high, 16) - int(low, 16)
    return [
        Held(name, _owner(name), max(sizes.values()), tuple(sorted(sizes)), tuple(sorted(leased.get(inode, ()))))
        for inode, (name, sizes) in seen.items()
    ]


class scope:
    """At its end, nothing that was made in it may still be held: by a view in this process, a message, or a process.

    It looks at segments of this process. What is still held is warned of (`ShareLeakWarning`), each with its owner, its
    holders, its age and its size; or, with `strict`, raised as a group of them.

    Args:
        strict: raise instead of warning.

    Raises:
        ExceptionGroup: of `ShareLeakWarning`, at the end, with `strict`.
        SpecError: `strict` is no bool.

    Example::

        with sharing.scope(strict=True):
            await supervise(Function(train, sharing.copy(data)), n=4)
    """

    def __init__(self, strict: bool = False) -> None:
        check_bool("strict", strict)
        self._strict = strict

    def __enter__(self) -> Self:
        with memory.gate:
            for arena in memory.arenas:
                arena.begin_slab()  # views of it are counted together
        self._before = _uses()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None:
            return  # its traceback may well hold arrays
        gc.collect()  # what only waits for the collector is not held
        now = time.monotonic()
        found = []
        for one, (views, holders) in _uses().items():
            views_before, holders_before = self._before.get(one, (0, []))
            new = [pid for pid in holders if holders.count(pid) > holders_before.count(pid)]
            if views > views_before or new:
                who = [f"{views - views_before} views in this process"] if views > views_before else []
                who += [_words(pid) for pid in sorted(set(new))]
                words = f"{one.size} bytes of shared memory ({one.name}) are still held by {', '.join(who)}"
                found.append(memory.ShareLeakWarning(f"{words}; owner {os.getpid()}, age {now - one.born:.1f} s"))
        if found and self._strict:
            raise ExceptionGroup("shared memory is still held", found)
        for leak in found:
            warnings.warn(leak, stacklevel=2)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)


def configure(
    *,
    strategy: Literal["memfd", "file"] | None = None,
    directory: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    gpu_limit: int | None = None,
) -> None:
    """How this process makes shared memory from now on. A worker is told by calling it there.

    Args:
        strategy: `"memfd"`, which has no name and no other limit than memory; or `"file"`: files in a directory of this
            process's own below `directory`, which count against that file system. They are removed with their array,
            the directory when the process ends; those of processes that were killed, by the next that calls this; in
            `/dev/shm` also at the end of a group, and of a program that owned workers, even when that was killed.
        directory: for `"file"`; `/dev/shm` when not given.
        limit: bytes of shared memory that may lie idle here for the next arrays; a quarter of the machine's memory, at
            most 2 GiB, when never given.
        gpu_limit: the same for each GPU; 256 MiB when never given.

    Raises:
        SpecError: an argument is wrong.
        OSError: the directory cannot be used.
    """
    if limit is not None:
        check_whole("limit", limit, 0)
    if gpu_limit is not None:
        check_whole("gpu_limit", gpu_limit, 0)
        gpu.set_limit(gpu_limit)
    if strategy not in (None, "memfd", "file"):
        raise SpecError("strategy", strategy, "is not known", 'use "memfd" or "file"')
    if directory is not None and strategy != "file":
        raise SpecError("directory", str(directory), 'is for strategy="file"', "name that too")
    place = None
    if strategy == "file":
        place = shm.own_directory(shm.SHM if directory is None else check_path("directory", directory))
    with memory.gate:
        if strategy is not None:
            memory.arena.directory = place
            memory.arena.trim()
            if place is None:
                shm.leave_empty()
        if limit is not None:
            memory.arena.limit = limit
            memory.arena.trim(limit)


def _uses() -> dict[memory.Segment, tuple[int, list[int]]]:
    """Of our own segments: the views here, and who holds a lease."""
    holders: dict[int, list[int]] = {}
    for inode, holder in _locks():
        holders.setdefault(inode, []).append(holder)
    return {one: (one.loans, holders.get(one.key[1], [])) for one in memory.segments() if one.owned}


def _locks() -> list[tuple[int, int]]:
    """Inode and process id of each shared flock(2) of the system; inodes of memfds are those of one file system."""
    found = []
    for line in lines("/proc/locks", _LISTS):  # of all processes
        words = line.split()
        if words[1:4] == [b"FLOCK", b"ADVISORY", b"READ"]:
            found.append((int(words[5].rpartition(b":")[2]), int(words[4])))
    return found


def _mapped(pid: int) -> Iterator[str]:
    """The lines of its map that may be of a segment; none when it has ended, or is not ours to look at."""
    try:
        for line in lines(f"/proc/{pid}/maps", _LISTS):
            if b"aioelastic-" in line:
                yield line.decode(errors="replace")
    except OSError:
        pass


def _owner(name: str) -> int:
    owner = memory.made_by(name)
    assert owner is not None
    return owner


def _words(pid: int) -> str:
    if pid == os.getpid():
        return "a message under way"
    try:
        return f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"process {pid}"
