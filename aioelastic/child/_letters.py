"""What a function and its supervisor send each other besides arguments and result: the function's side."""

from __future__ import annotations

import bisect
import contextlib
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from . import _context, _socket, _wire, _work

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from ._packing import Packing

T = TypeVar("T")
Packed: TypeAlias = tuple[bytes, list[int]]
_waiting: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()  # by loop


def send(value: Any) -> None:
    """Send an object to the supervisor, which gets it by `Worker.receive`. Waits while that has too many of them.

    Shared arrays in it stay shared; others are copied once.

    Raises:
        RuntimeError: this process runs no function of `supervise` or `Group`.
        OSError: the supervisor is gone.
        Exception: whatever pickling it raises.
    """
    channel = _channel()
    packet, fds = _work.pack(_wire.OBJECT, (value,))
    try:
        _socket.send(channel, packet, fds)
    finally:
        _socket.close(fds)


def receive(timeout: float | None = None) -> Any:
    """The next object that the supervisor sends by `Worker.send`; in any thread.

    Args:
        timeout: seconds to wait at most.

    Raises:
        RuntimeError: this process runs no function of `supervise` or `Group`.
        EOFError: the supervisor is gone.
        TimeoutError: nothing came.
        Exception: the object could not be unpickled.
    """
    channel = _channel()
    try:
        return _reader.take_sync(lambda: _next(channel), channel.fileno(), timeout)
    except Nothing:
        raise TimeoutError(f"nothing came within {timeout} s") from None


async def receive_async() -> Any:
    """As `receive`, without holding the event loop up."""
    channel = _channel()
    return await _reader.take(lambda: _next(channel), lambda can: _rung(channel.fileno(), can))


async def _rung(fd: int, can: asyncio.Future[None]) -> None:
    """Wait until something has come there, or that is set. Only for our channel, which lives as long as the process."""
    loop = can.get_loop()
    waiting = _waiting.get(loop)
    if waiting is None:
        waiting = _waiting[loop] = []
        loop.add_reader(fd, _rings, loop, fd)
    waiting.append(can)
    try:
        await can
    finally:
        if can in waiting:
            waiting.remove(can)


def _rings(loop: Any, fd: int) -> None:
    """The bell stays on between two messages: taking it off and on again costs more than a message."""
    waiting = _waiting[loop]
    if waiting:
        _context.settle(waiting.pop(0))
    else:
        loop.remove_reader(fd)
        del _waiting[loop]


async def readable(fd: int, can: asyncio.Future[None] | None = None) -> None:
    """Wait until something can be read there, or that is set."""
    import asyncio

    loop = asyncio.get_running_loop()
    can = can or loop.create_future()
    mine = os.dup(fd)  # several tasks may wait
    loop.add_reader(mine, _context.settle, can)
    try:
        await can
    finally:
        loop.remove_reader(mine)
        os.close(mine)


async def ready(pack: Callable[[], Packed]) -> Packed:
    """The message that `pack` makes, when it can be sent; meanwhile the loop goes on. See `begin`."""
    made = begin(pack)
    return made if isinstance(made, tuple) else await made.wait()


def begin(pack: Callable[[], Packed], wait: bool = False) -> Packed | Packing:
    """The message that `pack` makes, without waiting in this thread, unless it may.

    It is pickled here and now. Large arrays are copied, and GPUs waited for, elsewhere; and only where a GPU's driver
    has to be asked about an array, all of it is pickled in another thread.
    """
    memory = None if wait else _wire.memory()
    if memory is None:
        return pack()
    what = memory.later()
    try:
        with what:
            packed = pack()
    except memory.Elsewhere as where:
        from ._packing import Packing

        made = Packing(what)
        made.aside(pack, where.adopt)
        return made
    except BaseException:
        what.dropped = True
        raise
    if not what.copies and not what.waits:
        return packed
    from ._packing import Packing

    return Packing(what, packed)


class Nothing(Exception):
    """There is no message, or not in time."""


class Reader:
    """Takes messages of one object each, for many tasks and threads.

    What is slow to unpickle, since a driver of a GPU has to be asked, is unpickled in a thread of its own where an
    event loop waits for it. When the task that took it is cancelled meanwhile, whoever asks next gets it, or waits
    already.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # guarded by it
        self._count = 0
        self._left: list[tuple[int, Future[Any]]] = []  # by who was cancelled, in the order in which it came
        self._wakes: list[Callable[[], None]] = []  # of those who wait

    async def take(self, receive: Callable[[], Packed], comes: Callable[[Any], Awaitable[None]]) -> Any:
        """The next object. `receive` raises `BlockingIOError` for none; `comes` waits, or until its future is set."""
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            number, work = self._first()
            if work is None:
                try:
                    packet, fds = receive()
                except BlockingIOError:
                    can = loop.create_future()
                    with self._waiting(partial(_wake, can)):
                        if not self._left:
                            await comes(can)
                    continue
                if not _wire.is_slow(packet):
                    return open_message(packet, fds)
                with self._lock:
                    self._count += 1
                    number = self._count
                try:
                    work = aside(partial(open_message, packet, fds))
                except BaseException:  # this process may have no more threads
                    _socket.close(fds)
                    raise
            try:
                return await asyncio.wrap_future(work)
            except asyncio.CancelledError:
                self._leave(number, work)
                raise

    def take_sync(self, receive: Callable[[], Packed], fd: int, timeout: float | None) -> Any:
        """As `take`, and the thread waits until `fd` is readable. Raises `Nothing`."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if until is None else max(until - time.monotonic(), 0)
            number, work = self._first()
            if work is not None:
                try:
                    work.exception(left)
                except BaseException as exc:
                    self._leave(number, work)
                    if isinstance(exc, TimeoutError):
                        raise Nothing from None
                    raise
                return work.result()
            try:
                packet, fds = receive()
            except BlockingIOError:
                if left == 0 or not self._comes(fd, left):
                    raise Nothing from None
                continue
            return open_message(packet, fds)

    def _comes(self, fd: int, seconds: float | None) -> bool:
        """Wait until something can be read there, or was left."""
        bell = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            with self._waiting(partial(os.eventfd_write, bell, 1)):
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.register(bell, select.POLLIN)
                return bool(self._left or poll.poll(None if seconds is None else seconds * 1000))
        finally:
            os.close(bell)

    def _first(self) -> tuple[int, Future[Any] | None]:
        if self._left:
            with self._lock:
                if self._left:
                    return self._left.pop(0)
        return 0, None

    def _leave(self, number: int, work: Future[Any]) -> None:
        with self._lock:
            bisect.insort(self._left, (number, work), key=itemgetter(0))
            for wake in self._wakes:
                wake()

    @contextlib.contextmanager
    def _waiting(self, wake: Callable[[], None]) -> Iterator[None]:
        """Somebody waits, who looks at what is left once more now: it may have been left before he was known."""
        with self._lock:
            self._wakes.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakes.remove(wake)


def _wake(can: Any) -> None:
    try:
        can.get_loop().call_soon_threadsafe(_context.settle, can)
    except RuntimeError:
        pass  # the loop was closed: nobody waits there any more


def aside(work: Callable[[], T]) -> Future[T]:
    """Do it in a thread of its own."""
    from concurrent.futures import CancelledError, Future

    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # too late for that

    def run() -> None:
        try:
            value = work()
        except BaseException as exc:  # unpickling runs the code of others: anything may come
            if not isinstance(exc, Exception) or isinstance(exc, StopIteration | CancelledError):
                # a future would not take it, or who waits would think that it is himself who was asked to end
                told = RuntimeError(f"unpickling it raised {type(exc).__name__}: {exc}")
                told.__cause__ = exc
                exc = told
            done.set_exception(exc)
        else:
            done.set_result(value)

    threading.Thread(target=run, name="aioelastic-unpickle").start()
    return done


def _next(channel: socket.socket) -> tuple[bytes, list[int]]:
    packet, fds = _socket.receive(channel, _socket.DONTWAIT)
    if not packet:
        raise EOFError("the supervisor will send nothing more")
    return packet, fds


def open_message(packet: bytes, fds: list[int]) -> Any:
    """The only object in it. Closes `fds`."""
    try:
        (value,) = _wire.decode(packet, fds)
    finally:
        _socket.close(fds)
    return value


_reader = Reader()  # of our channel


def forget() -> None:
    """In a forked copy of a process: what it had received is not ours."""
    global _reader
    _reader = Reader()
    _waiting.clear()


def _channel() -> socket.socket:
    channel = _context.channel
    if channel is None or _context.serving:
        raise RuntimeError("only a function of supervise() or Group, in a process of its own, has a supervisor")
    return channel
