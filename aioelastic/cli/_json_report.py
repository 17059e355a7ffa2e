"""`--json`: what came of a run as JSON objects, one a line, for programs. In: a `GroupResult`. Out: text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..model.failures import Failure
from ..model.results import GroupResult, Result
from ..model.text import shown


def lines(result: GroupResult, troubles: Mapping[str, str], lost: Mapping[str, int]) -> list[str]:
    """One with `"event": "failure"` for each failure, the root cause last, and then the one with `"event": "result"`.

    Args:
        troubles: what is wrong with a sink, by its name.
        lost: bytes of output that did not arrive, by sink.
    """
    found = [_failure(one) for one in reversed(result.failures)]
    found.append(
        {
            "event": "result",
            "name": result.name,
            "run_id": result.run_id,
            "reason": result.reason,
            "ok": result.ok,
            "clean": result.clean,
            "duration": result.duration,
            "log_dir": None if result.log_dir is None else str(result.log_dir),
            "workers": [_worker(one) for one in result],
            "history": result.history(),
            "remains": [str(one) for one in result.remains],
            "troubles": dict(troubles),
            "lost": dict(lost),
        }
    )
    return [json.dumps(one) for one in found]


def _worker(one: Result) -> dict[str, Any]:
    exit, usage = one.exit, one.usage
    return {
        "rank": one.rank,
        "worker": one.worker,
        "pid": one.pid,
        "attempts": one.attempt + 1,
        "outcome": one.outcome,
        "ok": one.ok,
        "stopped": one.stopped,
        "code": None if exit is None else exit.code,
        "signal": None if exit is None else exit.signal,
        "duration": None if exit is None else exit.duration,
        "max_rss": None if usage is None else usage.max_rss,
        "cpu": None if usage is None else usage.user + usage.system,
        "value": None if one.value is None else shown(one.value),
        "stacks": one.stacks,
    }


def _failure(one: Failure) -> dict[str, Any]:
    teller = one.exception or one.error
    return {
        "event": "failure",
        "rank": one.rank,
        "worker": one.worker,
        "pid": one.pid,
        "host": one.host,
        "attempt": one.attempt,
        "root_cause": one.first,
        "headline": one.headline,
        "status": one.status,
        "why": None if one.why is None else str(one.why),
        "command": list(one.argv),
        "cwd": one.cwd,
        "logs": [str(out.path) for out in (one.stdout, one.stderr) if out.path],
        "stderr": one.stderr.last_lines(),
        "traceback": teller.traceback if teller else None,
    }
