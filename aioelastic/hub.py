"""Events, from whoever has one to whoever wants them: one hook, any number of readers, each from the beginning on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from .events import Event, GroupDone
from .thread import raise_soon

# Events kept for subscribers that come late: so many for each start of a worker, within these bounds.
HISTORY_PER_START = 8
HISTORY = 1_000
HISTORY_MOST = 100_000


class Hub:
    """Keeps the last events for readers that come late.

    Args:
        starts: how many of workers there may be.
        hook: called with each event at once; what it raises is told to the loop's exception handler, and nobody else
            suffers for it. What would end the program ends the loop's run instead, a moment later.
    """

    def __init__(self, hook: Callable[[Event], object] | None, starts: int) -> None:
        self._hook = hook
        self._history: deque[Event] = deque(maxlen=min(max(HISTORY, HISTORY_PER_START * starts), HISTORY_MOST))
        self._readers: set[_Reader] = set()

    def emit(self, event: Event) -> None:
        """Tell all."""
        self._history.append(event)
        for reader in self._readers:
            reader.tell(event)
        if self._hook is not None:
            try:
                self._hook(event)
            except (KeyboardInterrupt, SystemExit) as exc:
                raise_soon(exc)
            except Exception as exc:
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

    def read(self) -> AsyncIterator[Event]:
        """All events up to `GroupDone`, the earlier ones too."""
        reader = _Reader(self._history)
        self._readers.add(reader)
        return reader.read(self._readers)


class _Reader:
    def __init__(self, earlier: Iterable[Event]) -> None:
        self._queue = deque(earlier)
        self._waiter: asyncio.Future[None] | None = None
        self._problem: Exception | None = None

    def fail(self, problem: Exception) -> None:
        self._queue.clear()
        self._problem = problem

    def tell(self, event: Event) -> None:
        self._queue.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self, readers: set[_Reader]) -> AsyncIterator[Event]:
        try:
            while True:
                while self._queue:
                    event = self._queue.popleft()
                    yield event
                    if isinstance(event, GroupDone):
                        return
                if self._problem is not None:
                    raise self._problem
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            readers.discard(self)
