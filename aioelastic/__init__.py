"""aioelastic: an asyncio-native supervisor for groups of worker processes.

Start workers, stream their output, know within a millisecond when one ends, stop the rest, say exactly why, and
leave nothing behind::

    import asyncio
    from aioelastic import Command, Logs, supervise

    async def main() -> None:
        result = await supervise(Command("python", "train.py"), n=4, logs=Logs(dir="runs"))
        print(result[2].exit, result[2].usage.max_rss)

    asyncio.run(main())

Names are loaded when first used, so a worker that only wants `aioelastic.record` never pays for asyncio.
"""

import sys
from typing import TYPE_CHECKING

if not sys.platform.startswith("linux"):
    raise ImportError(
        f"aioelastic needs Linux, and this is {sys.platform}: run it in a container, or in WSL 2 on Windows"
    )

from .system import first_streams as _first_streams  # noqa: F401  # looked at now, before anything is closed

__version__ = "0.1.0"

# Where each public name lives; `tests/whole/test_house.py` holds this list to the real modules.
_HOMES = {
    "supervise": "supervisor.run_group",
    "run": "supervisor.run_main",
    "Group": "supervisor.any_group",
    "Worker": "supervisor.worker",
    "WorkerExecutor": "executor",
    "Command": "model.entries",
    "Function": "model.entries",
    "Logs": "model.logs",
    "Match": "model.logs",
    "Placement": "model.placement",
    "Restart": "model.restart_policy",
    "Rotate": "model.logs",
    "Std": "model.logs",
    "Stop": "model.stop_policy",
    "Exit": "model.exits",
    "Failure": "model.failures",
    "GroupResult": "model.results",
    "Output": "model.exits",
    "Result": "model.results",
    "Unkillable": "model.leftovers",
    "Remains": "model.leftovers",
    "Usage": "model.exits",
    "Cause": "model.failures",
    "GroupFailed": "errors",
    "GroupTimeout": "errors",
    "RemoteError": "errors",
    "TaskTimeout": "errors",
    "SpecError": "errors",
    "WorkerFailed": "errors",
    "Line": "model.lines",
    "LINE_LIMIT": "model.lines",
    "LaunchPlan": "planning",
    "plan": "planning",
    "read_env": "config",
    "record": "child.worker.error_record",
    "rank": "child.worker.context",
    "world_size": "child.worker.context",
    "local_rank": "child.worker.context",
    "attempt": "child.worker.context",
    "ready": "child.worker.context",
    "stopping": "child.worker.context",
}
_MODULES = {"errors", "events", "gpu", "sharing"}

__all__ = [
    "supervise",
    "run",
    "Group",
    "Worker",
    "WorkerExecutor",
    "Command",
    "Function",
    "Logs",
    "Match",
    "Placement",
    "Restart",
    "Rotate",
    "Std",
    "Stop",
    "Exit",
    "Failure",
    "GroupResult",
    "Output",
    "Result",
    "Remains",
    "Unkillable",
    "Usage",
    "Cause",
    "GroupFailed",
    "GroupTimeout",
    "RemoteError",
    "TaskTimeout",
    "SpecError",
    "WorkerFailed",
    "Line",
    "LINE_LIMIT",
    "LaunchPlan",
    "plan",
    "read_env",
    "record",
    "rank",
    "world_size",
    "local_rank",
    "attempt",
    "ready",
    "stopping",
    "errors",
    "events",
    "gpu",
    "sharing",
]

if TYPE_CHECKING:
    from . import events, gpu, sharing
    from .child.worker.context import attempt, local_rank, rank, ready, stopping, world_size
    from .child.worker.error_record import record
    from .config import read_env
    from .errors import GroupFailed, GroupTimeout, RemoteError, SpecError, TaskTimeout, WorkerFailed
    from .executor import WorkerExecutor
    from .model.entries import Command, Function
    from .model.exits import Exit, Output, Usage
    from .model.failures import Cause, Failure
    from .model.leftovers import Remains, Unkillable
    from .model.lines import LINE_LIMIT, Line
    from .model.logs import Logs, Match, Rotate, Std
    from .model.placement import Placement
    from .model.restart_policy import Restart
    from .model.results import GroupResult, Result
    from .model.stop_policy import Stop
    from .planning import LaunchPlan, plan
    from .supervisor.any_group import Group
    from .supervisor.run_group import supervise
    from .supervisor.run_main import run
    from .supervisor.worker import Worker


def __getattr__(name: str) -> object:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
