"""Datagrams with file descriptors over one socket; each descriptor is close-on-exec from its first moment."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from ._wire import FDS, PACKET


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep messages apart and tell when the other end is gone."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send one datagram. `BlockingIOError` when a non-blocking socket is full."""
    if not fds:
        sock.send(packet, socket.MSG_NOSIGNAL)
        return
    sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one datagram; b"" when the other end is gone. `BlockingIOError` when there is none yet.

    Raises:
        ValueError: it was larger than any of ours; what came with it is closed.
    """
    packet, rights, flags, _ = sock.recvmsg(PACKET, socket.CMSG_SPACE(FDS * 4), socket.MSG_CMSG_CLOEXEC)
    if not rights and not flags & socket.MSG_TRUNC:
        return packet, []
    fds: list[int] = []
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", data[: len(data) - len(data) % 4])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close(fds)
        raise ValueError("not a message of aioelastic's")
    return packet, fds


def close(fds: Sequence[int]) -> None:
    """Close all of them."""
    for fd in fds:
        os.close(fd)
