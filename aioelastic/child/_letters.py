"""What a function and its supervisor send each other besides arguments and result: the function's side."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Any

from . import _context, _socket, _wire, _work


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
            return _take(channel)
        except BlockingIOError:
            await readable(channel.fileno())


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


def _take(channel: socket.socket) -> Any:
    packet, fds = _socket.receive(channel, socket.MSG_DONTWAIT)
    if not packet:
        raise EOFError("the supervisor will send nothing more")
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
