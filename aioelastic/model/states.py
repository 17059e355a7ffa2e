"""One worker's life, as one table. A pair that is not in it is a bug and raises.

>>> step(State.RUNNING, Trigger.EXIT)
<State.EXITED: 'exited'>
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

S = TypeVar("S", bound=enum.Enum)
T = TypeVar("T", bound=enum.Enum)


class State(enum.Enum):
    """Where a worker is in its life; the value is the same word in lower case.

    Attributes:
        PLANNED: nothing has happened yet.
        STARTING: the launcher is at work.
        RUNNING: it has a pid.
        STOPPING: the stop signal was sent; its grace runs.
        KILLING: SIGKILL was sent.
        EXITED: the worker is gone; its output or its children may not be.
        SUCCEEDED: nothing of it is left; it did what it was to do.
        FAILED: nothing of it is left; it failed by itself, as far as its exit tells.
        STOPPED: nothing of it is left; we had stopped it.
        UNSTARTED: it never ran: refused by the system, or not needed any more.
        UNKILLABLE: SIGKILL did not end it within the bound.
    """

    PLANNED = "planned"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    KILLING = "killing"
    EXITED = "exited"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    UNSTARTED = "unstarted"
    UNKILLABLE = "unkillable"


class Trigger(enum.Enum):
    """What moves it."""

    LAUNCH = "launch"
    SPAWNED = "spawned"
    REFUSED = "refused"
    STOP = "stop"
    KILL = "kill"
    EXIT = "exit"
    SUCCESS = "success"
    FAILURE = "failure"
    STOPPED = "stopped"
    GIVE_UP = "give up"


_S, _T = State, Trigger

TABLE: dict[tuple[State, Trigger], State] = {
    (_S.PLANNED, _T.LAUNCH): _S.STARTING,
    (_S.PLANNED, _T.REFUSED): _S.UNSTARTED,
    (_S.STARTING, _T.SPAWNED): _S.RUNNING,
    (_S.STARTING, _T.REFUSED): _S.UNSTARTED,
    (_S.RUNNING, _T.STOP): _S.STOPPING,
    (_S.RUNNING, _T.KILL): _S.KILLING,
    (_S.RUNNING, _T.EXIT): _S.EXITED,
    (_S.STOPPING, _T.KILL): _S.KILLING,
    (_S.STOPPING, _T.EXIT): _S.EXITED,
    (_S.KILLING, _T.EXIT): _S.EXITED,
    (_S.KILLING, _T.GIVE_UP): _S.UNKILLABLE,
    (_S.EXITED, _T.SUCCESS): _S.SUCCEEDED,
    (_S.EXITED, _T.FAILURE): _S.FAILED,
    (_S.EXITED, _T.STOPPED): _S.STOPPED,
}

FINAL = frozenset(state for state in State if not any(state is source for source, _ in TABLE))
ALIVE = frozenset({State.RUNNING, State.STOPPING, State.KILLING})


def step(state: State, trigger: Trigger) -> State:
    """The state after `trigger`. Raises `RuntimeError` for a pair that is not in the table."""
    found = TABLE.get((state, trigger))  # each worker comes here four times
    return found or after(TABLE, state, trigger, "a worker")


# --- of any table: an executor has one, too ---


def after(table: Mapping[tuple[S, T], S], state: S, trigger: T, who: str) -> S:
    """See `step`."""
    try:
        return table[state, trigger]
    except KeyError:
        raise RuntimeError(f"{who} that is {state.value} cannot take {trigger.value!r}") from None
