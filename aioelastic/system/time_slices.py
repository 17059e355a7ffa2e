"""Long work on the event loop, in slices: whoever owns the loop is not kept waiting."""

from __future__ import annotations

import asyncio
import time

from .waiting import insist

SLICE = 0.001  # seconds that work may go on for


class TimeSlices:
    """Says when the loop should have its turn, and gives it."""

    def __init__(self) -> None:
        self.begin()

    def due(self) -> bool:
        """Whether the slice is over."""
        return time.monotonic() > self._until

    async def rest(self) -> None:
        """Let the loop have its turn if the slice is over; being cancelled changes nothing and is forgotten: for work
        of ours only, never in a task of the caller's."""
        if self.due():
            loop = asyncio.get_running_loop()
            turn = loop.create_future()
            loop.call_soon(turn.set_result, None)
            await insist(turn)
            self.begin()

    def begin(self) -> None:
        """A new slice."""
        self._until = time.monotonic() + SLICE
