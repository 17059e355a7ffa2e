"""The errors users meet: the public door to them. Each says whose fault it is and what to do."""

from __future__ import annotations

from ..model.errors import LaunchFailed, RemoteError, SpecError, TaskTimeout
from ..model.results import GroupFailed, GroupTimeout, WorkerFailed

__all__ = [
    "GroupFailed",
    "GroupTimeout",
    "LaunchFailed",
    "RemoteError",
    "SpecError",
    "TaskTimeout",
    "WorkerFailed",
]
