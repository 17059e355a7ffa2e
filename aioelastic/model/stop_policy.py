"""How workers are stopped, as a frozen value, checked when it is made."""

from __future__ import annotations

import signal as _signal
from typing import Literal

from .errors import SpecError
from .frozen import dataclass
from .signal_names import parse_signal, signal_name
from .validation import (
    check_bool,
    check_choice,
    check_seconds,
)

STACKS = _signal.SIGRTMAX - 2  # as in child/worker/stack_dump.py


@dataclass(frozen=True)
class Stop:
    """How workers are stopped: a signal, a time to obey it, then SIGKILL, then a bounded wait.

    Each worker has the whole grace for itself. A worker that ends early ends its own grace. `Group.stop()` returns
    within grace + bound + 1 s (and the 2 s of a dump), whatever hangs: what is not known by then is told so.

    Args:
        signal: the polite signal, by number, member or name (`"SIGINT"`, `"INT"`, `"SIGRTMIN+3"`).
        grace: seconds a worker has to obey before SIGKILL.
        scope: who gets the signal: `"leader_then_group"` (the worker; its process group when the worker is gone
            or its grace is over, so that a trainer's loaders outlive its last save), `"group"` (all at once), or
            `"leader"` (never anybody but the worker: what it leaves running is only reported).
        bound: seconds to wait for a process to die after SIGKILL before it is reported as `Unkillable`.
        if_lost: how the guardian ends workers when this program dies without having stopped them (by SIGKILL, say):
            `"kill"` at once, or `"stop"` by `signal` and `grace`, so that a trainer can save. Nobody reads what they
            print then.
        dump: first take the Python stacks of all that still run (`Group.dump_stacks`; at most 2 seconds), so that
            `Result.stacks` shows where a worker hung when another one failed or the time was over.

    Raises:
        SpecError: unknown or uncatchable signal; negative or infinite time.

    Example::

        Stop(signal="SIGINT", grace=120)  # two minutes to save
    """

    signal: int | str = _signal.SIGTERM
    grace: float = 30.0
    scope: Literal["leader_then_group", "group", "leader"] = "leader_then_group"
    bound: float = 30.0
    dump: bool = False
    if_lost: Literal["kill", "stop"] = "kill"

    def __post_init__(self) -> None:
        number = parse_signal("Stop.signal", self.signal)
        if number in (_signal.SIGKILL, _signal.SIGSTOP):
            raise SpecError(
                "Stop.signal",
                signal_name(number),
                "cannot be caught by a worker",
                "use SIGTERM with grace=0 to kill at once",
            )
        if number == STACKS:
            problem = "is the one by which a worker is asked for its stacks"
            raise SpecError("Stop.signal", signal_name(number), problem, "use another, as SIGRTMIN+3")
        object.__setattr__(self, "signal", number)
        check_seconds("Stop.grace", self.grace)
        check_seconds("Stop.bound", self.bound)
        check_bool("Stop.dump", self.dump)
        check_choice("Stop.scope", self.scope, ("leader_then_group", "group", "leader"))
        check_choice("Stop.if_lost", self.if_lost, ("kill", "stop"))

    @property
    def signum(self) -> int:
        """The signal as a member of `signal.Signals`; a plain number where it has none (real-time signals)."""
        assert isinstance(self.signal, int)  # since it was made
        return self.signal
