"""Log files, written by one thread of the group's own, so that a slow disk never stops the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import forked
from ..thread import HelperThread

if TYPE_CHECKING:
    from ..spec import Rotate
    from ._pump import Pump

BATCH = 1_048_576  # bytes handed to the thread at once: each handing-over costs both threads some 50 microseconds
DELAY = 0.002  # seconds that fewer bytes wait for more
HIGH = 4_194_304  # bytes the thread may be behind before the pipes of those who write more are held


class FileThread(HelperThread):
    """Writes the files of several sinks. Takes what all of them have gathered at once, and before it is so much that
    the caches of the CPU have forgotten it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        super().__init__(loop, name)
        self._gathered: dict[FileSink, list[bytes]] = {}
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self.queued = 0  # bytes taken so far; written by the loop only
        self._done = 0  # written by the thread only
        self._pumps: set[Pump] = set()

    @property
    def behind(self) -> int:
        """Bytes not written yet."""
        return self.queued - self._done

    def gather(self, sink: FileSink, data: bytes, pump: Pump | None) -> None:
        """Queue `data` for `sink`; hold `pump` while too much is queued."""
        self._gathered.setdefault(sink, []).append(data)
        self.queued += len(data)
        self._size += len(data)
        if self._size >= BATCH:
            self.flush()
        elif self._timer is None:
            self._timer = self.loop.call_later(DELAY, self.flush)
        if pump is not None and self.behind > HIGH:
            self._pumps.add(pump)
            pump.hold(self)
            if self.behind < HIGH // 2:  # the thread was quicker than we
                self._resume()

    def wrote(self, size: int) -> None:
        """In the thread: so many of them are done with."""
        self._done += size
        if self._pumps and self.behind < HIGH // 2:
            self.tell(self._resume)

    def flush(self) -> None:
        """Hand what waits for more to the thread now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gathered:
            gathered, self._gathered, self._size = self._gathered, {}, 0

            def job() -> None:
                for sink, batch in gathered.items():
                    sink.store(batch)

            self.put(job)

    def _resume(self) -> None:
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)


class FileSink:
    """One log file. Bytes in = bytes out. Policy: block (lossless), unless the file system refuses the bytes:
    then they are counted in `lost`, the trouble is told once per kind, and later bytes are tried again.

    Args:
        fd: write to this descriptor (not closed) instead of opening `path`.
    """

    def __init__(
        self,
        writer: FileThread,
        path: Path | None,
        rotate: Rotate | None,
        on_trouble: Callable[[str, str, int], None],
        fd: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or str(path)
        self.path = path
        self.lost = 0  # written by the thread only
        self._writer = writer
        self._rotate = rotate
        self._on_trouble = on_trouble
        self._fd = -1 if fd is None else fd
        self._given = fd is not None
        self._size = 0
        self._line_at = 0  # where the unfinished line at the file's end begins
        self._told: set[int | None] = set()
        self._missing = False  # could not be opened, which was told
        forked.register(self)

    def open(self, append: bool = False) -> None:
        """Make the file (it must not exist, unless to `append`). Runs in the writer's thread. Raises `OSError`."""
        if self.path is not None:
            how = os.O_APPEND if append else os.O_EXCL
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | how | os.O_CLOEXEC, 0o666)

    def disown(self) -> list[int]:
        """See `forked`."""
        fd, self._fd = self._fd, -1
        return [fd] if fd >= 0 and not self._given else []

    def try_open(self, append: bool = False) -> None:
        """The same, but what prevents it is told, and all bytes are counted as lost."""
        try:
            self.open(append)
        except OSError as exc:
            self._missing = True
            self._writer.tell(self._on_trouble, self.name, exc.strerror or str(exc), 0)

    def write(self, data: bytes, pump: Pump | None) -> None:
        """Queue `data`; hold `pump` while too much is queued."""
        self._writer.gather(self, data, pump)

    def close(self) -> None:
        """Close the file after its last byte."""
        self._writer.flush()
        self._writer.put(self._shut)

    def store(self, batch: list[bytes]) -> None:
        """In the thread: write them."""
        size = sum(map(len, batch))
        if self._missing:
            self.lost += size
        elif self._rotate is not None:
            self._put_rotating(memoryview(b"".join(batch)), self._rotate)
        else:
            try:
                sent = os.writev(self._fd, batch)
            except (OSError, ValueError):
                sent = 0  # more than 1,024 pieces, or trouble, which the next call will meet again and tell
            if sent < size:
                self._put(memoryview(b"".join(batch))[sent:])
        self._writer.wrote(size)

    def _put(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as exc:
                self.lost += len(view)
                if exc.errno not in self._told:
                    self._told.add(exc.errno)
                    self._writer.tell(self._on_trouble, self.name, exc.strerror or str(exc), self.lost)
                return

    def _put_rotating(self, view: memoryview, rotate: Rotate) -> None:
        while view:
            room = rotate.size - self._size
            if len(view) <= room:
                cut = len(view)
            else:
                cut = bytes(view[: max(room, 0)]).rfind(b"\n") + 1
                if cut == 0 and self._line_at == 0:
                    cut = max(room, 0)  # one line longer than a whole file
            self._put(view[:cut])
            end = bytes(view[:cut]).rfind(b"\n") + 1
            if end:
                self._line_at = self._size + end
            self._size += cut
            view = view[cut:]
            if view:
                self._turn(rotate.keep)

    def _turn(self, keep: int) -> None:
        assert self.path is not None
        name = str(self.path)
        try:
            if keep == 0:
                os.unlink(name)
            for index in range(keep, 0, -1):
                older = name if index == 1 else f"{name}.{index - 1}"
                if os.path.lexists(older):
                    os.replace(older, f"{name}.{index}")
            fresh = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as exc:
            if exc.errno not in self._told:
                self._told.add(exc.errno)
                self._writer.tell(self._on_trouble, self.name, f"cannot rotate: {exc}", self.lost)
            self._size = self._line_at = 0
            return
        # an unfinished line goes whole into the new file
        rest = self._size - self._line_at if self._line_at else 0
        at = os.lseek(self._fd, 0, os.SEEK_CUR) - rest
        begun = os.pread(self._fd, rest, at) if rest and at >= 0 else b""
        if begun:
            os.ftruncate(self._fd, at)
        os.close(self._fd)
        self._fd = fresh
        self._size = len(begun)
        self._line_at = 0
        self._put(memoryview(begun))

    def _shut(self) -> None:
        if self._fd >= 0 and not self._given:
            os.close(self._fd)
        self._fd = -1


class FileTap:
    """One stream into one `FileSink`, unchanged."""

    __slots__ = ("name", "sink")

    def __init__(self, sink: FileSink) -> None:
        self.sink = sink
        self.name = sink.name

    def feed(self, data: bytes, pump: Pump) -> None:
        self.sink.write(data, pump)

    def eof(self) -> None:
        self.sink.close()
