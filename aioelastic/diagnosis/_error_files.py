"""Workers' error files: where they are without a log directory, and reading one, which may be half-written, foreign, or
huge, and never raises."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..child.kernel.bounded_reads import upto
from ..model.failures import ErrorReport
from ..system import shared_memory_names
from ..system.descriptors import shut
from ..system.temporary_directories import temporary

LIMIT = 1_048_576  # bytes; a traceback is not longer


SHOWN = 65_536  # characters kept of each text


class ErrorFiles:
    """A place for those of one group, in the directory that this process has among the temporary ones
    (`system/shared_memory_names.py`): it is removed after the last group, at the interpreter's end, by the guardian
    when this program is killed, or by the next program.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._below = ""
        self._where: str | None = None

    def open(self) -> Path | None:
        """The directory; None: none can be made, and failures will lack what workers would write there."""
        try:
            self._below = temporary()
            self._where = shared_memory_names.own_directory(self._below, hold=True)
        except OSError:
            return None
        return Path(self._where)

    def close(self) -> None:
        """Nobody needs them any more."""
        where, self._where = self._where, None
        if where is None:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(where):
                if name.startswith(self._run_id):
                    path = os.path.join(where, name)
                    try:
                        os.unlink(path)
                    except OSError:
                        shared_memory_names.remove(path)  # whatever a worker has put there
        shared_memory_names.let_go(self._below)


def read_report(path: Path, clock: str = "", owner: Mapping[str, str | None] | None = None) -> ErrorReport | None:
    """What a worker wrote about itself: our schema, torch's (two forms of it), or None when there is nothing usable.

    torch's schema: `{"message": {"message": str, "extraInfo": {"py_callstack": str, "timestamp": str}}}`,
    or `{"message": str, "timestamp": int | str}`.

    Args:
        clock: which monotonic clock is ours (`error_record.clock`); stamps of another one say nothing here.
        owner: `run_id`, `rank` and `attempt` of the worker. A report that names others is not taken: a worker of
            another group wrote it, which has inherited the variable.
    """
    try:
        # whatever the worker put there: a FIFO must not make us wait, a terminal must not become ours, and what is
        # another's is not read for it
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        raw = upto(fd, LIMIT + 1)
    except OSError:
        return None
    finally:
        shut(fd)
    if not raw.strip():
        return None
    if len(raw) > LIMIT:
        return ErrorReport(f"(its error file is larger than {LIMIT} bytes and was not read)")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return ErrorReport("(its error file is not JSON: it was cut off, or something else wrote it)")
    if not isinstance(data, dict):
        return ErrorReport("(its error file has an unknown form)")
    ours = data.get("aioelastic")
    if isinstance(ours, dict) and isinstance(ours.get("message"), str):
        if any(isinstance(ours.get(key), str) and ours[key] != value for key, value in (owner or {}).items()):
            return None
        at, pid = ours.get("monotonic"), ours.get("pid")
        known = isinstance(at, int) and not isinstance(at, bool) and ours.get("clock") == clock != ""
        return ErrorReport(
            ours["message"][:SHOWN],
            _text(ours.get("traceback")),
            _time(ours.get("time")),
            monotonic=at if known else None,
            pid=pid if isinstance(pid, int) and not isinstance(pid, bool) else None,
        )
    message = data.get("message")
    if isinstance(message, str):
        return ErrorReport(message[:SHOWN], "", _time(data.get("timestamp")), exact=False)
    if isinstance(message, dict) and isinstance(message.get("message"), str):
        extra = message.get("extraInfo")
        extra = extra if isinstance(extra, dict) else {}
        trace, at = _text(extra.get("py_callstack")), _time(extra.get("timestamp"))
        return ErrorReport(message["message"][:SHOWN], trace, at, exact=False)
    return ErrorReport("(its error file has an unknown form)")


def _text(value: Any) -> str:
    return value[-SHOWN:] if isinstance(value, str) else ""


def _time(value: Any) -> float | None:
    try:
        at = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return at if math.isfinite(at) and not isinstance(value, bool) else None
