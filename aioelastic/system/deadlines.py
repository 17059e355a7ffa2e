"""Waiting with a deadline: until a notice, a time limit, or impatience."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from . import forked_copies

LOOK = 5.0  # seconds that a look at the system may take while there is no deadline


LEAST = 0.02  # ... and how many each has in any case


class Deadline:
    """Waiting that a notice, a time limit, or impatience (`hurry()`) ends, whichever comes first.

    Attributes:
        KILLED, SWEPT, CLOSED: seconds after the deadline of a stop by which SIGKILL has ended workers, what they left
            behind is swept, and all is closed: a loop that is late costs nobody the last look.
    """

    KILLED, SWEPT, CLOSED = 0.2, 0.5, 0.85

    def __init__(self) -> None:
        self.hurried = False
        self._deadline = math.inf
        self._waiter: asyncio.Future[None] | None = None
        self._instead: tuple[Callable[[], object], ...] = ()  # of what is to come
        self._timer: asyncio.TimerHandle | None = None

    def hurry(self) -> None:
        """Skip every grace from now on."""
        self.hurried = True
        self.notice()

    def limit(self, ends_at: float) -> None:
        """A stop has begun, which ends at that moment of the loop's clock, whatever is still waited for then."""
        self._deadline = min(self._deadline, ends_at)
        self.notice()
        if self._instead:
            self.unless(*self._instead)

    def left(self, late: float = CLOSED, most: float = LOOK) -> float:
        """Seconds that a look may take: at most so many, and not more than `late` after the deadline."""
        if self._deadline == math.inf:
            return most
        return max(min(self._deadline + late - asyncio.get_running_loop().time(), most), LEAST)

    def is_over(self, late: float = 0.0) -> bool:
        """Whether the stop should have ended by now."""
        return asyncio.get_running_loop().time() >= self._deadline + late

    def notice(self) -> None:
        """What was waited for may have happened: look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def unless(self, *calls: Callable[[], object]) -> None:
        """Make these calls if `came` is not called before: soon after the deadline of the stop, or `LOOK` from now."""
        self.came()
        self._instead = calls
        self._timer = asyncio.get_running_loop().call_later(self.left(self.KILLED), self._never_came)

    def came(self) -> None:
        """What was to come is there."""
        if self._timer is not None:
            self._timer.cancel()
            self._instead, self._timer = (), None

    def _never_came(self) -> None:
        calls, self._instead, self._timer = self._instead, (), None
        for call in calls:
            call()

    async def until(self, done: Callable[[], bool], seconds: float, grace: bool = True, late: float = 0.0) -> bool:
        """Wait for `done()`, asked after each `notice()`. False: time is over, or it is a `grace` and we hurry.

        Args:
            late: seconds after the deadline of the stop that it may still take.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        while not done():
            ends_at = min(now + seconds, max(self._deadline + late, now + LEAST))
            if (grace and self.hurried) or loop.time() >= ends_at:
                return False
            self._waiter = loop.create_future()
            timer = loop.call_at(ends_at, self.notice)
            try:
                await self._waiter
            except asyncio.CancelledError:
                if forked_copies.is_lost(loop):
                    raise
                self.hurried = True  # the loop shuts down: it has no time for a grace
            finally:
                timer.cancel()
                self._waiter = None
        return True
