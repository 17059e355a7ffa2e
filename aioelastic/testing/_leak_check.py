"""What this process holds at one moment, and what of it is more than before: the check behind `no_leaks`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from ..launch import end_idle_helpers
from ..model.frozen import dataclass
from ._allowed_leftovers import groups, kept_by_multiprocessing, left_behind, of_groups, pools
from ._left_files import SHM, names, ours
from ._process_tree import descendants, marked, process, see_off, strays


class LeftBehind(AssertionError):
    """Something was left behind.

    Attributes:
        leaks: kind (`"process"`, `"zombie"`, `"stray"`, `"thread"`, `"file descriptor"`, `"shared memory"`,
            `"temporary file"`, `"memfd map"`, `"task"`) → what is left, in words.
    """

    def __init__(self, leaks: Mapping[str, Iterable[str]]) -> None:
        self.leaks: dict[str, tuple[str, ...]] = {kind: tuple(found) for kind, found in leaks.items()}
        lines = [f"{kind}: {one}" for kind, found in self.leaks.items() for one in found]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        head = f"left behind: {lines[0]}{more}"  # all that pytest's summary shows
        super().__init__("\n".join([head, *(f"  {line}" for line in lines)]))


@dataclass(frozen=True)
class Holdings:
    """What this process, and whoever descends from it, holds now.

    Each is identity → description, so that two moments can be compared: a file descriptor that is closed and opened
    on another file is another one. What multiprocessing keeps for the whole program is left out: its resource tracker
    and fork server, with what they are reached by.

    Attributes:
        processes: descendants by /proc(5), children of children too.
        zombies: those that have ended, and that nobody has waited for.
        strays: processes with our mark in their environment that descend from us no more; see `marked`.
        threads: of Python's `threading`.
        fds: open file descriptors.
        shm: names in /dev/shm that are of our user. Whose they are is asked of those that are new, by `leaks`.
        memfds: maps of memfd_create(2).
        tasks: asyncio's, of the loop that runs; none outside of one.
        pools: of threads (`ThreadPoolExecutor`): those that they start later are theirs, while idle.
        groups: those of aioelastic, and executors: workers that they start later are theirs.
    """

    processes: Mapping[str, str] = field(default_factory=dict)
    zombies: Mapping[str, str] = field(default_factory=dict)
    strays: Mapping[str, str] = field(default_factory=dict)
    threads: Mapping[str, str] = field(default_factory=dict)
    fds: Mapping[str, str] = field(default_factory=dict)
    shm: Mapping[str, str] = field(default_factory=dict)
    memfds: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    pools: frozenset[weakref.ref[Any]] = frozenset()
    groups: frozenset[weakref.ref[Any]] = frozenset()

    @classmethod
    def now(cls) -> Holdings:
        """What is held at this moment. Garbage is collected first."""
        _warm()
        gc.collect()
        kept = kept_by_multiprocessing()
        alive: dict[str, str] = {}
        zombies: dict[str, str] = {}
        family = descendants()
        for pid, stat in family.items():
            if pid not in kept.pids:
                (zombies if stat[1] == "Z" else alive)[f"{pid} {stat[20]}"] = process(pid, stat)
        return cls(
            processes=alive,
            zombies=zombies,
            strays=dict(strays(family)),
            threads={_key(one): _words(one) for one in threading.enumerate() if one not in kept.threads},
            fds=dict(_fds(kept.fds, kept.files)),
            shm=names(),
            memfds=dict(_memfds()),
            tasks=pending_tasks(),
            pools=pools(),
            groups=groups(),
        )

    def leaks(self, before: Holdings, ignore: Iterable[str] = ()) -> dict[str, list[str]]:
        """What is held now and was not held `before`, by kind, in words; empty when all is well.

        A new name in /dev/shm counts unless a stranger has it open: others use this machine too. One that nobody has
        open may be a stranger's that is just coming or going, so it is looked at again for 2 s.

        Args:
            before: another moment.
            ignore: patterns (fnmatch) of names in /dev/shm that are somebody else's.
        """
        left = ours(_new_keys(self.shm, before.shm), tuple(ignore))
        pids, fds, tasks = of_groups(before.groups)
        named = {
            "process": _new(self.processes, before.processes, pids),
            "zombie": _new(self.zombies, before.zombies),
            "stray": _new(self.strays, before.strays),
            "thread": self._threads_left(before),
            "file descriptor": _new(self.fds, before.fds, fds),
            "shared memory": [one for one in left if one.startswith(SHM)],
            "temporary file": [one for one in left if not one.startswith(SHM)],
            "memfd map": _new(self.memfds, before.memfds),
            "task": _new(self.tasks, before.tasks, tasks),
        }
        return {kind: found for kind, found in named.items() if found}

    def and_what_came(self, before: Holdings, now: Holdings) -> Holdings:
        """This, and what `now` has beyond `before`."""
        came: dict[str, Any] = {}
        for one in fields(self):
            mine, held, there = (getattr(holdings, one.name) for holdings in (self, before, now))
            if isinstance(there, frozenset):
                came[one.name] = mine | (there - held)
            else:
                came[one.name] = {**mine, **{key: there[key] for key in _new_keys(there, held)}}
        return Holdings(**came)

    def _threads_left(self, before: Holdings) -> list[str]:
        new = _new_keys(self.threads, before.threads)
        if not new:
            return []
        there = [one for one in threading.enumerate() if _key(one) in new]
        return [self.threads[_key(one)] for one in left_behind(there, before.pools)]


@contextlib.contextmanager
def no_leaks(ignore: Iterable[str] = ()) -> Iterator[Holdings]:
    """A block that must leave nothing behind: no process, zombie, file descriptor, thread, shared memory, temporary
    file of ours, or task.

    Zygotes that nobody uses are ended first (they would stay for the next group). In a coroutine, tasks of its loop
    count too. Groups and executors that were there before live through it, and what they start meanwhile is theirs.

    Args:
        ignore: patterns (fnmatch) of names in /dev/shm that are somebody else's.

    Raises:
        LeftBehind: something was left behind; an exception from the block goes first.

    Example::

        with no_leaks():
            asyncio.run(supervise(Command("python", "train.py"), n=4))
    """
    with marked():
        before = Holdings.now()
        yield before
        if leaks := leaks_since(before, ignore):
            raise LeftBehind(leaks)


def leaks_since(before: Holdings, ignore: Iterable[str] = ()) -> dict[str, list[str]]:
    """What is held beyond `before` once our own helpers are ended, and those of programs that have just ended are."""
    cool_down()
    leaks = Holdings.now().leaks(before, ignore)
    if leaks.keys() & {"stray", "temporary file", "file descriptor", "memfd map"}:
        see_off(before.strays)
        # what threads had that were told to end is gone with them: that look has waited for these
        leaks = Holdings.now().leaks(before, ignore)
    return leaks


def cool_down() -> None:
    """End and give back what we keep warm for the next group, and nobody uses: zygotes, the guardian, memory, threads
    for GPUs."""
    end_idle_helpers()
    give_back()


def give_back() -> None:
    """What we keep in this process for the next group: memory, threads that copy and that are for GPUs."""
    memory = sys.modules.get("aioelastic.memory")
    if memory is not None:
        gc.collect()
        memory.trim()
    gpu = sys.modules.get("aioelastic.gpu")
    if gpu is not None:
        gpu.end()


def pending_tasks() -> dict[str, str]:
    """The tasks of the running loop that are not done, but the present one."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return {}
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
    return {f"{id(one)} {one.get_name()}": _task(one) for one in tasks if not one.done()}


def _key(thread: threading.Thread) -> str:
    return f"{thread.ident} {thread.native_id}"


def _words(thread: threading.Thread) -> str:
    return f"{thread.name} ({thread.native_id})"


def _task(task: asyncio.Task[object]) -> str:
    return f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', task.get_coro())}"


def _new_keys(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    return [one for one in now if one not in before]


def _new(now: Mapping[str, str], before: Mapping[str, str], but: Container[int] = ()) -> list[str]:
    """`but`: numbers with which the identity of somebody else's begins."""
    return [now[one] for one in _new_keys(now, before) if not but or int(one.split()[0]) not in but]


def _fds(kept: Container[int], files: Container[str]) -> Iterator[tuple[str, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of listdir itself
        if int(name) not in kept and target not in files:
            yield f"{name} {target}", f"{name} -> {target}"


def _memfds(pid: int | str = "self") -> Iterator[tuple[str, str]]:
    text = Path(f"/proc/{pid}/maps").read_text("utf-8", "replace")
    for line in text.splitlines() if "memfd:" in text else ():
        if "memfd:" in line:
            _, _, _, device, inode, path = line.split(None, 5)
            yield f"{device} {inode}", path


@functools.cache
def _warm() -> None:
    """libuv keeps one pipe for signals per process from its first loop on: have it before anybody counts."""
    try:
        import uvloop
    except ImportError:
        return
    uvloop.new_event_loop().close()
