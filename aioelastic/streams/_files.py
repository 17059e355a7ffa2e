"""Log files, written by one thread of the group's own, so that a slow disk never stops the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..system import forked_copies
from ..system.helper_thread import HelperThread

if TYPE_CHECKING:
    from ..model.logs import Rotate
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
        self.abandoned = False  # it hangs in a system call and was left behind
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
    """One log file. Bytes in = bytes out. Policy: block (lossless), unless the file system refuses the bytes: then they
    are counted in `lost`, which is told once per kind of trouble and at the end; later bytes are tried again.

    Others may do to the file what they like. It is written at its end, so it may be truncated. It is made anew, with
    its directory, when it was deleted; a file that was moved is still written to, as everybody's logs are, except with
    `rotate`: then the name is ours, and a new file is made there.

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
        self._writer = writer
        self._rotate = rotate
        self._on_trouble = on_trouble
        self._fd = -1 if fd is None else fd
        self._over = False
        self._taken = 0  # bytes given to us; written by the loop only
        # the rest is the thread's
        self._dealt = 0  # of those: written, or lost
        self._lost = 0
        self._due = 0  # bytes of the batch in hand that are neither
        self._told: dict[tuple[bool, object], str] = {}  # words of each kind of trouble
        self._told_lost = 0
        self._size = 0  # of the file; kept for rotation only
        self._limit = rotate.size if rotate is not None else 0  # the size at which the next file is due
        self._line_at = 0  # where the unfinished line at the file's end begins; 0: it is all of the file, or none
        forked_copies.register(self)

    @property
    def lost(self) -> int:
        """Bytes that did not reach the file."""
        return self._lost + (self._taken - self._dealt if self._writer.abandoned else 0)

    def open(self, append: bool = False) -> None:
        """Make the file (it must not exist, unless to `append`). Runs in the writer's thread. Raises `OSError`."""
        if self.path is not None:
            self._open(0 if append else os.O_EXCL)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fd, self._fd = self._fd, -1
        return [fd] if fd >= 0 and self.path is not None else []

    def try_open(self, append: bool = False) -> None:
        """The same, but what prevents it is told; it is tried again when there is something to write."""
        try:
            self.open(append)
        except Exception as exc:  # a file system may answer anything to any call
            self._tell(exc)

    def write(self, data: bytes, pump: Pump | None) -> None:
        """Queue `data`; hold `pump` while too much is queued."""
        self._taken += len(data)
        self._writer.gather(self, data, pump)

    def close(self) -> None:
        """Close the file after its last byte."""
        self._writer.flush()
        self._writer.put(self.shut)

    def store(self, batch: list[bytes]) -> None:
        """In the thread: write them. Does not raise: the thread has other files too."""
        size = self._due = sum(map(len, batch))
        try:
            if self._over:
                raise OSError(errno.EBADF, "is closed")
            if self.path is not None:
                self._look()
            if self._rotate is None:
                self._put(batch)
            else:
                self._put_rotating(b"".join(batch), self._rotate)
        except Exception as exc:  # a file system may answer anything to any call
            self._lose(self._due, exc)
        self._dealt += size
        self._writer.wrote(size)

    def _lose(self, size: int, exc: Exception) -> None:
        self._lost += size
        self._due -= size
        self._tell(exc)

    def _tell(self, exc: Exception, rotating: bool = False) -> None:
        """Once per kind."""
        kind = rotating, exc.errno if isinstance(exc, OSError) else type(exc)
        if kind not in self._told:
            strerror = exc.strerror if isinstance(exc, OSError) else None
            words = f"cannot rotate: {exc}" if rotating else strerror or f"{type(exc).__name__}: {exc}"
            self._told[kind] = words
            self._told_lost = self._lost
            self._writer.tell(self._on_trouble, self.name, words, self._lost)

    def shut(self) -> None:
        self._over = True
        if self.path is not None:
            self._drop()
        self._fd = -1
        if self._lost > self._told_lost:
            self._told_lost = self._lost
            self._writer.tell(self._on_trouble, self.name, "; ".join(self._told.values()), self._lost)

    def _look(self) -> bool:
        """See to it that there is a file to write to, or raise `OSError`. False: it does not stand at its path."""
        kept = False
        try:
            if self._fd >= 0:
                there = os.fstat(self._fd)
                kept = there.st_nlink > 0
                if kept and (self._rotate is None or self._stands(there)):
                    if there.st_size < self._size and self._rotate is not None:
                        self._limit = self._rotate.size  # somebody has truncated it
                    self._size = there.st_size
                    self._line_at = min(self._line_at, self._size)
                    return True
        except Exception:
            pass  # ESTALE, ENOTCONN: nothing will come of this descriptor any more
        try:
            try:
                self._open(0)
            except FileNotFoundError:
                os.makedirs(self._path.parent, exist_ok=True)
                self._open(0)
        except Exception as exc:  # as above
            if not kept:
                self._drop()
                raise
            self._tell(exc)  # something else has its name: it takes the bytes all the same, wherever it is now
            return False
        return True

    @property
    def _path(self) -> Path:
        assert self.path is not None
        return self.path

    def _stands(self, there: os.stat_result) -> bool:
        """Whether this file is the one at our path, as far as can be known."""
        try:
            return os.path.samestat(there, os.stat(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except Exception:  # as above
            return True

    def _open(self, how: int) -> None:
        # at its end, wherever that is by then; and what stands there now may be a pipe that nobody reads
        how |= os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(self._path, how, 0o666)
        self._drop()
        self._fd = fd
        self._size = self._line_at = os.fstat(fd).st_size
        self._limit = self._rotate.size if self._rotate is not None else 0

    def _drop(self) -> None:
        """Close what is open."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._close(fd)

    def _close(self, fd: int) -> None:
        try:
            os.close(fd)
        except Exception as exc:  # a network file system tells here of what it could not keep
            self._tell(exc)

    def _put(self, batch: list[bytes]) -> None:
        try:
            sent = os.writev(self._fd, batch)
        except Exception:
            sent = 0  # more than 1,024 pieces, or trouble, which the next call will meet again and tell
        left = self._due = self._due - sent
        if left:
            view = memoryview(b"".join(batch))[sent:]
            sent, trouble = self._write(view)
            self._due -= sent
            if trouble is not None:
                self._lose(left - sent, trouble)

    def _write(self, view: memoryview) -> tuple[int, Exception | None]:
        """How many of these bytes the file took, and why not all."""
        sent = 0
        try:
            while sent < len(view):
                took = os.write(self._fd, view[sent:])
                if not took:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))  # or we would try for ever
                sent += took
        except Exception as exc:  # as above
            return sent, exc
        return sent, None

    def _put_rotating(self, data: bytes, rotate: Rotate) -> None:
        view = memoryview(data)
        at, turned = 0, True
        while at < len(data):
            room = max(self._limit - self._size, 0)
            end = len(data)
            if end - at > room:
                end = data.rfind(b"\n", at, at + room) + 1
                if end == 0:  # one line longer than a whole file is cut; one that began elsewhere goes to the next
                    end = at if self._line_at else at + room
            sent, trouble = self._write(view[at:end])
            self._due -= sent
            newline = data.rfind(b"\n", at, at + sent) + 1
            if newline:
                self._line_at = self._size + newline - at
            self._size += sent
            if isinstance(trouble, OSError) and trouble.errno == errno.EFBIG and turned and self._size:
                end = at + sent  # RLIMIT_FSIZE is less than Rotate.size: the next file takes the rest
            elif trouble is not None:
                missed = end - at - sent
                self._lose(missed, trouble)
                self._limit -= missed  # on a full disk, too, old files go as fast as new ones would come, and no faster
            at = end
            if at < len(data):
                turned = self._turn(rotate)

    def _turn(self, rotate: Rotate) -> bool:
        """Begin a new file, with the unfinished line. False: that could not be, and the old one goes on."""
        fd = self._fd
        stands = self._look()
        if self._fd != fd:
            return True  # it was made anew
        begun = self._size - self._line_at if self._line_at else 0
        if begun > rotate.size:
            begun = 0  # others have written to it
        try:
            if not stands:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))
            line = self._succeed(rotate.keep, begun) if rotate.keep else self._empty(begun)
        except Exception as exc:  # as above
            self._tell(exc, rotating=True)
            self._limit = self._size + rotate.size  # then we shall try again
            self._line_at = 0
            return False
        self._size, self._line_at, self._limit = line, 0, rotate.size
        return True

    def _empty(self, begun: int) -> int:
        """Empty the file but for its last `begun` bytes. How many are left."""
        line = os.pread(self._fd, begun, self._size - begun) if begun else b""
        os.ftruncate(self._fd, 0)
        sent, trouble = self._write(memoryview(line))
        if trouble is not None:
            self._lost += len(line) - sent
            self._tell(trouble)
        return sent

    def _succeed(self, keep: int, begun: int) -> int:
        """Put the file among the older ones, and its last `begun` bytes into a new one. How many it has."""
        name = str(self._path)
        names = [name]  # up to the first that is free
        for index in range(1, keep + 1):
            older = f"{name}.{index}"
            try:
                mode = os.lstat(older).st_mode
            except FileNotFoundError:
                names.append(older)
                break
            if stat.S_ISDIR(mode):  # not ours: we do without this name
                self._tell(IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), older), rotating=True)
            else:
                names.append(older)
        if len(names) == 1:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), f"{name}.{keep}")
        for index in range(len(names) - 1, 0, -1):
            os.replace(names[index - 1], names[index])
        fresh = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        old, self._fd = self._fd, fresh
        line = self._carry(old, begun) if begun else 0
        self._close(old)
        return line

    def _carry(self, old: int, begun: int) -> int:
        """Move the last `begun` bytes of the old file into the new one. How many came."""
        sent = 0
        try:
            line = os.pread(old, begun, self._size - begun)
            sent, trouble = self._write(memoryview(line))
            if trouble is not None:
                raise trouble
            if len(line) == begun:  # else somebody has truncated it just now
                os.ftruncate(old, self._size - begun)
        except Exception as exc:
            self._tell(exc, rotating=True)  # they are in the old file still, so nothing is lost
        return sent


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
