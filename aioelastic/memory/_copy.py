"""Copying into segments: by several threads where it is worth it, and not in the thread of an event loop."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from . import _later
from ._arena import arena
from ._segment import PAGE, Segment, block, gate

Pieces: TypeAlias = Sequence[tuple[int, memoryview]]  # where they go, and what

_PART = 4 << 20  # bytes worth a thread
# one does not use all that the memory gives. A large piece is cut in no more parts than that: memcpy(3) of less than
# some 100 MiB is half as fast, as it writes past the caches only what they cannot hold
THREADS = 4


def store(pieces: Pieces, size: int, first: int) -> int:
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
        for offset, piece in pieces[:first]:
            fill(segment, offset, piece)
        rest = pieces[first:]
        nbytes = sum(piece.nbytes for _, piece in rest)
        what = _later.now()
        if what is not None and what.away is not None and nbytes >= what.away:
            _away(segment, rest, what)
            under_way = True
        elif nbytes >= 2 * _PART:
            _wait(segment, rest)
        else:
            for offset, piece in rest:
                fill(segment, offset, piece)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    finally:
        if not under_way:
            _give(segment)
    return fd


def fill(segment: Segment, offset: int, piece: memoryview) -> None:
    """Write there. Into memory that was never used, a write(2) is twice as fast as page faults."""
    if segment.address and not piece.readonly:
        # a foreign call: other threads run meanwhile
        ctypes.memmove(segment.address + offset, ctypes.addressof(block(piece.nbytes).from_buffer(piece)), piece.nbytes)
        return
    while piece:
        done = os.pwrite(segment.fd, piece, offset)
        piece, offset = piece[done:], offset + done


def _away(segment: Segment, pieces: Pieces, what: _later.later) -> None:
    """Begin to copy them; the segment is given back when that is done."""
    from concurrent.futures import Future

    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def over(problem: BaseException | None) -> None:
        _give(segment)
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(problem)

    _begin(segment, pieces, over, lambda: not what.dropped)
    what.copies.append(done)


def _wait(segment: Segment, pieces: Pieces) -> None:
    """Copy them."""
    problems: list[BaseException | None] = []
    done = threading.Lock()
    done.acquire()

    def over(problem: BaseException | None) -> None:
        problems.append(problem)
        done.release()

    _begin(segment, pieces, over)
    done.acquire()
    if problems[0] is not None:
        raise problems[0]


def _begin(
    segment: Segment,
    pieces: Pieces,
    over: Callable[[BaseException | None], None],
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Copy them by several threads, the last of which calls `over`. What is not wanted any more is left out.

    The caller does nothing of it: it would share its CPU with one of them half of the time, as it looks busy to the
    kernel when they begin.
    """
    most = min(THREADS, len(os.sched_getaffinity(0)))
    parts: list[tuple[int, memoryview]] = []
    for offset, piece in pieces:
        step = -(-piece.nbytes // max(min(most, piece.nbytes // _PART), 1) // PAGE) * PAGE or PAGE
        parts += [(offset + at, piece[at : at + step]) for at in range(0, piece.nbytes, step)]
    shares = [parts[number::most] for number in range(min(most, len(parts)))]
    lock, left = threading.Lock(), [len(shares)]
    problems: list[BaseException] = []

    def work(mine: Pieces) -> None:
        try:
            for offset, piece in mine:
                if wanted() and not problems:
                    fill(segment, offset, piece)
        except BaseException as exc:
            problems.append(exc)
        with lock:
            left[0] -= 1
            last = not left[0]
        if last:
            over(problems[0] if problems else None)

    for mine in shares:
        thread = threading.Thread(target=work, args=(mine,), name="aioelastic-copy")
        try:
            thread.start()
        except RuntimeError:  # the system has no more: then here
            work(mine)


def _give(segment: Segment) -> None:
    with gate:
        arena.give(segment)
