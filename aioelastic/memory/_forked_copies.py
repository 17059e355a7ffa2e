"""A forked copy of this process may use the memory that it inherits, and owns nothing."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..system.descriptors import into, shut, shut_all
from .shared_segments import PLACES, forks, made_by, named, segments


def _before_fork() -> None:
    """What is used now is used by the copy, too, whose hold on it cannot be told from ours: it is the same open file.
    So we never use it again, and it is free when both are done with it."""
    forks.append(None)
    for segment in segments():
        if segment.owned and segment.in_use:
            segment.has_copies = True
    for prepare in before_fork:
        prepare()


def _in_child() -> None:
    forks.clear()
    for segment in segments():
        segment.disown()
    for forget in after_fork:
        forget()
    _let_go()


def _let_go() -> None:
    """In a forked copy: of messages that were under way. Their numbers stay taken: somebody may still close them."""
    null: list[int] = []
    try:
        into(null, os.open, os.devnull, os.O_RDWR | os.O_CLOEXEC)
        found = [int(one) for one in os.listdir("/proc/self/fd")]
    except OSError:
        shut_all(null)  # no descriptors left: it holds them as long as it lives
        return
    mine = set(descriptors())
    for fd in found:
        try:
            name = named(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue  # that of the list itself
        if fd not in mine and (name == PLACES or made_by(name) is not None):
            try:
                os.dup2(null[0], fd, inheritable=False)
            except OSError:
                shut(fd)  # above the limit of now: nobody gets that number
    shut_all(null)


def descriptors() -> list[int]:
    """Those that a copied process must keep to use what it inherits."""
    return sorted(fd for one in segments() for fd in (one.fd, *one.beside()))


def peer_gone() -> None:
    """A process has ended that may have used what we share: who waits for it shall look again."""
    for look in list(after_exit):
        look()


after_exit: list[Callable[[], None]] = []
before_fork: list[Callable[[], None]] = []
after_fork: list[Callable[[], None]] = []
os.register_at_fork(before=_before_fork, after_in_parent=forks.pop, after_in_child=_in_child)
