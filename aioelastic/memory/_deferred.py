"""What sending a message has to wait for, and who waits: the thread that packs it, or, where that has an event loop,
somebody else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

AWAY = 8 << 20  # bytes from which a copy is not made in the thread of an event loop


class Done(Protocol):
    """A `concurrent.futures.Future`, which is heavy to import."""

    def result(self, timeout: float | None = None) -> Any: ...

    def exception(self, timeout: float | None = None) -> BaseException | None: ...

    def done(self) -> bool: ...

    def add_done_callback(self, fn: Callable[[Any], object]) -> None: ...


class Elsewhere(BaseException):
    """A message cannot be packed in this thread, which would have to wait for the driver of a GPU: pack it in another.

    Not an `Exception`: nobody in between shall take it for a failure of the pickling.

    Attributes:
        adopt: to be called in that thread first: what is current in this one is so there.
    """

    def __init__(self, adopt: Callable[[], None]) -> None:
        super().__init__()
        self.adopt = adopt


class later:
    """Messages that are packed in here, in this thread, do not wait; what is to be waited for is told.

    Args:
        away: bytes from which a copy is made in another thread; None for never.
        asks: the thread may wait for a driver's answers; else `Elsewhere` is raised.

    Attributes:
        waits: GPUs have not done all yet.
        copies: copies under way.
        dropped: set it when the messages will not be sent: copies stop soon, and are done then.

    Example::

        with memory.later() as what:
            packet, fds = encode(kind, body)
        for one in (*what.waits, *what.copies):
            one.result()
    """

    def __init__(self, away: int | None = AWAY, asks: bool = False) -> None:
        self.away, self.asks = away, asks
        self.waits: list[Done] = []
        self.copies: list[Done] = []
        self.dropped = False

    def __enter__(self) -> Self:
        self._before = now()
        here.later = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        here.later = self._before


here = threading.local()


def now() -> later | None:
    """The one in which this thread is."""
    found: later | None = getattr(here, "later", None)
    return found
