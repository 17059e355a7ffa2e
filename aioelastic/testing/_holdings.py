"""What this process holds at one moment, and what of it is more than before: the check behind `no_leaks`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..launch import end_helpers
from ._family import descendants, marked, process, see_off, strays
from ._shm import SHM, names, ours


class LeftBehind(AssertionError):
    """Something was left behind.

    Attributes:
        leaks: kind (`"process"`, `"zombie"`, `"stray"`, `"thread"`, `"file descriptor"`, `"shared memory"`,
            `"temporary file"`, `"memfd map"`, `"task"`) → what is left, in words.
    """

    def __init__(self, leaks: Mapping[str, Iterable[str]]) -> None:
        self.leaks = {kind: tuple(found) for kind, found in leaks.items()}
        lines = [f"  {kind}: {one}" for kind, found in self.leaks.items() for one in found]
        super().__init__("\n".join(["left behind:", *lines]))


@dataclass(frozen=True)
class Holdings:
    """What this process, and whoever descends from it, holds now.

    Each is identity → description, so that two moments can be compared: a file descriptor that is closed and opened
    on another file is another one.

    Attributes:
        processes: descendants by /proc(5), children of children too.
        zombies: those that have ended, and that nobody has waited for.
        strays: processes with our mark in their environment that descend from us no more; see `marked`.
        threads: of Python's `threading`.
        fds: open file descriptors.
        shm: names in /dev/shm that are of our user. Whose they are is asked of those that are new, by `leaks`.
        memfds: maps of memfd_create(2).
        tasks: asyncio's, of the loop that runs; none outside of one.
    """

    processes: Mapping[str, str] = field(default_factory=dict)
    zombies: Mapping[str, str] = field(default_factory=dict)
    strays: Mapping[str, str] = field(default_factory=dict)
    threads: Mapping[str, str] = field(default_factory=dict)
    fds: Mapping[str, str] = field(default_factory=dict)
    shm: Mapping[str, str] = field(default_factory=dict)
    memfds: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Holdings:
        """What is held at this moment. Garbage is collected first."""
        _warm()
        gc.collect()
        alive: dict[str, str] = {}
        zombies: dict[str, str] = {}
        family = descendants()
        for pid, stat in family.items():
            (zombies if stat[1] == "Z" else alive)[f"{pid} {stat[20]}"] = process(pid, stat)
        return cls(
            processes=alive,
            zombies=zombies,
            strays=dict(strays(family)),
            threads={f"{one.ident} {one.native_id}": f"{one.name} ({one.native_id})" for one in threading.enumerate()},
            fds=dict(_fds()),
            shm=names(),
            memfds=dict(_memfds()),
            tasks=pending_tasks(),
        )

    def leaks(self, before: Holdings, ignore: Iterable[str] = ()) -> dict[str, list[str]]:
        """What is held now and was not held `before`, by kind, in words; empty when all is well.

        A new name in /dev/shm counts unless a stranger has it open: others use this machine too. One that nobody has
        open may be a stranger's that is just coming or going, so it is looked at again 0.1 s later.

        Args:
            ignore: patterns (fnmatch) of names in /dev/shm that are somebody else's.
        """
        left = ours(_new_keys(self.shm, before.shm), tuple(ignore))
        named = {
            "process": _new(self.processes, before.processes),
            "zombie": _new(self.zombies, before.zombies),
            "stray": _new(self.strays, before.strays),
            "thread": _new(self.threads, before.threads),
            "file descriptor": _new(self.fds, before.fds),
            "shared memory": [one for one in left if one.startswith(SHM)],
            "temporary file": [one for one in left if not one.startswith(SHM)],
            "memfd map": _new(self.memfds, before.memfds),
            "task": _new(self.tasks, before.tasks),
        }
        return {kind: found for kind, found in named.items() if found}


@contextlib.contextmanager
def no_leaks(ignore: Iterable[str] = ()) -> Iterator[Holdings]:
    """A block that must leave nothing behind: no process, zombie, file descriptor, thread, shared memory, temporary
    file of ours, or task.

    Warm zygotes are ended first (they would stay for the next group). In a coroutine, tasks of its loop count too.

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
    if leaks.keys() & {"stray", "temporary file"}:
        see_off(before.strays)
        leaks = Holdings.now().leaks(before, ignore)
    return leaks


def cool_down() -> None:
    """End and give back what we keep warm for the next group: zygotes, the guardian, memory, threads for GPUs."""
    end_helpers()
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


def _task(task: asyncio.Task[object]) -> str:
    return f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', task.get_coro())}"


def _new_keys(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    return [one for one in now if one not in before]


def _new(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    return [now[one] for one in _new_keys(now, before)]


def _fds() -> Iterator[tuple[str, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of listdir itself
        yield f"{name} {target}", f"{name} -> {target}"


def _memfds(pid: int | str = "self") -> Iterator[tuple[str, str]]:
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
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
