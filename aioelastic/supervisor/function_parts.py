"""What only functions need, imported in one go where there are some: at the latest before a group of them starts, since
later the search path, the directory or the descriptors may be gone. A group of commands comes up sooner without it."""

from __future__ import annotations

from .. import errors  # under this name they come from workers
from ..child.wire import messages, pending, sent_objects
from ..child.worker import function_run, host_program, main_module
from ..launch import Ended, ExecutorLauncher, ForkLauncher, FunctionChannel, ZygoteLauncher, check_open
from ..planning import Calls

__all__ = [
    "Calls",
    "Ended",
    "ExecutorLauncher",
    "ForkLauncher",
    "FunctionChannel",
    "ZygoteLauncher",
    "check_open",
    "errors",
    "function_run",
    "host_program",
    "main_module",
    "messages",
    "pending",
    "sent_objects",
]
