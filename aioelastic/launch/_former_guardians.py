"""Guardians of the program that this one has replaced by execve(2): they end, and are still its children, of which it
knows nothing. They are reaped here, and those of ours that could not be born."""

from __future__ import annotations

import os
from collections.abc import Container

from ..child.kernel.bounded_reads import slurp
from ..child.kernel.child_processes import children
from ..system import forked_copies

pids: set[int] = set()


def find(mine: Container[int]) -> None:
    """Look for them; `mine` are guardians of this program."""
    for pid in children(os.getpid()):
        if pid not in mine and slurp(f"/proc/{pid}/comm", 64) == b"aio-keeper\n" and not _is_reaped(pid):
            pids.add(pid)


def reap() -> None:
    """Those that have ended."""
    if pids:
        pids.difference_update([pid for pid in pids if _is_reaped(pid)])


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


@forked_copies.in_copies
def _renew() -> None:
    pids.clear()
