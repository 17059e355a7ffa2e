"""Whom the guardian has started, and who was left to it. Nothing here waits: what has ended may not be reaped yet.

A process that a debugger holds (ptrace(2)) is dead for everybody, but only the debugger can reap it; its parent can
when the debugger lets go. So "ended", which the pidfd says, and "reaped" are two states: its end is told at once, from
what is known, and it is reaped when the kernel says that it can be (SIGCHLD).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select

from ...system.descriptors import shut
from ..kernel import process_marks
from ..kernel.child_processes import children, listed, own_list, status_of_dead
from ..wire import datagrams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ..wire.links import Link


class Child:
    """A worker or a helper.

    Attributes:
        pid: 0 as long as that is not known.
        link: of whom it is; None: of nobody (any more).
        number: of the request.
        pipe: tells how its start goes on (`process_start.outcome`); -1: it has started.
        program: of a start that goes on.
    """

    __slots__ = ("asked", "link", "mark", "number", "pid", "pidfd", "pipe", "program", "trial")

    def __init__(self, mark: int, number: int, link: Link | None, program: bytes = b"") -> None:
        self.pid = 0
        self.pidfd = -1
        self.mark = mark
        self.number = number
        self.link = link
        self.asked = link, number  # as it was first
        self.pipe = -1
        self.program = program
        self.trial = False

    def is_of(self, link: Link | None, number: int) -> bool:
        return self.link is link and self.number == number


class Children:
    """All children of this process."""

    def __init__(self, epoll: select.epoll) -> None:
        self.running: dict[int, Child] = {}  # by pidfd, until they have ended
        self.unknown: Child | None = None  # is being started, and may be a child of ours that we do not know
        self._by_pid: dict[int, Child] = {}  # until they are reaped
        self._asked: dict[tuple[Link | None, int], Child] = {}  # those that run
        self._epoll = epoll
        # whatever is left to a process becomes a child of its first thread, by which nobody else is started
        self._list = own_list()
        self._spare = -1  # so that there is one descriptor for a look
        self._take_back()
        self._adopted: set[int | None] | None = None  # marks of what was left to us, if we have looked

    def __iter__(self) -> Iterator[Child]:
        return iter(tuple(self.running.values()))

    def add(self, child: Child) -> None:
        """Watch it.

        Raises:
            OSError: no descriptors left; it goes.
        """
        self._by_pid[child.pid] = child
        pidfd = -1
        try:
            pidfd = os.pidfd_open(child.pid)
            self._epoll.register(pidfd, select.EPOLLIN)
        except OSError:
            if pidfd >= 0:
                shut(pidfd)
            self.kill(child)  # it is reaped when it can be
            raise
        self.running[pidfd] = self._asked[child.asked] = child
        child.pidfd = pidfd

    def of(self, link: Link | None, number: int) -> Child | None:
        """The one that was asked for there by that number, if it runs and still belongs there."""
        child = self._asked.get((link, number))
        return child if child is not None and child.is_of(link, number) else None

    def ended(self, pidfd: int) -> tuple[Child, int | None, tuple[Any, ...] | None]:
        """Its pidfd says so: who, with what wait status, and what it has used, as far as that is known."""
        child = self.running.pop(pidfd)
        if self._asked.get(child.asked) is child:
            del self._asked[child.asked]
        try:
            self._epoll.unregister(pidfd)  # closing is not enough: the supervisor holds the same open file
        except OSError:
            pass
        datagrams.close((pidfd,))
        child.pidfd = -1
        try:
            pid, status, rusage = os.wait4(child.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status, rusage = child.pid, None, None
        if pid:
            del self._by_pid[child.pid]
            return child, status, None if rusage is None else tuple(rusage)
        return child, status_of_dead(child.pid), None

    def kill(self, child: Child) -> None:
        """It and its process group."""
        self.signal(os.kill, child, _signal.SIGKILL)
        self.signal(os.killpg, child, _signal.SIGKILL)

    def signal(self, how: Callable[[int, int], None], child: Child, signum: int) -> None:
        if child.pid in self._by_pid:
            try:
                how(child.pid, signum)  # it is not reaped, so pid and group are its own
            except (ProcessLookupError, PermissionError):
                pass

    def find_unknown(self, thread: int) -> None:
        """Which process is it whose start hangs in that thread?"""
        child = self.unknown
        if child is not None and not child.pid:
            try:
                found = [pid for pid in _children_of_thread(thread) if pid not in self._by_pid]
            except OSError:
                return
            if found:
                child.pid = found[-1]
                self._by_pid[child.pid] = child

    def known(self, pid: int) -> None:
        """The one that was being started has that pid; 0: it has none."""
        child, self.unknown = self.unknown, None
        if child is not None and child.pid and child.pid != pid:
            self._by_pid.pop(child.pid, None)

    def close(self) -> None:
        """A look, or the end, begins, which needs descriptors."""
        shut(self._spare)
        self._spare = -1  # the number is somebody else's now

    def _take_back(self) -> None:
        try:
            self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            pass  # the next look has what there is then

    def new_look(self) -> None:
        """What was seen before is old."""
        self._adopted = None

    def has_others(self, child: Child) -> bool:
        """Whether it has left anybody: in its group, or to us with its mark or none. True where that is not known."""
        try:
            os.killpg(child.pid, 0)  # the id of a group that has members is never given to a new process
            return True
        except ProcessLookupError:
            pass
        except OSError:
            return True  # they changed their user
        try:
            if self._adopted is None:  # one look for all that ended together
                self._adopted = {self._mark(pid) for pid in self._strangers()}
        except OSError:
            return True
        return child.mark in self._adopted or None in self._adopted

    def reap_others(self) -> bool:
        """Reap those that were left to us, and who has ended long ago. Whether to look again, after one of our own."""
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if info is None:
                    return False
                child = self._by_pid.get(info.si_pid)
                if child is not None and (child.pidfd >= 0 or child is self.unknown):
                    return True
                starting = child is None and self.unknown is not None and not self.unknown.pid
                if starting and info.si_pid not in self._strangers():
                    return False  # may be the one that is being started
                os.waitpid(info.si_pid, os.WNOHANG)
                self._by_pid.pop(info.si_pid, None)
            except OSError:  # there are no more
                return False

    def left(self) -> list[int]:
        """Who was left to us and is not reaped yet.

        Raises:
            OSError: no descriptors left.
        """
        self.reap_others()
        # twice: the list is not read at one moment, and one that goes may hide its neighbour (proc(5))
        return sorted({pid for _ in range(2) for pid in self._strangers()})

    def _strangers(self) -> list[int]:
        if self._list >= 0:
            return [pid for pid in map(int, listed(self._list).split()) if pid not in self._by_pid]
        self.close()
        try:
            return [pid for pid in children(os.getpid()) if pid not in self._by_pid]
        finally:
            self._take_back()

    def _mark(self, pid: int) -> int | None:
        self.close()
        try:
            return process_marks.read(pid)
        finally:
            self._take_back()


def _children_of_thread(thread: int) -> list[int]:
    fd = os.open(f"/proc/self/task/{thread}/children", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [int(one) for one in listed(fd).split()]
    finally:
        shut(fd)
