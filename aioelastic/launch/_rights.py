"""What this program may do: a worker that may do more takes no more tasks. It is asked before each task, so it is less
than `HostState`, and costs a microsecond."""

from __future__ import annotations

import errno
import os
import resource
import struct
from typing import TypeAlias

from ..child.kernel import libc
from ..child.kernel.bounded_reads import slurp
from ._host_state import at_most

Held: TypeAlias = tuple[int, int, tuple[int, ...], bytes]

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3, linux/capability.h
_HEADER, _DATA = struct.Struct("=Ii"), 24  # struct __user_cap_header_struct, and two of __user_cap_data_struct
_CAPBSET_DROP, _SET_NO_NEW_PRIVS = 24, 38  # linux/prctl.h
_OF_THREADS = (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"NoNewPrivs")
_LIMITS = tuple(range(resource.RLIMIT_RTTIME))  # as in `_host_state`


class Rights:
    """Of this process; for one thread."""

    def __init__(self) -> None:
        names = ("capget", "capset", "prctl")
        self._capget, self._capset, self._prctl = (libc.function(one, holds=True) for one in names)
        # capabilities belong to threads: those of the main thread are what the program thinks of
        self._main, self._mine = (_buffer(_HEADER.pack(_VERSION, thread)) for thread in (os.getpid(), 0))
        self._found = libc.buffer(_DATA)
        self._view = memoryview(self._found).cast("B")

    def now(self) -> Held:
        """User, group, further groups, capabilities."""
        self._capget(self._main, self._found)
        return os.geteuid(), os.getegid(), tuple(os.getgroups()), bytes(self._view)

    def give_up(self) -> None:
        """Have this thread, and what it starts, without what the main thread has given up."""
        theirs, mine = (_status(f"/proc/{which}/status") for which in ("self", "thread-self"))
        if theirs == mine:
            return
        gone = mine.get(b"CapBnd", 0) & ~theirs.get(b"CapBnd", 0)
        refused = any(gone >> one & 1 and self._prctl(_CAPBSET_DROP, one, 0, 0, 0) < 0 for one in range(64))
        if theirs.get(b"NoNewPrivs"):
            self._prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        wanted = self.now()[3]
        self._capget(self._mine, self._found)
        had = bytes(self._view)
        self._view[:] = bytes(one & other for one, other in zip(had, wanted, strict=True))
        if refused or self._capset(self._mine, self._found) < 0:
            raise OSError(errno.EPERM, "this program has given up capabilities that a thread of ours cannot give up")


def hard_limits() -> tuple[int, ...]:
    """Which nobody without a privilege may raise again (setrlimit(2))."""
    return tuple(resource.getrlimit(one)[1] for one in _LIMITS)


def exceed(those: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether one of these limits is higher than that of the others."""
    return those != others and not all(map(at_most, those, others))


def _buffer(content: bytes) -> object:
    made = libc.buffer(len(content))
    memoryview(made).cast("B")[:] = content
    return made


def _status(path: str) -> dict[bytes, int]:
    lines = (line.partition(b":\t") for line in slurp(path, 8192).split(b"\n"))  # none where there is no /proc
    return {key: int(value, 16) for key, _, value in lines if key in _OF_THREADS}
