"""One process at a time: `plan()` decides, a `Launcher` starts, a `LiveProcess` is the only live handle.

In: a `GroupSpec`. Out: processes with a pid, a pidfd and pipe ends. Never here: what a failure means to a group.
"""

from __future__ import annotations

from ._answer import Answer
from ._call import Call, Calls, importable_main
from ._contract import Launcher, LiveProcess, RawExit, begin, withdraw
from ._direct import DirectLauncher, DirectProcess, reap_abandoned
from ._executor import ExecutorLauncher, check_open
from ._fork import ForkLauncher
from ._guardian import GuardianLauncher, removed_at_the_end
from ._host_state import HostState
from ._launchers import By, Launchers, check_launcher, needs_guardian
from ._places import check_places
from ._plan import ERROR_FILES, TAG, Identity, LaunchPlan, WorkerPlan, merged, new_run_id, plan
from ._port import Port
from ._preflight import absolute, check_limits, preflight
from ._standard import check_input, keep_standard, let_standard_go
from ._zygote import ZygoteLauncher, end_helpers

__all__ = [
    "ERROR_FILES",
    "TAG",
    "Answer",
    "By",
    "Call",
    "Calls",
    "DirectLauncher",
    "DirectProcess",
    "ExecutorLauncher",
    "ForkLauncher",
    "GuardianLauncher",
    "HostState",
    "Identity",
    "LaunchPlan",
    "Launcher",
    "Launchers",
    "LiveProcess",
    "Port",
    "RawExit",
    "WorkerPlan",
    "ZygoteLauncher",
    "absolute",
    "begin",
    "check_input",
    "check_launcher",
    "check_limits",
    "check_open",
    "check_places",
    "end_helpers",
    "importable_main",
    "keep_standard",
    "let_standard_go",
    "merged",
    "needs_guardian",
    "new_run_id",
    "plan",
    "preflight",
    "reap_abandoned",
    "removed_at_the_end",
    "withdraw",
]
