"""Memory that is used again: the segments this process has made, warm and mapped.

A page that was never touched costs a fault; copying into fresh memory runs at a tenth of the speed of copying into
memory that is mapped already. So a segment that nobody uses any more stays here for the next array of its size, up to
a limit. Small arrays share segments, so a thousand of them do not need a thousand descriptors.

As in `shared_segments`, nothing is locked. Who takes a segment has taken it out of the table, by one operation, before
anything else; while it is idle the table alone refers to it, and when it is used its uses do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..model.frozen import dataclass
from ..model.validation import check_whole
from ..system import shared_memory_names
from . import _limits, shared_segments
from ._errors import ShareLimit
from ._forked_copies import after_fork
from .shared_segments import PAGE, Segment, Use, create, segments

ALIGN = 64
IDLE = 128  # segments that lie idle here, if there are so many descriptors (`_limits.few`); others may keep any number
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


class _Slab:
    """A segment for small arrays, and where the next one begins: whoever makes that takes it out meanwhile."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.next = deque((0,))


class Arena:
    """That of this process.

    Attributes:
        limit: bytes that may lie idle; None: what `_limits.idle` says.
        below: where the directory of its files is; None: they have no names.
        where: the memory that it is for, as `Segment.where`.
        slab: bytes of a segment for small arrays.
        small: bytes up to which an array is one.
        align: bytes, of arrays in one segment.
        grain: a segment is a multiple of so many bytes.
    """

    where = ""
    slab, small, align, grain = 1 << 20, 1 << 16, ALIGN, PAGE

    def __init__(self) -> None:
        self.limit: int | None = None
        self.below: str | None = None
        self.made = self.reused = self.trimmed = 0
        self.idle: dict[Segment, None] = {}  # the one that lies longest comes first
        self._slab: _Slab | None = None

    def take(self, nbytes: int) -> Use:
        """A segment of at least so many bytes that nobody else uses. Its contents are anything. Raises `ShareLimit`."""
        size = rounded(nbytes, self.grain)
        return self._again(size) or Use(self._new(size))

    def _again(self, size: int) -> Use | None:
        """One of that size which lies idle, and nobody holds. Its variables are gone before another is made, and with
        them what they hold."""
        tries = TRIES
        for segment in list(self.idle):
            if segment.size != size:
                continue
            tries -= 1
            if tries < 0:
                break
            begun = segment.begun
            if self.idle.pop(segment, self) is self or segment.uses:
                continue  # somebody else has taken it
            if segment.is_free() and not segment.in_use and segment.begun == begun:
                use = Use(segment)
                segment.map()
                self.reused += 1
                return use
            if segment.begun == begun:  # else it has come back in a message, and its use has put it there, or will
                self.idle[segment] = None
        return None

    def give(self, segment: Segment) -> None:
        """It is not used here any more; others may still hold it."""
        slab = self._slab
        if slab is not None and slab.segment is segment:
            if slab.next and slab.next[0] <= self.slab // 2:
                return  # for the next small ones
            self._slab = None
            if segment.uses:
                return  # somebody has just taken a part: its end comes
            if segment.is_free():
                self._slab = _Slab(segment)  # and begins anew
                return
        if segment.has_copies or (segment.path is None) != (self.below is None):
            self.trimmed += 1
            return  # its last reference goes
        self.idle[segment] = None
        total = sum(one.size for one in list(self.idle))
        self._keep(_limits.idle(self.below, total) if self.limit is None else self.limit, _limits.few(IDLE))

    def came_back(self, segment: Segment) -> None:
        """One of ours has come back in a message, and is in use again."""
        self.idle.pop(segment, None)

    def alone(self, nbytes: int) -> Use:
        """A segment for one thing, zeroed, which is never used for another. Raises `ShareLimit`."""
        return Use(self._made(nbytes, isolated=True))

    def part(self, nbytes: int, isolated: bool = False) -> Any:
        """Memory for one array: a loan. Raises `ShareLimit`."""
        if isolated:
            use, at = self.alone(nbytes), 0
        elif nbytes > self.small:
            use, at = self.take(nbytes), 0
        else:
            use, at = self._in_slab(nbytes)
        return use.segment.loan(at, nbytes)

    def _in_slab(self, nbytes: int) -> tuple[Use, int]:
        """The segment for small arrays, used from now on, and where in it there is room."""
        slab = self._slab
        if slab is not None:
            use = Use(slab.segment)
            try:
                at = slab.next.pop()
            except IndexError:
                at = self.slab  # another thread makes one, or who is interrupted by this
            if slab is self._slab and at + nbytes <= self.slab:  # else it was given back before it was used
                slab.next.append(at + nbytes + -nbytes % self.align)
                return use, at
            del use
        use = self.take(self.slab)
        slab = _Slab(use.segment)
        slab.next.append(slab.next.pop() + nbytes + -nbytes % self.align)
        self._slab = slab
        return use, 0

    def begin_slab(self) -> None:
        """What is small and made from now on shares no segment with what is used now."""
        self._slab = None

    def trim(self, keep: int = 0) -> int:
        """Give idle segments back until at most `keep` bytes are left; returns how many bytes went."""
        shared_segments.sweep()
        slab = self._slab
        if slab is not None and not slab.segment.in_use:  # whoever made it was interrupted
            self._slab = None
            self.idle[slab.segment] = None
        return self._keep(keep, _limits.few(IDLE))

    def stats(self) -> ShareStats:
        found = [one for one in segments() if one.where == self.where]
        own = [one for one in found if one.owned]
        total, idle = sum(one.size for one in own), sum(one.size for one in list(self.idle) if not one.in_use)
        return ShareStats(len(own), total, idle, len(found) - len(own), self.made, self.reused, self.trimmed)

    def forget(self) -> None:
        """In a forked copy: nothing of it is ours."""
        limit = self.limit
        self.__init__()  # type: ignore[misc]
        self.limit = limit

    def settle(self) -> None:
        """Wait until all is done that was begun with what nobody uses any more."""

    def _new(self, size: int) -> Segment:
        return self._made(size)

    def _made(self, size: int, isolated: bool = False) -> Segment:
        if self.idle and _limits.is_tight(size):
            self.trim()
        own = sum(one.size for one in segments() if one.owned and not one.where)
        try:
            _limits.check(size, own)
        except ShareLimit:
            own -= self.trim()
            _limits.check(size, own)
        try:
            made = self._create(size, isolated)
        except ShareLimit:  # those that are idle have descriptors, too
            if not self.trim():
                raise
            made = self._create(size, isolated)
        self.made += 1
        return made

    def _create(self, size: int, isolated: bool) -> Segment:
        try:
            return create(size, None if isolated else self._directory(), isolated)
        except FileNotFoundError:  # something has tidied up there
            return create(size, self._directory(again=True))

    def _directory(self, again: bool = False) -> str | None:
        try:
            return None if self.below is None else shared_memory_names.own_directory(self.below, again=again)
        except OSError as exc:
            raise ShareLimit(f"cannot make a shared segment below {self.below}: {exc.strerror}") from exc

    def _keep(self, nbytes: int, count: int) -> int:
        """At most so many bytes and segments of what is idle; returns how many bytes went."""
        idle = list(self.idle)
        total, left, went = sum(one.size for one in idle), len(idle), 0
        for one in idle:
            if total <= nbytes and left <= count:
                break
            if self.idle.pop(one, self) is None:
                self.trimmed += 1
                went += one.size
            total, left = total - one.size, left - 1
        return went


def rounded(nbytes: int, grain: int) -> int:
    """The size of the segment for so many bytes: at most a quarter more, of which untouched pages cost nothing."""
    step = max(grain, 1 << max(nbytes.bit_length() - 3, 0))
    return max(nbytes + -nbytes % step, step)


arena = Arena()
arenas: list[Any] = [arena]  # behind it those of GPUs
threads: list[Callable[[], None]] = []  # what ends those that have nothing to do
Segment.arena = arena
after_fork.append(arena.forget)


def trim(keep: int = 0) -> int:
    """Give shared memory that lies idle in this process back to the system, that of GPUs too; threads that copy, also.

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
        went += one.trim(keep)
        one.settle()
    for end in threads:
        end()
    return went


def stats() -> ShareStats:
    """What this process has of shared memory of the CPU."""
    return arena.stats()
