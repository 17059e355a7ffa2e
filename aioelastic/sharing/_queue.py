"""A queue between any number of processes, which is nothing but kernel objects: there is no process that serves it.

Items are datagrams in one socket (unix(7), SOCK_SEQPACKET), read by whoever comes first. An item takes a place: the
lock of one byte of a memfd (fcntl(2), F_OFD_SETLK), held by a descriptor that travels in the item itself. So a place is
free when its item was received, and also when it was lost with a process that died. Closing is shutdown(2), which all
processes see.

That there may be room is told by an eventfd. Who finds none resets it, looks once more, and sets it again when there
was one, for there may be more: so all who wait are woken one after the other, and a wakeup that was set a thousand
times, once for each process that has died, makes nobody look more than once.

The handler of a signal, or a finalizer, may call all of this in the midst of any of it, and may raise: there are no
locks; what a call holds, it has in an object that it knows before (`Putting`, `Item`); at its end, or when something is
raised, the one gives all back, and the other is left to whoever asks next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import time
import weakref
from _socket import socket as AnySocket
from collections.abc import AsyncIterator, Collection, Iterator
from functools import partial
from typing import Any

from .. import memory
from ..child.wire import datagrams, messages, sent_objects
from ..child.worker import function_run
from ..model.validation import check_timeout, check_users, check_whole
from ..system.descriptors import into, reopened, shut_all
from ._items import Full, Item, Putting, QueueClosed, is_empty

MOST = 128  # items: so many small ones fit into one socket of the default size
LARGEST = 16_384  # bytes of the memory for an item in a socket: larger ones go by a memfd


_OFFERED, _SINCE_EMPTY = fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK  # on the file of its places, in which nobody writes
_LATER = "put_nowait() would hold up the event loop until a GPU has done its work; use await put()"


class Queue:
    """A bounded queue that can be sent to workers: many may put, many may get, each item is received once.

    Put it into the arguments of a `Function`, or send it. Items go from process to process by themselves; shared
    arrays in them stay shared, others are copied once. When a process dies, what it has put is still there, and the
    place of what it was receiving is free. What the handler of a signal raises in the midst of a call costs that call
    and nothing else: an item that it did not return is returned by the next, one that it did not put has no place.

    Args:
        maxsize: items that may be in it; 1 to 128, which is what a socket of the default size takes (an item may be a
            list of any length).
        uids: other users whose items are taken: unpickling runs their code. Not to be named are root, the user who
            has made the queue, and the one who receives. Shared arrays in its items are `isolated` ones then, as in an
            `Endpoint` for other users.

    Raises:
        SpecError: `maxsize` or `uids` are not that.

    Example::

        frames = sharing.Queue(maxsize=4)
        async with Group(Function(detect, frames), n=2):
            for frame in camera:
                await frames.put(frame)
            frames.close()
    """

    def __init__(self, maxsize: int = 8, uids: Collection[int] = ()) -> None:
        check_whole("maxsize", maxsize, 1)
        check_whole("maxsize", maxsize, 1, MOST)
        users = check_users("uids", uids)
        fds: list[int] = []
        try:
            first, second = datagrams.pair()
            datagrams.ask_who(first)  # before anybody can put anything
            fds += (first.detach(), second.detach())
            into(fds, os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            into(fds, os.memfd_create, memory.PLACES, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._set_up(maxsize, users, fds)
            if len(users) > 1:
                self._offered()
        except BaseException:
            shut_all(fds)
            raise

    def _set_up(self, maxsize: int, users: Collection[int], fds: list[int]) -> None:
        """Of these descriptors, which are its own when this returns."""
        self.maxsize = maxsize
        self._users = users
        ends: list[AnySocket] = []  # that speak of the first two
        self._over = weakref.finalize(self, _close, ends, fds)
        self._over.atexit = False
        for fd in fds[:2]:
            into(ends, AnySocket, -1, -1, -1, fd)
        for one in ends:
            one.setblocking(False)
        self._get: AnySocket | None = ends[0]
        self._put: AnySocket | None = ends[1]
        self._room, self._places = fds[2:]
        self._inline = _inline(ends[1].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), maxsize)
        # for who looks for a place: the one that is free next; and that there was none
        self._likely, self._was_full = 0, False
        self._is_for_others = self._has(_OFFERED)
        self._reader = sent_objects.Reader(Item)
        self._turns: sent_objects.Turns = weakref.WeakValueDictionary()
        stat = os.fstat(self._places)
        self._key = (stat.st_dev, stat.st_ino)
        _queues[self._key] = self

    # --- in an event loop ---

    async def put(self, item: Any) -> None:
        """Put it in; waits while the queue is full. What the tasks of a loop put comes in the order in which they did.

        Private arrays of 8 MiB and more are copied by other threads: do not change them until this returns.

        Args:
            item: what can be pickled, and arrays.

        Raises:
            QueueClosed: nobody may put any more.
            Exception: whatever pickling it raises.
        """
        async with sent_objects.turn(self._turns):
            one = Putting(self)
            try:
                while True:
                    if one.finds_room():
                        if not one.is_packed():
                            one.packet, one.fds = await sent_objects.ready(partial(self._packed, item, one.for_others))
                        if one.goes():
                            return
                    await one.room()
            finally:
                one.close()

    async def get(self) -> Any:
        """The next item; waits while there is none. Of the tasks of a loop that wait the first gets the first.

        Raises:
            QueueClosed: it was closed, and nothing is left.
            PermissionError: the next was put by another user, and is not unpickled; it is gone.
            ValueError: this process has no descriptors left for what came with the item, or it is none; it is gone.
            Exception: the item could not be unpickled; it is gone.
        """
        get, _ = self._ends()
        taken: sent_objects.Taken = []
        try:
            return await self._reader.take(taken, self._next, partial(sent_objects.readable, get.fileno()))
        except BaseException:
            self._leave(taken)
            raise

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
        """As `put`, and the thread waits, at most `timeout` seconds.

        Args:
            item: as for `put`.
            timeout: seconds; None, or infinity, for no limit.

        Raises:
            Full: it was full all the time (a `queue.Full`, and a `TimeoutError`).
            SpecError: `timeout` is no time-out.
        """
        until = time.monotonic() + check_timeout("timeout", timeout)
        one = Putting(self)
        try:
            try:
                while not (one.finds_room() and one.pack(item) and one.goes()):
                    left = until - time.monotonic()
                    if left <= 0:
                        raise Full(one.why)
                    one.room_sync(left)
            finally:
                one.close()
        except BaseException:
            one.close()  # what was raised may have come in the midst of that
            raise

    def get_sync(self, timeout: float | None = None) -> Any:
        """As `get`, and the thread waits, at most `timeout` seconds.

        Args:
            timeout: seconds; None, or infinity, for no limit.

        Raises:
            Empty: nothing came (a `queue.Empty`, and a `TimeoutError`).
            SpecError: `timeout` is no time-out.
        """
        seconds = check_timeout("timeout", timeout)
        get, _ = self._ends()
        taken: sent_objects.Taken = []
        try:
            return self._reader.take_sync(taken, self._next, get.fileno(), seconds)
        except BaseException:
            self._leave(taken)
            raise

    def __iter__(self) -> Iterator[Any]:
        """Items until it is closed and empty."""
        try:
            while True:
                yield self.get_sync()
        except QueueClosed:
            pass

    def put_nowait(self, item: Any) -> None:
        """As `put`; `Full` when it is. Private arrays are copied by this thread, whatever their size.

        Args:
            item: as for `put`.

        Raises:
            RuntimeError: there are arrays on a GPU in the item, for which the event loop of this thread would wait.
        """
        one = Putting(self)
        try:
            try:
                if not one.finds_room():
                    raise Full(one.why)
                if _in_a_loop():
                    with memory.later(away=None) as what:
                        one.pack(item)
                    if what.waits:
                        raise RuntimeError(_LATER)
                else:
                    one.pack(item)
                if not one.goes():
                    raise Full(one.why)
            finally:
                one.close()
        except memory.Elsewhere:
            raise RuntimeError(_LATER) from None
        except BaseException:
            one.close()  # what was raised may have come in the midst of that
            raise

    def get_nowait(self) -> Any:
        """As `get`; `Empty` when it is."""
        return self.get_sync(0)

    def close(self) -> None:
        """Nobody may put any more, in any process; what is in it can still be received."""
        _, put = self._ends()
        try:
            put.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was
        self._notify()  # for those who wait for room

    def _packed(self, item: Any, for_others: bool, fds: list[int] | None = None) -> datagrams.Packed:
        """Its message."""
        return function_run.pack(messages.ITEM, (item,), fds=fds, inline=self._inline, for_others=for_others)

    def _serves_others(self) -> bool:
        """Whether other users may receive what is put into it. Asked with a place, for `_offered`; what was not packed
        so does not go with another."""
        self._is_for_others = self._is_for_others or self._has(_OFFERED)
        return self._is_for_others

    def _has(self, seals: int) -> bool:
        return fcntl.fcntl(self._places, fcntl.F_GET_SEALS) & seals == seals

    def _offered(self, trial: bool = False) -> None:
        """Other users may receive what is put into it from now on. That is said by a seal, which nobody can take off;
        and by another, that there was nothing in it afterwards.

        Args:
            trial: only say whether that can be.

        Raises:
            NotShareable: there is something in it that was packed before, or is being put.
        """
        if self._has(_OFFERED | _SINCE_EMPTY):
            return
        if not trial:
            fcntl.fcntl(self._places, fcntl.F_ADD_SEALS, _OFFERED)
        if not is_empty(self._places, self.maxsize):  # who has a place from now on knows it
            raise memory.NotShareable(
                "this queue is not empty, and what is in it is not meant for other users: offer it to them before "
                "anything is put into it, or make it with their uids"
            )
        if not trial:
            fcntl.fcntl(self._places, fcntl.F_ADD_SEALS, _SINCE_EMPTY)
            self._is_for_others = True

    def _next(self, item: Item) -> None:
        """Receive it, and free its place. Raises `BlockingIOError`: there is none."""
        get, _ = self._ends()
        problem: Exception | None = None
        try:
            item.take(get, datagrams.DONTWAIT, self._users)
        except datagrams.Foreign as exc:
            uid = f"; Queue(uids=[{exc.uid}]) takes those of that user" if exc.uid >= 0 else ""
            problem = PermissionError(f"an item is not unpickled, for {exc}{uid}; it is gone")
        except ValueError as exc:
            problem = exc
        else:
            if not item.packet:
                raise QueueClosed("the queue is closed, and nothing is left in it")
            if item.packet[:1] != messages.ITEM or not item.had_place:
                problem = ValueError("somebody has put something into the queue that is no item; it is gone")
        if problem is not None:
            item.close()
        shut_all(item.place)
        self._notify()
        if problem is not None:
            raise problem

    def _leave(self, taken: sent_objects.Taken) -> None:
        """It was not returned."""
        self._reader.leave(taken)
        if any(item.has_come for _, item in taken):
            self._notify()  # its place may be free

    def _ends(self) -> tuple[AnySocket, AnySocket]:
        if self._get is None or self._put is None:
            raise RuntimeError("this queue belongs to the process that this one was forked from; use another start")
        return self._get, self._put

    def _notify(self) -> None:
        """There may be room: one of those who wait shall look."""
        # another user may have filled it, and have cleared O_NONBLOCK: those who wait look then in any case
        if self._is_for_others:
            poll = select.poll()
            poll.register(self._room, select.POLLOUT)
            if not poll.poll(0):
                return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._room, 1)

    def _forget(self) -> None:
        """In a forked copy, whose descriptors may be closed, and their numbers used again, at any time."""
        self._over()
        self._get = self._put = None
        self._reader = sent_objects.Reader(Item)  # whose threads are not here

    def __reduce__(self) -> Any:
        raise memory.NotShareable("a queue travels in arguments of workers, by worker.send() and in other queues only")

    def __repr__(self) -> str:
        return f"<Queue maxsize={self.maxsize}>"


def _inline(room: int, maxsize: int) -> int:
    """Bytes that each of so many items may have in a datagram, if all shall have room in the socket. There it needs the
    next power of two of these and of about 320, and another 256 (`SKB_TRUESIZE`, linux/skbuff.h)."""
    size = 1024
    while size < LARGEST and (2 * size + 256) * maxsize <= room:
        size *= 2
    return size - 512


def _close(ends: list[AnySocket], fds: list[int]) -> None:
    for one in ends:
        one.detach()
    shut_all(fds)


def _in_a_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _reduce(one: Queue, message: memory.Outgoing) -> Any:
    get, put = one._ends()
    if message.for_others:
        one._offered(message.trial)
    numbers = [message.descriptor(fd) for fd in (get.fileno(), put.fileno(), one._room)]
    # locks are of an open file: in one of theirs others would keep all places taken with ours
    return (_rebuild, (one.maxsize, tuple(one._users), *numbers, message.opened(one._places)))


def _rebuild(maxsize: int, users: tuple[int, ...], *numbers: int) -> Queue:
    came = [memory.incoming().fd(number) for number in numbers]
    stat = os.fstat(came[3])
    known = _queues.get((stat.st_dev, stat.st_ino))
    if known is not None:
        return known
    one = Queue.__new__(Queue)
    fds: list[int] = []
    try:
        for fd in came[:3]:
            into(fds, fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 3)
        reopened(fds, came[3])
        one._set_up(maxsize, frozenset(users), fds)
    except BaseException:
        shut_all(fds)
        raise
    return one


def _all() -> Iterator[Queue]:
    """Those of this process."""
    for known in _queues.valuerefs():
        one = known()
        if one is not None:
            yield one


def _somebody_died() -> None:
    for one in _all():
        one._notify()  # it may have had a place


def _forked() -> None:
    for one in _all():
        one._forget()
    _queues.clear()


_queues: weakref.WeakValueDictionary[tuple[int, int], Queue] = weakref.WeakValueDictionary()  # by device and inode
memory.carry(Queue, _reduce)
memory.after_exit.append(_somebody_died)
memory.after_fork.append(_forked)
