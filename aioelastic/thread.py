"""One helper thread for work that may block: files, /proc. The event loop never waits for it; it never polls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class HelperThread:
    """Does jobs in the order in which they were given; asleep when there are none; started by the first.

    A thread of our own, never the loop's default executor: that one is the caller's, and its threads outlive us.

    Args:
        loop: where results are told.
        name: the thread's name, as in `ps -L`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None]) -> None:
        """Do `job`, which must not raise, after all earlier ones."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do `work` after all earlier jobs; await its result or exception."""
        future: asyncio.Future[T] = self._loop.create_future()

        def job() -> None:
            try:
                value = work()
            except BaseException as exc:
                self.tell(_settle, future, None, exc)
            else:
                self.tell(_settle, future, value, None)

        self.put(job)
        return future

    def tell(self, callback: Callable[..., object], *args: Any) -> None:
        """From the thread: call on the loop."""
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # the loop was closed: nobody is left to tell

    async def close(self, timeout: float) -> bool:
        """End the thread after its last job. False: it hangs in a system call and is left behind (daemonic)."""
        if self._thread is None:
            return True
        ended: asyncio.Future[None] = self._loop.create_future()
        self._jobs.put(lambda: self.tell(_settle, ended, None, None))
        self._jobs.put(None)
        done, _ = await asyncio.wait({ended}, timeout=timeout)
        if done:
            self._thread.join()  # it has nothing left to do but return
            self._thread = None
        return bool(done)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


async def insist(future: asyncio.Future[T]) -> T:
    """Wait for `future` even while we are being cancelled: for the steps of a clean-up that must not be left out."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    return future.result()


def _settle(future: asyncio.Future[Any], value: Any, exc: BaseException | None) -> None:
    if future.done():
        return
    if exc is None:
        future.set_result(value)
    else:
        future.set_exception(exc)
