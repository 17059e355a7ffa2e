"""How much memory there is for this process: the machine's, or what its control groups leave of that (cgroups(7)).

A container may have a thousandth of the machine, and no control group's file says so but those up the path.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from typing import NamedTuple

from ._errors import ShareLimit

IDLE = 2 << 30  # bytes that may lie idle for the next arrays on a large machine
FEW = 64 << 20  # of them, as long as there is any room
_OLD = 10.0  # seconds until it is looked at again: limits are changed, and processes moved
_SOON = 0.01  # until it is looked at again what is left
_LIST = 1 << 24  # bytes of a file of the kernel's


class Room(NamedTuple):
    """In bytes: memory, memory with swap; and the control groups that have a limit: that, their version, and their
    directory."""

    memory: int
    all: int
    groups: tuple[tuple[int, int, str], ...] = ()


def room() -> Room:
    """What this process may have."""
    global _known
    now = time.monotonic()
    when, found = _known
    if found is None or now > when + _OLD:
        found = _look()
        _known = now, found
    return found


_known: tuple[float, Room | None] = (0.0, None)


def idle(directory: str | None, wanted: int) -> int:
    """How many bytes may lie idle, of that many.

    Whoever else is in a control group, or has files in the file system of that directory, keeps some, too, and nobody
    knows how many they are. So each keeps a quarter of what is left beyond a quarter: however many they are, they stop
    there. A thirty-second part, and at most `FEW`, each may keep as long as an eighth is left.
    """
    places = left()
    if directory is not None:
        try:
            about = os.statvfs(directory)
            places = [*places, (about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize)]
        except OSError:
            pass  # it was removed
    least = min([room().memory, *(size for size, _ in places)])
    most, few = min(wanted, IDLE, least // 4), min(FEW, least // 32)
    for size, free in places:
        most = min(most, max((free + wanted - size // 4) // 4, few if free > size // 8 else 0))
    return most


def is_tight(nbytes: int) -> bool:
    """Whether less than a quarter is left with so many bytes more: what lies idle is needed by others."""
    return any(free - nbytes < size // 4 for size, free in left())


def left() -> list[tuple[int, int]]:
    """Of the machine, and of each control group that has a limit: that, and what of it nobody has now."""
    global _seen
    now = time.monotonic()
    when, found = _seen
    if now > when + _SOON:
        told = dict(_fields("/proc/meminfo", ":"))
        sizes = [1024 * int(told[one].split()[0]) for one in ("MemTotal", "MemAvailable") if one in told]
        found = [(sizes[0], sizes[1])] if len(sizes) == 2 else []
        for size, version, directory in room().groups:
            own = _number(f"{directory}/{'memory.current' if version == 2 else 'memory.usage_in_bytes'}")
            if own is not None:
                cached = dict(_fields(f"{directory}/memory.stat", " "))
                kinds = ("inactive_file", "active_file")  # what the system takes back by itself
                own -= sum(int(cached.get(one if version == 2 else f"total_{one}", 0)) for one in kinds)
                found.append((size, max(size - own, 0)))
        _seen = now, found
    return found


_seen: tuple[float, list[tuple[int, int]]] = (0.0, [])


def few(most: int) -> int:
    """How many things there may be that have a descriptor each, of at most that many: seven of eight of the descriptors
    are the program's."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else min(most, soft // 8)


def check(nbytes: int, more: int) -> None:
    """Refuse what there can be no room for: the system would give it, and end the process when it is used.

    Args:
        more: bytes that this process has already.

    Raises:
        ShareLimit: says how much there is.
    """
    most = room().all
    if nbytes + more > most:
        has = f", and has {more}" if more else ""
        raise ShareLimit(f"cannot have {nbytes} bytes of shared memory: this process may have {most}, with swap{has}")


def _look() -> Room:
    told = {name: 1024 * int(size.split()[0]) for name, size in _fields("/proc/meminfo", ":") if name in _TOTALS}
    memory = told.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    swap = told.get("SwapTotal", 0)
    most = memory + swap
    groups = []
    for version, directory in _groups():
        if version == 2:
            own, more = _number(f"{directory}/memory.max"), _number(f"{directory}/memory.swap.max")
            both = None if own is None else own + (swap if more is None else min(more, swap))
        else:
            own = _number(f"{directory}/memory.limit_in_bytes")
            both = _number(f"{directory}/memory.memsw.limit_in_bytes")
            if own is not None:
                both = min(own + swap, both or own + swap)
        if own is not None:
            if own < memory + swap:
                groups.append((own, version, directory))
            memory = min(memory, own)
        if both is not None:
            most = min(most, both)
    return Room(memory, max(most, memory), tuple(groups))


_TOTALS = ("MemTotal", "SwapTotal")


def _groups() -> Iterator[tuple[int, str]]:
    """The control groups that this process is in, its own and all above it: their version, and their directory."""
    mine = {}  # by version: the path below the root of the hierarchy
    for line in _lines("/proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or "memory" in controllers.split(","):
            mine[2 if number == "0" else 1] = path
    for line in _lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2) if right.count(" ") >= 2 else ("", "", "")
        version = {"cgroup2": 2, "cgroup": 1}.get(kind, 0)
        if version not in mine or (version == 1 and "memory" not in options.split(",")):
            continue
        root, mount = left.split()[3:5]
        below = os.path.relpath(mine[version], root)
        if below == os.pardir or below.startswith(f"{os.pardir}/"):
            below = os.curdir  # a container sees its own as the root
        at = os.path.normpath(os.path.join(mount, below))
        while at.startswith(mount):
            yield version, at
            at = os.path.dirname(at)
            if at == "/":
                break


def _number(path: str) -> int | None:
    """None: no limit, or no such file."""
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdecimal() else None


def _fields(path: str, sign: str) -> Iterator[tuple[str, str]]:
    for line in _lines(path):
        name, _, rest = line.partition(sign)
        yield name, rest


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LIST).splitlines()
    except OSError:
        return []
