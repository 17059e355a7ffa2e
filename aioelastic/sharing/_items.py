"""An item on its way into a queue, and out of it: what it holds meanwhile."""

from __future__ import annotations

import fcntl
import os
import queue
import select
import struct
import time
from _socket import socket as AnySocket
from itertools import chain
from typing import Any, Protocol

from .. import memory
from ..child.wire import datagrams, sent_objects
from ..system.descriptors import reopened, shut_all

_LOCK = struct.Struct("hhqqi4x").pack
_CLOSED = 0x2000  # POLLRDHUP: nothing more will be written at the other end; `select` has it from 3.14 on


class QueueClosed(memory.SharingError):
    """No more can be put into this queue, or nothing is left in it."""


class Full(queue.Full, TimeoutError):
    """There was no room in time. Both a `queue.Full` and a `TimeoutError`."""


def is_empty(places: int, count: int) -> bool:
    """Whether nobody has any of so many places, and so no item is in the queue, or is being put."""
    told = fcntl.fcntl(places, fcntl.F_OFD_GETLK, _LOCK(fcntl.F_WRLCK, 0, 0, count, 0))
    return told[:2] == struct.pack("h", fcntl.F_UNLCK)


class Item(sent_objects.SentObject):
    """An item that was received.

    Attributes:
        place: the descriptor that holds its place.
        had_place: whether there was one.
    """

    had_place = False

    def __init__(self) -> None:
        self.place: list[int] = []
        super().__init__()

    def close(self) -> None:
        super().close()
        shut_all(self.place)

    def _have(self, packet: bytes, fds: list[int]) -> None:
        self.packet, self.fds, self.place, self.had_place = packet, fds[:-1], fds[-1:], bool(fds)


class Places(Protocol):
    """What an item needs of the queue into which it goes."""

    maxsize: int
    _places: int
    _room: int
    _likely: int
    _was_full: bool

    def _ends(self) -> tuple[AnySocket, AnySocket]: ...

    def _packed(self, item: Any, for_others: bool, fds: list[int] | None = None) -> datagrams.Packed: ...

    def _serves_others(self) -> bool: ...

    def _notify(self) -> None: ...


class Putting:
    """An item on its way into a queue: its message, and its place. `close` gives back what it has.

    Attributes:
        packet, fds: its message, once there is one.
        for_others: how that is to be packed (`is_packed`).
        why: there is no room.
    """

    why = "the queue is full"
    _notifies = False  # others are to be told that there may be room
    _refused = False  # there is a place, but the system takes no more
    _is_in = False
    for_others = False

    def __init__(self, queue: Places) -> None:
        self._queue = queue
        self._place: list[int] = []
        self.packet = b""
        self.fds: list[int] = []

    def finds_room(self) -> bool:
        """Whether there is a place, which it has then. Raises `QueueClosed`, `OSError`."""
        queue = self._queue
        get, _ = queue._ends()
        if self._refused:  # before the system would say that nobody reads there
            self._check_open(get)
        reopened(self._place, queue._places)
        if not queue._was_full and self._locks():
            return True
        self._notifies = queue._was_full = True
        try:
            if datagrams.readable(0, queue._room):  # which another user may have made one that waits
                os.eventfd_read(queue._room)
        except BlockingIOError:
            pass
        if self._locks():
            queue._was_full = False
            return True
        shut_all(self._place)
        self._check_open(get)
        self._notifies = self._refused = False
        return False

    def _check_open(self, get: AnySocket) -> None:
        poll = select.poll()
        poll.register(get, _CLOSED)
        if poll.poll(0):
            self._notifies = True  # others who wait shall see it, too
            raise QueueClosed("the queue is closed")

    def _locks(self) -> bool:
        queue, (place,) = self._queue, self._place
        first = queue._likely  # they become free in their order
        for number in chain(range(first, queue.maxsize), range(first)):
            try:
                fcntl.fcntl(place, fcntl.F_OFD_SETLK, _LOCK(fcntl.F_WRLCK, 0, number, 1, 0))
            except BlockingIOError:
                continue
            queue._likely = (number + 1) % queue.maxsize
            return True
        return False

    def pack(self, item: Any) -> bool:
        """True: there is a message of it."""
        if not self.is_packed():
            self.packet, _ = self._queue._packed(item, self.for_others, self.fds)
        return True

    def is_packed(self) -> bool:
        """Whether there is a message, for all who may receive it now: with another place, there may be more of them."""
        before, self.for_others = self.for_others, self._queue._serves_others()
        if self.for_others and not before:
            self.packet = b""
            shut_all(self.fds)
        return bool(self.packet)

    def goes(self) -> bool:
        """Whether it is in the queue. If not, its place is free again. Raises `QueueClosed`, `OSError`."""
        _, put = self._queue._ends()
        try:
            datagrams.send(put, self.packet, [*self.fds, *self._place], datagrams.DONTWAIT)
        except (BlockingIOError, datagrams.Crowded) as exc:
            self._refused = True
            self.why = str(exc.strerror)
            self._give_back()
            return False
        except OSError as exc:
            if datagrams.is_gone(exc):
                raise QueueClosed("the queue is closed") from None
            raise
        self._is_in = True
        return True

    async def room(self) -> None:
        """Wait until there may be some. What the system refuses is tried again every `AGAIN` seconds: of descriptors
        that others receive, from other queues too, there is no event."""
        import asyncio

        if self._refused:
            await asyncio.sleep(datagrams.AGAIN)
        else:
            await sent_objects.readable(self._queue._room)

    def room_sync(self, seconds: float) -> None:
        """The same, at most so many seconds."""
        if self._refused:
            time.sleep(min(seconds, datagrams.AGAIN))
        else:
            datagrams.readable(seconds, self._queue._room)

    def close(self) -> None:
        shut_all(self.fds)
        self._give_back()

    def _give_back(self) -> None:
        if self._place and not self._is_in:
            self._notifies = True
        shut_all(self._place)
        if self._notifies:
            self._queue._notify()
            self._notifies = False
