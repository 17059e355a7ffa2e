"""The tee: workers' lines, prefixed, on the caller's own stdout and stderr, without ever blocking the loop."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TextIO

from ..thread import HelperThread
from ._files import FileSink

if TYPE_CHECKING:
    from ..stop import Patience
    from ._pump import Pump

HIGH = 1_048_576  # bytes the console may be behind before its policy acts
BATCH = 1_048_576  # bytes handed to a blocking target at once

Parts = Sequence[bytes | memoryview]


class Console:
    """One target (a terminal, a pipe, a file, or a replaced `sys.stdout`) shared by the taps of all workers.

    A terminal or pipe is opened anew through /proc, so that making it non-blocking changes nothing for the other
    owners of the same descriptor. Where that is impossible, and for regular files, a thread writes.

    Policy (`when_full`), once it is 1 MiB behind: `block` holds the pumps, `drop` forgets the oldest, `spill`
    goes through an unnamed temporary file.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stream: TextIO | None,
        name: str,
        when_full: Literal["block", "drop", "spill"],
        writer: Callable[[], HelperThread],
        on_trouble: Callable[[str, str, int], None],
    ) -> None:
        self.name = name
        self.lost = 0
        self.tty = False
        self.open_line: object = None  # the tap whose unfinished line stands at the end of the output
        self._loop = loop
        self._when_full = when_full
        self._get_writer = writer
        self._on_trouble = on_trouble
        self._backlog: deque[bytes] = deque()
        self._size = 0
        self._begun = False  # the head of the backlog is partly written
        self._pumps: set[Pump] = set()
        self._spill: _Spill | None = None
        self._armed = False
        self._busy = False  # the thread has a batch
        self._dead = False
        self._sent = 0
        self._on_idle: Callable[[], None] = lambda: None
        self._fd = -1  # ours: non-blocking, or a duplicate for the thread
        self._threaded = False
        self._text: TextIO | None = None
        self.identity: tuple[int, int, int] | None = None
        self._attach(stream)

    def write(self, parts: Parts, pump: Pump | None) -> None:
        """Whole lines, or an unfinished one whose tap is in `open_line`."""
        if self._dead:
            return
        if self._text is not None:
            try:
                self._text.write(b"".join(parts).decode(errors="replace"))
                self._text.flush()
            except Exception as exc:  # somebody else's object: anything may come
                self._die(f"{type(exc).__name__}: {exc}")
            return
        if self._spill is not None:
            self._spill.sink.write(b"".join(parts), pump)
            return
        if self._threaded or self._backlog:
            data = b"".join(parts)
        else:
            size = sum(map(len, parts))
            try:
                sent = os.writev(self._fd, parts)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._die(exc.strerror or str(exc), size)
                return
            if sent == size:
                return
            data = b"".join(parts)[sent:]
            self._begun = sent > 0
        self._backlog.append(data)
        self._size += len(data)
        if self._threaded:
            self._write_in_thread()
        elif not self._armed:
            self._armed = True
            self._loop.add_writer(self._fd, self._writable)
        if self._size > HIGH:
            self._overflow(pump)

    @property
    def idle(self) -> bool:
        """Whether all that was taken is written (or given up)."""
        return self._dead or not (self._backlog or self._busy or self._spill is not None)

    async def flush(self, patience: Patience, bound: float, hurried: float) -> None:
        """Wait until all is written, as long as there is progress every `bound` seconds (or, in a hurry, for
        `hurried` seconds in all). What is not written then is counted as lost and told."""
        self._on_idle = patience.notice
        while not self.idle and not patience.hurried:
            before = self._sent
            if not await patience.until(lambda: self.idle, bound) and self._sent == before:
                break
        if not self.idle and patience.hurried:
            await patience.until(lambda: self.idle, hurried, grace=False)
        if not self.idle:
            left = self._size + (self._spill.pending if self._spill else 0)
            self._die(f"did not take its last {left} bytes", left)
        elif self._when_full == "drop" and self.lost and not self._dead:
            self._on_trouble(self.name, "was too slow: its oldest output was dropped", self.lost)

    def close(self) -> None:
        """Let go of the target. Bytes that are not written yet are lost: `flush` first."""
        self._disarm()
        self._dead = True
        if self._spill is not None:
            self._spill.close()
            self._spill = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._busy:
                # the thread hangs in write(2) on it: close after that, or another file could get its number
                self._get_writer().put(lambda: os.close(fd))
            else:
                os.close(fd)

    def _attach(self, stream: TextIO | None) -> None:
        if stream is None:
            self._die("is closed")
            return
        if not isinstance(stream, io.TextIOWrapper):
            self._text = stream  # a notebook's or a test's stand-in: it has no file to write to
            return
        try:
            stream.flush()  # what was printed before us comes before us
            fd = stream.fileno()
            info = os.fstat(fd)
        except (OSError, ValueError) as exc:
            self._die(f"is closed ({exc})")
            return
        self.identity = (info.st_dev, info.st_ino, info.st_rdev)
        self.tty = os.isatty(fd)
        if stat.S_ISFIFO(info.st_mode) or stat.S_ISCHR(info.st_mode):
            try:
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = os.open(f"/proc/self/fd/{fd}", flags)
                return
            except OSError:
                pass  # not allowed (another user's terminal), or nobody reads: the thread will find out
        self._fd = os.dup(fd)
        self._threaded = True

    def _writable(self) -> None:
        while self._backlog:
            parts = [self._backlog[i] for i in range(min(64, len(self._backlog)))]
            try:
                sent = os.writev(self._fd, parts)
            except BlockingIOError:
                break
            except OSError as exc:
                self._die(exc.strerror or str(exc), self._size)
                return
            self._took(sent)
        self._progress()

    def _took(self, sent: int) -> None:
        self._size -= sent
        self._sent += sent
        while sent:
            head = self._backlog[0]
            if sent < len(head):
                self._backlog[0] = head[sent:]
                self._begun = True
                return
            sent -= len(self._backlog.popleft())
            self._begun = False

    def _write_in_thread(self) -> None:
        if self._busy or not self._backlog:
            return
        batch: list[bytes] = []
        size = 0
        while self._backlog and size < BATCH:
            batch.append(self._backlog.popleft())
            size += len(batch[-1])
        self._busy = True
        fd, writer = self._fd, self._get_writer()

        def job() -> None:
            view = memoryview(b"".join(batch))
            problem = None
            try:
                while view:
                    view = view[os.write(fd, view) :]
            except OSError as exc:
                problem = exc.strerror or str(exc)
            writer.tell(self._written, size, len(view), problem)

        writer.put(job)

    def _written(self, size: int, unwritten: int, problem: str | None) -> None:
        self._busy = False
        self._size -= size
        self._sent += size
        if problem is not None:
            self._die(problem, unwritten + self._size)
        if not self._dead:
            self._write_in_thread()
            self._progress()

    def _progress(self) -> None:
        """After some was written: let held pumps go on, fetch from the spill, or say that all is done."""
        if self._size < HIGH // 2:
            self._release()
        if not self._backlog and not self._busy:
            self._disarm()
            if self._spill is not None:
                self._spill.fetch(self._fetched)
            else:
                self._on_idle()

    def _overflow(self, pump: Pump | None) -> None:
        if self._when_full == "block":
            if pump is not None:
                self._pumps.add(pump)
                pump.hold(self)
        elif self._when_full == "drop":
            first = not self.lost
            begun = self._backlog.popleft() if self._begun else None
            while self._size > HIGH and self._backlog:
                gone = len(self._backlog.popleft())
                self._size -= gone
                self.lost += gone
            if begun is not None:
                self._backlog.appendleft(begun)
            if first and self.lost:
                self._on_trouble(self.name, "is too slow: dropping its oldest output", self.lost)
        else:
            self._spill = _Spill(self._get_writer(), self._on_trouble, self.name)

    def _fetched(self, data: bytes) -> None:
        if self._dead or self._spill is None:
            return
        if not data:
            self._spill.close()
            self._spill = None
            self._progress()
            return
        self._backlog.append(data)
        self._size += len(data)
        if self._threaded:
            self._write_in_thread()
        else:
            self._armed = True
            self._loop.add_writer(self._fd, self._writable)

    def _die(self, problem: str, lost: int = 0) -> None:
        self._dead = True
        self.lost += lost
        self._backlog.clear()
        self._size = 0
        self._disarm()
        self._release()
        self._on_idle()
        self._on_trouble(self.name, problem, self.lost)

    def _release(self) -> None:
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._loop.remove_writer(self._fd)


class _Spill:
    """What a slow console has not taken yet, in an unnamed temporary file, in order."""

    def __init__(self, writer: HelperThread, on_trouble: Callable[[str, str, int], None], name: str) -> None:
        self._file = tempfile.TemporaryFile(buffering=0, prefix="aioelastic-spill-")  # noqa: SIM115  # closed by close()
        self._writer = writer
        self._at = 0
        self.sink = FileSink(writer, None, None, on_trouble, fd=self._file.fileno(), name=f"spill of {name}")

    @property
    def pending(self) -> int:
        """Bytes in the file, or on their way to it, that were not fetched."""
        return self.sink.queued - self._at

    def fetch(self, take: Callable[[bytes], None]) -> None:
        """Give the next piece to `take`, b"" when there is none left."""
        queued = self.sink.queued

        def job() -> None:
            data = os.pread(self._file.fileno(), BATCH, self._at)
            self._at += len(data)
            self._writer.tell(self._give, take, data, queued)

        self._writer.put(job)

    def close(self) -> None:
        self._writer.put(self._file.close)

    def _give(self, take: Callable[[bytes], None], data: bytes, queued: int) -> None:
        if not data and self.sink.queued != queued:
            self.fetch(take)  # more came in while the thread looked
        else:
            take(data)
