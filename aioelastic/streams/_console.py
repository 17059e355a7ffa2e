"""The tee: workers' lines, prefixed, on the caller's own stdout and stderr, without ever blocking the loop."""

from __future__ import annotations

import asyncio
import codecs
import io
import os
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TextIO

from .. import forked
from ._files import FileSink, FileThread

if TYPE_CHECKING:
    from ..stop import Patience
    from ._pump import Pump

HIGH = 1_048_576  # bytes the console may be behind before its policy acts
BATCH = 1_048_576  # bytes handed to a blocking target at once
HURRIED = 0.5  # seconds for its last bytes when we are in a hurry

Parts = Sequence[bytes | memoryview]
Trouble = Callable[[str, str, int], None]
Policy = Literal["block", "drop", "spill"]


class Console:
    """One target (a terminal, a pipe, a file, or a replaced `sys.stdout`), shared by all groups of a loop that write to
    it with the same policy, so that they never tear each other's lines.

    A terminal or pipe is opened anew through /proc, so that making it non-blocking changes nothing for the other
    owners of the same descriptor. Where that is impossible, and for regular files, a thread of its own writes.

    Policy (`when_full`), once it is 1 MiB behind: `block` holds the pumps, `drop` forgets the oldest lines, `spill`
    goes through an unnamed temporary file.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: TextIO | None, name: str, when_full: Policy) -> None:
        self.name = name
        self.lost = 0
        self.tty = False
        self.open_line: object = None  # the tap whose unfinished line stands at the end of the output
        self.identity: tuple[int, int, int] | None = None
        self._users: list[Trouble] = []
        self._loop = loop
        self._when_full = when_full
        self._thread = FileThread(loop, f"aioelastic-{name}")
        self._fd = -1  # ours: non-blocking, or a duplicate for the thread
        self._threaded = False
        self._text: TextIO | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._backlog: deque[bytes] = deque()
        self._size = 0  # bytes in the backlog and in the thread's hands
        self._begun = False  # the head of the backlog is partly written
        self._last = b"\n"  # the last byte that left the backlog
        self._taken = 0  # bytes given to us, ever
        self._given = 0  # of those: written, or lost
        self._pumps: set[Pump] = set()
        self._spill: _Spill | None = None
        self._armed = False
        self._busy = False  # the thread has a batch
        self._problem: str | None = None  # set: nothing can be written any more
        self._waiting: list[Callable[[], None]] = []
        self._attach(stream)
        forked.register(self)

    def disown(self) -> list[int]:
        """See `forked`: what it has not written yet, the original will."""
        self._problem, self._armed = "is the original's", False
        self._backlog.clear()
        self._pumps.clear()
        spill, self._spill = self._spill, None
        if spill is not None:
            spill.disown()
        fd, self._fd = self._fd, -1
        return [fd] if fd >= 0 else []

    @classmethod
    def of(
        cls, loop: asyncio.AbstractEventLoop, stream: TextIO | None, name: str, when_full: Policy, on_trouble: Trouble
    ) -> Console:
        """The console for `stream`: the one that others use already, or a new one. To be left with `leave`."""
        console = cls(loop, stream, name, when_full)
        key = (id(loop), console.identity, when_full)
        known = _consoles.get(key)
        if console.identity is not None and known is not None and known._loop is loop and known._problem is None:
            console._close()
            console = known
        elif console.identity is not None:
            _consoles[key] = console
        console._users.append(on_trouble)
        if console._problem is not None:
            on_trouble(console.name, console._problem, 0)
        return console

    async def leave(self, on_trouble: Trouble, patience: Patience, bound: float) -> None:
        """See to it that all that was given so far is written, then let go; the last user closes.

        Waits as long as there is progress every `bound` seconds, or half a second in all in a hurry. What is not
        written then is counted as lost and told.
        """
        mark = self._taken
        self._waiting.append(patience.notice)
        before = -1
        while not self._reached(mark) and not patience.hurried and self._given > before:
            before = self._given
            await patience.until(partial(self._reached, mark, before), bound)
        if not self._reached(mark) and patience.hurried:
            await patience.until(partial(self._reached, mark), HURRIED, grace=False)
        self._waiting.remove(patience.notice)
        if not self._reached(mark):
            self._die(f"did not take its last {self._taken - self._given} bytes", self._taken - self._given)
        elif self._when_full == "drop" and self.lost and self._problem is None:
            on_trouble(self.name, "was too slow: its oldest output was dropped", self.lost)
        self._users.remove(on_trouble)
        if not self._users:
            key = (id(self._loop), self.identity, self._when_full)
            if _consoles.get(key) is self:
                del _consoles[key]
            self._close()
            ended = self._thread.end()
            ended.add_done_callback(lambda _: patience.notice())
            await patience.until(ended.done, HURRIED, grace=False)  # if it hangs in write(2), it is left behind

    def write(self, parts: Parts, pump: Pump | None) -> None:
        """Whole lines, or an unfinished one whose tap is in `open_line`."""
        if self._problem is not None:
            self.lost += sum(map(len, parts))
            return
        if self._text is not None:
            self._write_text(self._text, b"".join(parts))
            return
        size = sum(map(len, parts))
        self._taken += size
        if self._spill is not None:
            self._spill.sink.write(b"".join(parts), pump)
            return
        sent = 0
        if not self._threaded and not self._backlog:
            try:
                sent = os.writev(self._fd, parts)
            except BlockingIOError:
                pass
            except OSError as exc:
                self._die(exc.strerror or str(exc), size)
                return
            self._given += sent
            if sent == size:
                self._last = bytes(parts[-1][-1:]) or self._last
                return
        data = b"".join(parts)
        if sent:
            self._begun = True
            self._last = data[sent - 1 : sent]
            data = data[sent:]
        self._backlog.append(data)
        self._size += len(data)
        self._pursue()
        if self._size > HIGH:
            self._overflow(pump)

    def _attach(self, stream: TextIO | None) -> None:
        if stream is None:
            self._problem = "is closed"
            return
        try:
            stream.flush()  # what was printed before us comes before us
            if not isinstance(stream, io.TextIOWrapper):
                raise io.UnsupportedOperation
            fd = stream.fileno()
            info = os.fstat(fd)
        except io.UnsupportedOperation:
            self._text = stream  # a notebook's or a test's stand-in: it has no file to write to
            self.identity = (-1, id(stream), 0)
            return
        except (OSError, ValueError) as exc:
            self._problem = f"is closed ({exc})"
            return
        except Exception as exc:  # somebody else's object: anything may come
            self._problem = f"{type(exc).__name__}: {exc}"
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

    def _write_text(self, text: TextIO, data: bytes) -> None:
        try:
            text.write(self._decode(data))
            text.flush()
        except Exception as exc:  # somebody else's object: anything may come
            self._die(f"{type(exc).__name__}: {exc}", len(data))

    def _pursue(self) -> None:
        """Write the backlog when the target takes it."""
        if self._threaded:
            self._write_in_thread()
        elif not self._armed:
            self._armed = True
            self._loop.add_writer(self._fd, self._writable)

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
        self._given += sent
        while sent:
            head = self._backlog[0]
            self._last = head[min(sent, len(head)) - 1 :][:1]
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
        self._last = batch[-1][-1:]
        self._busy = True
        fd = self._fd

        def job() -> None:
            view = memoryview(b"".join(batch))
            problem = None
            try:
                while view:
                    view = view[os.write(fd, view) :]
            except OSError as exc:
                problem = exc.strerror or str(exc)
            self._thread.tell(self._written, size, len(view), problem)

        self._thread.put(job)

    def _written(self, size: int, unwritten: int, problem: str | None) -> None:
        self._busy = False
        if self._problem is not None:
            return
        self._size -= size
        self._given += size - unwritten
        if problem is not None:
            self._die(problem, unwritten + self._size)
            return
        self._write_in_thread()
        self._progress()

    def _progress(self) -> None:
        """After some was written: let held pumps go on, fetch from the spill, tell who waits."""
        if self._size < HIGH // 2:
            self._release()
        if not self._backlog and not self._busy:
            self._disarm()
            if self._spill is not None:
                self._spill.fetch(self._fetched)
        self._tell_waiting()

    def _overflow(self, pump: Pump | None) -> None:
        if self._when_full == "block":
            if pump is not None:
                self._pumps.add(pump)
                pump.hold(self)
        elif self._when_full == "drop":
            first = not self.lost
            self._forget_oldest()
            if first and self.lost:
                self._tell(f"is too slow: dropping its oldest output ({self.lost} bytes so far)")
        else:
            self._spill = _Spill(self._thread, self._tell_spill, self.name)

    def _forget_oldest(self) -> None:
        """Drop from the head, never the newest piece, and never a part of a line that is still to be seen."""
        begun = self._backlog.popleft() if self._begun else None
        torn = False  # the beginning of what comes next is gone
        gap = False
        while self._backlog and (torn or (self._size > HIGH and len(self._backlog) > 1)):
            oldest = self._backlog.popleft()
            end = oldest.find(b"\n") + 1 if torn and self._size <= HIGH else len(oldest)
            end = end or len(oldest)
            self._size -= end
            self._given += end
            self.lost += end
            gap = True
            torn = not oldest[:end].endswith(b"\n")
            if oldest[end:]:
                self._backlog.appendleft(oldest[end:])
        if torn:
            self.open_line = None  # its tap must begin anew
        if gap and not (self._last if begun is None else begun).endswith(b"\n"):
            self._backlog.appendleft(b"\n")
            self._size += 1
            self._taken += 1
        if begun is not None:
            self._backlog.appendleft(begun)

    def _fetched(self, data: bytes) -> None:
        if self._problem is not None or self._spill is None:
            return
        if not data:
            lost = self._spill.sink.lost
            self.lost += lost
            self._given += lost
            self._spill.close()
            self._spill = None
            self._progress()
            return
        self._backlog.append(data)
        self._size += len(data)
        self._pursue()

    def _die(self, problem: str, lost: int) -> None:
        self._problem = problem
        self.lost += lost
        self._backlog.clear()
        self._size = 0
        self._disarm()
        self._release()
        self._tell_waiting()
        self._tell(problem)

    def _close(self) -> None:
        self._disarm()
        self._problem = self._problem or "is closed"
        if self._spill is not None:
            self._spill.close()
            self._spill = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._busy:
                # the thread hangs in write(2) on it: close after that, or another file could get its number
                self._thread.put(lambda: os.close(fd))
            else:
                os.close(fd)

    def _reached(self, mark: int, before: int | None = None) -> bool:
        return self._problem is not None or self._given >= mark or (before is not None and self._given > before)

    def _tell(self, problem: str) -> None:
        for on_trouble in list(self._users):
            on_trouble(self.name, problem, self.lost)

    def _tell_spill(self, sink: str, problem: str, lost: int) -> None:
        for on_trouble in list(self._users):
            on_trouble(sink, problem, lost)

    def _tell_waiting(self) -> None:
        for notice in self._waiting:
            notice()

    def _release(self) -> None:
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._loop.remove_writer(self._fd)


# the consoles in use, by loop, target and policy
_consoles: dict[tuple[int, tuple[int, int, int] | None, Policy], Console] = {}


class _Spill:
    """What a slow console has not taken yet, in an unnamed temporary file, in order."""

    def __init__(self, thread: FileThread, on_trouble: Trouble, name: str) -> None:
        self._file = tempfile.TemporaryFile(buffering=0, prefix="aioelastic-spill-")  # noqa: SIM115  # see close()
        self._thread = thread
        self._at = 0
        self._closed = False
        self.sink = FileSink(thread, None, None, on_trouble, fd=self._file.fileno(), name=f"spill of {name}")

    def fetch(self, take: Callable[[bytes], None]) -> None:
        """Give the next piece to `take`, b"" when there is none left."""
        if self._closed:
            return
        self._thread.flush()  # what waits for more must be in the file before we look
        queued = self._thread.queued

        def job() -> None:
            data = os.pread(self._file.fileno(), BATCH, self._at)
            self._at += len(data)
            self._thread.tell(self._give, take, data, queued)

        self._thread.put(job)

    def close(self) -> None:
        self._closed = True
        self._thread.put(self._file.close)

    def disown(self) -> None:
        self._closed = True
        self._file.close()

    def _give(self, take: Callable[[bytes], None], data: bytes, queued: int) -> None:
        if not data and self._thread.queued != queued:
            self.fetch(take)  # more came in while the thread looked
        else:
            take(data)
