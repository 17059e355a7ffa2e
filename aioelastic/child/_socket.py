"""Datagrams with file descriptors over one socket; each descriptor is close-on-exec from its first moment."""

from __future__ import annotations

import array
import os
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_NOSIGNAL, MSG_TRUNC, SCM_RIGHTS, SOL_SOCKET

TYPE_CHECKING = False  # `socket` and `typing` take 5 ms each to import
if TYPE_CHECKING:
    import socket
    from _socket import socket as AnySocket
    from collections.abc import Sequence

PACKET = 32_786  # the largest datagram
FDS = 4  # descriptors one datagram may carry


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep messages apart and tell when the other end is gone."""
    import socket

    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: AnySocket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send one datagram. `BlockingIOError` when a non-blocking socket is full."""
    if not fds:
        sock.send(packet, MSG_NOSIGNAL)
        return
    sock.sendmsg([packet], [(SOL_SOCKET, SCM_RIGHTS, array.array("i", fds))], MSG_NOSIGNAL)


def receive(sock: AnySocket) -> tuple[bytes, list[int]]:
    """Receive one datagram; b"" when the other end is gone. `BlockingIOError` when there is none yet.

    Raises:
        ValueError: it was larger than any of ours; what came with it is closed.
    """
    packet, rights, flags, _ = sock.recvmsg(PACKET, CMSG_SPACE(FDS * 4), MSG_CMSG_CLOEXEC)
    if not rights and not flags & MSG_TRUNC:
        return packet, []
    fds: list[int] = []
    for level, kind, data in rights:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fds += array.array("i", data[: len(data) - len(data) % 4])
    if flags & (MSG_TRUNC | MSG_CTRUNC):
        close(fds)
        raise ValueError("not a message of aioelastic's")
    return packet, fds


def close(fds: Sequence[int]) -> None:
    """Close all of them."""
    for fd in fds:
        os.close(fd)
