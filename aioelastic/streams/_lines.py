"""From chunks to lines, for whoever wants lines: `group.lines()`, a callback, JSON, filters."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from ._pump import Pump

HIGH = 1_048_576  # a subscriber that is this many bytes behind is slow


class Line(NamedTuple):
    """One line of a worker's output, without its newline.

    Attributes:
        stream: `"stdout"` or `"stderr"`.
        data: the bytes, of any length.
        time: when it was read, seconds since the epoch.
    """

    rank: int
    stream: str
    data: bytes
    time: float

    @property
    def text(self) -> str:
        """`data` as text; bytes that are not UTF-8 show as `\\xNN`."""
        return self.data.decode(errors="backslashreplace")


class LineSplitter:
    """Bytes in, whole lines out; keeps the unfinished one. No limit on a line's length."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self._parts:
            self._parts.append(lines[0])
            lines[0] = b"".join(self._parts)
            self._parts.clear()
        if rest:
            self._parts.append(rest)
        return lines

    def begin(self, unfinished: bytes) -> None:
        """Start in the middle of this line."""
        if unfinished:
            self._parts.append(unfinished)

    def rest(self) -> bytes:
        """The unfinished line at the end, if any."""
        out = b"".join(self._parts)
        self._parts.clear()
        return out


class LineTap:
    """Splits one stream's chunks into lines and hands them on in batches.

    Args:
        deliver: gets (lines, time of reading, pump); `pump` is None for the unfinished line at the end.
    """

    __slots__ = ("_deliver", "_splitter")

    def __init__(self, deliver: Callable[[list[bytes], float, Pump | None], None]) -> None:
        self._deliver = deliver
        self._splitter = LineSplitter()

    def begin(self, unfinished: bytes) -> None:
        """Start in the middle of this line."""
        self._splitter.begin(unfinished)

    def feed(self, data: bytes, pump: Pump) -> None:
        lines = self._splitter.feed(data)
        if lines:
            self._deliver(lines, time.time(), pump)

    def eof(self) -> None:
        rest = self._splitter.rest()
        if rest:
            self._deliver([rest], time.time(), None)


class CallbackTap(LineTap):
    """Calls a function with each line. Policy: runs on the loop as the data is read, so it must be quick."""

    name = "callback"

    def __init__(self, rank: int, stream: str, callback: Callable[[Line], object]) -> None:
        def deliver(lines: list[bytes], at: float, pump: Pump | None) -> None:
            for data in lines:
                callback(Line(rank, stream, data, at))

        super().__init__(deliver)


class LineFeed:
    """`async for line in group.lines()`: all lines read since it was made, until the group's streams are over.

    Policy: `when_full="block"` holds the workers' pipes once the reader is 1 MiB behind (lossless); `"drop"` forgets
    the oldest and counts them in `dropped`. Leave it with `close()` (or by the end of the group): a blocking feed
    that nobody reads stops the workers.
    """

    def __init__(
        self,
        when_full: Literal["block", "drop"],
        ranks: frozenset[int] | None,
        on_close: Callable[[LineFeed], None] = lambda feed: None,
    ) -> None:
        self.dropped = 0
        self._on_close = on_close
        self._ranks = ranks
        self._drop = when_full == "drop"
        # batches of (rank, stream, lines reversed, time): split once, popped from the end
        self._batches: deque[tuple[int, str, list[bytes], float]] = deque()
        self._size = 0
        self._pumps: set[Pump] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._over = False
        self._problem: Exception | None = None

    def fail(self, problem: Exception) -> None:
        """Nothing more will come: that is raised for who reads on. Nobody is told, nothing released."""
        self._over, self._problem = True, problem
        self._batches.clear()
        self._pumps.clear()
        self._on_close = lambda feed: None

    def deliver(self, rank: int, stream: str, lines: list[bytes], at: float, pump: Pump | None) -> None:
        """Take a batch; called by the taps."""
        if self._over or (self._ranks is not None and rank not in self._ranks):
            return
        self._batches.append((rank, stream, lines[::-1], at))
        self._size += _size(lines)
        if self._size > HIGH:
            if self._drop:
                while self._size > HIGH and len(self._batches) > 1:
                    oldest = self._batches.popleft()[2]
                    self._size -= _size(oldest)
                    self.dropped += len(oldest)
            elif pump is not None:
                self._pumps.add(pump)
                pump.hold(self)
        self._wake()

    def relax(self) -> None:
        """Hold no worker from now on: nobody is there to read while they are stopped."""
        self._drop = True
        self._release()

    def end(self) -> None:
        """All streams are over; what is buffered can still be read."""
        self._over = True
        self._wake()

    def close(self) -> None:
        """Stop listening: forget what is buffered and let held workers go on."""
        self._over = True
        self._batches.clear()
        self._size = 0
        self._release()
        self._wake()
        self._on_close(self)

    def __aiter__(self) -> LineFeed:
        return self

    async def __anext__(self) -> Line:
        while not self._batches:
            if self._problem is not None:
                raise self._problem
            if self._over:
                raise StopAsyncIteration
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        rank, stream, lines, at = self._batches[0]
        data = lines.pop()
        self._size -= len(data) + 1
        if not lines:
            self._batches.popleft()
        if self._pumps and self._size < HIGH // 2:
            self._release()
        return Line(rank, stream, data, at)

    async def aclose(self) -> None:
        """`close()`, for `contextlib.aclosing`."""
        self.close()

    def _release(self) -> None:
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _size(lines: list[bytes]) -> int:
    return sum(map(len, lines)) + len(lines)
