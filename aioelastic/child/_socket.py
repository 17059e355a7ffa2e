"""Datagrams with file descriptors over one socket; each descriptor is close-on-exec from its first moment."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from ._wire import PACKET

FDS = 250  # descriptors that one datagram may carry: the kernel lets 253 pass (SCM_MAX_FD, unix(7))
_MORE = b"+"  # in front of a datagram: its descriptors are in a socket, which is what came with it


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep messages apart and tell when the other end is gone."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send one datagram. `BlockingIOError` when a non-blocking socket is full."""
    if not fds:
        sock.send(packet, socket.MSG_NOSIGNAL)
    elif len(fds) <= FDS:
        sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], socket.MSG_NOSIGNAL)
    else:
        inner, outer = pair()
        with inner, outer:
            inner.setblocking(False)
            for at in range(0, len(fds), FDS):
                send(inner, b".", fds[at : at + FDS])
            send(sock, _MORE + packet, [outer.fileno()])


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive one datagram; b"" when the other end is gone. `BlockingIOError` when there is none yet.

    Raises:
        ValueError: it was larger than any of ours, or descriptors of it are missing, as this process may have no more;
            what came with it is closed.
    """
    room = socket.CMSG_SPACE(FDS * 4)
    packet, rights, flags, _ = sock.recvmsg(PACKET + 1, room, flags | socket.MSG_CMSG_CLOEXEC)
    if not rights and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return packet, []
    fds: list[int] = []
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", data[: len(data) - len(data) % 4])
    if flags & socket.MSG_CTRUNC:
        close(fds)
        raise ValueError("not all of its descriptors could be taken: this process may have too many open")
    if flags & socket.MSG_TRUNC:
        close(fds)
        raise ValueError("not a message of aioelastic's")
    if packet[:1] == _MORE:
        with socket.socket(fileno=fds[0]) as inner:
            return packet[1:], _all(inner)
    return packet, fds


def _all(sock: socket.socket) -> list[int]:
    """All descriptors in a socket that nobody writes to any more."""
    fds: list[int] = []
    try:
        while True:
            packet, more = receive(sock)
            if not packet:
                return fds
            fds += more
    except BaseException:
        close(fds)
        raise


def close(fds: Sequence[int]) -> None:
    """Close all of them."""
    for fd in fds:
        os.close(fd)
