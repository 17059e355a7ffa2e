"""Whether descriptor 0, 1 or 2 still is this program's standard stream.

A daemon closes them, and whatever is opened next gets their numbers: an event loop's own socket, say, which no worker
shall read from and no helper write to.
"""

from __future__ import annotations

import os
import socket
import stat
import struct


def standard(number: int) -> int | None:
    """`number`, or None: it is closed, or has become something else of this program's own."""
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
    except OSError:
        return None
    if not kind:
        return None  # an epoll, eventfd or pidfd: nothing that anybody has as a standard stream
    return None if kind == stat.S_IFSOCK and _is_ours(number) else number


def _is_ours(number: int) -> bool:
    """Whether this process has made that socket together with its other end (SO_PEERCRED, unix(7))."""
    with socket.socket(fileno=os.dup(number)) as one:
        try:
            told = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return False
    return bool(struct.unpack("3i", told)[0] == os.getpid())
