"""One call of an executor: its datagram, its limits, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from .child import _socket, _wire
from .replies import main_has_both_names, remote_error

Body: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], Any]


@dataclass(frozen=True)
class Limits:
    """When a task, or a worker, has had enough."""

    workers: int
    timeout: float | None = None
    tasks: int | None = None
    memory: int | None = None
    pending: int | None = None


class Task:
    """One call, on its way to a worker."""

    __slots__ = ("begun", "fds", "future", "packet")

    def __init__(self, future: Future[Any], packet: bytes, fds: list[int]) -> None:
        self.future = future
        self.packet = packet
        self.fds = fds
        self.begun = False

    def begin(self) -> bool:
        """Whether it is still wanted."""
        if not self.begun:
            self.begun = True
            if not self.future.set_running_or_notify_cancel():
                self.drop()
                return False
        return True

    def drop(self) -> None:
        _socket.close(self.fds)
        self.fds.clear()


def encode(body: Body, main_is_known: bool) -> tuple[bytes, list[int]]:
    """The datagram of a task; whether it needs the main module is a byte of it.

    Args:
        main_is_known: workers can import it. Else what is defined there goes by value, if cloudpickle is installed.

    Raises:
        Exception: whatever pickling raises.
    """
    dumps = None
    try:
        packet, fds = _wire.encode(_wire.TASK, body)
        main = b"__main__" in packet or (bool(fds) and b"__main__" in _wire.pickled(packet, fds))
        if main and not main_is_known:
            dumps = _wire.by_value()
            if dumps is not None:
                _socket.close(fds)
    except OSError:
        raise
    except Exception:
        main, dumps = False, _wire.by_value()
        if dumps is None:
            raise
    if dumps is not None:
        packet, fds = _wire.encode(_wire.TASK, body, dumps)
        main = False
    return packet[:2] + (b"\1" if main else b"\0") + packet[2:], fds


def settle(future: Future[Any], packet: bytes, fds: list[int]) -> None:
    """What came of a task, from a worker's reply."""
    try:
        if packet[:1] == _wire.FAILED:
            told = remote_error(packet, fds)
            error = told.exception
            if error is None or not isinstance(error, Exception | asyncio.CancelledError):
                error = told  # the others would end the one who waits
            else:
                error.__cause__ = told
            future.set_exception(error)
            return
        with main_has_both_names():
            (value,) = _wire.decode(packet, fds)
    except Exception as exc:  # what comes back may not be unpickled here
        future.set_exception(exc)
    else:
        future.set_result(value)
