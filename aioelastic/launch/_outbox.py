"""Datagrams to a process that may have stopped reading: whoever sends them waits for nothing."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

from ..child.wire import datagrams
from ..system import forked_copies
from ..system.descriptors import shut


class Outbox:
    """Sends at once while there is room; else a thread does it, in their order, which lives as long as there is none.

    Of any number of threads: what one of them sends is not mixed with what another does.

    Args:
        sock: its own from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._lock = threading.Lock()
        # guarded by it
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._thread: threading.Thread | None = None
        self._closes = False
        forked_copies.register(self)

    def send(self, packet: bytes, fds: Sequence[int]) -> None:
        """Now or soon; `fds` stay the caller's.

        Raises:
            OSError: it is gone; or it must wait, and this process may have no more descriptors or threads.
        """
        with self._lock:
            if not self._unsent:
                try:
                    datagrams.send(self.sock, packet, fds)
                except BlockingIOError:
                    pass
                else:
                    return
            kept: list[int] = []  # they must live until they are sent
            try:
                for fd in fds:
                    kept.append(os.dup(fd))
                if self._thread is None:
                    thread = threading.Thread(target=self._write, name="aioelastic-outbox", daemon=True)
                    thread.start()
                    self._thread = thread
            except (OSError, RuntimeError) as exc:
                datagrams.close(kept)
                raise exc if isinstance(exc, OSError) else OSError(errno.EAGAIN, str(exc)) from None
            self._unsent.append((packet, kept))

    def close(self) -> None:
        """Nothing more is sent; what waits still is."""
        with self._lock:
            self._closes = True
            if not self._unsent:
                shut(self.sock.detach())

    def give_up(self) -> None:
        """Nobody will read what waits."""
        with self._lock:
            thread = self._thread
            if thread is not None:
                self.sock.shutdown(socket.SHUT_RDWR)
        if thread is not None:
            thread.join()

    def disown(self) -> list[int]:
        """See `forked_copies`: there is no thread in the copy, and nobody there sends anything."""
        self._lock, self._thread = threading.Lock(), None
        fds = [self.sock.detach()] if self.sock.fileno() >= 0 else []
        for _, kept in self._unsent:
            fds += kept
        self._unsent.clear()
        return fds

    def _write(self) -> None:
        room = select.poll()
        room.register(self.sock, select.POLLOUT)
        rest = 0.0
        while True:
            time.sleep(rest)
            room.poll()
            rest = 0.0
            with self._lock:
                while self._unsent:
                    packet, fds = self._unsent[0]
                    try:
                        datagrams.send(self.sock, packet, fds)
                    except OSError as exc:
                        if datagrams.passes(exc):
                            rest = 0.0 if isinstance(exc, BlockingIOError) else datagrams.AGAIN
                            break
                        # it is gone, or cannot be sent: who asked sees the socket close
                    self._unsent.popleft()
                    datagrams.close(fds)
                else:
                    self._thread = None
                    if self._closes:
                        shut(self.sock.detach())
                    return
