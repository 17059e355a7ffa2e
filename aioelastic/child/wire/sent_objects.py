"""Objects that are sent one by one: packed, and taken by any number of tasks and threads, without holding a loop up."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ...system.descriptors import into, shut, shut_all
from . import datagrams, messages, untrusted

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from .pending import Packing

T = TypeVar("T")
Turns: TypeAlias = "weakref.WeakValueDictionary[asyncio.AbstractEventLoop, asyncio.Lock]"


def settle(future: Any) -> None:
    """Wake who awaits it."""
    if not future.done():
        future.set_result(None)


async def readable(fd: int, can: asyncio.Future[None] | None = None) -> None:
    """Wait until something can be read there, or that is set."""
    import asyncio

    loop = asyncio.get_running_loop()
    can = can or loop.create_future()
    mine = os.dup(fd)  # in a forked copy the number is not used for anything else while its loop may speak of it
    loop.add_reader(mine, settle, can)
    try:
        await can
    finally:
        loop.remove_reader(mine)
        shut(mine)


def turn(turns: Turns) -> asyncio.Lock:
    """Of the tasks of this loop: who comes first goes first, and only the first waits for an event of the system. It is
    there as long as somebody has it, or waits for it."""
    import asyncio

    loop = asyncio.get_running_loop()
    lock = turns.get(loop)
    if lock is None:
        lock = turns[loop] = asyncio.Lock()
    return lock


async def ready(pack: Callable[[], datagrams.Packed]) -> datagrams.Packed:
    """The message that `pack` makes, when it can be sent; meanwhile the loop goes on. See `begin`."""
    made = begin(pack)
    return made if isinstance(made, tuple) else await made.wait()


def begin(pack: Callable[[], datagrams.Packed], wait: bool = False) -> datagrams.Packed | Packing:
    """The message that `pack` makes, without waiting in this thread, unless it may.

    It is pickled here and now. Large arrays are copied, and GPUs waited for, elsewhere; and only where a GPU's driver
    has to be asked about an array, all of it is pickled in another thread.
    """
    memory = None if wait else messages.memory()
    if memory is None:
        return pack()
    what = memory.later()
    try:
        with what:
            packed = pack()
    except memory.Elsewhere as where:
        from .pending import Packing  # it imports asyncio, which few messages need

        made = Packing(what)
        made.aside(pack, where.adopt)
        return made
    except BaseException:
        what.dropped = True
        raise
    if not what.copies and not what.waits:
        return packed
    from .pending import Packing  # as above

    return Packing(what, packed)


class Empty(queue.Empty, TimeoutError):
    """Nothing came in time: what `Queue.get_sync` and `receive` raise. Both a `queue.Empty` and a `TimeoutError`."""


_NONE = object()


class SentObject(datagrams.Arrival):
    """A message of one object, until that is somebody's. Interrupted at any time, it is whole, and can be opened again.

    Attributes:
        work: another thread opens it.
    """

    work: Future[Any] | None = None
    _value: Any = _NONE

    def open(self) -> Any:
        """The object in it. What unpickling it raises is an `Exception` (see `untrusted`), and then it is over."""
        if self._value is _NONE:
            value, problem = untrusted.attempt(self._unpickle)
            if problem is not None:
                self.close()
                raise problem
            self._value = value
        shut_all(self.fds)
        return self._value

    def _unpickle(self) -> Any:
        (value,) = messages.decode(self.packet, self.fds)
        return value


Taken: TypeAlias = list[tuple[float, SentObject]]  # by one call: none, or one, and which of all it was


class Reader:
    """Takes messages of one object each, for many tasks and threads.

    What is slow to unpickle, since a driver of a GPU has to be asked, is unpickled in a thread of its own where an
    event loop waits for it. When the task that took one is cancelled meanwhile, or the handler of a signal raises
    anywhere, whoever asks next gets it, or waits already.

    There is no lock, which such a handler could find taken: each step on what is shared is a single one of C.
    """

    def __init__(self, make: Callable[[], SentObject] = SentObject) -> None:
        self._make = make
        self._numbers = itertools.count()
        self._left: Taken = []  # a heap
        self._turns: Turns = weakref.WeakValueDictionary()
        self._wakes: weakref.WeakValueDictionary[int, asyncio.Future[None]] = weakref.WeakValueDictionary()
        self._wakeup: list[int] = []  # of threads: an eventfd, reset by who looks, set again if there is more
        weakref.finalize(self, shut_all, self._wakeup).atexit = False

    async def take(
        self, taken: Taken, receive: Callable[[Any], None], comes: Callable[[asyncio.Future[None]], Awaitable[None]]
    ) -> Any:
        """The next object. Whatever this raises, `leave` is to be called then.

        Args:
            taken: an empty list.
            receive: has one come. Raises `BlockingIOError`: there is none.
            comes: waits for one, or until its future is set.
        """
        import asyncio

        async with turn(self._turns):
            while not self._comes(taken, receive):
                can = asyncio.get_running_loop().create_future()
                self._wakes[id(can)] = can
                try:
                    if not self._left:  # it may have been left before we were known
                        await comes(can)
                finally:
                    self._wakes.pop(id(can), None)
        obj = taken[0][1]
        if obj.work is None:
            if not messages.is_slow(obj.packet):
                return obj.open()
            obj.work = aside(obj.open)
        return await asyncio.wrap_future(obj.work)

    def take_sync(self, taken: Taken, receive: Callable[[Any], None], fd: int, seconds: float) -> Any:
        """As `take`, and the thread waits until `fd` is readable, at most so many seconds. Raises `Empty`."""
        until = time.monotonic() + seconds
        while not self._comes(taken, receive):
            left = until - time.monotonic()
            if left <= 0:
                raise _empty(seconds)
            if not self._wakeup:
                into(self._wakeup, os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self._left or datagrams.readable(left, fd, self._wakeup[0]):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wakeup[0])
        obj = taken[0][1]
        if obj.work is None:
            return obj.open()
        left = max(until - time.monotonic(), 0)
        try:
            obj.work.exception(None if left == math.inf else left)
        except TimeoutError:
            raise _empty(seconds) from None
        return obj.work.result()

    def leave(self, taken: Taken) -> None:
        """Who took it does not have it: somebody else shall."""
        for number, obj in taken:
            if obj.is_over:
                obj.close()  # which may have been interrupted
            elif obj.has_come:
                heapq.heappush(self._left, (min(number, next(self._numbers)), obj))
        if self._left:
            self._notify()

    def _comes(self, taken: Taken, receive: Callable[[Any], None]) -> bool:
        """Take the next, if there is one."""
        taken.clear()
        if self._left:
            with contextlib.suppress(IndexError):  # another thread has it
                into(taken, heapq.heappop, self._left)
            if self._left:
                self._notify()
        if not taken:
            taken.append((math.inf, self._make()))
        number, obj = taken[0]
        if obj.work is None:
            try:
                receive(obj)
            except BlockingIOError:
                return False
        taken[0] = min(number, next(self._numbers)), obj
        return True

    def _notify(self) -> None:
        """Something was left: those who wait shall look."""
        for wakeup in self._wakeup:
            os.eventfd_write(wakeup, 1)
        for known in self._wakes.valuerefs():
            can = known()
            if can is not None:
                try:
                    can.get_loop().call_soon_threadsafe(settle, can)
                except RuntimeError:
                    pass  # the loop was closed: nobody waits there any more


def _empty(seconds: float) -> Empty:
    return Empty(f"nothing came within {seconds:g} s" if seconds else "there is nothing")


def aside(work: Callable[[], T]) -> Future[T]:
    """Do it in a thread of its own."""
    from concurrent.futures import Future

    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # too late for that

    def run() -> None:
        value, problem = untrusted.attempt(work)
        if problem is None:
            done.set_result(value)  # type: ignore[arg-type]
        else:
            done.set_exception(problem)

    threading.Thread(target=run, name="aioelastic-unpickle", daemon=True).start()
    return done
