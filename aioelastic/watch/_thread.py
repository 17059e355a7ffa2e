"""waitid(2) in a thread: for kernels and sandboxes without pidfd. One thread per child, asleep until the exit."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable


class ThreadWatch:
    """Blocks in `waitid(P_PID, pid, WEXITED | WNOWAIT)`: it learns of the exit and leaves the child unreaped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], None]] = {}

    def add_exit(self, pid: int, callback: Callable[[], None]) -> None:
        self._callbacks[pid] = callback
        threading.Thread(target=self._wait, args=(pid,), name=f"aioelastic-wait-{pid}", daemon=True).start()

    def remove(self, pid: int) -> None:
        self._callbacks.pop(pid, None)

    def _wait(self, pid: int) -> None:
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            pass  # reaped by somebody else: that is an exit too
        try:
            self._loop.call_soon_threadsafe(self._tell, pid, threading.current_thread())
        except RuntimeError:
            pass  # the loop was closed: nobody is left to tell

    def _tell(self, pid: int, thread: threading.Thread) -> None:
        thread.join()  # this was the last thing it did: no thread of ours is left once the exit is known
        callback = self._callbacks.get(pid)
        if callback is not None:
            callback()
