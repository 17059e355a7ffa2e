"""What a source writes to the console at once, on its way to the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._console import Console

NEWLINE = 10


class Piece:
    """What one source wrote at once: whole lines, or the beginning of one.

    Attributes:
        source: whose lines these are; 0: of somebody who writes whole lines only.
        prefix: stands before `data` unless it continues a line.
        data: with the prefixes of its second and later lines. Empty: ends the line of `source`, if it is unfinished.
        size: bytes for the accounts of `console`.
        begun: the rest of one that was written in part.
        broken: something before it was lost: it continues no line.
        job: to be done when its turn has come, instead of writing.
    """

    __slots__ = ("begun", "broken", "console", "data", "job", "prefix", "size", "source")

    def __init__(self, console: Console, source: int, prefix: bytes, data: bytes, size: int) -> None:
        self.console = console
        self.source = source
        self.prefix = prefix
        self.data: bytes | memoryview = data
        self.size = size
        self.begun = False
        self.broken = False
        self.job: Callable[[], object] | None = None

    @property
    def torn(self) -> bool:
        """Whether it ends in the middle of a line."""
        return len(self.data) > 0 and self.data[-1] != NEWLINE
