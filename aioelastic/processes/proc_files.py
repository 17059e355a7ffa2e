"""What proc(5) says of one process, and who has something open; read as it is now, with bounds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from ..child.kernel.bounded_reads import slurp
from ..model.leftovers import Process

PF_EXITING = 0x00000004  # linux/sched.h

STATUS = 65_536  # bytes; with thousands of groups, a list in it is long


def describe(pid: int) -> Process:
    """Its command line and state, as far as they can be read. One without a command line, as there is none for a moment
    of execve(2), is told by its name in brackets, as by ps(1)."""
    words = slurp(f"/proc/{pid}/cmdline").rstrip(b"\0").split(b"\0")
    name, fields = _name_and_fields(pid)
    command = b" ".join(words) or (b"[%s]" % name if fields else b"")
    return Process(pid, command.decode(errors="backslashreplace"), fields[0] if fields else "?")


def in_words(process: Process) -> str:
    """`"process 5 (sleep 1000)"`."""
    return f"process {process.pid} ({process.command or '?'})"


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
    try:
        there = sorted(pids()) if wanted else []
    except OSError:
        there = []  # no /proc, or no descriptor for it: nobody can say
    for pid in there:
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
    """Of all processes that can be seen."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def is_exiting(pid: int) -> bool:
    """Whether a process is ending, each of its threads: no signal reaches it any more, though its exit may not be told
    yet, since it closes its files before that. Waits for nothing that the process may hold."""
    first = stat(pid)
    if first is None or not int(first[6]) & PF_EXITING:
        return False
    try:
        threads = [stat(f"{pid}/task/{one}") for one in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return False  # it is gone
    return all(one is None or int(one[6]) & PF_EXITING for one in threads)


def stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the third on (state, ppid, pgrp, session, …), None when it is gone."""
    return _name_and_fields(pid)[1] or None


def _name_and_fields(pid: int | str) -> tuple[bytes, list[str]]:
    """Its name, which is in parentheses there and may hold anything, and what comes behind it."""
    head, _, rest = slurp(f"/proc/{pid}/stat").rpartition(b")")
    return head.partition(b"(")[2], rest.decode().split()


def newest_pid() -> bytes:
    """The pid that was given last on this machine (proc(5), loadavg)."""
    return slurp("/proc/loadavg").rpartition(b" ")[2]
