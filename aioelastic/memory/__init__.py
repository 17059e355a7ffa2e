"""Memory that processes share: segments, arrays over them, and how they travel in messages.

In: arrays, and descriptors that came with messages. Out: places in segments, and descriptors to send. Synchronous and
of the standard library; numpy and torch are spoken to when somebody else has imported them. It must never import
asyncio: workers use it.
"""

from ._arena import Arena, ShareStats, arena, arenas, stats, trim
from ._array import SharedArray, copy, empty, is_shared
from ._copy import store
from ._errors import NotShareable, ShareLeakWarning, ShareLimit, ShareLost, SharingError
from ._later import Done, Elsewhere, later, now
from ._message import Incoming, Outgoing, carry, incoming, outgoing, register, tables
from ._segment import PLACES, Segment, after_exit, after_fork, descriptors, gate, made_by, named, peer_gone, segments

__all__ = [
    "Arena",
    "Done",
    "Elsewhere",
    "Incoming",
    "PLACES",
    "NotShareable",
    "Outgoing",
    "Segment",
    "ShareLeakWarning",
    "ShareLimit",
    "ShareLost",
    "ShareStats",
    "SharedArray",
    "SharingError",
    "after_exit",
    "after_fork",
    "arena",
    "arenas",
    "carry",
    "copy",
    "descriptors",
    "empty",
    "gate",
    "incoming",
    "is_shared",
    "later",
    "made_by",
    "named",
    "now",
    "outgoing",
    "peer_gone",
    "register",
    "segments",
    "stats",
    "store",
    "tables",
    "trim",
]
