"""One connection of a process that starts others: a group of workers."""

from __future__ import annotations

import os
import select
import sys
from _socket import SHUT_RDWR

from . import datagrams, requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

Environ = dict[bytes, bytes]


class Link:
    """Never waited for: a supervisor that does not read delays no other. `sock` is non-blocking, and in `epoll`.

    Attributes:
        again: the system takes nothing for now, of which no event tells when it does: `write` is to be called soon.
    """

    def __init__(self, sock: socket, epoll: select.epoll) -> None:
        self.sock = sock
        self.environ: Environ = {}  # as `process_start.variables`
        self.cwd = b"/"
        self.lost: tuple[int, float] | None = None
        self.again = False
        self._epoll = epoll
        self._unsent: list[tuple[bytes, list[int]]] = []

    def say(self, kind: bytes, body: tuple[Any, ...], fd: int | None = None) -> None:
        """Now or soon; `fd` stays the caller's.

        Raises:
            OSError: there are no descriptors, or the system does not take `fd`; nothing was said.
        """
        why: OSError | None = None
        packet, fds = requests.encode(kind, body)
        try:
            if not self._unsent:
                try:
                    datagrams.send(self.sock, packet, fds if fd is None else [*fds, fd])
                    return
                except OSError as exc:
                    if datagrams.is_gone(exc):
                        return  # which reading tells
                    if not isinstance(exc, BlockingIOError) and (fd is not None or not datagrams.passes(exc)):
                        raise
                    why = exc
            kept = fds if fd is None else [*fds, os.dup(fd)]
            self._unsent.append((packet, kept))
            fds = []
        finally:
            datagrams.close(fds)
        if why is not None:
            self._wait(why)

    def write(self) -> None:
        """There is room, or it is to be tried again."""
        while self._unsent:
            packet, fds = self._unsent[0]
            try:
                datagrams.send(self.sock, packet, fds)
            except OSError as exc:
                if datagrams.passes(exc):
                    self._wait(exc)
                    return
                if not datagrams.is_gone(exc):
                    complain(f"a message could not be sent: {exc}")
                    self.sock.shutdown(SHUT_RDWR)  # nobody shall wait for it: our end tells
            self._unsent.pop(0)
            datagrams.close(fds)
        self.again = False
        self._epoll.modify(self.sock, select.EPOLLIN)

    def _wait(self, why: OSError) -> None:
        self.again = not isinstance(why, BlockingIOError)
        self._epoll.modify(self.sock, select.EPOLLIN | (0 if self.again else select.EPOLLOUT))

    def close(self) -> None:
        self._epoll.unregister(self.sock)
        self.disown()

    def disown(self) -> None:
        """In a forked copy, too, which must not touch the epoll set."""
        for _, fds in self._unsent:
            datagrams.close(fds)
        self._unsent.clear()
        self.sock.close()


def complain(words: str) -> None:
    """One line for whoever reads what the program says; not if he does not read now, who shall not be waited for."""
    room = select.poll()
    room.register(2, select.POLLOUT)
    try:
        if room.poll(0):
            os.write(2, f"aioelastic: {words}\n".encode(errors="backslashreplace")[: select.PIPE_BUF])
    except OSError:
        pass


def show_error() -> None:
    """The exception that is handled: as a line where the system is to blame, whole where it is a bug of ours."""
    exc = sys.exc_info()[1]
    if isinstance(exc, OSError):
        complain(f"the guardian could not do its work: {exc}")
    else:
        sys.excepthook(*sys.exc_info())


def silence(null: int) -> None:
    """Nothing more is said; `null` is /dev/null. What is to be done then is done, whether or not that goes well."""
    try:
        os.dup2(null, 2)
    except OSError:
        pass
