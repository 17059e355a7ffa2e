"""The write end of a worker's standard input: `worker.stdin`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

from ..system import forked_copies
from ..system.descriptors import shut
from ..system.time_slices import TimeSlices

_NEWLINE, _END = 10, b"\x04"  # what ends a line, and at its beginning the input of a terminal (termios(3))
PART = 65_536  # bytes of one write, what a new pipe holds (pipe(7))


class StandardInput(forked_copies.Owned):
    r"""The standard input of a worker of `Command(..., stdin="pipe")`: bytes written here are read there.

    `send` waits while the pipe is full, that is, while the worker does not read. `aclose` is the end of the input,
    which the worker reads after all that was sent. Its methods are those of anyio's `ByteSendStream`, so anyio's
    wrappers, such as `TextSendStream`, take it.

    Example::

        async with Group(Command("sort", stdin="pipe")) as group:
            await group[0].stdin.send(b"b\na\n")
            await group[0].stdin.aclose()
            await group.wait()

    Attributes:
        extra_attributes: none; anyio's streams have them.
    """

    extra_attributes: Mapping[Any, Any] = MappingProxyType({})

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, who: str, terminal: bool = False) -> None:
        self.loop = loop
        self._fd = fd
        self._who = who
        self._turn = asyncio.Lock()  # what two tasks send at a time is not mixed
        self._senders = 0  # that have it, or wait for it
        self._room: asyncio.Future[None] | None = None
        self._why = "was closed"
        self._terminal = terminal
        self._ends_in_line = False  # what was sent
        # of a terminal, after the end of the input: else who closes its streams, and exits then, gets SIGHUP
        self._kept, self._end = -1, b""
        forked_copies.register(self)

    async def send(self, item: bytes) -> None:
        """Write all of it. Cancelled, it may have written a part.

        Args:
            item: bytes, or what has a buffer of them.

        Raises:
            BrokenPipeError: the worker does not read any more, has ended, or this was closed.
            TypeError: `item` is not bytes.
            RuntimeError: this is a forked copy of the program that started it.
        """
        self.check_ours()
        try:
            rest = memoryview(item).cast("B")
        except TypeError:
            words = f"takes bytes, not {type(item).__name__}: give text.encode(), or use worker.dialogue()"
            raise TypeError(f"the standard input of {self._who} {words}") from None
        if not self._senders and (rest := self._write(rest)).nbytes == 0:
            return  # as of most lines: without what follows, which takes longer than the write
        self._senders += 1
        try:
            async with self._turn:
                slices = TimeSlices()
                while rest:
                    left = self._write(rest)
                    if len(left) == len(rest):
                        await self._until_room()
                    rest = left
                    if slices.due():
                        await asyncio.sleep(0)
                        slices.begin()
        finally:
            self._senders -= 1

    async def aclose(self) -> None:
        """The end of the input; does nothing when it is closed already."""
        self.close()

    def close(self, why: str = "was closed") -> None:
        """The same at once. Who waits in `send` gets `BrokenPipeError`."""
        if self._fd < 0 or self.lost is not None:
            return
        self._why = why
        self._wake()
        fd, self._fd = self._fd, -1
        if self._terminal:  # it stays open for its output
            self._kept, self._end = fd, _END * (1 + self._ends_in_line)
            self._say_end()
        else:
            shut(fd)

    def ended(self) -> None:
        """The worker has: there is nobody to read the end of the input."""
        self.close("is closed: it has ended")
        fd, self._kept = self._kept, -1
        if fd >= 0:
            self.loop.remove_writer(fd)
            shut(fd)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        self.lost = forked_copies.error(self._who)
        fds = [fd for fd in (self._fd, self._kept) if fd >= 0]
        self._fd = self._kept = -1
        return fds

    def _say_end(self) -> None:
        self.loop.remove_writer(self._kept)
        try:
            while self._end:
                self._end = self._end[os.write(self._kept, self._end) :]
        except BlockingIOError:
            self.loop.add_writer(self._kept, self._say_end)
        except OSError:
            pass  # nobody reads it

    def _write(self, data: memoryview) -> memoryview:
        """What of it is still to be written: all, if there is no room."""
        if self._fd < 0:
            raise BrokenPipeError(f"the standard input of {self._who} {self._why}")
        if not data:
            return data
        try:
            sent = os.write(self._fd, data[:PART] if len(data) > PART else data)
        except BlockingIOError:
            return data
        except BrokenPipeError:
            raise BrokenPipeError(f"{self._who} reads its standard input no more") from None
        self._ends_in_line = data[sent - 1] != _NEWLINE
        return data[sent:]

    async def _until_room(self) -> None:
        self._room = self.loop.create_future()
        self.loop.add_writer(self._fd, self._wake)
        try:
            await self._room
        finally:
            self._wake()

    def _wake(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            self.loop.remove_writer(self._fd)
            if not room.done():
                room.set_result(None)
