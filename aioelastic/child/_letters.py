"""What a function and its supervisor send each other besides arguments and result: the function's side."""

from __future__ import annotations

import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _context, _socket, _wire, _work

if TYPE_CHECKING:
    from ._packing import Packing

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
    until = None if timeout is None else time.monotonic() + timeout
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while True:
        left = None if until is None else max(until - time.monotonic(), 0) * 1000
        if not poll.poll(left):
            raise TimeoutError(f"nothing came within {timeout:g} s")
        try:
            return _take(channel)
        except BlockingIOError:
            pass  # another thread was faster


async def receive_async() -> Any:
    """As `receive`, without holding the event loop up."""
    channel = _channel()
    while True:
        try:
            packet, fds = _next(channel)
        except BlockingIOError:
            await _rung(channel.fileno())
            continue
        return await unpacked(packet, fds)


async def _rung(fd: int) -> None:
    """Wait until something has come there. Only for our channel, which lives as long as the process."""
    import asyncio

    loop = asyncio.get_running_loop()
    waiting = _waiting.get(loop)
    if waiting is None:
        waiting = _waiting[loop] = []
        loop.add_reader(fd, _rings, loop, fd)
    can = loop.create_future()
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


async def readable(fd: int) -> None:
    """Wait until something can be read there."""
    import asyncio

    loop = asyncio.get_running_loop()
    can = loop.create_future()
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


async def unpacked(packet: bytes, fds: list[int]) -> Any:
    """The only object in a message; without holding the loop up for the driver of a GPU. Closes `fds`."""
    if not _wire.is_slow(packet):
        return _open(packet, fds)
    import asyncio

    done = asyncio.get_running_loop().create_future()
    aside(lambda: _open(packet, fds), done)
    return await done


def aside(work: Callable[[], Any], done: Any) -> None:
    """Do it in a thread of its own; what comes of it is told to a future of the running loop."""
    import threading

    loop = done.get_loop()

    def tell(value: Any, exc: BaseException | None) -> None:
        if done.done():
            return
        if exc is None:
            done.set_result(value)
        else:
            done.set_exception(exc)

    def run() -> None:
        value, problem = None, None
        try:
            value = work()
        except Exception as exc:
            problem = exc
        try:
            loop.call_soon_threadsafe(tell, value, problem)
        except RuntimeError:
            pass  # the loop was closed: nobody is left to tell

    threading.Thread(target=run, name="aioelastic-unpickle").start()


def _take(channel: socket.socket) -> Any:
    return _open(*_next(channel))


def _next(channel: socket.socket) -> tuple[bytes, list[int]]:
    packet, fds = _socket.receive(channel, _socket.DONTWAIT)
    if not packet:
        raise EOFError("the supervisor will send nothing more")
    return packet, fds


def _open(packet: bytes, fds: list[int]) -> Any:
    try:
        (value,) = _wire.decode(packet, fds)
    finally:
        _socket.close(fds)
    return value


def _channel() -> socket.socket:
    channel = _context.channel
    if channel is None or _context.serving:
        raise RuntimeError("only a function of supervise() or Group, in a process of its own, has a supervisor")
    return channel
