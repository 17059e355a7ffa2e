"""pidfd_open(2): a file descriptor that becomes readable when the process ends. No thread, no signal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class PidfdWatch:
    """Watches through the loop's own selector; the pidfd stays the caller's."""

    __slots__ = ("_loop", "_pidfd")

    def __init__(self, loop: asyncio.AbstractEventLoop, pidfd: int) -> None:
        self._loop = loop
        self._pidfd = pidfd

    def start(self, on_exit: Callable[[], None]) -> None:
        self._loop.add_reader(self._pidfd, on_exit)

    def cancel(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._pidfd)
