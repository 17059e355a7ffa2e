"""The numbers 0, 1 and 2, in a program that has closed them (a daemon): while groups live, nothing else gets them.

Whoever prints, a C library or `print()` itself, writes to a number. Were it that of one of our sockets or log files,
that text would go there. A place-holder answers as a closed descriptor does: reading and writing fail with EBADF.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading

_lock = threading.Lock()
_users = 0
_held: set[int] = set()


def keep_standard() -> None:
    """From now on, until `let_standard_go()` was called as often."""
    global _users
    with _lock:
        _users += 1
    hold_standard()


def hold_standard() -> None:
    """The program may have closed one since."""
    for fd in range(3):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            with _lock, contextlib.suppress(OSError):
                if _users and (made := os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)) != fd:
                    os.close(made)  # somebody else was quicker
                elif _users:
                    _held.add(fd)


def let_standard_go() -> None:
    """The last one closes what it has opened, unless the program has put something else there."""
    global _users
    with _lock:
        _users -= 1
        if not _users:
            for fd in _held:
                with contextlib.suppress(OSError):
                    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
                        os.close(fd)
            _held.clear()
