"""One call of an executor: its datagram, its limits, and what comes of it."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from .child import _letters, _socket, _wire
from .child._packing import Packing
from .replies import main_has_both_names, remote_error
from .worker import Worker

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
    """One call, on its way to a worker. In an event loop, its datagram may come later (`_letters.begin`).

    Args:
        main_is_known: as for `encode`.

    Attributes:
        future: what comes of it; done at once if it cannot be pickled.
        making: its datagram, as long as that cannot be sent yet.
    """

    __slots__ = ("begun", "fds", "future", "making", "packet")

    def __init__(self, body: Body, main_is_known: bool) -> None:
        self.future: Future[Any] = Future()
        self.begun = False
        self.packet, self.fds = b"", list[int]()
        self.making: Packing | None = None
        try:
            # in a thread without a loop it may wait
            made = _letters.begin(lambda: encode(body, main_is_known), asyncio._get_running_loop() is None)
        except Exception as exc:
            self.future.set_exception(exc)
            return
        if isinstance(made, Packing):
            self.making = made
        else:
            self.packet, self.fds = made

    def when_made(self, call: Callable[[Task], object]) -> None:
        """Call that, from whatever thread, when there is nothing to be waited for any more."""
        making = self.making
        if making is not None:
            known = weakref.ref(making)  # a future keeps its callbacks, and with them what they hold

            def end(future: Future[Any]) -> None:
                one = known()
                if one is not None and future.cancelled():
                    one.cancel()

            self.future.add_done_callback(end)
            making.add_done_callback(lambda _: call(self))

    def begin(self) -> bool:
        """Whether it is still wanted."""
        if not self.begun:
            self.begun = True
            if not self.future.set_running_or_notify_cancel():
                self.drop()
                return False
        return True

    def drop(self) -> None:
        if self.making is not None:
            self.making.cancel()
        _socket.close(self.fds)
        self.fds.clear()


class Slot:
    """One worker, and the task it holds."""

    __slots__ = ("done", "expired", "ready", "retired", "task", "timer", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.task: Task | None = None
        self.done = 0
        self.ready = False
        self.retired = False  # it gets no more
        self.expired = False
        self.timer: asyncio.TimerHandle | None = None


class Line(deque[Task]):
    """Tasks that wait, in their order: one whose datagram is not there yet holds up those behind it."""

    def next(self) -> Task | None:
        """The first, if it can be sent."""
        return self.popleft() if self and self[0].making is None else None

    def made(self, task: Task) -> BaseException | None:
        """Its datagram has come; or it cannot, and the task is taken out: then why. None, too, if it is not here."""
        making = task.making
        if task not in self or making is None:
            return None
        task.making = None
        try:
            task.packet, task.fds = making.take()
        except BaseException as exc:
            self.remove(task)
            return exc
        return None


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


def settle(future: Future[Any], packet: bytes, fds: list[int]) -> Coroutine[Any, Any, None] | None:
    """What came of a task, from a worker's reply. Returns what is to be awaited, where a GPU's driver has to be."""
    if _wire.is_slow(packet):
        mine = list(fds)
        fds.clear()
        return _settle_aside(future, packet, mine)
    _settle(future, packet, fds)
    return None


async def _settle_aside(future: Future[Any], packet: bytes, fds: list[int]) -> None:
    def work() -> None:
        try:
            _settle(future, packet, fds)
        finally:
            _socket.close(fds)

    await asyncio.wrap_future(_letters.aside(work))


def _settle(future: Future[Any], packet: bytes, fds: list[int]) -> None:
    try:
        if packet[:1] == _wire.FAILED:
            told = remote_error(*_wire.decode(packet, fds))
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
