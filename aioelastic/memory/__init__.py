"""Memory that processes share: segments, arrays over them, and how they travel in messages.

In: arrays, and descriptors that came with messages. Out: places in segments, and descriptors to send. Synchronous and
of the standard library; numpy and torch are spoken to when somebody else has imported them. It must never import
asyncio: workers use it.
"""

from ._arena import Arena, ShareStats, arena, arenas, stats, trim
from ._copying import pool, store
from ._deferred import Done, Elsewhere, later, now
from ._errors import NotShareable, ShareLeakWarning, ShareLimit, ShareLost, SharingError
from ._forked_copies import after_exit, after_fork, descriptors, peer_gone
from ._received_copies import received
from .array_messages import Outgoing, carry, outgoing, register, tables
from .incoming import Incoming, incoming
from .shared_array import SharedArray, copy, empty, is_shared
from .shared_segments import PLACES, Segment, Use, ending, kept, made_by, named, segments

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
    "Use",
    "arena",
    "arenas",
    "carry",
    "copy",
    "descriptors",
    "empty",
    "ending",
    "incoming",
    "is_shared",
    "kept",
    "later",
    "made_by",
    "named",
    "now",
    "outgoing",
    "peer_gone",
    "pool",
    "received",
    "register",
    "segments",
    "stats",
    "store",
    "tables",
    "trim",
]
