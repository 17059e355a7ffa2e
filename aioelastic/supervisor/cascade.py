"""How a worker is ended, and what it leaves behind too: signal → wait → kill → bounded wait → say what would not die.

Coroutines that the exit itself cuts short. Their only clock is the loop's. Being cancelled (the loop shuts down)
does not make them leave anything running: it makes them skip the grace. A stop has one deadline, grace and bound after
it began, for all that is waited for (`Deadline.limit`); what is not known by then is told as not known.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from ..model.leftovers import Process
from ..model.states import State
from ..processes.strays import Stray
from ..system.deadlines import Deadline
from .protocols import Stoppable

if TYPE_CHECKING:
    from ..model.failures import Stage
    from ..model.stop_policy import Stop
    from ..processes.census import Census

# After a worker's grace its process group gets the polite signal too, and this many seconds (or the grace, if that
# is less) before SIGKILL: time for the children of a wrapper that swallowed the signal.
GROUP_GRACE = 2.0


async def cascade(worker: Stoppable, stop: Stop, census: Census) -> None:
    """End one worker that was asked to stop. Returns when it has exited, or has been given up as unkillable."""
    deadline = worker.deadline
    if worker.state is State.STOPPING and stop.grace > 0:
        if await deadline.until(worker.has_exited, stop.grace):
            return
        if stop.scope == "leader_then_group" and not deadline.hurried:
            others = (await census.take(deadline.left(most=stop.bound / 4))).of(worker.owner, worker.pid)
            if others and not worker.has_exited():
                worker.stop_progress.stage = "group"
                worker.signal_group(stop.signum)
                # the rest of the bound is for SIGKILL
                await deadline.until(worker.has_exited, min(stop.grace, GROUP_GRACE, stop.bound / 2))
    if worker.has_exited():
        return
    stage: Stage = "hurried" if deadline.hurried else "grace_over" if stop.grace > 0 else "at_once"
    worker.kill(leader_only=stop.scope == "leader")
    if worker.state is State.KILLING:
        worker.stop_progress.stage = stage
    if not await deadline.until(worker.has_exited, stop.bound, grace=False, late=deadline.KILLED):
        if worker.pid is None:  # no process of ours
            worker.give_up("?", "")
        else:
            worker.give_up(*await census.look(worker.pid, deadline.left(deadline.SWEPT)))


async def strays_of(
    census: Census, deadline: Deadline, owner: str, leader: int | None = None, ended: int | None = None
) -> list[Stray]:
    """The processes that carry `owner` in their lineage or were in the session of `leader`; to be closed."""
    found = (await census.take(deadline.left(deadline.SWEPT))).of(owner, leader, ended)
    return await census.catch(found, deadline.left(deadline.SWEPT)) if found else []


async def sweep(
    find: Callable[[], Awaitable[list[Stray]]],
    deadline: Deadline,
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
    ends_at = loop.time() + stop.grace + stop.bound
    polite = stop.grace > 0
    while strays := await find():
        gone: set[int] = set()

        def ended(one: Stray, gone: set[int] = gone) -> None:
            gone.add(one.pid)
            deadline.notice()

        try:
            for one in strays:
                if one.pid not in told:
                    told.add(one.pid)
                    on_found(one.process)
                one.watch(loop, ended)
                one.signal(stop.signum if polite else signal.SIGKILL)
                # a stopped process obeys nothing but SIGKILL until it is continued
                one.signal(signal.SIGCONT)
            wait = stop.grace if polite else max(ends_at - loop.time(), 0.0)
            await deadline.until(partial(_all_in, strays, gone), wait, grace=polite, late=deadline.SWEPT)
        finally:
            for one in strays:
                one.close(loop)
        polite = polite and len(gone) == len(strays) and not deadline.hurried
        if loop.time() >= ends_at or deadline.is_over(deadline.SWEPT):
            return [one for one in strays if one.pid not in gone]
    return []


def _all_in(strays: list[Stray], gone: set[int]) -> bool:
    return len(gone) == len(strays)
