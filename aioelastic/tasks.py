"""One call of an executor: its datagram, its limits, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, TypeAlias

from .child import _letters, _socket, _wire
from .child._packing import Packing
from .replies import main_has_both_names, remote_error

_log = logging.getLogger("concurrent.futures")  # which tells what callbacks raise

Body: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], Any]


@dataclass(frozen=True)
class Limits:
    """When a task, or a worker, has had enough."""

    workers: int
    timeout: float | None = None
    tasks: int | None = None
    memory: int | None = None
    pending: int | None = None


class Called(Future[Any]):
    """The future of a task. It tells when it is cancelled, so that nothing of the task waits any longer."""

    on_cancel: Callable[[], object] | None = None

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        call, self.on_cancel = self.on_cancel, None
        if call is not None:
            call()
        return True


class Task:
    """One call, on its way to a worker. In an event loop, its datagram may come later (`_letters.begin`).

    Args:
        main_is_known: as for `encode`.

    Attributes:
        future: what comes of it; done at once if it cannot be pickled.
        making: its datagram, as long as that cannot be sent yet.
        begun: it is told to run, and cannot be cancelled any more.
    """

    __slots__ = ("begun", "fds", "future", "making", "packet")

    def __init__(self, body: Body, main_is_known: bool) -> None:
        self.future = Called()
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
        """Whether it is still wanted. To be called by who has taken it out of the line: one, and nobody else."""
        if not self.begun:
            self.begun = True
            self.future.on_cancel = None
            try:
                wanted = self.future.set_running_or_notify_cancel()
            except RuntimeError:  # the caller has settled it
                wanted = False
            if not wanted:
                self.drop()
                return False
        return True

    def settle(self, value: Any, problem: BaseException | None) -> None:
        """What came of it, after `begin`."""
        try:
            if problem is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(problem)
        except InvalidStateError:
            pass  # the caller has done that
        except BaseException:
            # of a callback: a future itself sees to an Exception. It is the caller's, and ends nobody's thread
            _log.exception("exception calling callback for %r", self.future)

    def fail(self, problem: BaseException) -> None:
        """It will not be run, or not to its end."""
        if self.begin():
            self.drop()
            self.settle(None, problem)

    def drop(self) -> None:
        """Free what it holds besides its future."""
        if self.making is not None:
            self.making.cancel()
        _socket.close(self.fds)
        self.fds.clear()


class Room:
    """Permits for tasks that are submitted and not done. Whoever waits for one is told first come, first served.

    Args:
        most: how many there are.

    Attributes:
        taken: how many have not come back.
    """

    def __init__(self, most: int) -> None:
        self._lock = threading.RLock()  # a collection may call `close`, or `leave`, in a thread that has it
        # guarded by it
        self.taken = 0
        self._most = most
        self._waiting: deque[Future[None]] = deque()
        self._refusal: Callable[[], Exception] | None = None

    def ask(self, at_once: bool) -> Future[None] | None:
        """Take one. None: it is taken; else it is when that future is done, unless it fails; whoever does not wait for
        it to the end calls `leave`.

        Args:
            at_once: one more than there are, rather than wait.

        Raises:
            Exception: that of `close`.
        """
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if at_once or (self.taken < self._most and not self._waiting):
                self.taken += 1
                return None
            ticket: Future[None] = Future()
            self._waiting.append(ticket)
            return ticket

    def leave(self, ticket: Future[None]) -> None:
        """Nobody waits for it any more; what it may have got goes back."""
        if ticket.cancel():
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(ticket)
        elif ticket.exception() is None:
            self.back()

    def back(self, _: object = None) -> None:
        """One comes back, and goes to the next who waits."""
        following = None
        with self._lock:
            while following is None and self._waiting and self.taken <= self._most:
                one = self._waiting.popleft()
                following = one if one.set_running_or_notify_cancel() else None
            if following is None:
                self.taken -= 1
        if following is not None:
            following.set_result(None)

    def close(self, refusal: Callable[[], Exception]) -> None:
        """There are no more, for whoever waits, or comes."""
        with self._lock:
            self._refusal = refusal
            waiting = list(self._waiting)
            self._waiting.clear()
        for one in waiting:
            if one.set_running_or_notify_cancel():
                one.set_exception(refusal())


class Line(deque[Task]):
    """Tasks that wait, in their order: one whose datagram is not there yet holds up those behind it."""

    def next(self) -> Task | None:
        """The first, if it can be sent."""
        return self.popleft() if self and self[0].making is None else None

    def take_out(self, task: Task) -> bool:
        """Whether it was here."""
        try:
            self.remove(task)
        except ValueError:
            return False
        return True

    def clear_unbegun(self) -> list[Task]:
        """Take out all that can be cancelled: not those that came back from a worker which was dying."""
        unbegun = [task for task in self if not task.begun]
        begun = [task for task in self if task.begun]
        self.clear()
        self.extend(begun)
        return unbegun

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


def opened(packet: bytes, fds: list[int]) -> tuple[Any, BaseException | None]:
    """What came of a task, from a worker's reply: a value, or why there is none."""
    try:
        if packet[:1] == _wire.FAILED:
            told = remote_error(*_wire.decode(packet, fds))
            error = told.exception
            if error is None or not isinstance(error, Exception | asyncio.CancelledError):
                return None, told  # the others would end the one who waits
            error.__cause__ = told
            return None, error
        with main_has_both_names():
            (value,) = _wire.decode(packet, fds)
    except Exception as exc:  # what comes back may not be unpickled here
        return None, exc
    return value, None


async def opened_aside(packet: bytes, fds: list[int]) -> tuple[Any, BaseException | None]:
    """The same where a GPU's driver has to be asked; closes `fds`."""

    def work() -> tuple[Any, BaseException | None]:
        try:
            return opened(packet, fds)
        finally:
            _socket.close(fds)

    return await asyncio.wrap_future(_letters.aside(work))
