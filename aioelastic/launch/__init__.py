"""One process at a time: `plan()` decides, a `Launcher` starts, a `LiveProcess` is the only live handle.

In: a `GroupSpec`. Out: processes with a pid, a pidfd and pipe ends. Never here: what a failure means to a group.
"""

from __future__ import annotations

from ._contract import Launcher, LiveProcess, RawExit
from ._direct import DirectLauncher, reap_abandoned
from ._plan import TAG, LaunchPlan, WorkerPlan, new_run_id, owner, plan
from ._port import Port
from ._preflight import absolute, check_limits, preflight

__all__ = [
    "TAG",
    "DirectLauncher",
    "LaunchPlan",
    "Launcher",
    "LiveProcess",
    "Port",
    "RawExit",
    "WorkerPlan",
    "absolute",
    "check_limits",
    "new_run_id",
    "owner",
    "plan",
    "preflight",
    "reap_abandoned",
]
