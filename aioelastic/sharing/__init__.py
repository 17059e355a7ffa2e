"""Arrays between processes without copying them, queues for them, and who holds what.

In: arrays. Out: the same memory in other processes, as long as anybody uses it. What it must never do: start a process
or a thread, or import numpy, torch or asyncio by itself.
"""

from ..child._letters import receive, receive_async, send
from ..memory import (
    NotShareable,
    SharedArray,
    ShareLeakWarning,
    ShareLimit,
    ShareLost,
    ShareStats,
    SharingError,
    copy,
    empty,
    is_shared,
    register,
    stats,
    trim,
)
from ._books import Held, Lease, audit, configure, leases, scope
from ._queue import Queue, QueueClosed

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
    "ShareLost",
    "ShareLimit",
    "ShareLeakWarning",
]
