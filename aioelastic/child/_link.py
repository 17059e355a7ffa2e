"""One connection of the guardian's: a group of workers."""

from __future__ import annotations

import os
import select

from . import _order, _socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

Environ = dict[bytes, bytes]


class Link:
    """Never waited for: a supervisor that does not read delays no other."""

    def __init__(self, sock: socket, epoll: select.epoll) -> None:
        self.sock = sock
        self.environ: Environ = {}
        self.cwd = b"/"
        self.lost: tuple[int, float] | None = None
        self._epoll = epoll
        self._unsent: list[tuple[bytes, list[int]]] = []

    def say(self, kind: bytes, body: tuple[Any, ...], fd: int | None = None) -> None:
        packet, fds = _order.encode(kind, body)
        self._unsent.append((packet, fds if fd is None else [*fds, os.dup(fd)]))
        if len(self._unsent) == 1:
            self.write(waited=False)

    def write(self, waited: bool = True) -> None:
        while self._unsent:
            packet, fds = self._unsent[0]
            try:
                _socket.send(self.sock, packet, fds)
            except BlockingIOError:
                if not waited:
                    self._epoll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                pass  # it is gone, which reading tells
            self._unsent.pop(0)
            _socket.close(fds)
        if waited:
            self._epoll.modify(self.sock, select.EPOLLIN)

    def close(self) -> None:
        for _, fds in self._unsent:
            _socket.close(fds)
        self._unsent.clear()
        self._epoll.unregister(self.sock)
        self.sock.close()
