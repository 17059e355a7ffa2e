"""Events, from whoever has one to whoever wants them: one hook, any number of readers, each from the beginning on."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from ..events import Event, GroupDone
from ..system.waiting import raise_soon

# Events kept for subscribers that come late: so many for each start of a worker, within these bounds.
HISTORY_PER_START = 8
HISTORY = 1_000
HISTORY_MOST = 100_000


class EventBus:
    """Keeps the last events for readers that come late.

    Args:
        starts: how many of workers there may be.
        hook: called with each event at once; what it raises is told to the loop's exception handler, and nobody else
            suffers for it. What would end the program ends the loop's run instead, a moment later.
    """

    def __init__(self, hook: Callable[[Event], object] | None, starts: int) -> None:
        self._hook = hook
        self._history: deque[Event] = deque(maxlen=min(max(HISTORY, HISTORY_PER_START * starts), HISTORY_MOST))
        self._readers: weakref.WeakSet[EventFeed] = weakref.WeakSet()  # one that nobody has any more is told nothing
        self._awaited: set[EventFeed] = set()  # a task that waits may be one that nobody else refers to
        self._was_read = False

    def emit(self, event: Event) -> None:
        """Tell all."""
        self._history.append(event)
        if self._was_read:
            for reader in self._readers:
                reader.tell(event)
        if self._hook is not None:
            try:
                self._hook(event)
            except (KeyboardInterrupt, SystemExit) as exc:
                raise_soon(exc)
            except BaseException as exc:  # CancelledError, too, as of a future that it asks: what follows is done
                if self._hook is None:
                    raise  # it has forked, and this is the copy
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"on_event raised for {type(event).__name__}", "exception": exc}
                )

    def fail(self, problem: Exception) -> None:
        """Nothing more will come: that is raised for who reads on."""
        self._hook = None
        self._history.clear()
        for reader in self._readers:
            reader.fail(problem)

    def forget(self) -> None:
        """Let go of what was told."""
        self._history.clear()

    def read(self) -> EventFeed:
        """All events up to `GroupDone`, the earlier ones too."""
        reader = EventFeed(self._history, self._awaited)
        self._readers.add(reader)
        self._was_read = True
        return reader


class EventFeed(AsyncIterator[Event]):
    """`async for event in group.events()`: all events of a group, from its beginning on, until `GroupDone`.

    A wait for the next event that is cancelled loses nothing, and leaves nothing behind.
    """

    def __init__(self, earlier: Iterable[Event], awaited: set[EventFeed]) -> None:
        self._awaited = awaited
        self._queue = deque(earlier)
        self._waiters: set[asyncio.Future[None]] = set()
        self._problem: Exception | None = None
        self._over = False

    def fail(self, problem: Exception) -> None:
        self._queue.clear()
        self._problem = problem

    def tell(self, event: Event) -> None:
        if self._over:
            return
        self._queue.append(event)
        self._wake()

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._over:
                raise StopAsyncIteration
            if self._problem is not None:
                raise self._problem
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            self._awaited.add(self)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
                if not self._waiters:
                    self._awaited.discard(self)
        event = self._queue.popleft()
        if isinstance(event, GroupDone):
            self._end()
        return event

    async def aclose(self) -> None:
        """Read no further; for `contextlib.aclosing`."""
        self._end()

    def _end(self) -> None:
        self._over = True
        self._queue.clear()
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
