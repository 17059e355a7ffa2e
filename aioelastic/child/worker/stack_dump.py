"""How a worker shows where it is: at a signal, faulthandler writes the stacks of all its threads into a memfd.

It takes part by holding that memfd, which the supervisor finds in /proc, and by catching the signal. Nothing is
promised anywhere else: what is closed, or replaced by execve(2), is not there any more, and is not signalled.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import faulthandler
import os

from ...system.descriptors import shut

SIGNAL: int = _signal.SIGRTMAX - 2
NAME = "aioelastic-stacks"  # as /proc shows it: "/memfd:aioelastic-stacks (deleted)"

_fd: int | None = None


def offer() -> None:
    """Take part from now on. Costs a descriptor; no thread, no wake-up. A handler of the user's own stays."""
    global _fd
    if _fd is not None or callable(_signal.getsignal(SIGNAL)):
        return
    try:
        made = os.memfd_create(NAME, os.MFD_CLOEXEC)
        try:
            # opened by name: since Linux 6.14 only what is written through such a descriptor is told by inotify(7)
            fd = os.open(f"/proc/self/fd/{made}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        finally:
            shut(made)
    except OSError:
        return  # out of descriptors, or no /proc: then it has no stacks to show
    try:
        faulthandler.register(SIGNAL, file=fd, all_threads=True, chain=False)
    except (OSError, ValueError, RuntimeError):
        shut(fd)
        return
    _fd = fd


def forget() -> None:
    """In a forked copy of a process, which has stacks of its own to show. A handler of the user's own stays."""
    global _fd
    if _fd is not None:
        faulthandler.unregister(SIGNAL)
        shut(_fd)
        _fd = None
