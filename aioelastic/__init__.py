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

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives; `tests/test_house.py` holds this list to the real modules.
_HOMES = {
    "supervise": "run",
    "Group": "group",
    "Worker": "worker",
    "WorkerExecutor": "executor",
    "Command": "entry",
    "Function": "entry",
    "Logs": "spec",
    "Match": "spec",
    "Placement": "placement",
    "Restart": "restart",
    "Rotate": "spec",
    "Std": "spec",
    "Stop": "spec",
    "Exit": "outcome",
    "Failure": "outcome",
    "GroupResult": "outcome",
    "Output": "outcome",
    "Result": "outcome",
    "Unkillable": "remains",
    "Remains": "remains",
    "Usage": "outcome",
    "Cause": "why",
    "GroupFailed": "errors",
    "GroupTimeout": "errors",
    "RemoteError": "errors",
    "TaskTimeout": "errors",
    "SpecError": "errors",
    "WorkerFailed": "errors",
    "Line": "streams",
    "LINE_LIMIT": "streams",
    "LaunchPlan": "launch",
    "plan": "launch",
    "record": "child",
    "rank": "child",
    "world_size": "child",
    "local_rank": "child",
    "attempt": "child",
    "ready": "child",
    "stopping": "child",
}
_MODULES = {"errors", "events", "gpu", "sharing"}

__all__ = [
    "supervise",
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
    from . import errors as errors
    from . import events as events
    from . import gpu as gpu
    from . import sharing as sharing
    from .child import attempt as attempt
    from .child import local_rank as local_rank
    from .child import rank as rank
    from .child import ready as ready
    from .child import record as record
    from .child import stopping as stopping
    from .child import world_size as world_size
    from .entry import Command as Command
    from .entry import Function as Function
    from .errors import GroupFailed as GroupFailed
    from .errors import GroupTimeout as GroupTimeout
    from .errors import RemoteError as RemoteError
    from .errors import SpecError as SpecError
    from .errors import TaskTimeout as TaskTimeout
    from .errors import WorkerFailed as WorkerFailed
    from .executor import WorkerExecutor as WorkerExecutor
    from .group import Group as Group
    from .launch import LaunchPlan as LaunchPlan
    from .launch import plan as plan
    from .outcome import Exit as Exit
    from .outcome import Failure as Failure
    from .outcome import GroupResult as GroupResult
    from .outcome import Output as Output
    from .outcome import Result as Result
    from .outcome import Usage as Usage
    from .placement import Placement as Placement
    from .remains import Remains as Remains
    from .remains import Unkillable as Unkillable
    from .restart import Restart as Restart
    from .run import supervise as supervise
    from .spec import Logs as Logs
    from .spec import Match as Match
    from .spec import Rotate as Rotate
    from .spec import Std as Std
    from .spec import Stop as Stop
    from .streams import LINE_LIMIT as LINE_LIMIT
    from .streams import Line as Line
    from .why import Cause as Cause
    from .worker import Worker as Worker


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
