"""What runs inside a worker: synchronous, standard library only, and never imports asyncio (50 ms of start-up)."""

from ._context import attempt, local_rank, rank, ready, stopping, world_size
from ._record import record

__all__ = ["attempt", "local_rank", "rank", "ready", "record", "stopping", "world_size"]
