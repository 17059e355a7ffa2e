"""A queue between any number of processes, which is nothing but kernel objects: there is no process that serves it.

Items are datagrams in one socket (unix(7), SOCK_SEQPACKET), read by whoever comes first. An item takes a place: the
lock of one byte of a memfd (fcntl(2), F_OFD_SETLK), held by a descriptor that travels in the item itself. So a place is
free when its item was received, and also when it was lost with a process that died. Closing is shutdown(2), which all
processes see.

That there may be room is rung by an eventfd. Who looks for a place silences it first, and rings it again when there was
one, for there may be more: so all who wait are woken one after the other, and a bell that was rung a thousand times,
once for each process that has died, makes nobody look more than once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import socket
import struct
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from .. import memory
from ..checks import check_seconds, check_whole
from ..child import _letters, _socket, _wire, _work

if TYPE_CHECKING:
    import asyncio

_CLOSED = 0x2000  # POLLRDHUP: nothing more will be written at the other end; `select` has it from 3.14 on
MOST = 128  # items: so many small ones fit into one socket of the default size


_LATER = "put_nowait() would hold up the event loop until a GPU has done its work; use await put()"


class QueueClosed(memory.SharingError):
    """No more can be put into this queue, or nothing is left in it."""


class Queue:
    """A bounded queue that can be sent to workers: many may put, many may get, each item is received once.

    Put it into the arguments of a `Function`, or send it. Items go from process to process by themselves; shared
    arrays in them stay shared, others are copied once. When a process dies, what it has put is still there, and the
    place of what it was receiving is free.

    Args:
        maxsize: items that may be in it; 1 to 128, which is what a socket of the default size takes (an item may be a
            list of any length).

    Raises:
        SpecError: `maxsize` is not that.

    Example::

        frames = sharing.Queue(maxsize=4)
        async with Group(Function(detect, frames), n=2):
            for frame in camera:
                await frames.put(frame)
            frames.close()
    """

    def __init__(self, maxsize: int = 8) -> None:
        check_whole("maxsize", maxsize, 1)
        check_whole("maxsize", maxsize, 1, MOST)
        first, second = _socket.pair()
        places = os.memfd_create(memory.PLACES, os.MFD_CLOEXEC)
        room = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._set_up(maxsize, first, second, places, room)

    def _set_up(self, maxsize: int, get: socket.socket, put: socket.socket, places: int, room: int) -> None:
        get.setblocking(False)
        put.setblocking(False)
        self.maxsize = maxsize
        self._get: socket.socket | None = get
        self._put: socket.socket | None = put
        self._places, self._room = places, room
        self._reader = _letters.Reader()
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._over = weakref.finalize(self, _close, get, put, places, room)
        self._over.atexit = False
        _queues.add(self)

    # --- in an event loop ---

    async def put(self, item: Any) -> None:
        """Put it in; waits while the queue is full. What the tasks of a loop put comes in the order in which they did.

        Private arrays of 8 MiB and more are copied by other threads: do not change them until this returns.

        Raises:
            QueueClosed: nobody may put any more.
            Exception: whatever pickling it raises.
        """
        async with self._turn():
            while True:
                try:
                    packet, fds = await self._ready(item)
                    return self._post(packet, fds)
                except queue.Full:
                    await _letters.readable(self._room)

    async def get(self) -> Any:
        """The next item; waits while there is none.

        Raises:
            QueueClosed: it was closed, and nothing is left.
            ValueError: this process has no descriptors left for what came with the item, or it is none; it is gone.
            Exception: the item could not be unpickled; it is gone.
        """
        return await self._reader.take(self._next, lambda can: _letters.readable(self._ends()[0].fileno(), can))

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Items until it is closed and empty."""
        while True:
            try:
                item = await self.get()
            except QueueClosed:
                return
            yield item

    # --- anywhere else ---

    def put_sync(self, item: Any, timeout: float | None = None) -> None:
        """As `put`, and the thread waits; `queue.Full` after `timeout` seconds, `SpecError` when those are none."""
        if timeout is not None:
            check_seconds("timeout", timeout)
        until = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._room, select.POLLIN)
        while True:
            try:
                return self._post(*self._packed(item))
            except queue.Full:
                left = None if until is None else (until - time.monotonic()) * 1000
                if left is not None and left <= 0:
                    raise
                poll.poll(left)

    def get_sync(self, timeout: float | None = None) -> Any:
        """As `get`, and the thread waits; `queue.Empty` after `timeout` seconds, `SpecError` when those are none."""
        if timeout is not None:
            check_seconds("timeout", timeout)
        try:
            return self._reader.take_sync(self._next, self._ends()[0].fileno(), timeout)
        except _letters.Nothing:
            raise queue.Empty from None

    def __iter__(self) -> Iterator[Any]:
        """Items until it is closed and empty."""
        while True:
            try:
                item = self.get_sync()
            except QueueClosed:
                return
            yield item

    def put_nowait(self, item: Any) -> None:
        """As `put`; `queue.Full` when it is. Private arrays are copied by this thread, whatever their size.

        Raises:
            RuntimeError: there are arrays on a GPU in the item, for which the event loop of this thread would wait.
        """
        what = memory.later(away=None)
        try:
            with what if _in_a_loop() else contextlib.nullcontext():
                packet, fds = self._packed(item)
        except memory.Elsewhere:
            raise RuntimeError(_LATER) from None
        if what.waits:
            _socket.close(fds)
            self._ring()  # its place is free again
            raise RuntimeError(_LATER)
        self._post(packet, fds)

    def _turn(self) -> asyncio.Lock:
        """Of the tasks of this loop."""
        import asyncio

        return self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())

    async def _ready(self, item: Any) -> tuple[bytes, list[int]]:
        """Packed, when GPUs have done what they were asked for arrays in it."""
        try:
            return await _letters.ready(lambda: self._packed(item))
        except queue.Full:
            raise
        except BaseException:
            self._ring()  # its place is free again
            raise

    def _packed(self, item: Any) -> tuple[bytes, list[int]]:
        """With its place, as its last descriptor."""
        get, _ = self._ends()
        try:
            os.eventfd_read(self._room)
        except BlockingIOError:
            pass
        poll = select.poll()
        poll.register(get, _CLOSED)
        if poll.poll(0):
            self._ring()  # others who wait shall see it too
            raise QueueClosed("the queue is closed")
        place = self._place()
        try:
            packet, fds = _work.pack(_wire.ITEM, (item,))
        except BaseException:
            os.close(place)
            self._ring()
            raise
        fds.append(place)
        return packet, fds

    def _post(self, packet: bytes, fds: list[int]) -> None:
        try:
            _socket.send(self._ends()[1], packet, fds)
        except BlockingIOError:
            raise queue.Full from None
        except BrokenPipeError:
            raise QueueClosed("the queue is closed") from None
        except BaseException:
            self._ring()  # its place is free again
            raise
        finally:
            _socket.close(fds)
        self._ring()

    def get_nowait(self) -> Any:
        """As `get`; `queue.Empty` when it is."""
        return self.get_sync(0)

    def _next(self) -> tuple[bytes, list[int]]:
        """The next item, packed; its place is free. Raises `BlockingIOError` for none."""
        get, _ = self._ends()
        try:
            packet, fds = _socket.receive(get)
        except BlockingIOError:
            raise
        except BaseException:
            self._ring()  # what could not be taken is gone, and its place is free
            raise
        if not packet:
            raise QueueClosed("the queue is closed, and nothing is left in it")
        if packet[:1] != _wire.ITEM or not fds:
            _socket.close(fds)
            raise ValueError("somebody has put something into the queue that is no item; it is gone")
        os.close(fds.pop())
        self._ring()
        return packet, fds

    def close(self) -> None:
        """Nobody may put any more, in any process; what is in it can still be received."""
        _, put = self._ends()
        try:
            put.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was
        self._ring()  # for those who wait for room

    def _place(self) -> int:
        """A descriptor that holds one. Raises `queue.Full`."""
        try:
            place = os.open(f"/proc/self/fd/{self._places}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self._ring()  # others may have better luck
            raise
        for number in range(self.maxsize):
            try:
                fcntl.fcntl(place, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, number, 1, 0))
            except BlockingIOError:
                continue
            return place
        os.close(place)
        raise queue.Full

    def _ends(self) -> tuple[socket.socket, socket.socket]:
        if self._get is None or self._put is None:
            raise RuntimeError("this queue belongs to the process that this one was forked from; use another start")
        return self._get, self._put

    def _ring(self) -> None:
        """There may be room: one of those who wait shall look."""
        os.eventfd_write(self._room, 1)

    def _forget(self) -> None:
        """In a forked copy, whose descriptors may be closed, and their numbers used again, at any time."""
        self._over()
        self._get = self._put = None
        self._reader = _letters.Reader()  # whose threads are not here

    def __reduce__(self) -> Any:
        raise memory.NotShareable("a queue travels in arguments of workers, by worker.send() and in other queues only")

    def __repr__(self) -> str:
        return f"<Queue maxsize={self.maxsize}>"


def _close(get: socket.socket, put: socket.socket, places: int, room: int) -> None:
    get.close()
    put.close()
    os.close(places)
    os.close(room)


def _in_a_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _reduce(one: Queue, message: memory.Outgoing) -> Any:
    get, put = one._ends()
    fds = (get.fileno(), put.fileno(), one._places, one._room)
    return (_rebuild, (one.maxsize, *(message.descriptor(fd) for fd in fds)))


def _rebuild(maxsize: int, *numbers: int) -> Queue:
    fds = [memory.incoming().fd(number) for number in numbers]
    inode = os.fstat(fds[2]).st_ino
    for known in list(_queues):
        if known._get is not None and os.fstat(known._places).st_ino == inode:
            return known
    one = Queue.__new__(Queue)
    get, put = (socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)) for fd in fds[:2])
    places, room = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds[2:])
    one._set_up(maxsize, get, put, places, room)
    return one


def _somebody_died() -> None:
    for one in list(_queues):
        if one._get is not None:
            one._ring()  # it may have had a place


def _forked() -> None:
    for one in list(_queues):
        if one._get is not None:
            one._forget()


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()
memory.carry(Queue, _reduce)
memory.after_exit.append(_somebody_died)
memory.after_fork.append(_forked)
