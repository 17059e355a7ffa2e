"""Datagrams with file descriptors over one socket; each descriptor is close-on-exec from its first moment."""

from __future__ import annotations

import os
import select
import struct
from _socket import (
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    MSG_TRUNC,
    SCM_RIGHTS,
    SOL_SOCKET,
)
from _socket import socket as AnySocket
from errno import EMSGSIZE, ENOBUFS

TYPE_CHECKING = False  # `socket` and `typing` take 5 ms each to import, `array` 2
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

PACKET = 32_786  # the largest datagram
FDS = 250  # descriptors that one datagram may carry: the kernel lets 253 pass (SCM_MAX_FD, unix(7))
MOST = 16_384  # that one message may have
DONTWAIT = MSG_DONTWAIT  # a plain number: those of `socket` are enums, which take longer than the call
_ROOM = CMSG_SPACE(FDS * 4)
_FOREIGN = "not a message of aioelastic's"
_MORE = b"+"  # in front of a datagram: its descriptors are in a socket, which is what came with it


class Missing(ValueError):
    """A datagram whose descriptors could not be taken: this process may have no more.

    Attributes:
        packet: the datagram itself.
    """

    def __init__(self, packet: bytes) -> None:
        super().__init__("not all of its descriptors could be taken: this process may have too many open")
        self.packet = packet


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep messages apart and tell when the other end is gone."""
    import socket

    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: AnySocket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send one datagram. `BlockingIOError` when a non-blocking socket is full.

    Raises:
        OSError: it has more descriptors than `MOST` (EMSGSIZE), or than the system lets be under way (ETOOMANYREFS).
    """
    if not fds:
        sock.send(packet, MSG_NOSIGNAL)
    elif len(fds) <= FDS:
        sock.sendmsg([packet], [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))], MSG_NOSIGNAL)
    elif len(fds) > MOST:
        raise OSError(EMSGSIZE, f"a message with {len(fds)} descriptors: {MOST} can travel")
    else:
        inner, outer = pair()
        with outer:
            # it has ended before it is sent: who takes it never has to wait for the rest
            with inner:
                inner.setblocking(False)
                try:
                    for at in range(0, len(fds), FDS):
                        send(inner, b".", fds[at : at + FDS])
                except BlockingIOError:  # to wait for room would be in vain
                    raise OSError(ENOBUFS, f"a message with {len(fds)} descriptors has no room in a socket") from None
            send(sock, _MORE + packet, [outer.fileno()])


def receive(sock: AnySocket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive one datagram; b"" when the other end is gone. `BlockingIOError` when there is none yet.

    It waits for nothing but the datagram itself, and takes no more descriptors than `MOST`, whoever has sent it.

    Raises:
        Missing: not all of its descriptors could be taken; those that could are closed.
        ValueError: it is none of ours: too large, or its descriptors are; what came with it is closed.
    """
    packet, fds = _one(sock, flags)
    if not packet:
        close(fds)
        return b"", []
    if not fds or packet[:1] != _MORE:
        return packet, fds
    if len(packet) == 1:
        close(fds)
        raise ValueError(_FOREIGN)
    try:
        return packet[1:], _all(fds)
    except Missing:
        raise Missing(packet[1:]) from None


def waiting(sock: AnySocket) -> int:
    """How many bytes of datagrams there are to be received (FIONREAD, unix(7))."""
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), "little")


def _one(sock: AnySocket, flags: int) -> tuple[bytes, list[int]]:
    """One datagram, as it came."""
    try:
        packet, rights, flags, _ = sock.recvmsg(PACKET + 1, _ROOM, flags | MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # told once: the other end has gone, and had not read all that we had sent; what it had sent is still here
        packet, rights, flags, _ = sock.recvmsg(PACKET + 1, _ROOM, flags | MSG_CMSG_CLOEXEC)
    if not rights and not flags & (MSG_TRUNC | MSG_CTRUNC):
        return packet, []
    fds: list[int] = []
    for level, kind, data in rights:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            count = len(data) // 4
            fds += struct.unpack_from(f"{count}i", data)
    if flags & MSG_CTRUNC:
        close(fds)
        raise Missing(packet.removeprefix(_MORE))
    if flags & MSG_TRUNC:
        close(fds)
        raise ValueError(_FOREIGN)
    return packet, fds


def has_ended(sock: socket.socket, seconds: float = 0.0) -> bool:
    """Whether the other end is gone, and has left nothing to read; so many seconds are waited for that."""
    try:
        if seconds:
            ended = select.poll()
            ended.register(sock, select.POLLIN)
            ended.poll(seconds * 1000)
        return not sock.recv(1, MSG_PEEK | MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _all(fds: list[int]) -> list[int]:
    """All descriptors in the socket that came with a datagram, which nobody writes to any more. Closes `fds`."""
    found: list[int] = []
    try:
        if len(fds) > 1:
            raise ValueError(_FOREIGN)
        inner = AnySocket(fileno=fds[0])
        try:
            while True:
                packet, more = _one(inner, MSG_DONTWAIT)
                found += more
                if not packet:
                    return found
                if packet != b"." or not more or len(found) > MOST:
                    raise ValueError(_FOREIGN)
        finally:
            inner.detach()
    except Missing:
        close(found)
        raise
    except (OSError, ValueError):  # no such socket, or somebody still writes to it
        close(found)
        raise ValueError(_FOREIGN) from None
    except BaseException:
        close(found)
        raise
    finally:
        close(fds)


def close(fds: Sequence[int]) -> None:
    """Close all of them: whatever close(2) says, they are."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass
