"""Whether descriptor 0, 1 or 2 still is this program's standard stream.

A daemon closes them, and whatever is opened next gets their numbers: an event loop's own socket, say, which no worker
shall read from and no helper write to.
"""

from __future__ import annotations

import os
import socket
import stat
import struct

from ..errors import SpecError


def standard(number: int) -> int | None:
    """`number`, or None: it is closed, or has become something else of this program's own."""
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
    except OSError:
        return None
    if not kind:
        return None  # an epoll, eventfd or pidfd: nothing that anybody has as a standard stream
    return None if kind == stat.S_IFSOCK and _is_ours(number) else number


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
