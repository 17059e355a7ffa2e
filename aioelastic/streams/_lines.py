"""From chunks to lines, for whoever wants lines: `group.lines()`, a callback, JSON, filters."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from ..model.lines import LINE_LIMIT, Line

if TYPE_CHECKING:
    from ._pump import Pump

HIGH = 1_048_576  # a subscriber that is this many bytes behind is slow
MANY = (
    4096  # so is one that is this many batches behind: an empty line, if read by itself, is a byte that costs hundreds
)
PIECE = 48  # bytes that a small `bytes` object costs beside its own


class LineSplitter:
    """Bytes in, lines out; keeps the unfinished one.

    Attributes:
        size: what that one costs, in bytes of memory.
    """

    __slots__ = ("_begun", "size")

    def __init__(self) -> None:
        self._begun: list[bytes] = []
        self.size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines, of any length."""
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self.size:
            self._begun.append(lines[0])
            lines[0] = b"".join(self._begun)
            self._begun.clear()
            self.size = 0
        if rest:
            self._begun.append(rest)
            self.size += len(rest) + PIECE
        return lines

    def feed_parts(self, data: bytes) -> Iterator[tuple[list[bytes], bool]]:
        """The same, in parts of at most `LINE_LIMIT` bytes: lines or ends of lines, and (True) parts that go on.

        For when `size` and `data` are more than that: then what came in small pieces is put together, too.
        """
        whole: list[bytes] = []
        for line in self.feed(data):
            *parts, last = _parts(line)
            if parts:
                if whole:
                    yield whole, False
                    whole = []
                yield parts, True
            whole.append(last)
        if whole:
            yield whole, False
        *parts, last = _parts(self.rest())
        self.begin(last)
        if parts:
            yield parts, True

    def begin(self, unfinished: bytes) -> None:
        """Start in the middle of this line."""
        if unfinished:
            self._begun.append(unfinished)
            self.size += len(unfinished) + PIECE

    def rest(self) -> bytes:
        """The unfinished line at the end, if any."""
        out = b"".join(self._begun)
        self._begun.clear()
        self.size = 0
        return out


class LineTap:
    """Splits one stream's chunks into lines and hands them on in batches.

    Args:
        deliver: gets (lines, time of reading, pump, continued); `pump` is None for the unfinished line at the end;
            `continued`: they are parts of a line that goes on.
    """

    __slots__ = ("_deliver", "_splitter")

    def __init__(self, deliver: Callable[[list[bytes], float, Pump | None, bool], None]) -> None:
        self._deliver = deliver
        self._splitter = LineSplitter()

    def begin(self, unfinished: bytes) -> None:
        """Start in the middle of this line."""
        self._splitter.begin(unfinished)

    def feed(self, data: bytes, pump: Pump | None = None) -> None:
        splitter = self._splitter
        if splitter.size + len(data) > LINE_LIMIT:
            at = time.time()
            for lines, continued in splitter.feed_parts(data):
                self._deliver(lines, at, pump, continued)
            return
        lines = splitter.feed(data)
        if lines:
            self._deliver(lines, time.time(), pump, False)

    def eof(self) -> None:
        rest = self._splitter.rest()
        if rest:
            self._deliver([rest], time.time(), None, False)


class PartialLineTap(LineTap):
    """Hands on the unfinished line, too, as a part that goes on, when nothing has followed for some seconds."""

    __slots__ = ("_seconds", "_timer", "_unwanted")

    def __init__(self, deliver: Callable[[list[bytes], float, Pump | None, bool], None], seconds: float) -> None:
        super().__init__(deliver)
        self._seconds = seconds
        self._unwanted = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, unfinished: bytes) -> None:
        super().begin(unfinished)
        self._wait()

    def feed(self, data: bytes, pump: Pump | None = None) -> None:
        super().feed(data, pump)
        self._wait()

    def eof(self) -> None:
        self._cancel()
        super().eof()

    def stop(self) -> None:
        """Nobody wants it any more; in the middle of a `feed`, too."""
        self._unwanted = True
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._cancel()
        if self._splitter.size and not self._unwanted:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._show)

    def _show(self) -> None:
        self._timer = None
        self._deliver([self._splitter.rest()], time.time(), None, True)


class CallbackTap(LineTap):
    """Calls a function with each line. Policy: runs on the loop as the data is read, so it must be quick."""

    name = "callback"

    def __init__(self, rank: int, stream: str, callback: Callable[[Line], object]) -> None:
        def deliver(lines: list[bytes], at: float, pump: Pump | None, continued: bool) -> None:
            for data in lines:
                callback(Line(rank, stream, data, at, continued))

        super().__init__(deliver)


class Held:
    """The pumps that one reader holds. It outlives the reader, to let them go."""

    __slots__ = ("_loop", "_pumps")

    def __init__(self) -> None:
        self._pumps: set[Pump] = set()

    def __bool__(self) -> bool:
        return bool(self._pumps)

    def hold(self, pump: Pump) -> None:
        """On the thread of the loop."""
        self._loop = asyncio.get_running_loop()
        self._pumps.add(pump)
        pump.hold(self)

    def release(self) -> None:
        if not self._pumps:
            return
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)

    def release_soon(self) -> None:
        """The same from any thread, and in the middle of anything."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.release)

    def forget(self) -> None:
        """They are another's."""
        self._pumps.clear()


class LineFeed:
    """`async for line in group.lines()`: all lines read since it was made, until the streams of its ranks are over.

    Policy: `when_full="block"` holds the workers' pipes once the reader is 1 MiB, or 4096 reads of them, behind
    (lossless); `"drop"` forgets the oldest and counts them (of a long line, its parts) in `dropped`. It ends with its
    group, by `close()`, and when nobody refers to it any more: after a `break` out of the loop above nothing is held.
    What refers to itself in a circle goes when Python collects it: `contextlib.aclosing` closes at once. Who keeps a
    blocking feed and does not read it stops the workers.

    Attributes:
        ranks: only of these; None: of all.
        dropped: how many lines `when_full="drop"` has forgotten.
    """

    def __init__(
        self,
        when_full: Literal["block", "drop"],
        ranks: frozenset[int] | None,
        partial: float | None = None,
        on_close: Callable[[float | None, LineFeed], None] | None = None,
        awaited: set[LineFeed] | None = None,
    ) -> None:
        self.dropped = 0
        self.ranks = ranks
        self._partial = partial
        self._on_close = on_close
        self._drop = when_full == "drop"
        # batches of (rank, stream, lines reversed, time, continued): split once, popped from the end
        self._batches: deque[tuple[int, str, list[bytes], float, bool]] = deque()
        self._size = 0
        self._held = Held()
        self._waiters: dict[asyncio.Future[None], None] = {}  # in the order in which they came
        # of its group: a task that waits here may be one that nobody else refers to
        self._awaited = set() if awaited is None else awaited
        self._over = False
        self._problem: Exception | None = None

    def fail(self, problem: Exception) -> None:
        """Nothing more will come: that is raised for who reads on. Nobody is told, nothing released."""
        self._over, self._problem = True, problem
        self._batches.clear()
        self._held.forget()
        self._on_close = None

    def deliver(
        self, rank: int, stream: str, lines: list[bytes], at: float, pump: Pump | None, continued: bool = False
    ) -> None:
        """Take a batch; called by the taps."""
        if self._over or (self.ranks is not None and rank not in self.ranks):
            return
        self._batches.append((rank, stream, lines[::-1], at, continued))
        self._size += _size(lines)
        if self._size > HIGH or len(self._batches) > MANY:
            if self._drop:
                while len(self._batches) > MANY or (self._size > HIGH and len(self._batches) > 1):
                    oldest = self._batches.popleft()[2]
                    self._size -= _size(oldest)
                    self.dropped += len(oldest)
            elif pump is not None:
                self._held.hold(pump)
        self._wake()

    def relax(self) -> None:
        """Hold no worker from now on: nobody is there to read while they are stopped."""
        self._drop = True
        self._held.release()

    def end(self) -> None:
        """All streams are over; what is buffered can still be read."""
        self._over = True
        self._wake()
        self._leave()

    def close(self) -> None:
        """Stop listening: forget what is buffered and let held workers go on."""
        self._over = True
        self._batches.clear()
        self._size = 0
        self._held.release()
        self._wake()
        self._leave()

    def __aiter__(self) -> LineFeed:
        return self

    async def __anext__(self) -> Line:
        while not self._batches:
            if self._problem is not None:
                raise self._problem
            if self._over:
                raise StopAsyncIteration
            waiter = asyncio.get_running_loop().create_future()
            self._waiters[waiter] = None
            self._awaited.add(self)
            try:
                await waiter
            finally:
                self._waiters.pop(waiter, None)
                if not self._waiters:
                    self._awaited.discard(self)
        rank, stream, lines, at, continued = self._batches[0]
        data = lines.pop()
        self._size -= len(data) + 1
        if not lines:
            self._batches.popleft()
        if self._held and self._size < HIGH // 2 and len(self._batches) < MANY // 2:
            self._held.release()
        return tuple.__new__(Line, (rank, stream, data, at, continued))  # Line(...), in less time

    async def aclose(self) -> None:
        """`close()`, for `contextlib.aclosing`."""
        self.close()

    def __del__(self) -> None:
        if self._held:
            self._held.release_soon()

    def _leave(self) -> None:
        on_close, self._on_close = self._on_close, None  # whose feed it was is not held by its reader
        if on_close is not None:
            on_close(self._partial, self)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def _size(lines: list[bytes]) -> int:
    return sum(map(len, lines)) + len(lines)


def _parts(line: bytes) -> list[bytes]:
    """Of at most `LINE_LIMIT` bytes each. No character of UTF-8 is cut, so the text of each part can be read."""
    out = []
    at = 0
    while len(line) - at > LINE_LIMIT:
        end = at + LINE_LIMIT
        for back in range(4):
            if line[end - back] & 0xC0 != 0x80:  # it begins a character
                end -= back
                break
        out.append(line[at:end])
        at = end
    out.append(line[at:])
    return out
