"""The exit status, by one table. In: what came of the run, or the error that kept it from beginning. Out: a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..model.errors import SpecError

if TYPE_CHECKING:
    from ..model.results import GroupResult

TIMED_OUT = 124  # as timeout(1)
READER_GONE = 141  # 128 + SIGPIPE, as of a program that is ended by writing to it: `yes | head -1`
INTERRUPTED = 130  # as a shell: 128 + SIGINT


class Facts(NamedTuple):
    """What the status of a run depends on.

    Attributes:
        signals: those that we got to stop the run, in order.
        require_clean: what is left behind counts.
        reader_gone: whoever read what the tee writes has gone.
        lost: bytes of output that could not be written.
    """

    result: GroupResult
    signals: Sequence[int] = ()
    require_clean: bool = False
    reader_gone: bool = False
    lost: int = 0


class Rule(NamedTuple):
    """One line of the table.

    Attributes:
        shown: the status, for people.
        when: what it says.
        of: the status; 0 where this rule does not apply.
    """

    shown: str
    when: str
    of: Callable[[Facts], int]


def _signalled(facts: Facts) -> int:
    return 128 + facts.signals[0] if facts.signals and facts.result.reason == "stopped" else 0


def _failed(facts: Facts) -> int:
    first = facts.result.first_failure
    return 0 if first is None else first.status


# the first that applies counts
RULES: tuple[Rule, ...] = (
    Rule("128 + N", "the run was stopped by signal N", _signalled),
    Rule(
        "that of the first failure",
        "a worker failed: its exit code, 128 + N if signal N ended it, 1 if that would be 0 or if it had failed before "
        "it was stopped, 127 if it could not be started, 126 if the system refused its program",
        _failed,
    ),
    Rule(
        "141",
        "the reader of the output went away (| head), which stops the workers",
        lambda facts: READER_GONE if facts.reader_gone else 0,
    ),
    Rule("124", "--timeout was over", lambda facts: TIMED_OUT if facts.result.reason == "timeout" else 0),
    Rule("1", "a worker would not die", lambda facts: int(bool(facts.result.unkillable))),
    Rule(
        "1", "--require-clean, and something is left", lambda facts: int(facts.require_clean and not facts.result.clean)
    ),
    Rule("1", "output could not be written (a full disk, say)", lambda facts: int(facts.lost > 0)),
)
# told before anything has started
REFUSALS: tuple[tuple[str, str], ...] = (
    ("127", "the program was not found"),
    ("126", "the program was found, but cannot be run"),
    ("2", "wrong usage"),
    ("1", "the system refused what this command itself needs, or what it prints could not be written"),
)
DONE = (
    "0",
    "all workers succeeded (or one: --on-success stop), and nothing of what follows; else the first that applies",
)


def of_run(facts: Facts) -> int:
    """That of a run that has come to its end."""
    return next((status for rule in RULES if (status := rule.of(facts))), 0)


def of_error(exc: BaseException) -> int:
    """That of one which could not begin."""
    if isinstance(exc, SpecError):
        return exc.status
    return INTERRUPTED if isinstance(exc, KeyboardInterrupt) else 1


def table() -> list[tuple[str, str]]:
    """All of it: (status, when)."""
    return [DONE, *((rule.shown, rule.when) for rule in RULES), *REFUSALS]
