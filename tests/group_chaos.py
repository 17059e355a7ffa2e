"""What may happen to a group at any moment, and what holds when it is over, whatever has happened."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

from helpers import struck

from aioelastic import Group
from aioelastic.model.states import FINAL, State


def disturb(what: str, group: Group, task: asyncio.Task[Any] | None, rng: random.Random) -> bool:
    """Whether it was: there may be nobody at that moment, and then the next will do."""
    if what == "cancel":
        return task is not None and task.cancel()
    if what in ("stop", "hurry"):
        group.begin_stop()
        if what == "hurry":
            group.hurry()
        return True
    ends = what in ("worker", "all")
    signum = rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]) if ends else signal.SIGSTOP
    pids = list(group.pids.values())
    rng.shuffle(pids)
    return struck(pids if what == "all" else pids[:1], signum)


def assert_over(group: Group) -> None:
    """No worker is left, in whatever state."""
    assert all(worker.state in FINAL - {State.UNKILLABLE} for worker in group)
    assert group.pids == {}
