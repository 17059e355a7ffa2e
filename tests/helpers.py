"""Tiny real processes, and ways to wait for the real thing instead of sleeping."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aioelastic import Command, Group, Logs, Std
from aioelastic.child.wire import datagrams, messages
from aioelastic.events import Event

E = TypeVar("E", bound=Event)

QUIET = Logs(tee=Std.NONE)

# a program with two workers, whose pids are the last words of its line "ready"
TWO_WORKERS = """
import asyncio
from aioelastic import *
async def main():
    async with Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE)) as group:
        print("ready", *group.pids.values(), flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""

# what the extra `test` does not hold: the module, its distribution, the extra that does
OPTIONAL = {
    "cuda.bindings.driver": ("cuda-python", "gpu"),
    "circus": ("circus", "test-all"),
    "honcho": ("honcho", "test-all"),
    "loky": ("loky", "test-all"),
    "pebble": ("pebble", "test-all"),
    "py-spy": ("py-spy", "test-all"),
    "torch": ("torch", "test-all"),
}


def lacks(module: str) -> str:
    """Why a test is skipped that needs this one."""
    return "needs {} (the extra {})".format(*OPTIONAL[module])


def needs(module: str) -> Any:
    """This module, or a skip that names its extra."""
    return pytest.importorskip(module, reason=lacks(module))


def sh(script: str, env: Mapping[str, str | None] | None = None, **how: Any) -> Command:
    """A worker of a few kilobytes that starts in a millisecond."""
    return Command("/bin/sh", "-c", script, env=env, **how)


def py(script: str, env: Mapping[str, str | None] | None = None, **how: Any) -> Command:
    """A Python worker, without site (it starts twice as fast)."""
    return Command(sys.executable, "-S", "-c", script, env=env, **how)


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
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


@contextmanager
def child_process(argv: Sequence[str | Path], **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """As `subprocess.Popen(argv, **how)` in a `with`, which waits for its end. But where the block raises, what would
    have it end may not come about: it is killed then."""
    process = subprocess.Popen(argv, **how)
    try:
        yield process
        _close_pipes(process)
        process.wait()
    finally:
        process.kill()  # unless it was waited for
        _close_pipes(process)
        process.wait()


def _close_pipes(process: subprocess.Popen[Any]) -> None:
    for pipe in (process.stdout, process.stderr, process.stdin):
        if pipe is not None:
            with suppress(BrokenPipeError):  # it has ended, and not read all that was written
                pipe.close()


def alive(pid: int) -> bool:
    """Whether this process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_and_see_it_dead(pid: int | None, signum: int) -> None:
    """Signal a process and wait, with the loop standing still, until the kernel has ended it. It is not reaped here."""
    assert pid is not None
    with seen_dead([pid]):
        os.kill(pid, signum)


@contextmanager
def seen_dead(pids: Iterable[int]) -> Iterator[None]:
    """Wait, with the loop standing still, until the kernel has ended these processes, by what is done inside."""
    pidfds: list[int] = []
    try:
        for pid in pids:
            with suppress(ProcessLookupError):  # it is dead, and its guardian has reaped it
                pidfds.append(os.pidfd_open(pid))
        yield
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def struck(pids: Iterable[int], signum: int) -> bool:
    """Signal them, as somebody else would. Whether one of them was there still."""
    count = 0
    for pid in pids:
        with suppress(ProcessLookupError):  # its guardian has reaped it, and we do not know yet
            os.kill(pid, signum)
            count += 1
    return count > 0


async def stopped_itself(pid: int | None) -> None:
    """Wait until a process stands still (SIGSTOP), with all its threads."""
    # only its parent gets an event for that, and we are not its parent
    while not stands_still(pid):  # noqa: ASYNC110
        await asyncio.sleep(0)


def stands_still(pid: int | None) -> bool:
    """Whether all its threads do. The first of them to run after SIGSTOP stops the others."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((one / "stat").read_text().rpartition(")")[2].split()[0] == "T" for one in threads)


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Every call that makes one fails, whatever another thread closes meanwhile: the three that may be are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def until(true: Callable[[], bool]) -> None:
    """Wait for what tells nobody when it has come about."""
    async with asyncio.timeout(150):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def program(
    script: str, cwd: Path, *args: str, env: dict[str, str] | None = None, options: tuple[str, ...] = ()
) -> str:
    """What a script with functions in it prints; nothing on stderr."""
    (cwd / "program.py").write_text(script)
    ran = subprocess.run(
        [sys.executable, *options, "program.py", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, **(env or {})},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def travelled(*body: Any, kind: bytes = messages.TASK) -> tuple[Any, ...]:
    """What arrives of a message, in this process."""
    packet, fds = messages.encode(kind, body)
    here, there = datagrams.pair()
    with here, there:
        datagrams.send(here, packet, fds)
        datagrams.close(fds)
        packet, fds = datagrams.receive(there)
    try:
        return messages.decode(packet, fds)
    finally:
        datagrams.close(fds)
