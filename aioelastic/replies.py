"""What a function worker says on its channel: that it is ready, its value, or its error."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any, TypeAlias

from . import forked
from .child import _context, _failure, _letters, _read, _socket, _wire, _work
from .errors import RemoteError
from .launch import Answer
from .shown import told
from .watch import Poller

_NOT_HERE = "its result could not be unpickled here"
LETTERS = 64  # that a worker may have sent and nobody has received; then it waits
DESCRIPTORS = 512  # that all of them may hold here; what brings more is unpickled at once
LEFT = 1_048_576  # bytes that are read after its end, where the kernel does not say how many there are
AT_ONCE = 262_144  # of these at once, which is what a socket of the default size holds: some 3 ms
SLICE = 0.002  # seconds of reading the rest, then the loop gets its turn


def _nothing() -> None:
    pass


class Letter:
    """What was sent, and is unpickled when somebody receives it: until then it costs its datagram and descriptors.

    Args:
        fds: its own from now on.
    """

    __slots__ = ("fds", "packet")

    def __init__(self, packet: bytes, fds: list[int]) -> None:
        self.packet = packet
        self.fds = fds

    def open(self) -> Any:
        """The object in it. Raises whatever unpickling it raises."""
        fds, self.fds = self.fds, []
        try:
            return _decoded(self.packet, fds)
        finally:
            _socket.close(fds)

    def __del__(self) -> None:
        _socket.close(self.fds)


# what was opened, or why it could not be; what is being opened, in another thread; what is not opened yet
Kept: TypeAlias = "tuple[Any, Exception | None] | asyncio.Future[Any] | Letter"


class Replies(Answer):
    """Reads `channel` (closed by us at the end) from the moment of the start."""

    def __init__(
        self,
        poller: Poller,
        channel: socket.socket,
        on_ready: Callable[[], None],
        on_task: Callable[[bytes, list[int]], None] | None = None,
        on_whole: Callable[[], None] = _nothing,
    ) -> None:
        super().__init__()
        self._poller = poller
        self._channel: socket.socket | None = channel
        self._on_ready = on_ready
        self._on_task = on_task
        self._on_whole = on_whole
        self._letters: deque[Kept] = deque()  # what it sends besides
        self._held = 0  # descriptors in them
        self._full = False  # nothing more is read until they are
        self._left = -1  # bytes that it has sent before its end; -1: it has not ended
        self._late = False  # they are being read, in more than one turn of the loop
        self._guess = False  # that there is a value among them
        self._opening = False  # its value is being unpickled
        self._came: set[asyncio.Future[None]] = set()
        self.turn = asyncio.Lock()  # what is sent arrives in the order in which that was begun
        poller.add_reader(channel.fileno(), self._read)

    def send(self, packet: bytes, fds: list[int]) -> None:
        """Send it something. `OSError`: it is gone, or full."""
        if self._channel is None:
            raise BrokenPipeError("it is gone")
        _socket.send(self._channel, packet, fds)

    async def post(self, packet: bytes, fds: list[int]) -> None:
        """As `send`, and wait while it is full."""
        while True:
            try:
                return self.send(packet, fds)
            except BlockingIOError:
                assert self._channel is not None
                await writable(self._channel.fileno())

    async def letter(self) -> Any:
        """The next of what it sends besides.

        Raises:
            EOFError: it has ended, or closed its channel, and there are no more.
            Exception: whatever unpickling it raised.
        """
        while not self._letters or not self._is_here():
            if self._channel is None and not self._letters:
                raise EOFError("the worker will send nothing more")
            came = asyncio.get_running_loop().create_future()
            self._came.add(came)
            try:
                await came
            finally:
                self._came.discard(came)
        letter = self._letters.popleft()
        if self._full and self._channel is not None and self._left < 0:
            self._full = False
            self._poller.add_reader(self._channel.fileno(), self._read)
        if isinstance(letter, asyncio.Future):
            return letter.result()
        if isinstance(letter, Letter):
            self._held -= len(letter.fds)
            return letter.open()
        value, problem = letter
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
                self._left = max(_socket.waiting(self._channel), 1)
            except OSError:
                self._left = LEFT
            if not self._full:
                self._full = True
                self._poller.remove(self._channel.fileno())
            later = max(self._left - AT_ONCE, 0)
            self._left = _read.turn(self._read, self._left - later, math.inf) + later
            self._read_rest()
        _look_again()  # its channel may have ended before its other descriptors

    def too_late(self) -> None:
        if self._late:
            self._late = False
            if not self._opening:
                self.whole, self.has_value = True, not self._guess
                self.nonsense = self.nonsense or "it had sent more than could be read in time after its end"
            self._close()
        super().too_late()

    def _read_rest(self) -> None:
        """A slice of it. Where that is not all, it is taken to hold a value, until it is read."""
        if self._channel is not None and self._left:
            self._left = _read.turn(self._read, self._left, SLICE)
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
        """See `forked`."""
        channel, self._channel = self._channel, None
        self._on_ready, self._on_task, self._on_whole = _nothing, None, _nothing
        self.whole = True
        fds = [channel.detach()] if channel is not None and channel.fileno() >= 0 else []
        for one in self._letters:
            if isinstance(one, Letter):
                fds += one.fds
                one.fds = []
        return fds

    def _read(self) -> int:
        """One message, and its bytes. -1: there was none, or it was the last."""
        assert self._channel is not None
        try:
            packet, fds = _socket.receive(self._channel)
        except BlockingIOError:
            return -1
        except _socket.Missing as exc:
            if exc.packet[:1] == _wire.OBJECT:
                self._letter_is((None, exc))  # the next may have more luck
                return len(exc.packet)
            self.nonsense = self.nonsense or f"{_NOT_HERE}: {exc}"
            self._close()
            return -1
        except (OSError, ValueError) as exc:
            self.nonsense = self.nonsense or f"it sent something that is not ours: {exc}"
            self._close()
            return -1
        if not packet:
            self._close()
            return -1
        try:
            self._take(packet, fds)
        except Exception as exc:  # unpickling runs the code of others: anything may come
            words = f"{_NOT_HERE}: {told(exc)}"
            self.nonsense = self.nonsense or words
        finally:
            _socket.close(fds)
        return len(packet)

    def _take(self, packet: bytes, fds: list[int]) -> None:
        kind = packet[:1]
        if self._on_task is not None and kind in (_wire.DONE, _wire.FAILED):
            self._on_task(packet, fds)
        elif kind == _wire.VALUE and _wire.is_slow(packet):
            self.has_value, self.whole, self._guess, self._opening = True, False, False, True
            self._aside(_letter(packet, fds), self._value_came)
        elif kind == _wire.VALUE:
            self._guess = False
            self.value = _decoded(packet, fds)
            self.has_value = True
        elif kind == _wire.ERROR:
            phase, told = _wire.decode(packet, fds)
            self.error, self.raised_ns = remote_error(phase, told), _failure.raised_ns(told)
        elif kind == _wire.RUNS:
            tell, self._on_ready = self._on_ready, _nothing  # once
            tell()
        elif kind == _wire.OBJECT:
            self._letter_came(_letter(packet, fds))
        else:
            raise ValueError(f"a message of kind {kind!r}")

    def _letter_came(self, letter: Letter) -> None:
        if _wire.is_slow(letter.packet) and self._left < 0:
            self._letter_is(self._aside(letter, self._opened))
        elif self._held + len(letter.fds) > DESCRIPTORS:
            try:
                self._letter_is((letter.open(), None))
            except Exception as exc:
                self._letter_is((None, exc))
        else:
            self._held += len(letter.fds)
            self._letter_is(letter)

    def _letter_is(self, letter: Kept) -> None:
        assert self._channel is not None
        self._letters.append(letter)
        if len(self._letters) >= LETTERS and not self._full:
            self._full = True
            self._poller.remove(self._channel.fileno())
        self._wake()

    def _is_here(self) -> bool:
        """Whether the first can be given out. One that waits for a driver is begun now, if it is not yet."""
        first = self._letters[0]
        if isinstance(first, Letter) and _wire.is_slow(first.packet):
            self._held -= len(first.fds)
            first = self._letters[0] = self._aside(first, self._opened)
        return not isinstance(first, asyncio.Future) or first.done()

    def _aside(self, letter: Letter, then: Callable[[asyncio.Future[Any]], None]) -> asyncio.Future[Any]:
        """Unpickle it in another thread."""
        done = asyncio.wrap_future(_letters.aside(letter.open))
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
            self.nonsense = f"{_NOT_HERE}: {told(exc)}"
        if not self._late:
            self._is_whole()

    def _is_whole(self) -> None:
        self.whole = True
        self._on_whole()
        self._on_whole = _nothing

    def _opened(self, letter: asyncio.Future[Any]) -> None:
        letter.exception()  # it is nobody's fault if nobody receives it
        self._wake()

    def _wake(self) -> None:
        for one in self._came:
            if not one.done():
                one.set_result(None)

    def _close(self) -> None:
        if self._channel is not None:
            if not self._full:
                self._poller.remove(self._channel.fileno())
            _socket.close((self._channel.detach(),))
            self._channel = None
            self._on_ready, self._on_task = _nothing, None  # who has us shall not be held by us
            if self.whole:
                self._on_whole = _nothing
            self._wake()


class Correspondent(forked.Owned):
    """What a live function worker can be sent, and sends."""

    rank: int
    replies: Replies | None

    async def send(self, value: Any) -> None:
        """Send an object to the function that runs there; it gets it by `aioelastic.sharing.receive`.

        Shared arrays in it stay shared; others are copied once: from 8 MiB on by other threads, so do not change them
        until this returns. Objects arrive in the order in which they were sent, by whatever tasks. Waits while the
        worker has not received what was sent before: a few hundred small objects.

        Raises:
            RuntimeError: it does not run, or is no function worker.
            BrokenPipeError: it has ended.
            Exception: whatever pickling it raises.

        Example::

            async with Group(Function(serve), n=2) as group:
                await group[0].send({"weights": x})
                print(await group[0].receive())
        """
        replies = self._correspondence()
        async with replies.turn:
            packet, fds = await _letters.ready(lambda: _work.pack(_wire.OBJECT, (value,)))
            try:
                await replies.post(packet, fds)
            finally:
                _socket.close(fds)

    async def receive(self) -> Any:
        """The next object that the function sends by `aioelastic.sharing.send`; also after it has ended.

        Raises:
            RuntimeError: it was not started, or is no function worker.
            EOFError: it has ended, and there are no more.
            Exception: the object could not be unpickled.
        """
        return await self._correspondence().letter()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """All that it sends, until it ends."""
        while True:
            try:
                value = await self.receive()
            except EOFError:
                return
            yield value

    def _correspondence(self) -> Replies:
        self.check_ours()
        if self.replies is None:
            raise RuntimeError(f"worker {self.rank} is no function worker that was started in a process of its own")
        return self.replies


async def writable(fd: int) -> None:
    """Wait until something can be written there."""
    loop = asyncio.get_running_loop()
    can = loop.create_future()
    mine = os.dup(fd)  # several may wait, and somebody else reads there
    loop.add_writer(mine, _context.settle, can)
    try:
        await can
    finally:
        loop.remove_writer(mine)
        os.close(mine)


def _letter(packet: bytes, fds: list[int]) -> Letter:
    """They are its own from now on, and not the caller's."""
    mine = list(fds)
    fds.clear()
    return Letter(packet, mine)


def _decoded(packet: bytes, fds: list[int]) -> Any:
    with main_has_both_names():
        (value,) = _wire.decode(packet, fds)
    return value


def _look_again() -> None:
    """A process is gone: what it held is free."""
    memory = sys.modules.get("aioelastic.memory")
    if memory is not None:
        memory.peer_gone()


def remote_error(phase: str, told: dict[str, Any]) -> RemoteError:
    """From what an `ERROR` or `FAILED` message holds."""
    with main_has_both_names():
        exc, why = _failure.rebuild(told["packed"])
    return RemoteError(phase, told["type"], told["message"], told["traceback"], exc, why)


class main_has_both_names:
    """A worker knows our main module by another name, as in multiprocessing: so do we while we unpickle, in whatever
    threads: the first adds it, the last takes it away."""

    def __enter__(self) -> None:
        global _users, _added
        with _names:
            _users += 1
            if _users == 1 and "__mp_main__" not in sys.modules and "__main__" in sys.modules:
                _added = sys.modules["__mp_main__"] = sys.modules["__main__"]

    def __exit__(self, *_: object) -> None:
        global _users, _added
        with _names:
            _users -= 1
            if not _users:
                added, _added = _added, None
                if added is not None and sys.modules.get("__mp_main__") is added:
                    del sys.modules["__mp_main__"]


_names = threading.RLock()  # a signal's handler may come in between
# guarded by it
_users = 0
_added: ModuleType | None = None


@forked.in_copies
def _renew() -> None:
    global _names
    _names = threading.RLock()  # another thread of the original may have had it
