"""The first line that matches: `await group.line(pattern)`."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from ._lines import LineTap

if TYPE_CHECKING:
    from ._pump import Pump
    from ._tail import Tail


class LineSearch:
    """One search, in any number of streams.

    What a stream has said lately is looked at, too, from where the last search in it has found something: two searches,
    one after the other, miss nothing in between, as far as the tail of the stream goes back.

    Args:
        ranks: only in the output of these; None: of all.
    """

    def __init__(self, pattern: re.Pattern[str], ranks: frozenset[int] | None) -> None:
        self.pattern = pattern
        self.ranks = ranks
        self._found: asyncio.Future[tuple[re.Match[str], Tail, int]] = asyncio.get_running_loop().create_future()

    async def found(self) -> re.Match[str]:
        """Wait for it.

        Raises:
            EOFError: the streams are over.
        """
        match, tail, end = await self._found
        tail.searched = max(tail.searched, end)  # not before: a search that is cancelled has found nothing
        return match

    def tap(self, tail: Tail) -> LineTap:
        """Takes what the stream of that tail says from now on."""
        kept = tail.unsearched()
        at = tail.total - len(kept)
        if at > tail.searched and b"\n" in kept:  # the first line is not whole
            _, _, rest = kept.partition(b"\n")
            kept, at = rest, tail.total - len(rest)

        def deliver(lines: list[bytes], when: float, pump: Pump | None, continued: bool) -> None:
            nonlocal at
            for data in lines:
                at += len(data) + (not continued)
                if self._found.done():
                    return
                match = self.pattern.search(data.decode(errors="backslashreplace"))
                if match is not None:
                    self._found.set_result((match, tail, at))

        made = LineTap(deliver)
        made.feed(kept)
        return made

    def fail(self, problem: Exception) -> None:
        """It will not be found."""
        if not self._found.done():
            self._found.set_exception(problem)
