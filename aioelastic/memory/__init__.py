"""Memory that processes share: segments, arrays over them, and how they travel in messages.

In: arrays, and descriptors that came with messages. Out: places in segments, and descriptors to send. Synchronous and
of the standard library; numpy and torch are spoken to when somebody else has imported them. It must never import
asyncio: workers use it.
"""

from ._arena import ShareStats, arena, stats, trim
from ._array import SharedArray, copy, empty, is_shared
from ._errors import NotShareable, ShareLeakWarning, ShareLimit, ShareLost, SharingError
from ._message import Incoming, Outgoing, carry, incoming, register, store

__all__ = [
    "Incoming",
    "NotShareable",
    "Outgoing",
    "ShareLeakWarning",
    "ShareLimit",
    "ShareLost",
    "ShareStats",
    "SharedArray",
    "SharingError",
    "arena",
    "carry",
    "copy",
    "empty",
    "incoming",
    "is_shared",
    "register",
    "stats",
    "store",
    "trim",
]
