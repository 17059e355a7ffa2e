"""When did a worker fail by itself, and had we stopped it before? Pure."""

from __future__ import annotations

from typing import NamedTuple

from ..model.exits import Exit
from ..model.failures import ErrorReport


class Moment(NamedTuple):
    """The same moment on the monotonic clock, in nanoseconds, and on the wall clock, in seconds."""

    ns: int
    at: float


def raised_ns(exit: Exit, told: int | None, report: ErrorReport | None, stopped: Moment | None) -> int | None:
    """When it raised the exception that it told of, at the latest (monotonic, ns); None: it told of none, of one that
    was an answer to our signal, or of a time that is not in its life.

    Args:
        told: when, by its channel.
        report: what it wrote about itself.
        stopped: just before the first signal that we sent to stop it: no answer to that is earlier.
    """
    at = told if told is not None or report is None else report.monotonic
    if at is not None:
        in_its_life = exit.started_ns <= at <= exit.ended_ns
    elif report is not None and report.time is not None:
        # A wall clock alone, as torch writes it: a guess, which must not make a failure of what we have stopped. That
        # clock may have been set meanwhile: what counts is the latest moment at which it can have shown that time.
        moments = [Moment(exit.started_ns, exit.started_at), Moment(exit.ended_ns, exit.ended_at)]
        if stopped is not None:
            moments.append(stopped)
        base = min(one.at - one.ns / 1e9 for one in moments)
        rounded = 0.0 if report.exact else 1.0  # whole seconds are rounded down
        latest = report.time + rounded - base
        in_its_life = exit.started_ns / 1e9 <= latest <= exit.ended_ns / 1e9 + 1
        at = round(latest * 1e9) if in_its_life else None
    else:
        return None
    return at if in_its_life and at is not None and (stopped is None or at < stopped.ns) else None
