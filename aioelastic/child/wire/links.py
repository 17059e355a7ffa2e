"""One connection of a process that starts others: a group of workers."""

from __future__ import annotations

import errno
import os
import select
import sys

from . import datagrams, requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

Environ = dict[bytes, bytes]


class Link:
    """Never waited for: a supervisor that does not read delays no other. `sock` is non-blocking, and in `epoll`."""

    def __init__(self, sock: socket, epoll: select.epoll) -> None:
        self.sock = sock
        self.environ: Environ = {}  # as `process_start.variables`
        self.cwd = b"/"
        self.lost: tuple[int, float] | None = None
        self._epoll = epoll
        self._unsent: list[tuple[bytes, list[int]]] = []

    def say(self, kind: bytes, body: tuple[Any, ...], fd: int | None = None) -> None:
        """Now or soon; `fd` stays the caller's.

        Raises:
            OSError: there are no descriptors, or no memory; nothing was said.
        """
        packet, fds = requests.encode(kind, body)
        try:
            if not self._unsent:
                try:
                    datagrams.send(self.sock, packet, fds if fd is None else [*fds, fd])
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
            datagrams.close(fds)
        if len(self._unsent) == 1:
            self._epoll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)

    def write(self) -> None:
        """There is room."""
        while self._unsent:
            packet, fds = self._unsent[0]
            try:
                datagrams.send(self.sock, packet, fds)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it is gone, which reading tells
            except OSError:
                return
            self._unsent.pop(0)
            datagrams.close(fds)
        self._epoll.modify(self.sock, select.EPOLLIN)

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
    """One line for whoever reads what the program says."""
    try:
        os.write(2, f"aioelastic: {words}\n".encode(errors="backslashreplace"))
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
