"""The numbers 0, 1 and 2: this program's standard streams, unless it has closed them, as daemons do.

Whoever prints, a C library or `print()` itself, writes to a number. Were it that of one of our sockets or log files,
that text would go there: so while groups live, a place-holder has a number that is free. It answers as a closed
descriptor does: reading and writing fail with EBADF. What else has got such a number, an event loop's own socket, say,
no worker shall read from, and no helper write to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
import threading

from ..model.errors import SpecError
from ..system import forked_copies
from ..system.descriptors import shut

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
                    shut(made)  # somebody else was quicker
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
                        shut(fd)
            _held.clear()


@forked_copies.in_copies
def _renew() -> None:
    """Their users are the original's."""
    global _lock, _users
    _lock, _users = threading.Lock(), 1
    let_standard_go()


def standard(number: int) -> int | None:
    """`number`, or None: it is closed, or has become something else of this program's own."""
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_PATH:
            return None  # a place-holder
    except OSError:
        return None
    if not kind:
        return None  # an epoll, eventfd or pidfd: nothing that anybody has as a standard stream
    return None if kind == stat.S_IFSOCK and _is_ours(number) else number


def above_two(fd: int) -> int:
    """Our own standard streams may be closed: keep clear of the child's."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        shut(fd)


def check_input() -> None:
    """Whether workers may have our standard input (`Command(stdin="inherit")`).

    Workers are in sessions of their own, so the terminal does not hold them up as it holds up a program in its
    background (SIGTTIN): they would take what is typed for the shell.

    Raises:
        SpecError: it is that terminal.
    """
    if standard(0) is None or not os.isatty(0):
        return
    try:
        foreground = os.tcgetpgrp(0)
    except OSError:
        return  # not our controlling terminal: nobody's background
    if foreground != os.getpgrp():
        problem = "is the terminal in whose background this program runs"
        raise SpecError("stdin", "inherit", problem, "run it in the foreground, or redirect its standard input")


def _is_ours(number: int) -> bool:
    """Whether this process has made that socket together with its other end (SO_PEERCRED, unix(7))."""
    with socket.socket(fileno=os.dup(number)) as one:
        try:
            told = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return False
    return bool(struct.unpack("3i", told)[0] == os.getpid())
