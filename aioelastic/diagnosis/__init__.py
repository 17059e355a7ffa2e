"""Why did it end? In: an exit, what the worker wrote of itself, what the system shows. Out: a `Cause`, with evidence.

Never here: a signal that could end a process, a restart, or a decision for a group; and nothing is called certain that
is not.
"""

from __future__ import annotations

from ._cause import Evidence, Facts, Kills, cause_of, is_kill, is_out_of_memory
from ._error_files import ErrorFiles, read_report
from ._evidence import EvidenceCollector
from ._failure_time import Moment, raised_ns
from ._tracebacks import raised

__all__ = [
    "ErrorFiles",
    "Evidence",
    "Facts",
    "Kills",
    "Moment",
    "EvidenceCollector",
    "cause_of",
    "is_kill",
    "is_out_of_memory",
    "raised",
    "raised_ns",
    "read_report",
]
