"""What happens to a group, as small frozen values: one hook (`on_event`), one stream (`group.events()`).

Each has `rank`, `pid` and `attempt` (None where it is about the whole group) and `time`
(seconds since the epoch, when it was noticed).
"""

from __future__ import annotations

from ..model.exits import Exit
from ..model.frozen import dataclass
from ..model.leftovers import Process
from ..model.results import GroupResult


@dataclass(frozen=True, slots=True)
class Event:
    """The common part of all events.

    Attributes:
        rank: of the worker that it is about; None: the whole group.
        pid: of its process; None: it has none, or the event is about the whole group.
        attempt: 0 for the first start of its rank; None: the event is about the whole group.
        time: when it was noticed, seconds since the epoch.
    """

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
    """A worker ended. Its output may still be on its way; see `Drained`.

    Attributes:
        exit: how.
    """

    exit: Exit


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """Both streams of an exited worker are at their end, or were given up.

    Attributes:
        holders: the pids that still held a stream open when the wait for its end was over; empty when all is well.
    """

    holders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stopping(Event):
    """A worker was sent the stop signal; its grace begins.

    Attributes:
        signal: its number (signal(7)).
    """

    signal: int


@dataclass(frozen=True, slots=True)
class Killed(Event):
    """A worker outlived its grace (or had none) and was sent SIGKILL (which reaches no function in an executor)."""


@dataclass(frozen=True, slots=True)
class Restarting(Event):
    """A worker's attempt is over, nothing of it is left, and its rank restarts; `Spawned` follows.

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

    Attributes:
        attempts: how many there were, the first one too.
    """

    attempts: int


@dataclass(frozen=True, slots=True)
class SinkTrouble(Event):
    """A sink failed or lost bytes. Other sinks and the workers go on.

    The tee tells each problem once, within 0.1 s of the first byte that it costs, and the last one again at the end if
    more was lost.

    Attributes:
        sink: its name: a path, `"stdout"`, `"callback"`.
        problem: what is wrong, in words.
        lost: bytes that did not arrive so far.
    """

    sink: str
    problem: str
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Leaked(Event):
    """A process that a worker left running was found (and ended, unless `Stop.scope` is `"leader"`).

    Attributes:
        process: its pid, command and state when it was found.
    """

    process: Process


@dataclass(frozen=True, slots=True)
class GroupDone(Event):
    """The last event: nothing of the group runs any more.

    Attributes:
        result: what came of it.
    """

    result: GroupResult
