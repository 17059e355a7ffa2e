"""pidfd_open(2): a file descriptor that becomes readable when the process ends. No thread, no signal."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

# exits told per turn of the loop: a thousand at once must not keep it from its owner
BATCH = 8


class PidfdWatch:
    """All pidfds of one launcher in one epoll(7) of its own, which the loop watches as one descriptor.

    Not one `add_reader` each: the kernel queues them in an epoll in the order in which they ended, so "who failed
    first" is the kernel's answer on every event loop (uvloop hands new descriptors to its own epoll only later). It is
    also one syscall per child instead of the loop's book-keeping. The epoll exists while there is something in it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll: select.epoll | None = None
        self._callbacks: dict[int, Callable[[], None]] = {}

    def add(self, pid: int, pidfd: int | None, on_exit: Callable[[], None]) -> None:
        assert pidfd is not None
        if self._epoll is None:
            self._epoll = select.epoll()  # close-on-exec
            self._loop.add_reader(self._epoll.fileno(), self._ready)
        self._epoll.register(pidfd, select.EPOLLIN)
        self._callbacks[pidfd] = on_exit

    def discard(self, pid: int, pidfd: int | None) -> None:
        if pidfd is None or self._callbacks.pop(pidfd, None) is None or self._epoll is None:
            return
        self._epoll.unregister(pidfd)
        if not self._callbacks:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _ready(self) -> None:
        assert self._epoll is not None
        for pidfd, _ in self._epoll.poll(0, BATCH):
            callback = self._callbacks.get(pidfd)
            if callback is not None:  # not discarded by one that came before it
                callback()
