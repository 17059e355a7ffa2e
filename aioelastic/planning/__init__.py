"""From what is asked for to what exactly will run: a plan that can be printed, and the looks at the machine before it.

In: a `GroupSpec`. Out: a `LaunchPlan`, or a `SpecError` that names the field. It reads the disk; nothing is started,
and nothing is written but what a free port and a pickled function need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._launch_plan import ERROR_FILES, TAG, Identity, LaunchPlan, Who, WorkerPlan, merged, new_run_id, plan
from ._machine_checks import Looking, absolute, check_limits, preflight
from ._placement_checks import check_places
from ._ports import Port

if TYPE_CHECKING:
    from ._calls import Call, Calls, explain
    from ._user_checks import check_users

__all__ = [
    "ERROR_FILES",
    "TAG",
    "Call",
    "Calls",
    "Identity",
    "LaunchPlan",
    "Looking",
    "Port",
    "Who",
    "WorkerPlan",
    "absolute",
    "check_limits",
    "check_places",
    "check_users",
    "explain",
    "merged",
    "new_run_id",
    "plan",
    "preflight",
]


def __getattr__(name: str) -> object:
    module: Any
    if name in ("Call", "Calls", "explain"):
        from . import _calls as module  # for start-up time: commands have none
    elif name == "check_users":
        from . import _user_checks as module  # for start-up time: most run as this program
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(module, name)
    return value
