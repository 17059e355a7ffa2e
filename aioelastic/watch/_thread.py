"""waitid(2) in a thread: for kernels and sandboxes without pidfd. One thread per child, asleep until the exit."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable


class ThreadWatch:
    """Blocks in `waitid(P_PID, pid, WEXITED | WNOWAIT)`: it learns of the exit and leaves the child unreaped."""

    __slots__ = ("_cancelled", "_loop", "_pid")

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int) -> None:
        self._loop = loop
        self._pid = pid
        self._cancelled = False

    def start(self, on_exit: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._wait, args=(on_exit,), name=f"aioelastic-wait-{self._pid}", daemon=True)
        thread.start()

    def cancel(self) -> None:
        self._cancelled = True

    def _wait(self, on_exit: Callable[[], None]) -> None:
        try:
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            pass  # reaped by somebody else: that is an exit too
        try:
            self._loop.call_soon_threadsafe(self._tell, on_exit)
        except RuntimeError:
            pass  # the loop was closed: nobody is left to tell

    def _tell(self, on_exit: Callable[[], None]) -> None:
        if not self._cancelled:
            on_exit()
