"""Arrays between processes without copying them, queues for them, and who holds what.

In: arrays. Out: the same memory in other processes, as long as anybody uses it. What it must never do: start a process
or a thread, or import numpy, torch or asyncio by itself.
"""

from typing import TYPE_CHECKING

from ..child._letters import receive, receive_async, send
from ..gpu import DeviceUnavailable, ForkedCudaError, ReshareError
from ..memory import (
    NotShareable,
    SharedArray,
    ShareLeakWarning,
    ShareLimit,
    ShareLost,
    ShareStats,
    SharingError,
    is_shared,
    register,
    stats,
    trim,
)
from ._books import Held, Lease, audit, configure, leases, scope
from ._places import copy, empty
from ._queue import Queue, QueueClosed

if TYPE_CHECKING:
    from ._endpoint import Attachment as Attachment
    from ._endpoint import Endpoint as Endpoint
    from ._endpoint import attach as attach

__all__ = [
    "empty",
    "copy",
    "is_shared",
    "SharedArray",
    "register",
    "Queue",
    "QueueClosed",
    "send",
    "receive",
    "receive_async",
    "Endpoint",
    "attach",
    "Attachment",
    "stats",
    "trim",
    "configure",
    "scope",
    "leases",
    "audit",
    "Lease",
    "Held",
    "ShareStats",
    "SharingError",
    "NotShareable",
    "ReshareError",
    "ShareLost",
    "ShareLimit",
    "DeviceUnavailable",
    "ForkedCudaError",
    "ShareLeakWarning",
]


def __getattr__(name: str) -> object:
    if name in ("Attachment", "Endpoint", "attach"):
        from . import _endpoint  # it needs asyncio

        return getattr(_endpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
