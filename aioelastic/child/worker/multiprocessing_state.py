"""What `multiprocessing` keeps for a program and gives to the processes that it spawns, for function workers, too.

The resource tracker removes shared memory and semaphores once nobody holds its pipe any more. A worker that attached to
the program's `SharedMemory` would have a tracker of its own, which destroys that memory when the worker ends. By the
key, proxies of a `Manager` are let in. As `multiprocessing.spawn` does both; here only where the program uses them.
"""

from __future__ import annotations

import sys
from typing import Any

from ...system.descriptors import shut

TRACKED: tuple[str, ...] = ("multiprocessing.shared_memory", "multiprocessing.managers", "multiprocessing.synchronize")


def own() -> tuple[bytes | None, list[int]]:
    """What this program has: its key, and the end of the tracker's pipe that it writes to, which stays its own. None
    and []: it uses nothing that needs them."""
    modules = sys.modules
    key = None
    if "multiprocessing.managers" in modules:
        key = bytes(modules["multiprocessing.process"].current_process().authkey)
    module = modules.get("multiprocessing.resource_tracker")
    if module is None or modules.keys().isdisjoint(TRACKED):
        return key, []
    try:
        return key, [module.getfd()]
    except (OSError, RuntimeError, Warning):  # there is no room for it, or it has died: workers have their own
        return key, []


def adopt(authkey: bytes | None, pipe: list[int]) -> None:
    """Have those of the program. `pipe` is ours from now on."""
    if authkey is not None:
        from multiprocessing import process  # for start-up time: few programs use it

        process.current_process().authkey = authkey
    if pipe:
        from multiprocessing import resource_tracker  # the same

        ours: Any = resource_tracker._resource_tracker
        if ours._fd is None:
            ours._fd = pipe.pop()  # as `multiprocessing.spawn.spawn_main` has it
    shut(*pipe)
