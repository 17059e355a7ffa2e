"""A plain dialogue with a worker: `worker.dialogue()`."""

from __future__ import annotations

import asyncio
import codecs
import math
import re
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from ..model.validation import check_pattern, check_timeout, check_whole
from ._lines import HIGH, Held

if TYPE_CHECKING:
    from ..model.exits import Exit
    from ._pump import Pump
    from ._standard_input import StandardInput
    from ._tail import Tail

T = TypeVar("T")

SHOWN = 200  # characters of what has come, in an error
ENDING = 1.0  # seconds: the output of a worker that ends is over a moment before its exit is known
LINE_END = re.compile(r"\n")
OVER = "the dialogue is over"


class DialogueTap:
    """Keeps what one stream says until it is read. Policy: block, at `room` bytes."""

    name = "dialogue"

    def __init__(self, tail: Tail) -> None:
        self.data = bytearray()
        self.room = HIGH
        self.over = False
        self._tail = tail
        self._held = Held()
        self._text: str | None = None  # of that data, if it is known
        self._waiters: dict[asyncio.Future[None], None] = {}  # in their order
        self._take(tail.unsearched())

    def feed(self, data: bytes, pump: Pump) -> None:
        self._take(data)
        if len(self.data) >= self.room:
            self._held.hold(pump)

    def eof(self) -> None:
        self.over = True
        self._take(b"")

    @property
    def text(self) -> str:
        """What has come, without a character of which the end has not."""
        if self._text is None:
            self._text, _ = codecs.utf_8_decode(self.data, "backslashreplace", self.over)
        return self._text

    def read(self, end: int) -> None:
        """So much of the text has been read."""
        rest = self.text[end:] if self.data.isascii() else None
        if rest is None:
            # as many bytes: each that is none of UTF-8 is one character here, and four of the text
            text, _ = codecs.utf_8_decode(self.data, "surrogateescape", self.over)
            for escaped in re.finditer("[\udc80-\udcff]", text):
                if escaped.start() >= end:
                    break
                end = max(end - 3, escaped.end())
            end = len(text[:end].encode(errors="surrogateescape"))
        self.take(end)
        self._text = rest

    def take(self, n: int) -> bytes:
        """So many bytes have been read."""
        taken = bytes(self.data[:n])
        del self.data[:n]
        self._text = None
        self._held.release()
        return taken

    async def at_least(self, n: int) -> bool:
        """Wait for so many bytes. False: the output has ended before."""
        while len(self.data) < n and not self.over:
            self.room = max(self.room, n)
            self._held.release()
            try:
                await self.more()
            finally:
                self.room = HIGH
        return len(self.data) >= n

    def close(self) -> None:
        """Nobody reads on: what came is not looked for again."""
        self._tail.searched = self._tail.total
        self._held.release()
        self.over = True
        self._wake()

    async def more(self) -> None:
        """Wait until something has come, or the end has."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            del self._waiters[waiter]

    def _take(self, data: bytes) -> None:
        self.data += data
        self._text = None
        self._wake()

    def _wake(self) -> None:
        for one in self._waiters:
            if not one.done():
                one.set_result(None)


class Dialogue:
    r"""A dialogue with one worker: text to its standard input, and text from its standard output.

    What has come and was not read waits here; from 1 MiB on the worker waits. Of several tasks that read each gets what
    the others have not read, in the order in which they asked.

    Example::

        async with Group(Command("python3", "-q", "-i", tty=True)) as group:
            async with group[0].dialogue() as io:
                await io.read_until(">>> ", timeout=30)
                await io.send_line("6 * 7")
                print((await io.read_until(r"\d+", timeout=30))[0])
    """

    def __init__(
        self,
        stdin: StandardInput,
        listen: Callable[[], tuple[DialogueTap, Callable[[], None]]],
        wait: Callable[[], Awaitable[Exit | None]],
    ) -> None:
        self._stdin = stdin
        self._wait = wait  # for its exit
        self._listen = listen  # not before it is entered: what nobody reads would hold the worker
        self._heard: tuple[DialogueTap, Callable[[], None]] | None = None
        self._over = False

    async def __aenter__(self) -> Self:
        if self._heard is not None or self._over:
            raise RuntimeError("a dialogue is entered once: make another by worker.dialogue()")
        self._heard = self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._heard is not None
        (tap, leave), self._heard, self._over = self._heard, None, True
        tap.close()
        leave()

    async def send(self, text: str | bytes) -> None:
        """Write text, as UTF-8, or bytes. Raises as `StandardInput.send`.

        Args:
            text: what the worker is to read.
        """
        await self._stdin.send(_encoded(text))

    async def send_line(self, text: str | bytes = "") -> None:
        """The same with a newline after it.

        Args:
            text: the line.
        """
        await self._stdin.send(b"%b\n" % _encoded(text))

    async def read_until(self, pattern: str | re.Pattern[str], timeout: float | None = None) -> re.Match[str]:
        r"""Wait until a regular expression is found in what has come since the last one; all up to its end is read.

        It need not be a line: a prompt is found as soon as it is there. Bytes that are not UTF-8 show as ``\xNN``.

        Args:
            pattern: the expression (`re.search`). With `$` or `+` at its end it may be found in a part of what comes.
            timeout: seconds; None: no limit.

        Returns:
            The match; ``match.string[: match.start()]`` is what came before it.

        Raises:
            EOFError: the output has ended, and it is not there. Says how the worker has ended, if it has.
            TimeoutError: it took longer.
            BufferError: 1 MiB has come without it.
            RuntimeError: the dialogue was not entered, or is over; or this is a forked copy of the program.
            SpecError: an argument is wrong.
        """
        wanted = check_pattern("pattern", pattern)
        tap = self._entered()
        match = await self._within(timeout, tap, repr(wanted.pattern), lambda: _found(tap, wanted))
        tap.read(match.end())
        return match

    async def read_exactly(self, n: int, timeout: float | None = None) -> bytes:
        r"""The next `n` bytes, as they came: a message whose length was told before it, as language servers have it.

        Args:
            n: how many. They are kept in memory until all have come.
            timeout: seconds; None: no limit. What has come by then is kept for the next one.

        Raises:
            EOFError: the output has ended before that. Says how the worker has ended, if it has.
            TimeoutError: it took longer.
            RuntimeError: the dialogue was not entered, or is over; or this is a forked copy of the program.
            SpecError: an argument is wrong.

        Example::

            header = await io.read_until(r"Content-Length: (\d+)\r\n\r\n", timeout=30)
            message = json.loads(await io.read_exactly(int(header[1]), timeout=30))
        """
        check_whole("n", n, 0)
        tap = self._entered()
        await self._within(timeout, tap, f"the last of {n} bytes", lambda: tap.at_least(n))
        return tap.take(n)

    def _entered(self) -> DialogueTap:
        self._stdin.check_ours()
        if self._heard is None:
            raise RuntimeError(OVER if self._over else "enter it first: async with worker.dialogue()")
        return self._heard[0]

    async def _within(
        self, timeout: float | None, tap: DialogueTap, what: str, wait: Callable[[], Awaitable[T | None]]
    ) -> T:
        """What that waits for, which is nothing when the output has ended without it."""
        seconds = check_timeout("timeout", timeout)
        if seconds == math.inf:  # a limit costs as much as all the rest of a short line
            found = await wait()
        else:
            try:
                async with asyncio.timeout(seconds) as limit:
                    found = await wait()
            except TimeoutError:
                if not limit.expired():
                    raise
                raise TimeoutError(_words(tap, what, f"has not come within {seconds:g} s")) from None
        if not found:
            if self._over:  # left by another task meanwhile
                raise RuntimeError(OVER)
            raise EOFError(_words(tap, what, f"is not in the output, which has ended{await self._how()}"))
        return found

    async def read_line(self, timeout: float | None = None) -> str:
        """The next line, without its newline. Raises as `read_until`.

        Args:
            timeout: seconds; None: no limit.
        """
        match = await self.read_until(LINE_END, timeout)
        return match.string[: match.start()].removesuffix("\r")

    async def _how(self) -> str:
        """How its worker has ended, if it has: that is known a moment after the end of its output."""
        try:
            async with asyncio.timeout(ENDING):
                exit = await self._wait()
        except TimeoutError:
            return ""
        return "" if exit is None else f" with {exit}"


async def _found(tap: DialogueTap, wanted: re.Pattern[str]) -> re.Match[str] | None:
    """None: the output has ended without it."""
    while (match := wanted.search(tap.text)) is None and not tap.over:
        if len(tap.data) >= HIGH:
            raise BufferError(_words(tap, repr(wanted.pattern), f"is not in {HIGH} bytes"))
        await tap.more()
    return match


def _encoded(text: str | bytes) -> bytes:
    if isinstance(text, str):
        return text.encode()
    if not isinstance(text, bytes | bytearray | memoryview):
        raise TypeError(f"a dialogue sends text or bytes, not {type(text).__name__}: give str() of it")
    return text


def _words(tap: DialogueTap, what: str, problem: str) -> str:
    return f"{what} {problem}; the last that came: {tap.text[-SHOWN:]!r}"
