"""One helper thread for work that may block: files, /proc. The event loop never waits for it; it never polls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ..model.errors import SpecError
from . import forked_copies
from .waiting import T, nothing, settle, settled

GATHER = 0.002  # seconds


STUCK = 0.25  # seconds after which a job is slow enough that others are done beside it


class InterpreterEnds(Exception):
    """See `starts_no_more`."""


def starts_no_more(exc: RuntimeError) -> bool:
    """Why a thread could not be started: Python 3.12 starts none once the main thread has ended, though executors have
    work to finish then. Who needs one does without."""
    return "interpreter shutdown" in str(exc)


class JobThread(threading.Thread):
    """One that says whether it was told to end, or another does its work: it will end then, though perhaps nobody waits
    for that any more."""

    told_to_end = False


class HelperThread:
    """Does jobs in the order in which they were given; asleep when there are none; started by the first; survives them.

    A thread of our own, never the loop's default executor: that one is the caller's, and its threads outlive us. A job
    that hangs in the kernel cannot be ended: it keeps its thread, and another one does the rest (`known`).

    Args:
        loop: where results are told.
        name: the thread's name, as in `ps -L`, which shows 15 characters of it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self.loop = loop
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: JobThread | None = None  # None: there is none, or it is to end
        self._owner: threading.Thread | None = None  # of the jobs: the last one that was begun
        self._news: list[tuple[Callable[..., object], tuple[Any, ...]]] = []  # the thread's own
        self._news_since = 0.0
        self._began: float | None = None  # when the job that is being done was begun
        self._lost = False
        forked_copies.register(self)

    def put(self, job: Callable[[], None]) -> None:
        """Do `job` after all earlier ones. What it raises is told to the loop's exception handler.

        Raises:
            SpecError: it is the first job, and this process may have no more threads.
        """
        if self._lost:
            return
        if self._thread is None:
            try:
                self._begin()
            except InterpreterEnds:
                self._do(job)
                return
        self._jobs.put(job)

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do `work` after all earlier jobs; await its result or exception."""
        future: asyncio.Future[T] = self.loop.create_future()
        if self._lost:
            future.cancel()
            return future

        def job() -> None:
            try:
                value = work()
            except BaseException as exc:  # it is the caller's
                self.tell(settle, future, None, exc)
            else:
                self.tell(settle, future, value, None)

        self.put(job)
        return future

    async def known(self, future: asyncio.Future[T], within: float, otherwise: T) -> T:
        """What a job finds out, waited for even while we are being cancelled; `otherwise` if that is not known within
        so many seconds. What the thread does then, it may go on to do, and another does what comes after it."""
        if await settled(future, within):
            return future.result()
        self.relieve()
        return otherwise

    def relieve(self) -> None:
        """If the job that is being done hangs, let another thread do the rest."""
        stuck = self._thread
        if stuck is not None and self._began is not None and time.monotonic() - self._began > STUCK:
            with contextlib.suppress(SpecError, InterpreterEnds):  # then the rest is not known either
                self._begin()
                stuck.told_to_end = True
                self._jobs.put(nothing)  # what earlier jobs have told is delivered after one

    def tell(self, callback: Callable[..., object], *args: Any) -> None:
        """From a job: call on the loop. What several jobs tell within 2 ms wakes the loop once."""
        if self._owner is not threading.current_thread():  # it was relieved
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self.loop.call_soon_threadsafe(callback, *args)
            return
        if not self._news:
            self._news_since = time.monotonic()
        self._news.append((callback, args))

    def end(self) -> asyncio.Future[None]:
        """Let the thread end after its last job; the future is done when it has. It may hang in a system call for ever
        (it is daemonic): bound the wait."""
        ended: asyncio.Future[None] = self.loop.create_future()
        thread, self._thread = self._thread, None
        if thread is None:
            ended.set_result(None)
        else:
            thread.told_to_end = True
            self._jobs.put(lambda: self._last(ended))
            self._jobs.put(None)
        return ended

    def disown(self) -> list[int]:
        """See `forked_copies`: there is no thread in the copy."""
        self._lost, self._thread = True, None
        return []

    def _begin(self) -> None:
        thread = JobThread(target=self._run, name=self._name, daemon=True)
        before, self._owner = self._owner, thread
        try:
            thread.start()
        except RuntimeError as exc:
            self._owner = before
            if starts_no_more(exc):
                raise InterpreterEnds from None
            remedy = "raise `ulimit -u`, or pids.max of the control group"
            raise SpecError("thread", self._name, f"cannot be had: {exc}", remedy) from None
        self._thread = thread

    def _last(self, ended: asyncio.Future[None]) -> None:
        self.tell(_ended, threading.current_thread(), ended)
        self._news_since = 0.0  # nothing comes after it

    def _run(self) -> None:
        me = threading.current_thread()
        self._do(lambda: tell_kernel(self._name))
        while (job := self._jobs.get()) is not None:
            self._began = time.monotonic()
            self._do(job)
            if self._owner is not me:  # it took so long that another does the rest
                return
            self._began = None
            if self._news and (self._jobs.empty() or time.monotonic() - self._news_since > GATHER):
                news, self._news = self._news, []
                try:
                    self.loop.call_soon_threadsafe(self._deliver, news)
                except RuntimeError:
                    pass  # the loop was closed: nobody is left to tell

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as exc:  # whatever is wrong with this one: the thread has others to do
            self.tell(self._failed, job, exc)

    def _failed(self, job: Callable[[], None], exc: BaseException) -> None:
        context = {"message": f"a job of the thread {self._name} failed: {job}", "exception": exc}
        self.loop.call_exception_handler(context)

    def _deliver(self, news: list[tuple[Callable[..., object], tuple[Any, ...]]]) -> None:
        for callback, args in news:
            self.loop.call_soon(callback, *args)  # each by itself: one that raises costs the others nothing


def tell_kernel(name: str) -> None:
    """That name of this thread; Python itself does so from 3.14 on."""
    with contextlib.suppress(OSError), open("/proc/thread-self/comm", "wb") as file:
        file.write(name.encode())


def _ended(thread: threading.Thread, ended: asyncio.Future[None]) -> None:
    thread.join()  # it has nothing left to do but return
    settle(ended, None, None)
