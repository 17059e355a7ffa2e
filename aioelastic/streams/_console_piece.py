"""What a source writes to the console at once, on its way to the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from contextvars import Context

NEWLINE = 10


class Account(Protocol):
    """What one group has to write to a target, in bytes, guarded by the target's lock; and whom to tell of it.

    Attributes:
        context: the group's, for stand-ins that ask whose output it is.
        taken: given to it, ever.
        given: of these, written or lost.
        queued: of the others, in the queue of the target.
        lost: that did not arrive.
        gone: nobody waits for the rest any more.
        gaps: sources of which something was lost; True: the beginning of their next line.
    """

    loop: asyncio.AbstractEventLoop
    context: Context
    taken: int
    given: int
    queued: int
    lost: int
    gone: bool
    gaps: dict[int, bool]

    def lose(self, size: int, problem: str | None = None, final: bool = False) -> None:
        """So many bytes do not arrive. `problem`: why; `final`: and no others will."""

    def wake(self, here: asyncio.AbstractEventLoop | None = None) -> None:
        """Some of it was written (`here`): does somebody wait for that?"""


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

    def __init__(self, console: Account, source: int, prefix: bytes, data: bytes, size: int) -> None:
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
