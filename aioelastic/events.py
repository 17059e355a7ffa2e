"""What happens to a group, as small frozen values: one hook (`on_event`), one stream (`group.events()`).

Each has `rank`, `pid` and `attempt` (None where it is about the whole group) and `time`
(seconds since the epoch, when it was noticed).
"""

from __future__ import annotations

from dataclasses import dataclass

from .outcome import Exit, GroupResult
from .remains import Process


@dataclass(frozen=True, slots=True)
class Event:
    """The common part of all events."""

    rank: int | None
    pid: int | None
    attempt: int | None
    time: float


@dataclass(frozen=True, slots=True)
class Spawned(Event):
    """A worker runs; or its executor has it, and it may wait there for its turn."""


@dataclass(frozen=True, slots=True)
class Ready(Event):
    """A function worker has called `aioelastic.ready()`."""


@dataclass(frozen=True, slots=True)
class Exited(Event):
    """A worker ended. Its output may still be on its way; see `Drained`."""

    exit: Exit


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """Both streams of an exited worker are at their end, or were given up.

    `holders` are the pids that still held a stream open when the wait for its end was over; empty when all is well.
    """

    holders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stopping(Event):
    """A worker was sent the stop signal; its grace begins."""

    signal: int


@dataclass(frozen=True, slots=True)
class Killed(Event):
    """A worker outlived its grace (or had none) and was sent SIGKILL (which reaches no function in an executor)."""


@dataclass(frozen=True, slots=True)
class Restarting(Event):
    """A worker's attempt is over, nothing of it is left, and its rank begins again; `Spawned` follows.

    It is about the attempt that ended. With `Restart` scope `"all"` each rank has one.

    Attributes:
        next_attempt: the one that begins.
        reason: the failure that is answered so: `"rank 1: exit code 3"`.
    """

    next_attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class GaveUp(Event):
    """A worker failed once more than `Restart` allows: the group fails, and the others are stopped.

    `attempts` is how many there were, the first one too.
    """

    attempts: int


@dataclass(frozen=True, slots=True)
class SinkTrouble(Event):
    """A sink failed or lost bytes. Other sinks and the workers go on.

    `sink` names it (a path, `"stdout"`, `"callback"`), `lost` counts bytes that did not arrive so far. The tee tells
    each problem once, within 0.1 s of the first byte that it costs, and the last one again at the end if more was lost.
    """

    sink: str
    problem: str
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Leaked(Event):
    """A process that a worker left running was found (and ended, unless `Stop.scope` is `"leader"`)."""

    process: Process


@dataclass(frozen=True, slots=True)
class GroupDone(Event):
    """The last event: nothing of the group runs any more."""

    result: GroupResult
