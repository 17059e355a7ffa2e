"""One process at a time: a `Launcher` starts what a plan says, a `LiveProcess` is the only live handle.

In: a `WorkerPlan`. Out: a process with a pid and pipe ends, and a function worker's channel. Never
here: what a failure means to a group.

Ways of starting, and for whom each is there. `_guardian`: commands and fresh interpreters, which end with this program
however that ends. `_zygote`: functions, in milliseconds. `_fork`: functions that need this process's memory.
`_executor`: functions in an executor of the caller's. `_direct`: where no guardian can run, and for py-spy.

Names are loaded when first used: the command line begins a guardian before it imports what the rest needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._call_outcome import CallOutcome
    from ._contract import Launcher, LiveProcess, RawExit, begin, withdraw
    from ._direct import DirectLauncher, DirectProcess, reap_abandoned
    from ._fork import ForkLauncher
    from ._function_channel import Ended, FunctionChannel
    from ._guardian import begin_guardian, dismiss_guardian, removed_at_the_end
    from ._guardian_launcher import GuardianLauncher
    from ._host_state import HostState
    from ._launchers import By, Launchers, check_launcher, needs_guardian
    from ._lent_executor import ExecutorLauncher, check_open
    from ._passed_descriptors import PassedDescriptors
    from ._received_values import decoded, failure_in, remote_error
    from ._rights import Rights, exceed, hard_limits
    from ._standard_streams import check_input, keep_standard, let_standard_go
    from ._zygote import ZygoteLauncher, end_helpers, end_idle_helpers

_NAMES = {
    "_call_outcome": ["CallOutcome"],
    "_contract": ["Launcher", "LiveProcess", "RawExit", "begin", "withdraw"],
    "_direct": ["DirectLauncher", "DirectProcess", "reap_abandoned"],
    "_fork": ["ForkLauncher"],
    "_function_channel": ["Ended", "FunctionChannel"],
    "_guardian": ["begin_guardian", "dismiss_guardian", "removed_at_the_end"],
    "_guardian_launcher": ["GuardianLauncher"],
    "_host_state": ["HostState"],
    "_launchers": ["By", "Launchers", "check_launcher", "needs_guardian"],
    "_lent_executor": ["ExecutorLauncher", "check_open"],
    "_passed_descriptors": ["PassedDescriptors"],
    "_received_values": ["decoded", "failure_in", "remote_error"],
    "_rights": ["Rights", "exceed", "hard_limits"],
    "_standard_streams": ["check_input", "keep_standard", "let_standard_go"],
    "_zygote": ["ZygoteLauncher", "end_helpers", "end_idle_helpers"],
}

__all__ = [
    "By",
    "CallOutcome",
    "DirectLauncher",
    "DirectProcess",
    "Ended",
    "ExecutorLauncher",
    "ForkLauncher",
    "FunctionChannel",
    "GuardianLauncher",
    "HostState",
    "Launcher",
    "Launchers",
    "LiveProcess",
    "PassedDescriptors",
    "RawExit",
    "Rights",
    "ZygoteLauncher",
    "begin",
    "begin_guardian",
    "check_input",
    "check_launcher",
    "check_open",
    "decoded",
    "dismiss_guardian",
    "end_helpers",
    "end_idle_helpers",
    "exceed",
    "failure_in",
    "hard_limits",
    "keep_standard",
    "let_standard_go",
    "needs_guardian",
    "reap_abandoned",
    "remote_error",
    "removed_at_the_end",
    "withdraw",
]


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
