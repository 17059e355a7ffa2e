"""Tiny real processes, and ways to wait for the real thing instead of sleeping."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aioelastic import Command, Group, Logs, Std
from aioelastic.events import Event

E = TypeVar("E", bound=Event)

QUIET = Logs(tee=Std.NONE)

# what the extra `test` does not hold: the module, its distribution, the extra that does
OPTIONAL = {
    "cuda.bindings.driver": ("cuda-python", "gpu"),
    "loky": ("loky", "test-all"),
    "py-spy": ("py-spy", "test-all"),
    "torch": ("torch", "test-all"),
}


def lacks(module: str) -> str:
    """Why a test is skipped that needs this one."""
    return "needs {} (the extra {})".format(*OPTIONAL[module])


def needs(module: str) -> Any:
    """This module, or a skip that names its extra."""
    return pytest.importorskip(module, reason=lacks(module))


def sh(script: str, env: Mapping[str, str | None] | None = None) -> Command:
    """A worker of a few kilobytes that starts in a millisecond."""
    return Command("/bin/sh", "-c", script, env=env)


def py(script: str, env: Mapping[str, str | None] | None = None) -> Command:
    """A Python worker, without site (it starts twice as fast)."""
    return Command(sys.executable, "-S", "-c", script, env=env)


async def event_of(group: Group, kind: type[E], rank: int | None = None, attempt: int | None = None) -> E:
    """The first event of this kind (and rank, and attempt), past or to come."""
    async for event in group.events():
        if isinstance(event, kind) and rank in (None, event.rank) and attempt in (None, event.attempt):
            return event
    raise AssertionError(f"the group ended without {kind.__name__}")


async def gone(pid: int) -> None:
    """Wait until this process, child or not, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(pidfd, lambda: ended.done() or ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def alive(pid: int) -> bool:
    """Whether this process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_and_see_it_dead(pid: int | None, signum: int) -> None:
    """Signal a process and wait, with the loop standing still, until the kernel has ended it. It is not reaped here."""
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signum)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    os.close(pidfd)


async def stopped_itself(pid: int | None) -> None:
    """Wait until a process stands still (SIGSTOP), with all its threads."""
    # only its parent gets an event for that, and we are not its parent
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    while any((one / "stat").read_text().rpartition(")")[2].split()[0] != "T" for one in threads):  # noqa: ASYNC110
        await asyncio.sleep(0)


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Every call that makes one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(one) for one in os.listdir("/proc/self/fd"))
    blocked = [os.dup(0) for _ in range(used)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(blocked), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in blocked:
            os.close(fd)


async def until(true: Callable[[], bool]) -> None:
    """Wait for what tells nobody when it has come about."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
