"""Descriptors: the one place where this program calls close(2) in a clean-up, and steps that nothing comes between.

A signal's handler runs between two instructions of Python, wherever the main thread is, and may raise. What one call
into C does is never cut in two: so what makes a descriptor also puts it into a list, by such a call, and what closes
one also takes it out.
"""

from __future__ import annotations

import os
import select
from itertools import repeat

TYPE_CHECKING = False  # `typing` takes 5 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def owned(make: Callable[..., int], *args: Any) -> select.epoll:
    """A descriptor that `make(*args)` opens, as an object that closes it with its last reference: in C, so that no
    exception of a signal's handler can come between the two, or in the middle of the closing. Of `epoll` only that is
    used: it takes any descriptor, and says nothing when it is left to the garbage collector.

    Raises:
        BaseException: whatever `make` raises.
    """
    return next(map(select.epoll.fromfd, map(make, *zip(args))))


def shut(*fds: int) -> None:
    """Close them; a negative number is none. Whatever close(2) says (EIO, ENOSPC, EDQUOT, EINTR: of network file
    systems), each is closed, and what else there is to be tidied up is not left out for it.

    Not for a file that we have written to: what close(2) says of it is told (`streams/_files.py`). Where the file is
    the program's own stdout, of which we had a duplicate, the program's own close(2) tells."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def shut_all(fds: list[int]) -> None:
    """As `shut`, and they are out of the list: who is interrupted finds those in it that are still open."""
    while fds:
        try:
            list(map(os.close, map(fds.pop, repeat(-1, len(fds)))))
        except (OSError, IndexError):
            pass


def into(found: list[Any], make: Callable[..., object], *args: object) -> None:
    """Append what `make(*args)` returns, of one argument or more; in the same step, if `make` is of C."""
    found.extend(map(make, *zip(args)))


def reopened(found: list[int], fd: int, how: int = os.O_RDWR) -> None:
    """Append a descriptor of the same file with an open file description, and so locks, of its own; as `into`."""
    into(found, os.open, f"/proc/self/fd/{fd}", how | os.O_CLOEXEC)
