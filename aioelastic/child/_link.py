"""One connection of a process that starts others: a group of workers."""

from __future__ import annotations

import errno
import os
import select

from . import _order, _socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

Environ = dict[bytes, bytes]


class Link:
    """Never waited for: a supervisor that does not read delays no other. `sock` is non-blocking, and in `epoll`."""

    def __init__(self, sock: socket, epoll: select.epoll) -> None:
        self.sock = sock
        self.environ: Environ = {}  # as `_start.variables`
        self.cwd = b"/"
        self.lost: tuple[int, float] | None = None
        self._epoll = epoll
        self._unsent: list[tuple[bytes, list[int]]] = []

    def say(self, kind: bytes, body: tuple[Any, ...], fd: int | None = None) -> None:
        """Now or soon; `fd` stays the caller's.

        Raises:
            OSError: there are no descriptors, or no memory; nothing was said.
        """
        packet, fds = _order.encode(kind, body)
        try:
            if not self._unsent:
                try:
                    _socket.send(self.sock, packet, fds if fd is None else [*fds, fd])
                    return
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    return  # it is gone, which reading tells
                except OSError as exc:
                    if exc.errno == errno.ETOOMANYREFS:
                        raise
            kept = fds if fd is None else [*fds, os.dup(fd)]
            self._unsent.append((packet, kept))
            fds = []
        finally:
            _socket.close(fds)
        if len(self._unsent) == 1:
            self._epoll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)

    def write(self) -> None:
        """There is room."""
        while self._unsent:
            packet, fds = self._unsent[0]
            try:
                _socket.send(self.sock, packet, fds)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it is gone, which reading tells
            except OSError:
                return
            self._unsent.pop(0)
            _socket.close(fds)
        self._epoll.modify(self.sock, select.EPOLLIN)

    def close(self) -> None:
        for _, fds in self._unsent:
            _socket.close(fds)
        self._unsent.clear()
        self._epoll.unregister(self.sock)
        self.sock.close()


def complain(words: str) -> None:
    """One line for whoever reads what the program says."""
    try:
        os.write(2, f"aioelastic: {words}\n".encode(errors="backslashreplace"))
    except OSError:
        pass
