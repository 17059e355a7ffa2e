"""The last bytes of a stream, in memory, for the report of a failure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._pump import Pump

KEEP = 16_384


class Tail:
    """Keeps at least the last `KEEP` bytes (less when there were less) and counts all. Policy: never holds, never loses
    what it promises.

    Attributes:
        total: bytes that have come.
        searched: of these, up to where a line has been looked for and found (see `LineSearch`).
    """

    __slots__ = ("_chunks", "_size", "searched", "total")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self.total = 0
        self.searched = 0

    def feed(self, data: bytes, pump: Pump | None = None) -> None:
        self.total += len(data)
        if len(data) > KEEP:
            data = data[-KEEP:]
        chunks = self._chunks
        chunks.append(data)
        self._size += len(data)
        while self._size - len(chunks[0]) >= KEEP:
            self._size -= len(chunks.popleft())

    def eof(self) -> None:
        pass

    def unfinished(self) -> bytes:
        """What stands after the last newline (as far as it is kept)."""
        return self.last().rpartition(b"\n")[2]

    def unsearched(self) -> bytes:
        """The last `KEEP` bytes, without those that were searched."""
        kept = self.last()
        return kept[max(self.searched - (self.total - len(kept)), 0) :]

    def last(self) -> bytes:
        """The last `KEEP` bytes."""
        return b"".join(self._chunks)[-KEEP:]
