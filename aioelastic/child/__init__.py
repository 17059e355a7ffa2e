"""What runs inside a worker: synchronous, standard library only, and never imports asyncio (50 ms of start-up)."""

from ._record import record

__all__ = ["record"]
