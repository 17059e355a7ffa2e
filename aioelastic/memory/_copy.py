"""Copying into segments: by several threads where it is worth it, and not in the thread of an event loop."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

from . import _later
from ._arena import arena
from ._segment import PAGE, Segment, block, gate

_PART = 4 << 20  # bytes worth a thread
THREADS = 4
# bytes after which a copy that nobody wants any more stops; memcpy(3) of less than some 100 MiB is half as fast: it
# writes past the caches only where it thinks they are too small
STEP = 1 << 30


def store(pieces: Sequence[tuple[int, memoryview]], size: int, first: int) -> int:
    """Copy the pieces of a message to their offsets in a segment that nobody uses; a descriptor that holds it.

    Args:
        first: so many of them are there when this returns, in any case.

    Raises:
        ShareLimit: there is no room.
    """
    with gate:
        segment = arena.take(size)
    fd, under_way = -1, False
    try:
        fd = segment.lend()
        what = _later.now()
        for at, (offset, piece) in enumerate(pieces):
            if at >= first and what is not None and what.away is not None and size - offset >= what.away:
                _away(segment, pieces[at:], what)
                under_way = True
                break
            fill(segment, offset, piece)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    finally:
        if not under_way:
            _give(segment)
    return fd


def fill(segment: Segment, offset: int, piece: memoryview, what: _later.later | None = None) -> None:
    """Write there, as long as it is wanted. Into memory that was never used, a write(2) is twice as fast as faults."""
    mapped = segment.address and not piece.readonly
    source = ctypes.addressof(block(piece.nbytes).from_buffer(piece)) if mapped else 0
    at = 0
    while at < piece.nbytes and not (what is not None and what.dropped):
        step = min(STEP, piece.nbytes - at)
        if mapped:
            _copy(segment.address + offset + at, source + at, step)
        else:
            step = os.pwrite(segment.fd, piece[at : at + step], offset + at)
        at += step


def _away(segment: Segment, pieces: Sequence[tuple[int, memoryview]], what: _later.later) -> None:
    """Begin to copy them in a thread; the segment is given back when that is done."""
    from concurrent.futures import Future

    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def work() -> None:
        problem = None
        try:
            for offset, piece in pieces:
                fill(segment, offset, piece, what)
        except BaseException as exc:
            problem = exc
        _give(segment)
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(problem)

    threading.Thread(target=work, name="aioelastic-copy").start()
    what.copies.append(done)


def _give(segment: Segment) -> None:
    with gate:
        arena.give(segment)


def _copy(target: int, source: int, nbytes: int) -> None:
    """memcpy, by several threads where it is worth it: one does not use all that the memory gives."""
    if nbytes < 2 * _PART:
        ctypes.memmove(target, source, nbytes)
        return
    parts = min(THREADS, len(os.sched_getaffinity(0)), nbytes // _PART)
    step = -(-nbytes // parts // PAGE) * PAGE
    pieces = [(target + at, source + at, min(step, nbytes - at)) for at in range(0, nbytes, step)]
    # a foreign call: other threads run meanwhile
    others = [threading.Thread(target=ctypes.memmove, args=one) for one in pieces[1:]]
    for one in others:
        one.start()
    ctypes.memmove(*pieces[0])
    for one in others:
        one.join()
