"""What a slow console has not taken yet, in an unnamed temporary file, in order."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..system.helper_thread import HelperThread
from ..system.temporary_directories import unnamed_file
from ._console_piece import NEWLINE, Account
from ._console_target import Target
from ._writers import words

if TYPE_CHECKING:
    from ._pump import Pump

BATCH = 1_048_576  # bytes read at once
BEHIND = 4_194_304  # bytes on their way into the file before the pipes of those who write more are held
WHOLE, TORN = 1, 2  # gaps: something before it was lost; the beginning of its first line too
_HEAD = struct.Struct("<qIIIB")  # source, bytes of prefix, bytes of data, size, gap
Record = tuple[int, bytes, bytes, int, int]


class Spill:
    """The file, which is written and read by a thread.

    What the file does not take is lost, counted and told; what comes later is tried again.
    """

    def __init__(self, console: Account, target: Target, thread: HelperThread) -> None:
        self._file = unnamed_file("aioelastic-spill-")
        self._fd = self._file.fileno()
        self._console = console
        self._target = target
        self._thread = thread
        self._count = 0  # pieces, ever
        self._behind = 0  # bytes that the thread has not stored yet
        self._pumps: set[Pump] = set()
        self._fetching = False
        self._closed = False
        # of the thread
        self._begin = 0
        self._end = 0
        self._gaps: dict[int, bool] = {}

    def write(self, source: int, prefix: bytes, data: bytes, size: int, pump: Pump | None) -> None:
        """Store a piece."""
        self._count += 1
        self._behind += size
        self._thread.put(partial(self._store, source, prefix, data, size))
        if pump is not None and self._behind > BEHIND:
            self._pumps.add(pump)
            pump.hold(self)

    def fetch(self, take: Callable[[list[Record], bool], None]) -> None:
        """Give the next pieces to `take`, and whether they are the last."""
        if not self._fetching:
            self._fetching = True
            count = self._count
            self._thread.put(lambda: self._thread.tell(self._give, take, self._load(), count))

    def close(self) -> None:
        """After the jobs that it has."""
        self._closed = True
        self._release()
        self._thread.put(self._file.close)

    def disown(self) -> None:
        """In a forked copy (see `forked_copies`)."""
        self._closed = True
        self._file.close()

    def _give(self, take: Callable[[list[Record], bool], None], records: list[Record], count: int) -> None:
        self._fetching = False
        if not self._closed:
            take(records, not records and count == self._count)

    def _stored(self, size: int) -> None:
        self._behind -= size
        if self._behind < BEHIND // 2:
            self._release()

    def _release(self) -> None:
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)

    # --- in the thread ---

    def _store(self, source: int, prefix: bytes, data: bytes, size: int) -> None:
        gap = self._gaps.get(source)
        head = _HEAD.pack(source, len(prefix), len(data), size, 0 if gap is None else TORN if gap else WHOLE)
        view, at = memoryview(b"".join((head, prefix, data))), self._end
        try:
            while view:
                sent = _some(os.pwrite(self._fd, view, at))
                view, at = view[sent:], at + sent
        except Exception as exc:  # what is there of it will be written over
            with self._target.lock:
                self._console.lose(size, f"cannot spill: {words(exc)}")
            self._gaps[source] = len(data) > 0 and data[-1] != NEWLINE
        else:
            self._end = at
            self._gaps.pop(source, None)
        self._thread.tell(self._stored, size)

    def _load(self) -> list[Record]:
        try:
            return self._records()
        except Exception as exc:  # what is in it is lost, which is counted at the end
            with self._target.lock:
                self._console.lose(0, f"cannot read what was spilled: {words(exc)}")
            self._begin = self._end = 0
            return []

    def _records(self) -> list[Record]:
        records: list[Record] = []
        size = min(self._end - self._begin, BATCH)
        if not size:
            self._begin = self._end = 0
            return records
        data, at = self._read(size), 0
        while len(data) - at >= _HEAD.size:
            source, prefix, body, cost, gap = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + prefix + body
            if end > len(data):
                if records:
                    break
                data = self._read(end)
            middle = at + _HEAD.size + prefix
            records.append((source, data[middle - prefix : middle], data[middle:end], cost, gap))
            at = end
        self._begin += at
        if self._begin > max(self._end - self._begin, BATCH):
            self._move()
        return records

    def _move(self) -> None:
        """To the file's beginning with what waits: the file stays below twice that, however long nobody catches up."""
        size = self._end - self._begin
        try:
            for at in range(0, size, BATCH):  # to where nothing waits: if it fails, all is as it was
                data = memoryview(self._read(min(BATCH, size - at), at))
                while data:
                    sent = _some(os.pwrite(self._fd, data, at))
                    data, at = data[sent:], at + sent
            os.ftruncate(self._fd, size)
        except Exception:  # as above: what cannot be moved stays
            return
        self._begin, self._end = 0, size

    def _read(self, size: int, at: int = 0) -> bytes:
        """So many bytes from `at` of what waits."""
        out = b""
        while len(out) < size:
            more = os.pread(self._fd, size - len(out), self._begin + at + len(out))
            _some(len(more))  # somebody has cut it off
            out += more
        return out


def _some(done: int) -> int:
    """That many bytes were read or written. Raises `OSError` for none: to go on would be for ever."""
    if not done:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return done
