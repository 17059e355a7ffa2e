"""Arrays between processes without copying them, queues for them, and who holds what.

In: arrays. Out: the same memory in other processes, as long as anybody uses it. What it must never do: start a process
or a thread, or import numpy, torch or asyncio by itself.
"""

from typing import TYPE_CHECKING

from ..child.wire.sent_objects import Empty
from ..child.worker.send_receive import receive, receive_async, send
from ..gpu import DeviceUnavailable, ForkedCudaError, ReshareError
from ..memory import NotShareable, ShareLeakWarning, ShareLimit, ShareLost, ShareStats, SharingError, stats, trim
from ..memory.array_messages import register
from ..memory.shared_array import SharedArray, is_shared
from ._arrays import copy, empty
from ._audit import Held, Lease, audit, configure, leases, scope
from ._items import Full, QueueClosed
from ._queue import Queue

if TYPE_CHECKING:
    from ._endpoint import Attachment, Endpoint, attach

__all__ = [
    "empty",
    "copy",
    "is_shared",
    "SharedArray",
    "register",
    "Queue",
    "QueueClosed",
    "Empty",
    "Full",
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
