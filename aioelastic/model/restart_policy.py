"""Beginning again after a failure: what the caller asks for, and the decision. Pure: no I/O, no clock.

>>> decide(Restart.on_failure(max=1), attempt=0, refused=False)
<Verdict.AGAIN: 'again'>
"""

from __future__ import annotations

import enum
from typing import Any, Literal

from .errors import SpecError
from .frozen import dataclass
from .validation import check_choice

# Each failure is kept for the report, and each attempt has its own directory: what failed a thousand times will not
# heal.
MOST = 1_000


@dataclass(frozen=True)
class Restart:
    """Whether workers that fail are restarted. Made by `Restart.never()` or `Restart.on_failure(max=3)`.

    A worker that succeeds is not restarted, nor is one that was stopped by us.

    Attributes:
        max: how many restarts there may be: of each rank with scope `"one"`, of the group with `"all"`. 0: never.
        scope: who is restarted: `"one"` (only the rank that failed; the others run on untouched) or `"all"` (the
            others are stopped first, and all ranks restart together, on a new `MASTER_PORT`).

    Raises:
        SpecError: a field is not usable.
    """

    max: int = 0
    scope: Literal["one", "all"] = "one"

    def __post_init__(self) -> None:
        _check_max(self.max, 0)
        check_choice("Restart.scope", self.scope, ("one", "all"))

    @classmethod
    def never(cls) -> Restart:
        """A failure ends the group. The default."""
        return cls()

    @classmethod
    def on_failure(cls, max: int, scope: Literal["one", "all"] = "one") -> Restart:
        """A failure is answered by a new attempt, at most `max` times; the next one ends the group.

        Args:
            max: how many restarts: of each rank with scope `"one"`, of the group with `"all"`.
            scope: who is restarted: `"one"`, the rank that failed, or `"all"`.

        Raises:
            SpecError: one of them is not usable.

        Example::

            Group(Command("serve"), n=8, restart=Restart.on_failure(max=3))
            Group(Command("python", "train.py"), n=8, restart=Restart.on_failure(max=3, scope="all"))
        """
        _check_max(max, 1)
        return cls(max, scope)

    def __str__(self) -> str:
        """In words, as `--dry-run` prints it."""
        if self.max == 0:
            return "never"
        times = "once" if self.max == 1 else f"{self.max} times"
        if self.scope == "one":
            return f"a rank that fails, at most {times} each"
        return f"all ranks when one fails, at most {times}"


class Verdict(enum.Enum):
    """What follows a failure."""

    AGAIN = "again"  # a new attempt
    GIVE_UP = "give up"  # the limit is passed: the group fails
    FAIL = "fail"  # the group fails; nothing was to be tried again


def decide(policy: Restart, attempt: int, refused: bool) -> Verdict:
    """What follows the failure of this attempt (which is also how many restarts there were before it).

    Args:
        refused: the system refused to start it. In the first attempt that is a mistake in what was asked for;
            later, when it had run before, it is a failure like any other.
    """
    if policy.max == 0 or (refused and attempt == 0):
        return Verdict.FAIL
    return Verdict.AGAIN if attempt < policy.max else Verdict.GIVE_UP


def _check_max(value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        problem = f"is {type(value).__name__}, not int"
    elif value < least:
        problem = f"is less than {least}"
    elif value > MOST:
        problem = f"is more than {MOST}"
    else:
        return
    raise SpecError("Restart.max", value, problem, f"give a whole number from {least} to {MOST}")
