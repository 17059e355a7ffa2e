"""inotify(7): who has written to a file. One descriptor, while there is something to be told."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from ...child.kernel import libc
from ...system import forked_copies
from ...system.descriptors import shut
from ...watch import Poller

_MODIFY = 2  # IN_MODIFY, sys/inotify.h
_EVENT = struct.Struct("=iIII")
_ROOM = 65_536
_CALLS = ("inotify_init1", "inotify_add_watch", "inotify_rm_watch")


class Changes:
    """Calls back whenever somebody has written to one of the files."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._fd: int | None = None
        self._init, self._add, self._remove = map(libc.function, _CALLS)
        self._callbacks: dict[int, Callable[[], object]] = {}
        forked_copies.register(self)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fd, self._fd = self._fd, None
        return [] if fd is None else [fd]

    def add(self, path: str, callback: Callable[[], object]) -> int:
        """From now on; returns what `remove` wants.

        Raises:
            OSError: there is no such file, or no more watches.
        """
        if self._fd is None:
            self._fd = self._open()
            self._poller.add_reader(self._fd, self._read)
        number: int = self._add(self._fd, os.fsencode(path), _MODIFY)
        if number < 0:
            code = libc.errno_of()
            self._close_if_idle()
            raise OSError(code, os.strerror(code), path)
        self._callbacks[number] = callback
        return number

    def remove(self, number: int) -> None:
        """No more."""
        del self._callbacks[number]
        if self._fd is not None:
            self._remove(self._fd, number)
            self._close_if_idle()

    def _open(self) -> int:
        fd: int = self._init(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            code = libc.errno_of()
            raise OSError(code, os.strerror(code))
        return fd

    def _close_if_idle(self) -> None:
        if not self._callbacks and self._fd is not None:
            self._poller.remove(self._fd)
            shut(self._fd)
            self._fd = None

    def _read(self) -> bool:
        assert self._fd is not None
        try:
            data = os.read(self._fd, _ROOM)
        except BlockingIOError:
            return False
        at = 0
        while at < len(data):
            number, _, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            callback = self._callbacks.get(number)  # what was just removed may still be told
            if callback is not None:
                callback()
        return True
