"""What a function and its supervisor send each other besides arguments and result: the function's side."""

from __future__ import annotations

import socket
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from ...model.validation import check_timeout
from ..wire import datagrams, messages, sent_objects
from . import context, function_run

if TYPE_CHECKING:
    import asyncio

_waiting: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by loop: who waits, or nobody just now


def send(value: Any) -> None:
    """Send an object to the supervisor, which gets it by `Worker.receive`. Waits while that has too many of them.

    Shared arrays in it stay shared; others are copied once.

    Args:
        value: what can be pickled, and arrays.

    Raises:
        RuntimeError: this process runs no function of `supervise` or `Group`, or a worker has forked it.
        OSError: the supervisor is gone.
        Exception: whatever pickling it raises.
    """
    channel = _channel()
    packet, fds = function_run.pack(messages.OBJECT, (value,))
    try:
        datagrams.deliver(channel, packet, fds)
    finally:
        datagrams.close(fds)


def receive(timeout: float | None = None) -> Any:
    """The next object that the supervisor sends by `Worker.send`; in any thread.

    Args:
        timeout: seconds to wait at most; None, or infinity, for no limit.

    Raises:
        SpecError: `timeout` is no time-out.
        RuntimeError: this process runs no function of `supervise` or `Group`, or a worker has forked it.
        EOFError: the supervisor is gone.
        Empty: nothing came (a `TimeoutError`).
        Exception: the object could not be unpickled.
    """
    seconds = check_timeout("timeout", timeout)
    channel, reader = _channel(), _reader
    taken: sent_objects.Taken = []
    try:
        return reader.take_sync(taken, partial(_next, channel), channel.fileno(), seconds)
    except BaseException:
        reader.leave(taken)
        raise


async def receive_async() -> Any:
    """As `receive`, without holding the event loop up. Of the tasks of a loop that wait the first gets the first."""
    channel, reader = _channel(), _reader
    taken: sent_objects.Taken = []
    try:
        return await reader.take(taken, partial(_next, channel), partial(_until_readable, channel.fileno()))
    except BaseException:
        reader.leave(taken)
        raise


async def _until_readable(fd: int, can: asyncio.Future[None]) -> None:
    """Wait until something has come there, or that is set. Only for our channel, which lives as long as the process."""
    loop = can.get_loop()
    if loop not in _waiting:
        loop.add_reader(fd, _on_readable, loop, fd)
    _waiting[loop] = can
    try:
        await can
    finally:
        if _waiting.get(loop) is can:
            _waiting[loop] = None


def _on_readable(loop: Any, fd: int) -> None:
    """The reader stays registered between two messages: to remove and add it again costs more than a message."""
    can = _waiting[loop]
    if can is not None:
        _waiting[loop] = None
        sent_objects.settle(can)
    else:
        loop.remove_reader(fd)
        del _waiting[loop]


def _next(channel: socket.socket, obj: sent_objects.SentObject) -> None:
    obj.take(channel, datagrams.DONTWAIT)
    if not obj.packet:
        raise EOFError("the supervisor will send nothing more")


_reader = sent_objects.Reader()  # of our channel


def forget() -> None:
    """In a forked copy of a process: what it had received is not ours."""
    global _reader
    _reader = sent_objects.Reader()
    _waiting.clear()


def _channel() -> socket.socket:
    channel = context.channel
    if channel is None or context.serving:
        raise RuntimeError("only a function of supervise() or Group, in a process of its own, has a supervisor")
    if context.is_copy():
        raise RuntimeError("a process that a worker has forked has no supervisor: let the worker itself do this")
    return channel
