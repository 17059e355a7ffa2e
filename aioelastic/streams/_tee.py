"""What each worker's stream looks like on the console: whole lines with a prefix, or JSON."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._console import Console
from ._lines import LineTap

if TYPE_CHECKING:
    from ._pump import Pump

PARTIAL = 65_536  # an unfinished line longer than this is shown as far as it goes
QUIET = 0.1  # seconds after which an unfinished line (a prompt, a progress bar) is shown on a terminal
# the same where a program reads, which wants lines whole: on a busy machine a worker may stand still between the two
# write(2) of one line for longer than a person would wait
READ_BY_PROGRAM = 1.0
AT_ONCE = 1000  # lines that are made JSON before they are written: of an empty line that makes a hundred bytes
_BREAKS = "[\x80-\x9f\u2028\u2029]"  # JSON allows them; some readers end lines there, terminals obey some
_encode = json.JSONEncoder(ensure_ascii=False).encode
_sources = itertools.count(1)  # of all taps of this process: consoles share what they write to
_LONE_CR = re.compile(rb"\r(?!\n)")


class ConsoleTap:
    """One stream's lines on the console, each with a prefix.

    A line is written whole, so workers never share one. An unfinished line (a prompt, a progress bar) is shown
    after 0.1 s of quiet (1 s where it is no terminal); if another worker writes then, it gets a line of its own. A
    carriage return that rewrites the line is followed by the prefix again, which it would otherwise rub out.

    Args:
        prefix: the prefix at a time (seconds since the epoch).
        constant: it does not depend on the time.
    """

    __slots__ = ("_armed", "_carry", "_console", "_constant", "_fed", "_loop", "_prefix", "_shown", "_source", "name")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        console: Console,
        prefix: Callable[[float], bytes],
        constant: bool,
    ) -> None:
        self.name = console.name
        self._loop = loop
        self._console = console
        self._prefix = prefix
        self._constant = prefix(0.0) if constant else None
        self._carry = b""  # the part of an unfinished line that is not shown yet
        self._armed: asyncio.TimerHandle | None = None
        self._fed = False
        self._source = next(_sources)
        self._shown = False  # the beginning of an unfinished line was

    def feed(self, data: bytes, pump: Pump) -> None:
        console = self._console
        prefix = self._now()
        if self._carry.endswith(b"\r"):
            data, self._carry = b"\r" + data, self._carry[:-1]
        if b"\r" in data:
            held = b"\r" if data.endswith(b"\r") else b""  # perhaps one half of \r\n
            data = _after_returns(prefix, data[: len(data) - len(held)]) + held
        end = data.rfind(b"\n")
        if end < 0:
            self._carry += data
            if len(self._carry) > PARTIAL:
                self._show(prefix, pump)
            elif self._carry:
                self._arm()
            return
        rest = data[end + 1 :]
        body = data.replace(b"\n", b"\n" + prefix)
        cut = len(body) - len(prefix) - len(rest)
        console.write((self._carry, memoryview(body)[:cut]), pump, self._source, prefix, self._shown)
        self._shown = False
        self._carry = rest
        if rest:
            self._arm()

    def eof(self) -> None:
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None
        if self._carry:  # the \r too that _show() holds back
            self._console.write((self._carry,), None, self._source, self._now(), self._shown)
            self._carry, self._shown = b"", True
        if self._shown:
            self._shown = False
            self._console.end(self._source)

    def _now(self) -> bytes:
        return self._constant if self._constant is not None else self._prefix(time.time())

    def _show(self, prefix: bytes, pump: Pump | None) -> None:
        shown, held = (self._carry[:-1], b"\r") if self._carry.endswith(b"\r") else (self._carry, b"")
        self._carry = held
        if shown:
            self._console.write((shown,), pump, self._source, prefix, self._shown)
            self._shown = True

    def _arm(self) -> None:
        self._fed = True
        if self._armed is None:
            self._fed = False
            delay = QUIET if self._console.tty else READ_BY_PROGRAM
            self._armed = self._loop.call_later(delay, self._quiet)

    def _quiet(self) -> None:
        self._armed = None
        if not self._carry:
            return
        if self._fed:
            self._arm()  # it was busy meanwhile: most likely the line goes on
        else:
            self._show(self._now(), None)


def _after_returns(prefix: bytes, data: bytes) -> bytes:
    """With the prefix after each carriage return that ends no line. A read may hold nothing else."""
    if _LONE_CR.search(data) is None:
        return data
    begins = b"\r" + prefix
    return data.replace(b"\r", begins).replace(begins + b"\n", b"\r\n")


class JsonTap(LineTap):
    """One stream's lines on the console as JSON objects (RFC 8259, UTF-8), one per line. `Logs.json` tells the keys."""

    grows = True  # an empty line becomes a hundred bytes

    def __init__(self, console: Console, name: str, worker: str, rank: int, stream: str) -> None:
        self.name = console.name

        def deliver(lines: list[bytes], at: float, pump: Pump | None, continued: bool) -> None:
            when = iso_time(at)
            for first in range(0, len(lines), AT_ONCE):
                out = []
                for line in lines[first : first + AT_ONCE]:
                    record: dict[str, object] = {"time": when, "name": name, "rank": rank, "stream": stream}
                    try:
                        record["line"] = line.decode()
                    except UnicodeDecodeError:
                        record["line"] = line.decode(errors="backslashreplace")
                        record["raw"] = base64.b64encode(line).decode()
                    if worker:
                        record["worker"] = worker
                    if continued:
                        record["continued"] = True
                    out.append(_encode(record))
                out.append("")
                text = "\n".join(out)
                if not text.isascii():
                    text = re.sub(_BREAKS, lambda found: f"\\u{ord(found[0]):04x}", text)
                console.write([text.encode()], pump)

        super().__init__(deliver)


def iso_time(at: float) -> str:
    """Seconds since the epoch → `2026-01-31T12:00:00.000Z`."""
    seconds, millionths = divmod(round(at * 1e6), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millionths // 1000:03d}Z"
