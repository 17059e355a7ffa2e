"""What is made to outlast a block of code, and so is no leak of it: what multiprocessing keeps for the whole program,
and the idle threads of pools that are older, and of loops that are open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from ..executor.owner import Owner
from ..supervisor.supervisor import Supervisor
from ..system import forked_copies
from ..system.helper_thread import JobThread

ENDING = 5.0  # seconds for a thread that was told to end, or to come to rest
WAITS = re.compile(r"(asyncio-)?waitpid-\d+")  # with the child watcher of Python 3.11


class Kept(NamedTuple):
    """What lives as long as the program: pids, numbers and targets of descriptors, threads."""

    pids: set[int]
    fds: set[int]
    files: set[str]
    threads: set[threading.Thread]


def kept_by_multiprocessing() -> Kept:
    """Its resource trackers (loky's too), its fork server, the thread that hands descriptors out, and memory for arrays
    in which there are none."""
    kept = Kept(set(), set(), set(), set())
    for name, module in list(sys.modules.items()):
        if name.endswith(".resource_tracker"):
            _add(kept, getattr(module, "_resource_tracker", None), "_pid", "_fd")
    _add(kept, _of("forkserver", "_forkserver"), "_forkserver_pid", "_forkserver_alive_fd")
    sharer = _of("resource_sharer", "_resource_sharer")
    if (thread := getattr(sharer, "_thread", None)) is not None:
        kept.threads.add(thread)
        kept.fds.add(sharer._listener._listener._socket.fileno())
    heap: Any = getattr(_of("heap", "BufferWrapper"), "_heap", None)
    for arena in getattr(heap, "_arenas", ()):
        if not heap._allocated_blocks.get(arena):
            with contextlib.suppress(OSError):
                kept.files.add(os.readlink(f"/proc/self/fd/{arena.fd}"))
    return kept


def _add(kept: Kept, helper: object, pid: str, fd: str) -> None:
    for name, numbers in ((pid, kept.pids), (fd, kept.fds)):
        if isinstance(number := getattr(helper, name, None), int):
            numbers.add(number)


def _of(module: str, name: str) -> Any:
    return getattr(sys.modules.get(f"multiprocessing.{module}"), name, None)


def groups() -> frozenset[weakref.ref[Any]]:
    """All groups and executors that there are."""
    return frozenset(map(weakref.ref, forked_copies.living(Supervisor, Owner)))


def of_groups(groups: Iterable[weakref.ref[Any]]) -> tuple[set[int], set[int], set[int]]:
    """The pids of the workers that these have now, the descriptors that we have for them, the ids of their tasks."""
    pids: set[int] = set()
    fds: set[int | None] = set()
    tasks: set[int] = set()
    for one in groups:
        group = one()
        if isinstance(group, Supervisor):
            tasks |= {id(task) for task in group._tasks | group.attempts._tasks}
        for worker in () if group is None else group.workers:
            if worker.pid is not None and worker.exit is None:
                pids.add(worker.pid)
                channel = getattr(worker.channel, "_channel", None)
                fds |= {getattr(worker._process, "_pidfd", None), None if channel is None else channel.fileno()}
                fds |= {pump.fd for pump in worker.output._pumps.values()}
                fds |= {sink._fd for sink in worker.output._sinks.values() if sink is not None}
    return pids, {fd for fd in fds if fd is not None}, tasks


def pools() -> frozenset[weakref.ref[Any]]:
    """All pools of threads that there are (`ThreadPoolExecutor`)."""
    kinds = [] if (futures := _futures()) is None else [futures.ThreadPoolExecutor]
    for kind in kinds:
        kinds += kind.__subclasses__()
    # an instance refers to its class: a fifth of the time that a look at all objects takes
    found = [one for one in gc.get_referrers(*kinds) if issubclass(type(one), tuple(kinds))]
    return frozenset(map(weakref.ref, found))


def left_behind(threads: Iterable[threading.Thread], before: Collection[weakref.ref[Any]]) -> list[threading.Thread]:
    """Those of new threads that are: not idle ones of a pool that was there `before`, or of a loop that is open; and
    not those that were told to end, which are waited for."""
    owners = {thread: pool for one in pools() if (pool := one()) is not None for thread in pool._threads}
    until = time.monotonic() + ENDING
    left = []
    for one in threads:
        pool, loop = owners.get(one), one.loop if _is_anyio(one) else None  # type: ignore[attr-defined]
        if pool is not None and not pool._shutdown:
            goes_on = weakref.ref(pool) in before or _is_of_open_loop(pool)
            is_told = False
        else:
            goes_on = loop is not None and not loop.is_closed() and not one.stopping  # type: ignore[attr-defined]
            # a pool that nobody has any more tells them; and asyncio has one that waits for each child
            is_told = loop is not None or _is_of_pool(one) or WAITS.match(one.name) is not None
            is_told |= isinstance(one, JobThread) and one.told_to_end
        while not (is_over := (goes_on and _is_idle(one)) or not one.is_alive()) and (goes_on or is_told):
            if time.monotonic() > until:
                break
            one.join(0.001)
        if not is_over:
            left.append(one)
    return left


def _is_of_open_loop(pool: object) -> bool:
    holders = gc.get_referrers(pool)
    holders += gc.get_referrers(*[one for one in holders if type(one) is dict])  # or what it is the __dict__ of
    loops = [one for one in holders if issubclass(type(one), asyncio.AbstractEventLoop)]
    return any(not one.is_closed() for one in loops)


def _is_idle(thread: Any) -> bool:
    if _is_anyio(thread):
        return thread in thread.idle_workers
    frame = sys._current_frames().get(thread.ident)  # it waits for work, or has just begun to
    return frame is not None and frame.f_code is _futures()._worker.__code__


def _is_anyio(thread: threading.Thread) -> bool:
    return type(thread).__module__ == "anyio._backends._asyncio"


def _is_of_pool(thread: threading.Thread) -> bool:
    futures = _futures()
    return futures is not None and thread in futures._threads_queues


def _futures() -> Any:
    return sys.modules.get("concurrent.futures.thread")
