"""Copying into segments: by several threads where it is worth it, and not in the thread of an event loop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from . import _deferred
from ._arena import ALIGN, arena, threads
from ._forked_copies import after_fork
from .file_mapping import block
from .shared_segments import PAGE, Segment, Use

if TYPE_CHECKING:
    from concurrent.futures import Future

Place: TypeAlias = tuple[Segment, int, memoryview]  # where it goes, and what

_PART = 4 << 20  # bytes worth a thread
# one does not use all that the memory gives. A large piece is cut in no more parts than that: memcpy(3) of less than
# some 100 MiB is half as fast, as it writes past the caches only what they cannot hold
THREADS = 4
REST = 1.0  # seconds after which a thread with nothing to do ends


def store(
    bodies: Sequence[Sequence[memoryview]], fds: list[int], gap: int = 0, now: bool = False, for_others: bool = False
) -> None:
    """Copy each into a segment that nobody uses, its pieces one after the other; descriptors that hold them are added
    to `fds`, at once.

    Args:
        gap: bytes in front of the first.
        for_others: there is nothing else in the segments, nor was, and they are not used again.
        now: they are there when this returns, in any case.

    Raises:
        ShareLimit: there is no room.
    """
    uses, places, nbytes = list[Use](), list[Place](), 0
    for pieces in bodies:
        size = gap
        for piece in pieces:
            size += piece.nbytes + -piece.nbytes % ALIGN
        use = arena.alone(size) if for_others else arena.take(size)
        uses.append(use)
        segment, at = use.segment, gap
        del use  # the threads that copy let go of it
        segment.lend(fds)
        for piece in pieces:
            places.append((segment, at, piece))
            nbytes += piece.nbytes
            at += piece.nbytes + -piece.nbytes % ALIGN
    what = _deferred.now()
    if not now and what is not None and what.away is not None and nbytes >= what.away:
        from concurrent.futures import Future

        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        what.copies.append(done)
        _Copying(uses, places, lambda exc: _settle(done, exc), lambda: not what.dropped).begin()
    elif nbytes >= 2 * _PART:
        answer: SimpleQueue[BaseException | None] = SimpleQueue()
        wanted = [True]
        try:
            _Copying(uses, places, answer.put, lambda: bool(wanted)).begin()
            problem = answer.get()
        except BaseException:  # of a signal's handler
            wanted.clear()
            raise
        if problem is not None:
            raise problem
    else:
        for place in places:
            fill(*place)


def _settle(done: Future[None], problem: BaseException | None) -> None:
    if problem is None:
        done.set_result(None)
    else:
        done.set_exception(problem)


def fill(segment: Segment, offset: int, piece: memoryview) -> None:
    """Write there. Into memory that was never used, a write(2) is twice as fast as page faults."""
    if segment.address and not piece.readonly:
        # a foreign call: other threads run meanwhile
        ctypes.memmove(segment.address + offset, ctypes.addressof(block(piece.nbytes).from_buffer(piece)), piece.nbytes)
        return
    while piece:
        done = os.pwrite(segment.fd, piece, offset)
        piece, offset = piece[done:], offset + done


class _Copying:
    """Pieces that are copied by threads: whoever asked for it may leave, and what they touch is theirs until they have
    done."""

    def __init__(
        self,
        uses: list[Use],
        places: Sequence[Place],
        over: Callable[[BaseException | None], object],
        wanted: Callable[[], bool],
    ) -> None:
        self._uses = uses
        self._shares = _shares(places)
        self._wanted = wanted
        self._left = deque(range(len(self._shares)))  # for each that is not done; the last one calls `over`
        self._over = over
        self._problems: list[BaseException] = []

    def begin(self) -> None:
        """The caller does nothing of it: it would share its CPU with one of them half of the time, as it looks busy to
        the kernel when they begin."""
        pool.do([lambda share=share: self._copy(share) for share in self._shares])  # type: ignore[misc]

    def _copy(self, share: list[Place]) -> None:
        try:
            while share and self._wanted() and not self._problems:
                fill(*share.pop(0))
        except BaseException as exc:
            self._problems.append(exc.with_traceback(None))  # whose frames would hold what they have used
        share.clear()  # this thread may hold the list a little longer
        if self._left.pop() == 0:
            self._uses.clear()
            self._over(self._problems.pop() if self._problems else None)


def _shares(places: Sequence[Place]) -> list[list[Place]]:
    """What each thread is to copy."""
    most = min(THREADS, len(os.sched_getaffinity(0)))
    parts: list[Place] = []
    for segment, offset, piece in places:
        step = -(-piece.nbytes // max(min(most, piece.nbytes // _PART), 1) // PAGE) * PAGE or PAGE
        parts += [(segment, offset + at, piece[at : at + step]) for at in range(0, piece.nbytes, step)]
    return [parts[number::most] for number in range(min(most, len(parts)))]


class _Pool:
    """Threads that stand ready for a second after each piece of work: a queue, and a set of those that there are."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()

    def do(self, work: Sequence[Callable[[], None]]) -> None:
        """Each by a thread, as far as there may be some. It is done even if this is interrupted."""
        deque(map(self._work.put, work), maxlen=0)  # all of it at once
        while len(self._threads) < min(len(work), THREADS):
            thread = threading.Thread(target=self._run, name="aioelastic-copy", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # the system has no more: then here
                self._threads.discard(thread)
                while self._next(0):
                    pass
                return
            except BaseException:  # of a signal's handler; if it runs all the same, it ends by itself
                self._threads.discard(thread)
                raise

    def end(self) -> None:
        """Those that have nothing to do."""
        for _ in list(self._threads):
            self._work.put(None)
        for thread in list(self._threads):
            with contextlib.suppress(RuntimeError):  # it is not started yet, or it is this one
                thread.join()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            while self._next(REST):
                pass
            self._threads.discard(me)
            if self._work.empty():  # who has put something there since has seen that we are gone
                return
            self._threads.add(me)

    def _next(self, seconds: float) -> bool:
        """Do what is next. False: there was nothing in that time, or this thread shall end."""
        try:
            work = self._work.get(timeout=seconds) if seconds else self._work.get_nowait()
        except Empty:
            return False
        if work is not None:
            work()
        return work is not None


pool = _Pool()
threads.append(pool.end)
after_fork.append(pool.__init__)  # type: ignore[misc]
