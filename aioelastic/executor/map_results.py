"""The results of many calls, as `map` and `map_unordered` return them: for `for`, and for `async for`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from types import AsyncGeneratorType, GeneratorType
from typing import Any, TypeVar

from ..child.worker import task_loop
from ..system.time_slices import TimeSlices
from .pool import Pool
from .tasks import Body, Called, Options, raised

T_co = TypeVar("T_co", covariant=True)
LATE = "the next result is not there after the `timeout` of its map, which is for all results together"


class MapResults(Iterator[T_co], AsyncIterator[T_co]):
    """The results of `WorkerExecutor.map` and `map_unordered`: to be read once, by `for` or by `async for`.

    Whoever leaves it before its end (`break`, an exception, `close()`) has what has not begun cancelled. What runs then
    goes on to its end after `for`, as in `concurrent.futures`; after `async for` its workers are killed, as for a `run`
    that is cancelled (`WorkerExecutor.with_options(kill_on_cancel=False)`).

    Example::

        for result in executor.map_unordered(simulate, seeds):
            print(result)

        async with aclosing(executor.map_unordered(simulate, seeds)) as results:
            async for result in results:
                print(result)
    """

    def __init__(self, calls: Calls, executor: object) -> None:
        self._calls = calls
        self._executor = executor  # one that is forgotten takes no more calls
        # what holds a reference to us would not be closed when we are dropped
        self._reader: Generator[Any, None, None] | AsyncGenerator[Any, None] | None = None
        self._next: Callable[[], Any] | None = None

    def __iter__(self) -> MapResults[T_co]:
        return self

    def __next__(self) -> T_co:
        if self._next is None:
            self._next = self._by_for().__next__
        return self._next()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Read no more."""
        self._by_for().close()
        self._calls.cancel()  # one that was not begun has no `finally`

    def __aiter__(self) -> MapResults[T_co]:
        return self

    async def __anext__(self) -> T_co:
        return await anext(self._by_async_for())

    async def aclose(self) -> None:
        """Read no more."""
        await self._by_async_for().aclose()
        await self._calls.leave()

    def _by_for(self) -> Generator[Any, None, None]:
        if self._reader is None:
            self._reader = _read(self._calls)
        if not isinstance(self._reader, GeneratorType):
            raise RuntimeError("these results are being read by `async for`")
        return self._reader

    def _by_async_for(self) -> AsyncGenerator[Any, None]:
        if self._reader is None:
            self._reader = _read_soon(self._calls)
        if not isinstance(self._reader, AsyncGeneratorType):
            raise RuntimeError("these results are being read by `for`")
        return self._reader


class Calls:
    """Those of one map: what is submitted and not read, and what is to come.

    Args:
        tasks: as `tasks_of` makes them.
        options: for all of them.
        chunked: each task is several calls.
        ordered: they are read in the order in which they were submitted, and not in that in which they are done.
        as_values: what they raise is a result like others.
        ahead: how many tasks may be submitted, and not read.
        until: no result is waited for any longer (monotonic).
    """

    def __init__(
        self,
        pool: Pool,
        tasks: Iterator[tuple[Body, int]],
        options: Options,
        *,
        chunked: bool,
        ordered: bool,
        as_values: bool,
        ahead: Callable[[], float],
        until: float | None = None,
    ) -> None:
        self._pool, self._tasks, self._options = pool, tasks, options
        self._chunked, self._ordered, self._as_values = chunked, ordered, as_values
        self._ahead, self._until = ahead, until
        self._pending: OrderedDict[Called, int] = OrderedDict()  # with the number of calls in each
        self._done: SimpleQueue[Called] = SimpleQueue()
        self._ring: Callable[[object], None] | None = None  # once, when another one is done
        self._failed: task_loop.Raised | None = None

    def fill(self) -> bool:
        """Submit what may be. Whether there is something to wait for. Raises `RuntimeError`: this is a forked copy."""
        self._pool.check_ours()
        for found in self._wanted():
            self._add(self._pool.submit(found[0], self._options.timeout), found[1])
        return bool(self._pending)

    async def fill_soon(self) -> bool:
        """The same, and it is the task that waits for room."""
        self._pool.check_ours()
        for found in self._wanted():
            self._add(await self._pool.submit_soon(found[0], self._options.timeout), found[1])
        return bool(self._pending)

    def take(self) -> Called:
        """Wait for the next that is to be read. Raises `TimeoutError`."""
        if not self._ordered:
            return self._done.get()
        future = next(iter(self._pending))
        try:
            future.exception(self._left())
        except CancelledError:
            pass
        except TimeoutError:
            if not future.done():
                raise TimeoutError(LATE) from None
        return future

    async def take_soon(self) -> Called:
        """The same, and it is the task that waits."""
        if not self._ordered:
            while self._done.empty():
                await self._rung(None)
            return self._done.get_nowait()
        future = next(iter(self._pending))
        if not future.done():
            try:
                async with asyncio.timeout(self._left()):
                    await self._rung(future)
            except TimeoutError:
                raise TimeoutError(LATE) from None
        return future

    def results(self, future: Called) -> list[Any]:
        """Of the calls in that task, the first at the end: whoever pops one is the only one who holds it. Raises what
        it has failed of, unless that is a result."""
        count = self._pending.pop(future)
        if self._as_values:
            problem = CancelledError() if future.cancelled() else future.exception()
            if problem is not None:
                return [problem] * count
        value = future.result()
        if not self._chunked:
            return [value]
        if self._as_values:
            value = [raised(one) if type(one) is task_loop.Raised else one for one in value]
        elif value and type(value[-1]) is task_loop.Raised:
            self._failed = value.pop()
        value.reverse()
        return value  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise what the call after those of `results` has raised."""
        if self._failed is not None:
            raise raised(self._failed)

    def cancel(self) -> None:
        """What has not begun need not be done."""
        for one in self._given_up():
            one.cancel()

    async def leave(self) -> None:
        """Nobody waits for the rest any more."""
        await self._pool.leave(self._given_up(), self._options.kill)

    def _given_up(self) -> Iterable[Called]:
        pending, self._pending = self._pending, OrderedDict()
        self._done = SimpleQueue()  # it and what is in it would hold each other until there is a collection
        return pending

    def _wanted(self) -> Iterator[tuple[Body, int]]:
        """The tasks that are to be submitted now."""
        if not self._ordered and 2 * len(self._pending) > self._ahead():
            return  # many at once wake the owner of the workers once
        while len(self._pending) < self._ahead() and (found := next(self._tasks, None)) is not None:
            yield found

    def _add(self, future: Called, count: int) -> None:
        self._pending[future] = count
        if not self._ordered:
            Future.add_done_callback(future, self._note)  # that of `Called` is for the code of others

    def _note(self, future: Any) -> None:
        if future not in self._pending:
            return  # nobody reads it
        self._done.put(future)
        ring, self._ring = self._ring, None
        if ring is not None:
            ring(future)

    def _left(self) -> float | None:
        return None if self._until is None else self._until - time.monotonic()

    async def _rung(self, future: Called | None) -> None:
        """Wait until this one is done, or, if it is None, until any is."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def ring(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_wake, waiter)

        if future is not None:
            future.add_done_callback(ring)
        else:
            self._ring = ring
            if not self._done.empty():  # it came before that was said
                return
        await waiter


def tasks_of(
    fn: Callable[..., Any], iterables: Iterable[Iterable[Any]], chunksize: int, as_values: bool
) -> Iterator[tuple[Body, int]]:
    """The tasks of a map, and how many calls are in each."""
    calls = zip(*iterables, strict=False)
    if chunksize == 1:
        return (((fn, one, {}), 1) for one in calls)
    chunks = iter(lambda: list(itertools.islice(calls, chunksize)), [])
    # a few long tuples are packed in a third of the time that many short ones take
    return (((task_loop.chunk, (fn, tuple(zip(*one, strict=True)), as_values), {}), len(one)) for one in chunks)


def _read(calls: Calls) -> Generator[Any, None, None]:
    try:
        while calls.fill():
            results = calls.results(calls.take())
            while results:
                yield results.pop()
            calls.check()
    finally:
        calls.cancel()


async def _read_soon(calls: Calls) -> AsyncGenerator[Any, None]:
    slices = TimeSlices()
    try:
        while await calls.fill_soon():
            results = calls.results(await calls.take_soon())
            while results:
                yield results.pop()
            calls.check()
            if slices.due():  # where all are there already, nothing else would run
                await asyncio.sleep(0)
                slices.begin()
    finally:
        await calls.leave()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
