"""Readers of what the tee wrote, stand-ins for the caller's stdout and stderr, and gates for workers."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import subprocess
import sys
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from aioelastic.streams import Console, Pump
from aioelastic.system.deadlines import Deadline


class Reader:
    """Collects on the loop what comes out of a descriptor, which it closes at the end."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.data = bytearray()
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(fd, self._read)

    async def until(self, needle: bytes) -> bytes:
        """All that came, once `needle` is in it."""
        while needle not in self.data:
            assert not self.over, f"it ended without {needle!r}: {bytes(self.data[-500:])!r}"
            await self._change()
        return bytes(self.data)

    async def all(self) -> bytes:
        """All, at its end."""
        while not self.over:
            await self._change()
        return bytes(self.data)

    def close(self) -> None:
        """Go away, as a reader that was killed does."""
        if not self.over:
            self.over = True
            self._loop.remove_reader(self.fd)
            os.close(self.fd)

    async def _change(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def _read(self) -> None:
        try:
            data = os.read(self.fd, 1 << 20)
        except BlockingIOError:
            return
        except OSError:  # how a pty says that its other side is closed
            data = b""
        self.data += data
        if not data:
            self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Target:
    """A pipe or pty whose writing side stands in for the caller's stdout (or stderr), and its reading side."""

    def __init__(self, kind: str = "pipe") -> None:
        if kind == "pty":
            self.read_fd, write_fd = os.openpty()
            tty.setraw(write_fd)  # or it would show \n as \r\n
        else:
            self.read_fd, write_fd = os.pipe()
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 65_536)
        self.file = open(write_fd, "w")  # noqa: SIM115  # closed by all() or close()
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        """Reads from the first use on; until then nobody drains it."""
        if self._reader is None:
            self._reader = Reader(self.read_fd)
        return self._reader

    async def until(self, needle: bytes) -> bytes:
        return await self.reader.until(needle)

    async def all(self) -> bytes:
        """All that was written, once the group has let go too."""
        self.file.close()
        return await self.reader.all()

    def close(self) -> None:
        self.file.close()
        if self._reader is None:
            os.close(self.read_fd)
        else:
            self._reader.close()


@contextmanager
def tee_to(out: str | Any = "pipe", err: str | Any = "pipe") -> Iterator[tuple[Any, Any]]:
    """`sys.stdout` and `sys.stderr` are something else: "pipe", "pty", or the given object."""
    made = [Target(one) if isinstance(one, str) else one for one in (out, err)]
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = (one.file if isinstance(one, Target) else one for one in made)
        yield made[0], made[1]
    finally:
        sys.stdout, sys.stderr = before
        for one in made:
            if isinstance(one, Target):
                one.close()


class Gate:
    """A FIFO on which a worker waits (`read x < gate`) until it is opened."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDWR)  # so that nobody's open blocks

    def open(self, times: int = 1) -> None:
        os.write(self._fd, b"go\n" * times)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    one = Gate(tmp_path / "gate")
    yield one
    one.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when some pump is held: a sink is so slow that a worker has to wait."""
    event = asyncio.Event()
    real = Pump.hold

    def hold(pump: Pump, who: object) -> None:
        real(pump, who)
        event.set()

    monkeypatch.setattr(Pump, "hold", hold)
    return event


class Troubles(list[tuple[str, str, int]]):
    """What a sink's `on_trouble` was told: (sink, problem, lost)."""

    def __call__(self, sink: str, problem: str, lost: int) -> None:
        self.append((sink, problem, lost))


@asynccontextmanager
async def console_on(
    stream: Any, when_full: Any = "block", bound: float = 600.0
) -> AsyncIterator[tuple[Console, Troubles]]:
    """A console, left at the end as a group leaves it."""
    troubles = Troubles()
    console = Console(asyncio.get_running_loop(), stream, "stdout", when_full, troubles)
    try:
        yield console, troubles
    finally:
        await console.leave(Deadline(), bound)


class Collect:
    """A tap that keeps what it is fed; `until` waits for it."""

    name = "collect"

    def __init__(self, on_feed: Callable[[bytes, Pump], None] | None = None) -> None:
        self.data = bytearray()
        self.over = False
        self._on_feed = on_feed

    def feed(self, data: bytes, pump: Pump) -> None:
        self.data += data
        if self._on_feed is not None:
            self._on_feed(data, pump)

    def eof(self) -> None:
        self.over = True


@contextmanager
def text_of(raw: io.BytesIO) -> Iterator[io.TextIOWrapper]:
    """A text file in memory, as test runners put in sys.stdout's place."""
    file = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
    try:
        yield file
    finally:
        file.detach()


def random_bytes(size: int) -> bytes:
    """Binary rubbish with newlines, NULs and carriage returns in it."""
    return os.urandom(size)


def cat(path: Path, to_stderr: bool = False) -> str:
    return f"cat '{path}'" + (" >&2" if to_stderr else "")


@contextmanager
def tiny_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a tmpfs here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
