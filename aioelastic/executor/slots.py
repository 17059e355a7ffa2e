"""An executor's workers, each with its state, from one table. A pair that is not in it is a bug and raises.

Only the executor's own thread uses them: nothing here is locked.

>>> step(State.BUSY, Trigger.REPLY)
<State.IDLE: 'idle'>
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections import Counter

from ..model.states import after
from ..supervisor.worker_life import WorkerLife
from .tasks import Task


class State(enum.StrEnum):
    """Where a worker of an executor is in its life."""

    STARTING = "starting"  # it is started, and is not ready yet
    IDLE = "idle"  # it waits for a task
    BUSY = "busy"  # it has one
    ABORTED = "aborted"  # its task took too long, or nobody waits for it any more: it was killed
    RETIRING = "retiring"  # it was told that no task will come
    DEAD = "dead"  # it has ended; what it has left behind may not have


class Trigger(enum.StrEnum):
    """What moves it."""

    READY = "ready"
    GIVE = "give"
    REPLY = "reply"
    ABORT = "abort"
    RETIRE = "retire"
    EXIT = "exit"


_S, _T = State, Trigger

TABLE: dict[tuple[State, Trigger], State] = {
    (_S.STARTING, _T.READY): _S.IDLE,
    (_S.STARTING, _T.EXIT): _S.DEAD,
    (_S.IDLE, _T.GIVE): _S.BUSY,
    (_S.IDLE, _T.RETIRE): _S.RETIRING,
    (_S.IDLE, _T.EXIT): _S.DEAD,
    (_S.BUSY, _T.REPLY): _S.IDLE,
    (_S.BUSY, _T.ABORT): _S.ABORTED,
    (_S.BUSY, _T.EXIT): _S.DEAD,
    (_S.ABORTED, _T.EXIT): _S.DEAD,
    (_S.RETIRING, _T.EXIT): _S.DEAD,
}

LEAVING = frozenset({State.RETIRING, State.DEAD})  # another may take its place


def step(state: State, trigger: Trigger) -> State:
    """The state after `trigger`. Raises `RuntimeError` for a pair that is not in the table."""
    return after(TABLE, state, trigger, "an executor's worker")


class Slot:
    """One worker, and the task it holds.

    Attributes:
        number: how many have come before it.
        rank: the lowest number that no other of those had which were alive when it came: so one that takes the place
            of another has the same.
        attempt: how many of that rank have come before it.
        worker: None until its plan is made.
        task: what it has been given, and has not answered.
        done: how many tasks it has answered.
        is_spent: it is to get no more.
        timer: ends the time of its task.
        abortion: what its task is told, once it was killed for that.
        problem: why it was killed before it was ready.
        rights, limits: of this program when it was started.
    """

    __slots__ = (
        *("abortion", "attempt", "done", "is_spent", "limits", "number", "problem", "rank", "rights", "state", "task"),
        *("timer", "worker"),
    )

    def __init__(self, number: int = 0, rank: int = 0, attempt: int = 0) -> None:
        self.number, self.rank, self.attempt = number, rank, attempt
        self.state = State.STARTING
        self.worker: WorkerLife | None = None
        self.task: Task | None = None
        self.done = 0
        self.is_spent = False
        self.timer: asyncio.TimerHandle | None = None
        self.abortion: BaseException | None = None
        self.problem: BaseException | None = None
        self.rights: object = None
        self.limits: tuple[int, ...] = ()

    def untaken(self) -> Task | None:
        """What its worker has ended without having taken: the kernel tells, when the last who had the other end of the
        channel is gone. What went with descriptors has lost them, and is not among that."""
        channel = self.worker.channel if self.worker is not None else None
        if self.task is None or channel is None or not channel.untaken or self.task.with_fds:
            return None
        self.task.untaken += 1
        return self.task

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Slots:
    """All of them.

    Attributes:
        all: by rank and attempt, until nothing is left of them.
        idle: those that are; the last is the one that was given a task last.
        starting: how many are.
        alive: how many are, or are about to be, and are not leaving.
        count: how many there have been.
    """

    def __init__(self) -> None:
        self.all: dict[tuple[int, int], Slot] = {}
        self.idle: dict[Slot, None] = {}
        self.starting = 0
        self.alive = 0
        self.count = 0
        self._of_rank = Counter[int]()  # the same, by rank

    def add(self) -> Slot:
        """One more."""
        taken = {one.rank for one in self.all.values() if one.state not in LEAVING}
        rank = next(number for number in itertools.count() if number not in taken)
        slot = Slot(self.count, rank, self._of_rank[rank])
        self.all[rank, slot.attempt] = slot
        self.count += 1
        self._of_rank[rank] += 1
        self.starting += 1
        self.alive += 1
        return slot

    def move(self, slot: Slot, trigger: Trigger) -> None:
        """The one place where a state changes, and what is counted with it."""
        before = slot.state
        after = slot.state = step(before, trigger)
        if before is State.IDLE:
            del self.idle[slot]
        elif before is State.STARTING:
            self.starting -= 1
        if after is State.IDLE:
            self.idle[slot] = None
        elif after in LEAVING and before not in LEAVING:
            self.alive -= 1

    def remove(self, slot: Slot) -> None:
        """Nothing is left of it."""
        if slot.state is not State.DEAD:
            self.move(slot, Trigger.EXIT)
        del self.all[slot.rank, slot.attempt]
        slot.stop_timer()
