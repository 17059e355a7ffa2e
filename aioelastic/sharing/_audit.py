"""Who holds what: the kernel's view, a scope that warns of what was left, and where memory comes from."""

from __future__ import annotations

import gc
import mmap
import os
import time
import warnings
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Literal, Self, TypeAlias

import psutil

from .. import gpu, memory
from ..child.kernel.bounded_reads import blocks, lines
from ..model.errors import SpecError
from ..model.frozen import dataclass
from ..model.validation import check_bool, check_path, check_whole
from ..system import shared_memory_names

File: TypeAlias = tuple[int, int]  # its device and inode, as the kernel's lists show them
_LISTS = 1 << 28  # bytes of a list of the kernel's that are looked through


@dataclass(frozen=True)
class Lease:
    """The hold of one process on one segment, however many messages and views of it there are.

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
    """

    segment: str
    owner: int
    size: int
    mapped: tuple[int, ...]
    leased: tuple[int, ...]

    @property
    def unexplained(self) -> tuple[int, ...]:
        """Process ids of those that have it mapped, and are neither its owner nor have a lease.

        Nothing keeps its owner from using the memory for something else. A process that was forked is one of them: what
        it inherited is held for it in the name of the process it was copied from.
        """
        return tuple(pid for pid in self.mapped if pid != self.owner and pid not in self.leased)


def leases() -> list[Lease]:
    """All leases on the segments that this process has, its own and others', from `/proc/locks`."""
    mine = _segments()
    now = time.monotonic()
    found = []
    for file, holder in sorted(_locks(mine)):
        one = mine[file]
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
    seen: dict[File, tuple[str, dict[int, int]]] = {}
    for pid in pids:
        for line in _mapped(pid):
            where, _, _, device, number, *rest = line.split(None, 5)
            name = memory.named(rest[0]) if rest else ""
            if memory.made_by(name) is not None:
                low, _, high = where.partition("-")
                _, sizes = seen.setdefault((_device(device), int(number)), (name, {}))
                _, on_gpu, size = name.rpartition("-gpu-")  # of those, only a page is mapped here
                sizes[pid] = int(size) if on_gpu else sizes.get(pid, 0) + int(high, 16) - int(low, 16)
    leased = _holders(seen)
    return [
        Held(name, _owner(name), max(sizes.values()), tuple(sorted(sizes)), tuple(sorted(leased.get(file, ()))))
        for file, (name, sizes) in seen.items()
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
        for arena in list(memory.arenas):
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
            views_before, holders_before = self._before.get(one, (0, set()))
            new = sorted(holders - holders_before)
            if views > views_before or new:
                who = [f"{views - views_before} views in this process"] if views > views_before else []
                who += [_words(pid) for pid in new]
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
        limit: bytes of shared memory that may lie idle here for the next arrays; when never given, a quarter of the
            memory of the machine, or of the container (cgroups(7)) or file system where that has less, at most 2 GiB,
            and less where little of that is left.
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
    below = None
    if strategy == "file":
        below = shared_memory_names.SHM if directory is None else check_path("directory", directory)
        shared_memory_names.own_directory(below)
    if strategy is not None:
        memory.arena.below = below
        memory.arena.trim()
        if below is None:
            shared_memory_names.leave_empty()
    if limit is not None:
        memory.arena.limit = limit
        memory.arena.trim(limit)


def _uses() -> dict[memory.Segment, tuple[int, set[int]]]:
    """Of our own segments: the views here, and who holds a lease."""
    mine = {file: one for file, one in _segments().items() if one.owned}
    holders = _holders(mine)
    return {one: (len(one.uses), holders.get(file, set())) for file, one in mine.items()}


def _segments() -> dict[File, memory.Segment]:
    """Those of this process. Their devices are asked of their mounts, since stat(2) may tell another (btrfs)."""
    mounts = {}
    for line in lines("/proc/self/mountinfo", _LISTS):
        number, _, device, _ = line.split(None, 3)
        mounts[number] = os.makedev(*map(int, device.split(b":")))
    found = {}
    for one in memory.segments():
        file = one.key
        try:
            for line in lines(f"/proc/self/fdinfo/{one.fd}", _LISTS):
                if line.startswith(b"mnt_id:"):  # that of a memfd is in no list
                    file = mounts.get(line.split()[1], file[0]), file[1]
        except OSError:
            pass  # it was closed meanwhile
        found[file] = one
    return found


def _holders(files: Collection[File]) -> dict[File, set[int]]:
    found: dict[File, set[int]] = {}
    for file, holder in _locks(files):
        found.setdefault(file, set()).add(holder)
    return found


def _locks(files: Collection[File]) -> set[tuple[File, int]]:
    """Which of these files has a shared flock(2) of which process.

    The kernel gives its list by pages and goes on by position: when somebody locks or unlocks any file in between,
    lines at the border are left out or come twice (`seq_read_iter` of fs/seq_file.c). So it is read twice, the second
    time with its borders in the middle of the first one's pages.
    """
    found = set()
    for first in (mmap.PAGESIZE, mmap.PAGESIZE // 2):
        pages = list(blocks("/proc/locks", _LISTS, first))  # of all processes; nothing is done between two of them
        for line in b"".join(pages).splitlines():
            words = line.split()
            if words[1:4] == [b"FLOCK", b"ADVISORY", b"READ"]:
                device, _, inode = words[5].decode().rpartition(":")
                file = _device(device), int(inode)
                if file in files:
                    found.add((file, int(words[4])))
    return found


def _device(shown: str) -> int:
    """As proc(5) shows it."""
    major, minor = shown.split(":")
    return os.makedev(int(major, 16), int(minor, 16))


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
