"""A mark that a worker hands down to whatever it starts, and that nothing sheds by accident.

A variable can be cleaned away, and a session or process group can be left. Resource limits are inherited through
fork(2) and execve(2) alike, and are seldom touched (getrlimit(2)). RLIMIT_RTTIME bounds the CPU time of a real-time
process between two system calls; where it was unlimited, a soft limit of tens of thousands of years changes nothing,
and its digits say whose the process is. Needs no privilege.
"""

from __future__ import annotations

import resource
from _blake2 import blake2b  # `hashlib` loads a library besides

from .bounded_reads import slurp

LEAST = 1 << 61  # microseconds: 73,000 years
_LINE = b"Max realtime timeout"


def of(owner: str) -> int:
    """The mark of the worker with that name, which no other has."""
    return LEAST + int.from_bytes(blake2b(owner.encode(), digest_size=7).digest(), "little")


def put(mark: int) -> int | None:
    """Mark this process, and so what it will start. Returns the soft limit it had, for `take_off`.

    None: it has such a limit for what that is meant for, and got no mark.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
    if hard != resource.RLIM_INFINITY or (soft != resource.RLIM_INFINITY and soft < LEAST):
        return None
    resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
    return soft


def give(pid: int, mark: int) -> None:
    """Mark a child that is not reaped, if it still runs and may be marked."""
    try:
        if resource.prlimit(pid, resource.RLIMIT_RTTIME)[1] == resource.RLIM_INFINITY:
            resource.prlimit(pid, resource.RLIMIT_RTTIME, (mark, resource.RLIM_INFINITY))
    except OSError:
        pass


def take_off(soft: int) -> None:
    """Undo `put` for this process; what it has started keeps the mark."""
    try:
        resource.setrlimit(resource.RLIMIT_RTTIME, (soft, resource.RLIM_INFINITY))
    except OSError:
        pass  # the next one has the mark of its own all the same


def read(pid: int) -> int | None:
    """The mark of another process; None: it has none, or is gone."""
    text = slurp(f"/proc/{pid}/limits")
    at = text.find(_LINE)
    words = text[at + len(_LINE) :].split(None, 1) if at >= 0 else []
    return int(words[0]) if words and words[0].isdigit() and int(words[0]) >= LEAST else None
