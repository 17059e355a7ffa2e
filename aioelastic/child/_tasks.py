"""What a worker of an executor does: one task after another, until there are no more."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from . import _context, _socket, _wire, _work
from ._failure import describe

_PAGE = os.sysconf("SC_PAGE_SIZE")


def serve(
    initializer: Callable[..., object] | None, initargs: tuple[Any, ...], weigh: bool, main: tuple[str, str] | None
) -> None:
    """Run tasks from our channel until its other end stops sending.

    Args:
        weigh: tell our resident size in bytes with each reply.
        main: the caller's main module, imported for the first task that needs it.
    """
    channel = _context.channel
    assert channel is not None
    _context.serving = True
    copies: list[int] = []  # not empty: this is a forked copy of the worker
    os.register_at_fork(after_in_child=lambda: copies.append(1))
    if initializer is not None:
        initializer(*initargs)
    _context.ready()
    receive, send, encode, decode = _socket.receive, _socket.send, _wire.encode, _wire.decode
    while True:
        packet, fds = receive(channel)
        if not packet:
            return
        phase = _work.IMPORT
        try:
            if packet[2]:
                _work.import_main(main)
            phase = _work.UNPICKLE
            fn, args, kwargs = decode(packet[:2] + packet[3:], fds)
            if fds:
                _socket.close(fds)
            phase = _work.RUN
            value = fn(*args, **kwargs)
            if type(value) is types.CoroutineType:
                value = _work.run(value)
            if copies:
                return  # the value is what the worker itself returns, and so are the tasks to come
            phase = _work.RESULT
            out, fds = _work.pack(_wire.DONE, (value,))
            del value, fn, args, kwargs  # nothing of a task stays until the next
        except BaseException as exc:
            if copies:
                raise
            out, fds = encode(_wire.FAILED, (phase, describe(exc, 1)))
            exc.__traceback__ = None
        size = _resident() if weigh else 0
        send(channel, out[:2] + size.to_bytes(8, "little") + out[2:], fds)
        if fds:
            _socket.close(fds)


def chunk(fn: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Several tasks as one."""
    return [fn(*one) for one in items]


def _resident() -> int:
    memory = sys.modules.get("aioelastic.memory")
    if memory is not None:
        with memory.gate:
            memory.arena.trim()  # what lies idle for the next result is no growth
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
