"""How a worker is ended, and what it leaves behind too: signal → wait → kill → bounded wait → say what would not die.

Coroutines that the exit itself cuts short. Their only clock is the loop's. Being cancelled (the loop shuts down)
does not make them leave anything running: it makes them skip the grace. A stop has one deadline, grace and bound after
it began, for all that is waited for (`Patience.limit`); what is not known by then is told as not known.
"""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from . import forked
from .lifecycle import State
from .remains import Process
from .watch import Stray

if TYPE_CHECKING:
    from .spec import Stop
    from .watch import Census
    from .why import Stage
    from .worker import Worker

# After a worker's grace its process group gets the polite signal too, and this many seconds (or the grace, if that
# is less) before SIGKILL: time for the children of a wrapper that swallowed the signal.
GROUP_GRACE = 2.0
LOOK = 5.0  # seconds that a look at the system may take while there is no deadline
LEAST = 0.02  # ... and how many each has in any case


class Patience:
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

    def hurry(self) -> None:
        """Skip every grace from now on."""
        self.hurried = True
        self.notice()

    def limit(self, deadline: float) -> None:
        """A stop has begun, which ends at that moment of the loop's clock, whatever is still waited for then."""
        self._deadline = min(self._deadline, deadline)
        self.notice()

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

    async def until(self, done: Callable[[], bool], seconds: float, grace: bool = True, late: float = 0.0) -> bool:
        """Wait for `done()`, asked after each `notice()`. False: time is over, or it is a `grace` and we hurry.

        Args:
            late: seconds after the deadline of the stop that it may still take.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        while not done():
            deadline = min(now + seconds, max(self._deadline + late, now + LEAST))
            if (grace and self.hurried) or loop.time() >= deadline:
                return False
            self._waiter = loop.create_future()
            timer = loop.call_at(deadline, self.notice)
            try:
                await self._waiter
            except asyncio.CancelledError:
                if forked.is_lost(loop):
                    raise
                self.hurried = True  # the loop shuts down: it has no time for a grace
            finally:
                timer.cancel()
                self._waiter = None
        return True


class Trail:
    """What was done to end one worker.

    Attributes:
        stage: how far its cascade came.
        sent: signals that the program sent it through us.
    """

    def __init__(self) -> None:
        self.stage: Stage = "asked"
        self.sent: set[int] = set()

    def sending(self, signum: int, reached: bool) -> bool:
        """Note it if it has `reached` the worker, and return that."""
        if reached:
            self.sent.add(signum)
        return reached


async def cascade(worker: Worker, stop: Stop, census: Census) -> None:
    """End one worker that was asked to stop. Returns when it has exited, or has been given up as unkillable."""
    patience = worker.patience
    if worker.state is State.STOPPING and stop.grace > 0:
        if await patience.until(worker.has_exited, stop.grace):
            return
        if stop.scope == "leader_then_group" and not patience.hurried:
            others = (await census.take(patience.left(most=stop.bound / 4))).of(worker.owner, worker.pid)
            if others and not worker.has_exited():
                worker.trail.stage = "group"
                worker.signal_group(stop.signum)
                # the rest of the bound is for SIGKILL
                await patience.until(worker.has_exited, min(stop.grace, GROUP_GRACE, stop.bound / 2))
    if worker.has_exited():
        return
    stage: Stage = "hurried" if patience.hurried else "grace_over" if stop.grace > 0 else "at_once"
    worker.kill(leader_only=stop.scope == "leader")
    if worker.state is State.KILLING:
        worker.trail.stage = stage
    if not await patience.until(worker.has_exited, stop.bound, grace=False, late=patience.KILLED):
        if worker.pid is None:  # no process of ours
            worker.give_up("?", "")
        else:
            worker.give_up(*await census.look(worker.pid, patience.left(patience.SWEPT)))


async def strays_of(
    census: Census, patience: Patience, owner: str, leader: int | None = None, ended: int | None = None
) -> list[Stray]:
    """The processes that carry `owner` in their lineage or were in the session of `leader`; to be closed."""
    found = (await census.take(patience.left(patience.SWEPT))).of(owner, leader, ended)
    return await census.catch(found, patience.left(patience.SWEPT)) if found else []


async def sweep(
    find: Callable[[], Awaitable[list[Stray]]],
    patience: Patience,
    stop: Stop,
    on_found: Callable[[Process], None],
) -> list[Stray]:
    """End processes that are not our children: what a worker left running. Looks again after each round, since what
    dies may have forked; gives up at the end of grace and bound.

    Args:
        find: those that are there now.
        on_found: told once for each.

    Returns:
        those that are there all the same; they are closed.
    """
    loop = asyncio.get_running_loop()
    told: set[int] = set()
    deadline = loop.time() + stop.grace + stop.bound
    polite = stop.grace > 0
    while strays := await find():
        gone: set[int] = set()

        def ended(one: Stray, gone: set[int] = gone) -> None:
            gone.add(one.pid)
            patience.notice()

        try:
            for one in strays:
                if one.pid not in told:
                    told.add(one.pid)
                    on_found(one.process)
                one.watch(loop, ended)
                one.signal(stop.signum if polite else signal.SIGKILL)
                # a stopped process obeys nothing but SIGKILL until it is continued
                one.signal(signal.SIGCONT)
            wait = stop.grace if polite else max(deadline - loop.time(), 0.0)
            await patience.until(partial(_all_in, strays, gone), wait, grace=polite, late=patience.SWEPT)
        finally:
            for one in strays:
                one.close(loop)
        polite = polite and len(gone) == len(strays) and not patience.hurried
        if loop.time() >= deadline or patience.is_over(patience.SWEPT):
            return [one for one in strays if one.pid not in gone]
    return []


def _all_in(strays: list[Stray], gone: set[int]) -> bool:
    return len(gone) == len(strays)
