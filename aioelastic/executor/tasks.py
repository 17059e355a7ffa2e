"""One call of an executor: its datagram, its limits, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container
from concurrent.futures import BrokenExecutor, CancelledError, Future, InvalidStateError
from functools import partial
from typing import Any, TypeAlias

from ..child.wire import datagrams, messages, pickling, sent_objects, untrusted
from ..child.wire.pending import Packing
from ..child.worker import error_record, function_run, task_loop
from ..launch import decoded, failure_in, remote_error
from ..model.errors import RemoteError
from ..model.frozen import dataclass
from ..model.interruptions import is_the_programs
from ..model.text import call_text
from ..system.descriptors import shut

_log = logging.getLogger("concurrent.futures")  # which tells what callbacks raise

Body: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], Any]


class _Here(threading.local):
    """Of this thread.

    Attributes:
        owns: it is that of workers, and calls callbacks.
    """

    owns = False


here = _Here()


@dataclass(frozen=True)
class Options:
    """Of single calls.

    Attributes:
        timeout: seconds that each may run on its worker.
        kill: its worker is killed when nobody awaits it any more.
    """

    timeout: float | None = None
    kill: bool = True


@dataclass(frozen=True)
class Limits:
    """When a task, or a worker, has had enough."""

    workers: int
    tasks: int | None = None
    memory: int | None = None
    pending: int | None = None


class Called(Future[Any]):
    """The future of a task. It tells when it is cancelled, so that nothing of the task waits any longer. What its
    callbacks raise, SystemExit too, keeps no other from being called, and ends nobody's thread; but what a signal's
    handler raises in one that is called in here (Ctrl-C) is raised at the end.

    Attributes:
        is_abandoned: nobody waits for it any more, though it cannot be cancelled.
        has_permit: of a `Room`; it comes back once.
        heard: what a signal's handler has raised in a callback.
    """

    on_cancel: Callable[[], object] | None = None
    is_abandoned = False
    has_permit = False
    heard: BaseException | None = None

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        super().add_done_callback(partial(_called_back, fn))
        if self.heard is not None:
            self._raise_heard()

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        call, self.on_cancel = self.on_cancel, None
        if call is not None:
            call()
        if self.heard is not None:
            self._raise_heard()
        return True

    def lose(self, why: RuntimeError) -> None:
        """In a forked copy, where nothing will come of it, and whoever had its locks is not there."""
        mine: Any = self  # these have no types
        mine._condition, mine._done_callbacks = threading.Condition(), []
        for one in mine._waiters:  # those of `as_completed`, in whose block the copy was made
            one.lock, one.event = threading.Lock(), threading.Event()
        if not self.done():
            self.set_exception(why)
        elif self.cancelled():
            with contextlib.suppress(RuntimeError):  # they know
                self.set_running_or_notify_cancel()

    def _raise_heard(self) -> None:
        if threading.current_thread() is threading.main_thread():  # where handlers run
            heard, self.heard = self.heard, None
            if heard is not None:
                raise heard


class Task:
    """One call, on its way to a worker. In an event loop, its datagram may come later (`sent_objects.begin`).

    Args:
        forked: as for `function_run.pack`.
        future: what comes of it; done at once if it cannot be pickled.
        timeout: seconds that it may run on a worker; None: as long as it will.

    Attributes:
        text: the call, for who reads of its end.
        given_ns: when a worker was given it (monotonic).
        making: its datagram, as long as that cannot be sent yet.
        begun: it is told to run, and cannot be cancelled any more.
        untaken: how many workers have ended without having taken it.
        with_fds: it was sent with descriptors, which are not here any more.
    """

    __slots__ = (
        *("_kept", "begun", "fds", "future", "given_ns", "making", "packet", "text", "timeout", "untaken"),
        "with_fds",
    )

    def __init__(self, body: Body, forked: bool, future: Called | None = None, timeout: float | None = None) -> None:
        self.future = future or Called()
        self.timeout = timeout
        self.text = _text_of(*body)
        self.given_ns = 0
        self.begun = False
        self.untaken = 0
        self.with_fds = False
        self.packet, self.fds = b"", list[int]()
        self._kept: list[int | Callable[[], int]] | None = None  # what makes the descriptors that are not there now
        self.making: Packing | None = None
        try:
            # in a thread without a loop it may wait; but not in a callback of a task
            may_wait = asyncio._get_running_loop() is None and not here.owns
            made = sent_objects.begin(lambda: function_run.pack(messages.TASK, body, forked), may_wait)
        except pickling.FAILURES as exc:
            self.future.set_exception(exc)
            return
        if isinstance(made, Packing):
            self.making = made
        else:
            self.packet, self.fds = made

    @property
    def needs_main(self) -> bool:
        """Whether it is known to need the main module."""
        return self.packet != b"" and messages.needs_main(self.packet)

    def told(self, at_ns: int | None = None) -> str:
        """The call, and how long it had run by then, or has by now."""
        ran = (time.monotonic_ns() if at_ns is None else at_ns) - self.given_ns
        return f"{self.text}, {max(ran, 0) / 1e9:.2f} s after its start"

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
            asker = threading.get_ident()

            def made(_: object) -> None:
                if threading.get_ident() == asker:  # it was there at once: who submits may have an event loop to run
                    messages.memory().pool.do([partial(call, self)])
                else:
                    call(self)

            making.add_done_callback(made)

    def put_away(self) -> None:
        """It will wait for long: without a descriptor, where that can be. Where it cannot, nothing changes."""
        if self.fds:
            self._have(self.packet, self.fds, True)

    def made(self, is_far: bool) -> None:
        """Its datagram has come; `is_far` as for `put_away`. Raises why it could not be made."""
        assert self.making is not None
        self._have(*self.making.take(), is_far)  # nobody else has them yet: who cancels closes none that is being read

    def take_out(self) -> None:
        """It is about to be sent. Raises `OSError`: this process has no descriptor left, or no memory."""
        if self._kept is not None:
            self.fds, self._kept = _taken_out(self._kept), None

    def _have(self, packet: bytes, fds: list[int], is_far: bool) -> None:
        kept = _put_away(packet, fds) if is_far else None
        self.packet, self.fds, self._kept = packet, fds, kept
        if kept is not None:
            _close(fds, kept)

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
        elif self.future.is_abandoned:  # it came back from a worker that had not taken it
            self.drop()
            self.settle(None, CancelledError())
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

    def fail(self, problem: BaseException) -> None:
        """It will not be run, or not to its end."""
        if self.begin():
            self.drop()
            self.settle(None, problem)

    def drop(self) -> None:
        """Free what it holds besides its future."""
        if self.making is not None:
            self.making.cancel()
        self._kept = None
        _close(self.fds)


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
        self._waiting: OrderedDict[Called, Future[None]] = OrderedDict()
        self._refusal: Callable[[], Exception] | None = None

    def ask(self, at_once: bool, future: Called) -> Future[None] | None:
        """Take one for a task. None: it is taken; else it is when what is returned is done, unless that fails. Whoever
        does not wait for it to the end, or is interrupted at any line, calls `leave`.

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
                future.has_permit = True
                return None
            ticket: Future[None] = Future()
            self._waiting[future] = ticket
            return ticket

    def leave(self, future: Called) -> None:
        """That task does not wait any more; what it may have got goes back."""
        with self._lock:
            self._waiting.pop(future, None)
        self.back(future)

    def back(self, future: Any) -> None:
        """That of a task comes back, if it has one, and goes to the next who waits."""
        following = None
        with self._lock:
            if not future.has_permit:
                return
            future.has_permit = False
            if self._waiting and self.taken <= self._most:
                one, following = self._waiting.popitem(last=False)
                one.has_permit = True
            else:
                self.taken -= 1
        if following is not None and following.set_running_or_notify_cancel():  # else whoever has cancelled it leaves
            following.set_result(None)

    def close(self, refusal: Callable[[], Exception]) -> None:
        """There are no more, for whoever waits, or comes."""
        with self._lock:
            self._refusal = refusal
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for one in waiting:
            if one.set_running_or_notify_cancel():
                one.set_exception(refusal())


class Line(OrderedDict[Task, None]):
    """Tasks that wait, in their order: one whose datagram is not there yet holds up those behind it.

    Each leaves it in the same time, wherever it stands: all may be cancelled, from the last to the first.
    """

    def append(self, task: Task) -> None:
        self[task] = None

    def appendleft(self, task: Task) -> None:
        self[task] = None
        self.move_to_end(task, last=False)

    def next(self) -> Task | None:
        """The first, if it can be sent."""
        for task in self:
            return task if task.making is None and self.take_out(task) else None
        return None

    def take_out(self, task: Task) -> bool:
        """Whether it was here."""
        return self.pop(task, self) is None

    def clear_unbegun(self) -> list[Task]:
        """Take out all that can be cancelled: not those that came back from a worker which was dying."""
        return [task for task in list(self) if not task.begun and self.take_out(task)]

    def clear_all(self) -> list[Task]:
        """Take out all."""
        return [task for task in list(self) if self.take_out(task)]


def _text_of(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> str:
    """The call, or the calls of a chunk."""
    if fn is not task_loop.chunk:
        return call_text(fn, args, kwargs)
    of, columns, _ = args
    return f"{len(columns[0])} calls from {call_text(of, [one[0] for one in columns], kwargs)} on"


def _put_away(packet: bytes, fds: list[int]) -> list[int | Callable[[], int]] | None:
    """Those that have to stay open; and in the place of each that has not, what makes it again. None: no descriptor is
    left for that, or no memory."""
    memory, kept = messages.memory(), list[int | Callable[[], int]]()
    try:
        for number, fd in enumerate(fds):
            again = None
            if number >= len(fds) - messages.copies(packet):
                again = partial(messages.taken_out, messages.taken_in(fd))
            elif memory is not None:
                again = memory.kept(fd)
            kept.append(again or fd)
    except (OSError, MemoryError):
        return None
    return kept


def _close(fds: list[int], but: Container[object] = ()) -> None:
    """Close them, and have them out of the list before: who is interrupted here, and comes back, closes none twice."""
    for fd in [one for one in fds if one not in but]:
        try:
            fds.remove(fd)
        except ValueError:
            continue  # another thread closes it
        shut(fd)


def _taken_out(kept: list[int | Callable[[], int]]) -> list[int]:
    """The descriptors as they were. Raises `OSError`: there are no more; nothing has changed."""
    fds, made = list[int](), list[int]()
    try:
        for one in kept:
            if isinstance(one, int):
                fds.append(one)
            else:
                made.append(one())
                fds.append(made[-1])
    except BaseException:
        datagrams.close(made)
        raise
    return fds


def _called_back(fn: Callable[[Future[Any]], object], future: Called) -> None:
    loop = asyncio._get_running_loop() if here.owns else None
    if loop is not None:  # it may run one of its own, as in any executor
        asyncio._set_running_loop(None)
    try:
        untrusted.attempt(_logged, fn, future)
    except BaseException as exc:  # of a signal's handler: raised where the program waits
        future.heard = exc
    finally:
        if loop is not None:
            asyncio._set_running_loop(loop)


def _logged(fn: Callable[[Future[Any]], object], future: Called) -> None:
    try:
        fn(future)
    except BaseException as exc:  # a future itself sees to an Exception only
        if is_the_programs(exc):
            raise
        _log.exception("exception calling callback for %r", future)


def opened(packet: bytes, fds: list[int], task: Task) -> tuple[Any, BaseException | None]:
    """What came of a task, from a worker's reply: a value, or why there is none. Not for the main thread."""
    if packet[:1] == messages.DONE:
        return untrusted.step(decoded, packet, fds)
    error, problem = untrusted.step(_error_in, packet, fds, task)
    return None, problem if error is None else error


def _error_in(packet: bytes, fds: list[int], task: Task) -> BaseException:
    told, _ = failure_in(packet, fds)
    told.task = task.told()
    return _to_raise(told)


def raised(one: task_loop.Raised) -> BaseException:
    """What a call in a chunk has raised."""
    told, problem = untrusted.attempt(remote_error, one.told, one.task)
    return _to_raise(told) if told is not None else problem or RuntimeError(one.task)


def _to_raise(told: RemoteError) -> BaseException:
    error = told.exception
    if error is None or untrusted.can_end(error):
        return told
    error_record.assign(error, "cause", told)
    return error


async def opened_aside(packet: bytes, fds: list[int], task: Task) -> tuple[Any, BaseException | None]:
    """The same where a GPU's driver has to be asked; closes `fds`. It raises nothing."""

    def work() -> tuple[Any, BaseException | None]:
        try:
            return opened(packet, fds, task)
        finally:
            datagrams.close(fds)

    try:
        opening = sent_objects.aside(work)
    except RuntimeError as exc:  # this process may have no more threads
        datagrams.close(fds)
        return None, exc
    try:
        return await asyncio.wrap_future(opening)
    except asyncio.CancelledError:  # all else is over
        return None, BrokenExecutor("its result could not be unpickled in time: the driver of a GPU does not answer")
