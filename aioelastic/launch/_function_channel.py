"""What a function worker says on its channel: that it is ready, its value, or its error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from ..child.kernel import bounded_reads
from ..child.wire import datagrams, messages, sent_objects, untrusted
from ..child.worker import exceptions
from ..model.interruptions import is_the_programs
from ..model.text import told
from ..system.waiting import nothing
from ..watch import Poller
from ._call_outcome import CallOutcome
from ._received_values import decoded, failure_in

_NOT_HERE = "its result could not be unpickled here"
_REMEDY = "have the function stay the user that its host is, or leave what it found in a file"
OBJECTS = 64  # that a worker may have sent and nobody has received; then it waits
DESCRIPTORS = 512  # that all of them may hold here; what brings more is unpickled at once
LEFT = 1_048_576  # bytes that are read after its end, where the kernel does not say how many there are
AT_ONCE = 262_144  # of these at once, which is what a socket of the default size holds
SLICE = 0.002  # seconds of reading what is left, enough but for many small messages; then the loop gets its turn


def _raise(exc: BaseException) -> None:
    raise exc


class Ended(EOFError):
    """There will be no more objects. A class of its own: what is unpickled may raise EOFError, too."""


class SentObject(sent_objects.SentObject):
    """What was sent, and is unpickled when somebody receives it: until then it costs its datagram and descriptors.

    Args:
        fds: its own from now on.
    """

    def __init__(self, packet: bytes, fds: list[int]) -> None:
        super().__init__()
        self.packet, self.fds = packet, fds

    def _unpickle(self) -> Any:
        return decoded(self.packet, self.fds)


# what was opened, or why it could not be; what is being opened, in another thread; what is not opened yet
Kept: TypeAlias = "tuple[Any, Exception | None] | asyncio.Future[Any] | SentObject"


class FunctionChannel(CallOutcome):
    """Reads `channel` (closed by us at the end) from the moment of the start."""

    def __init__(
        self,
        poller: Poller,
        channel: socket.socket,
        on_ready: Callable[[], None],
        on_task: Callable[[bytes, list[int]], None] | None = None,
        on_whole: Callable[[], None] = nothing,
    ) -> None:
        super().__init__()
        self._poller = poller
        self._channel: socket.socket | None = channel
        self._on_ready = on_ready
        self._on_task = on_task
        self._on_whole = on_whole
        self._objects: deque[Kept] = deque()  # what it sends besides
        self._held, self._full = 0, False  # descriptors in them; whether nothing more is read until they are
        self._left = -1  # bytes that it has sent before its end; -1: it has not ended
        self._late = False  # they are being read, in more than one turn of the loop
        self._guess = False  # that there is a value among them
        self._opening = False  # its value is being unpickled
        self._receiving = asyncio.Lock()  # who waits for objects, in the order in which they came; the first by this:
        self._came: asyncio.Future[None] | None = None
        self.untaken = False  # it has ended, and had not taken the last that it was sent
        self.turn = asyncio.Lock()  # what is sent arrives in the order in which that was begun
        poller.add_reader(channel.fileno(), self._read)

    def send(self, packet: bytes, fds: list[int]) -> None:
        """Send it something. `OSError`: it is gone, or full."""
        if self._channel is None:
            raise BrokenPipeError("it is gone")
        datagrams.send(self._channel, packet, fds)

    async def post(self, packet: bytes, fds: list[int]) -> None:
        """As `send`, and wait while it is full."""
        while True:
            try:
                return self.send(packet, fds)
            except BlockingIOError:
                assert self._channel is not None
                await writable(self._channel.fileno())
            except datagrams.Crowded:
                await asyncio.sleep(datagrams.AGAIN)

    async def receive(self) -> Any:
        """The next of what it sends besides.

        Raises:
            EOFError: it has ended, or closed its channel, and there are no more.
            Exception: what unpickling it raised.
        """
        async with self._receiving:
            while not self._objects or not self._is_here():
                if self._channel is None and not self._objects:
                    raise Ended("the worker will send nothing more")
                self._came = asyncio.get_running_loop().create_future()
                try:
                    await self._came
                finally:
                    self._came = None
            first = self._objects[0]
            if isinstance(first, SentObject):
                count = len(first.fds)
                first = self._objects[0] = untrusted.step(first.open)  # what the program's signals raise here leaves it
                self._held -= count
            if self._full and self._channel is not None and self._left < 0:
                self._full = False
                self._poller.add_reader(self._channel.fileno(), self._read)
            del self._objects[0]
            if isinstance(first, asyncio.Future):
                return first.result()
            value, problem = first
            if problem is not None:
                raise problem
            return value

    def no_more(self) -> None:
        """Tell it that nothing more will be sent."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        """It has exited: read what it had sent by now, and close. What copies of it send from now on is refused."""
        if self._channel is not None and self._left < 0:
            try:
                self._channel.shutdown(socket.SHUT_RD)  # what is there can still be read, and nobody adds to it
                self._left = max(datagrams.waiting(self._channel), 1)
            except OSError:
                self._left = LEFT
            if not self._full:
                self._full = True
                self._poller.remove(self._channel.fileno())
            later = max(self._left - AT_ONCE, 0)
            self._left = bounded_reads.turn(self._read, self._left - later, SLICE) + later
            self._read_rest()
        _look_again()  # its channel may have ended before its other descriptors

    def too_late(self) -> None:
        if self._late:
            self._late = False
            if not self._opening:
                self.whole, self.has_value = True, not self._guess
                self.invalid = self.invalid or "it had sent more than could be read in time after its end"
            self._close()
        super().too_late()

    def _read_rest(self) -> None:
        """A slice of it. Where that is not all, it is taken to hold a value, until it is read."""
        if self._channel is not None and self._left:
            self._left = bounded_reads.turn(self._read, self._left, SLICE)
            if self._left and self._channel is not None:
                if not self._late:
                    self._late, self._guess = True, not self.has_value
                    self.has_value, self.whole = True, False
                asyncio.get_running_loop().call_soon(self._read_rest)
                return
        self._close()
        if self._late:
            self._late = False
            self.has_value = self.has_value and not self._guess
            if not self._opening:
                self._is_whole()

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        channel, self._channel = self._channel, None
        self._on_ready, self._on_task, self._on_whole = nothing, None, nothing
        self.whole = True
        fds = [channel.detach()] if channel is not None and channel.fileno() >= 0 else []
        for one in self._objects:
            if isinstance(one, SentObject):
                fds += one.fds
                one.fds = []
        return fds

    def _read(self) -> int:
        """One message, and its bytes; 0: try again. -1: there was none, or it was the last."""
        assert self._channel is not None
        stranger: int | None = None
        try:
            packet, fds = datagrams.receive(self._channel, 0, self._was_reset)
        except BlockingIOError:
            return -1
        except datagrams.Foreign as exc:
            packet, fds, stranger = exc.packet, exc.fds, exc.uid
        except datagrams.Missing as exc:
            if exc.packet[:1] == messages.OBJECT:
                self._keep((None, exc))  # the next may have more luck
                return len(exc.packet)
            self.invalid = self.invalid or f"{_NOT_HERE}: {exc}"
            self._close()
            return -1
        except (OSError, ValueError) as exc:
            if isinstance(exc, OSError) and datagrams.passes(exc):
                return 0
            self.invalid = self.invalid or f"it sent something that is not ours: {exc}"
            self._close()
            return -1
        if not packet:
            self._close()
            return -1
        try:
            if stranger is None:
                self._take(packet, fds)
            else:
                self._take_as_text(packet, fds, stranger)
        except BaseException as exc:  # no thread could be started; or a signal handler of the program's has raised it
            self._cannot_read(exc)
            if not isinstance(exc, Exception) or is_the_programs(exc):
                asyncio.get_running_loop().call_soon(_raise, exc)  # not here: who reads goes on to its end
        finally:
            if fds:
                datagrams.close(fds)
        return len(packet)

    def _was_reset(self) -> None:
        self.untaken = True

    def _take_as_text(self, packet: bytes, fds: list[int], uid: int) -> None:
        """Nothing that another user's process has sent is unpickled: a pickle runs what its sender likes."""
        kind, words = packet[:1], f"it was sent by another user (uid {uid}), and is not unpickled: {_REMEDY}"
        is_reply = self._on_task is not None and kind in (messages.DONE, messages.FAILED)
        if is_reply or kind == messages.ERROR:
            text, problem = untrusted.attempt(exceptions.as_text, packet, fds, words)
            if text is None and is_reply:  # nonsense, and the task shall not wait for another reply
                text = exceptions.as_text(messages.DONE, (), words)
            if text is None:
                self._cannot_read(problem or PermissionError(words))
                return
            try:
                self._take(*text)
            finally:
                datagrams.close(text[1])
        elif kind == messages.RUNS:
            self._is_ready()
        elif kind == messages.OBJECT:
            self._keep((None, PermissionError(words)))
        else:
            self._cannot_read(PermissionError(words))

    def _is_ready(self) -> None:
        tell, self._on_ready = self._on_ready, nothing  # once
        tell()

    def _error_came(self, packet: bytes, fds: list[int]) -> None:
        found, problem = untrusted.attempt(failure_in, packet, fds)
        if found is not None:
            self.error, self.raised_ns = found
        elif problem is not None:
            self._cannot_read(problem)

    def _cannot_read(self, exc: BaseException) -> None:
        self.invalid = self.invalid or f"{_NOT_HERE}: {told(exc)}"

    def _take(self, packet: bytes, fds: list[int]) -> None:
        kind = packet[:1]
        if self._on_task is not None and kind in (messages.DONE, messages.FAILED):
            self._on_task(packet, fds)
        elif kind == messages.VALUE and messages.is_slow(packet):
            self._aside(_sent_object(packet, fds), self._value_came)  # or no thread can be started
            self.has_value, self.whole, self._guess, self._opening = True, False, False, True
        elif kind == messages.VALUE:
            self._guess = False
            value, problem = untrusted.attempt(decoded, packet, fds)
            if problem is None:
                self.value, self.has_value = value, True
            else:
                self._cannot_read(problem)
        elif kind == messages.ERROR:
            self._error_came(packet, fds)
        elif kind == messages.RUNS:
            self._is_ready()
        elif kind == messages.OBJECT:
            self._object_came(_sent_object(packet, fds))
        else:
            self._cannot_read(ValueError(f"a message of kind {kind!r}"))

    def _object_came(self, obj: SentObject) -> None:
        if messages.is_slow(obj.packet) and self._left < 0:
            self._keep(self._aside(obj, self._opened))
        elif self._held + len(obj.fds) > DESCRIPTORS:
            self._keep(untrusted.attempt(obj.open))
        else:
            self._held += len(obj.fds)
            self._keep(obj)

    def _keep(self, obj: Kept) -> None:
        assert self._channel is not None
        self._objects.append(obj)
        if len(self._objects) >= OBJECTS and not self._full:
            self._full = True
            self._poller.remove(self._channel.fileno())
        self._wake()

    def _is_here(self) -> bool:
        """Whether the first can be given out. One that waits for a driver is begun now, if it is not yet."""
        first = self._objects[0]
        if isinstance(first, SentObject) and messages.is_slow(first.packet):
            count = len(first.fds)
            first = self._objects[0] = self._aside(first, self._opened)
            self._held -= count
        return not isinstance(first, asyncio.Future) or first.done()

    def _aside(self, obj: SentObject, then: Callable[[asyncio.Future[Any]], None]) -> asyncio.Future[Any]:
        """Unpickle it in another thread."""
        done = asyncio.wrap_future(sent_objects.aside(obj.open))
        done.add_done_callback(then)
        return done

    def _value_came(self, done: asyncio.Future[Any]) -> None:
        exc = done.exception()
        if self.whole:
            return  # too late
        self._opening, self.has_value = False, exc is None
        if exc is None:
            self.value = done.result()
        else:
            self.invalid = f"{_NOT_HERE}: {told(exc)}"
        if not self._late:
            self._is_whole()

    def _is_whole(self) -> None:
        self.whole = True
        self._on_whole()
        self._on_whole = nothing

    def _opened(self, obj: asyncio.Future[Any]) -> None:
        obj.exception()  # it is nobody's fault if nobody receives it
        self._wake()

    def _wake(self) -> None:
        if self._came is not None:
            sent_objects.settle(self._came)

    def _close(self) -> None:
        if self._channel is not None:
            if not self._full:
                self._poller.remove(self._channel.fileno())
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)  # who waits for room is told, though others have the other end
            datagrams.close((self._channel.detach(),))
            self._channel = None
            self._on_ready, self._on_task = nothing, None  # who has us shall not be held by us
            if self.whole:
                self._on_whole = nothing
            self._wake()


async def writable(fd: int) -> None:
    """Wait until something can be written there."""
    loop = asyncio.get_running_loop()
    can = loop.create_future()
    mine = os.dup(fd)  # several may wait, and somebody else reads there
    loop.add_writer(mine, sent_objects.settle, can)
    try:
        await can
    finally:
        loop.remove_writer(mine)
        datagrams.close((mine,))


def _sent_object(packet: bytes, fds: list[int]) -> SentObject:
    """They are its own from now on, and not the caller's."""
    mine = list(fds)
    fds.clear()
    return SentObject(packet, mine)


def _look_again() -> None:
    """A process is gone: what it held is free."""
    if (memory := sys.modules.get("aioelastic.memory")) is not None:
        memory.peer_gone()
