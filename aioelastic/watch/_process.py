"""What proc(5) says of one process, and who has something open; read as it is now, with bounds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from ..child._read import slurp
from ..remains import Process

STATUS = 65_536  # bytes; with thousands of groups, a list in it is long


def describe(pid: int) -> Process:
    """Its command line and state, as far as they can be read."""
    words = slurp(f"/proc/{pid}/cmdline").rstrip(b"\0").split(b"\0")
    command = b" ".join(words).decode(errors="backslashreplace")
    fields = stat(pid)
    return Process(pid, command, fields[0] if fields else "?")


def wchan(pid: int) -> str:
    """The kernel function in which a process sleeps (proc(5)), "" when it cannot be read."""
    return slurp(f"/proc/{pid}/wchan").decode(errors="replace").strip("0 \n")


def caught_signals(pid: int) -> set[int]:
    """The signals for which a process has a handler of its own (SigCgt of proc(5))."""
    # its name, in the first line, may hold any bytes but the end of a line
    status = slurp(f"/proc/{pid}/status", STATUS).split(b"\n")
    mask = next((int(line.split()[1], 16) for line in status if line.startswith(b"SigCgt:")), 0)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def pipe_holders(read_ends: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """For each read end of a pipe: the pids of other processes that have the pipe open (as far as we may look)."""
    wanted: dict[str, int] = {}
    for fd in read_ends:
        try:
            wanted[os.readlink(f"/proc/self/fd/{fd}")] = fd
        except OSError:
            pass
    found = _having(set(wanted))
    me = os.getpid()
    return {fd: tuple(pid for pid in found[what] if pid != me) for what, fd in wanted.items()}


def socket_holders(inodes: Iterable[int]) -> list[int]:
    """The pids of the processes that have one of these sockets (as far as we may look)."""
    found = _having({f"socket:[{one}]" for one in inodes})
    return sorted({pid for pids in found.values() for pid in pids})


def _having(wanted: set[str]) -> dict[str, list[int]]:
    """Who has these open: what a link in /proc/<pid>/fd says → pids in their order."""
    found: dict[str, list[int]] = {one: [] for one in wanted}
    for pid in sorted(pids()) if wanted else ():
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    try:
                        what = os.readlink(entry.path)
                    except OSError:
                        continue
                    if what in wanted and pid not in found[what]:
                        found[what].append(pid)
        except OSError:
            continue  # gone, or another user's
    return found


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the third on (state, ppid, pgrp, session, …), None when it is gone."""
    data = slurp(f"/proc/{pid}/stat")
    # the second field, the name, is in parentheses and may hold anything
    return data[data.rindex(b")") + 2 :].decode().split() if data else None


def newest_pid() -> bytes:
    """The pid that was given last on this machine (proc(5), loadavg)."""
    return slurp("/proc/loadavg").rpartition(b" ")[2]
