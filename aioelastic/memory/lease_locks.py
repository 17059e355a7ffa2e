"""Open file descriptions of a segment: a shared flock(2) on one holds the segment (see `shared_segments`)."""

from __future__ import annotations

import fcntl
import os
import select
import time

from ..system.descriptors import owned
from ._errors import ShareLimit, ShareLost

_TRIES, _REST = 20, 0.001  # at a lock, and seconds between two


def lease(fd: int) -> None:
    """Hold the segment of this open file description. Only its owner locks it for itself, for a moment in which nobody
    uses it; what lasts longer is somebody's who means no good. Raises `ShareLost`."""
    for left in range(_TRIES, -1, -1):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise ShareLost("another process keeps a shared segment locked for itself (flock(2))") from None
            time.sleep(_REST)


def held(fd: int) -> select.epoll:
    """As `opened`, with a lease of this process. Raises `ShareLimit`, `ShareLost`."""
    mine = opened(fd)
    lease(mine.fileno())
    return mine


def opened(fd: int, read_only: bool = False) -> select.epoll:
    """The same file by a description of its own. Raises `ShareLimit`."""
    try:
        how = os.O_RDONLY if read_only else os.O_RDWR
        return owned(os.open, f"/proc/self/fd/{fd}", how | os.O_CLOEXEC)
    except OSError as exc:
        raise ShareLimit(f"cannot open a shared segment: {exc}") from exc
