"""Memory that is used again: the segments this process has made, warm and mapped.

A page that was never touched costs a fault; copying into fresh memory runs at a tenth of the speed of copying into
memory that is mapped already. So a segment that nobody uses any more stays here for the next array of its size, up to
a limit. Small arrays share segments (`SLAB`), so a thousand of them do not need a thousand descriptors.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from ..checks import check_whole
from . import _segment
from ._segment import PAGE, Segment, create, gate

SLAB = 1 << 20  # bytes of a segment for small arrays
SMALL = 1 << 16  # bytes up to which an array is one
ALIGN = 64
TRIES = 16  # segments of one size that are asked whether they are free, before a new one is made


@dataclass(frozen=True)
class ShareStats:
    """What a process has of shared memory, in bytes, and how it came by it.

    Attributes:
        segments: that this process has made and still has.
        total: bytes in them.
        idle: bytes of those with no view in this process; others may still hold them.
        borrowed: segments of other processes that are in use here.
        made: segments made so far.
        reused: times one was used again instead.
        trimmed: segments given back to the system.
    """

    segments: int
    total: int
    idle: int
    borrowed: int
    made: int
    reused: int
    trimmed: int


class Arena:
    """That of this process. All methods behind the gate, but `settle`.

    Attributes:
        where: the memory that it is for, as `Segment.where`.
    """

    where = ""

    def __init__(self) -> None:
        self.limit = min(2 << 30, os.sysconf("SC_PHYS_PAGES") * PAGE // 4)
        self.directory: str | None = None
        self.made = self.reused = self.trimmed = 0
        self.idle_bytes = 0
        self._own: set[Segment] = set()
        self._idle: dict[int, deque[Segment]] = {}  # by size
        self._order: OrderedDict[Segment, None] = OrderedDict()  # the one that lies longest comes first
        self._slab: Segment | None = None
        self._at = 0

    def take(self, nbytes: int) -> Segment:
        """A segment of at least so many bytes that nobody uses. Its contents are anything. Raises `ShareLimit`."""
        size = rounded(nbytes)
        return self.again(size) or self.own(create(size, self.directory))

    def again(self, size: int) -> Segment | None:
        """One of that size which lies idle, and nobody holds."""
        waiting = self._idle.get(size) or deque()
        for _ in range(min(len(waiting), TRIES)):
            segment = waiting.popleft()
            if segment.is_free():
                self._out_of_idle(segment)
                self.reused += 1
                segment.map()
                return segment
            waiting.append(segment)
        return None

    def own(self, segment: Segment) -> Segment:
        """It has been made."""
        segment.on_idle = self.give
        self._own.add(segment)
        self.made += 1
        return segment

    def give(self, segment: Segment) -> None:
        """It is not used here any more; others may still hold it."""
        if segment.fd < 0 or segment in self._order:
            return  # it belongs to the process that we were forked from
        if segment is self._slab:
            if segment.is_free():
                self._at = 0  # start again at its beginning
            return
        if (segment.path is None) != (self.directory is None):
            self._drop(segment)  # the strategy has changed
            return
        self._idle.setdefault(segment.size, deque()).append(segment)
        self._order[segment] = None
        self.idle_bytes += segment.size
        while self.idle_bytes > self.limit:
            self._drop(next(iter(self._order)))

    def came_back(self, segment: Segment) -> None:
        """One of ours has come back in a message: it is in use again."""
        if segment in self._order:
            self._idle[segment.size].remove(segment)
            self._out_of_idle(segment)

    def part(self, nbytes: int) -> tuple[Segment, Any]:
        """Memory for one array: its segment, and the loan."""
        if nbytes > SMALL:
            segment = self.take(nbytes)
            try:
                return segment, segment.loan(0, nbytes)
            except MemoryError:
                self._drop(segment)
                raise
        if self._slab is None or self._at + nbytes > SLAB:
            full, self._slab = self._slab, None
            if full is not None and not full.loans:
                self.give(full)
            self._slab, self._at = self.take(SLAB), 0
        loan = self._slab.loan(self._at, nbytes)
        self._at += nbytes + -nbytes % ALIGN
        return self._slab, loan

    def begin_slab(self) -> None:
        """What is small and made from now on shares no segment with what is used now."""
        if self._slab is not None and self._slab.loans:
            self._slab = None  # it comes back when they are gone

    def trim(self, keep: int = 0) -> int:
        """Give idle segments back until at most `keep` bytes are left; returns how many bytes went."""
        before = self.idle_bytes
        if self._slab is not None and not self._slab.loans and keep == 0:
            slab, self._slab = self._slab, None
            self.give(slab)
            before = max(before, self.idle_bytes)
        while self.idle_bytes > keep:
            self._drop(next(iter(self._order)))
        return before - self.idle_bytes

    def stats(self) -> ShareStats:
        borrowed = sum(not one.owned and one.where == self.where for one in _segment._known.values())
        total = sum(one.size for one in self._own)
        return ShareStats(len(self._own), total, self.idle_bytes, borrowed, self.made, self.reused, self.trimmed)

    def forget(self) -> None:
        """In a forked copy: nothing of it is ours."""
        limit = self.limit
        self.__init__()  # type: ignore[misc]
        self.limit = limit

    def settle(self) -> None:
        """Wait until all is done that was begun with what nobody uses any more."""

    def _out_of_idle(self, segment: Segment) -> None:
        del self._order[segment]
        self.idle_bytes -= segment.size

    def _drop(self, segment: Segment) -> None:
        if segment in self._order:
            self._idle[segment.size].remove(segment)
            self._out_of_idle(segment)
        self._own.discard(segment)
        segment.close()
        self.trimmed += 1


def rounded(nbytes: int) -> int:
    """The size of the segment for so many bytes: whole pages, at most a quarter more; untouched pages cost nothing."""
    step = max(PAGE, 1 << max(nbytes.bit_length() - 3, 0))
    return max(nbytes + -nbytes % step, step)


arena = Arena()
arenas = [arena]  # behind it those of GPUs
_segment.after_fork.append(arena.forget)


def trim(keep: int = 0) -> int:
    """Give shared memory that lies idle in this process back to the system, that of GPUs too.

    Args:
        keep: bytes that may stay for the next arrays, of the CPU and of each GPU.

    Returns:
        Bytes that went.

    Raises:
        SpecError: `keep` is no whole number from 0.
    """
    check_whole("keep", keep, 0)
    went = 0
    for one in list(arenas):
        one.settle()
        with gate:
            went += one.trim(keep)
        one.settle()
    return went


def stats() -> ShareStats:
    """What this process has of shared memory of the CPU."""
    with gate:
        return arena.stats()
