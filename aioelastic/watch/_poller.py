"""All descriptors of a group in one epoll(7) of its own, which the event loop watches as one."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable

from ..system import forked_copies

BATCH = 8  # events taken from the kernel at once
SLICE = 0.0005  # seconds after which the loop gets its turn, however much there is to do


class Poller:
    """Calls back when a pidfd says that its process has ended, or a pipe that there is something in it.

    Not one `add_reader` each: the kernel queues them in an epoll in the order in which they became ready, so "who
    failed first" is the kernel's answer on every event loop (uvloop hands new descriptors to its own epoll only
    later); it costs one syscall each instead of the loop's book-keeping; and what follows at once, as the exit does
    on the end of the output, is seen without a turn of the loop. A busy pipe is read until the slice is over.
    The epoll exists while there is something in it, or while it is `kept`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll: select.epoll | None = None
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._pipes: set[int] = set()
        self._kept = False
        self._lost = False
        forked_copies.register(self)

    def keep(self) -> None:
        """Keep the epoll until `let_go()`, though it be empty at times: making one costs what ten starts should."""
        self._kept = True

    def let_go(self) -> None:
        """Undo that."""
        self._kept = False
        self._close_if_unused()

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` whenever `fd` is readable, until `remove(fd)`."""
        self._add(fd, callback)
        self._pipes.add(fd)

    def add_exit(self, pidfd: int, callback: Callable[[], None]) -> None:
        """The same for a pidfd: exits come before data."""
        self._add(pidfd, callback)

    def remove(self, fd: int) -> None:
        """No more calls for it. To be called before `fd` is closed; does nothing when it is not there."""
        if self._callbacks.pop(fd, None) is None or self._epoll is None:
            return
        self._pipes.discard(fd)
        self._epoll.unregister(fd)
        self._close_if_unused()

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        self._lost = True
        self._callbacks.clear()
        self._pipes.clear()
        epoll, self._epoll = self._epoll, None
        if epoll is None:
            return []
        number = epoll.fileno()
        epoll.close()  # the object would do it later
        return [number]

    def _close_if_unused(self) -> None:
        if self._epoll is not None and not self._callbacks and not self._kept:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _add(self, fd: int, callback: Callable[[], object]) -> None:
        if self._lost:
            return
        if self._epoll is None:
            self._epoll = select.epoll()  # close-on-exec
            self._loop.add_reader(self._epoll.fileno(), self._ready)
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def _ready(self) -> None:
        if self._epoll is None:
            return  # in a forked copy
        events = self._epoll.poll(0, BATCH)
        if events and events[-1][1] == select.EPOLLHUP and not self._exits(events):
            # an output has just ended: most likely its process is dying, and our waking up took the CPU from it
            os.sched_yield()
            events = self._epoll.poll(0, BATCH)
        until = time.monotonic() + SLICE
        while events:
            if exits := self._exits(events):
                # data can wait for the next turn, and whoever awaits these comes before it; and until they are
                # reaped, which is then too, another look would show them again
                self._call(exits, until)
                return
            if not self._call([fd for fd, _ in events], until) or self._epoll is None:
                return
            events = self._epoll.poll(0, BATCH)

    def _exits(self, events: list[tuple[int, int]]) -> list[int]:
        return [fd for fd, _ in events if fd not in self._pipes]

    def _call(self, fds: list[int], until: float) -> bool:
        """Whether there is time left. What there was none for, the kernel shows again, in its order."""
        for fd in fds:
            callback = self._callbacks.get(fd)
            if callback is not None:  # not removed by one that came before it
                callback()
            if time.monotonic() > until:
                return False
        return True
