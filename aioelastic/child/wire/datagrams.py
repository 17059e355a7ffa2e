"""Datagrams with file descriptors over one socket; each descriptor is close-on-exec from its first moment."""

from __future__ import annotations

import os
import select
import stat
import struct
import time
from _socket import (
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    MSG_TRUNC,
    SCM_RIGHTS,
    SO_PASSCRED,
    SO_SNDTIMEO,
    SOL_SOCKET,
)
from _socket import socket as AnySocket
from errno import EAGAIN, EFBIG, EMFILE, EMSGSIZE, ENFILE, ENOBUFS, ENOMEM, ENOTCONN, ETOOMANYREFS

from ...system.descriptors import into, shut, shut_all

TYPE_CHECKING = False  # `socket` and `typing` take 5 ms each to import, `array` 2
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Sequence
    from typing import Any, TypeAlias

Packed: TypeAlias = "tuple[bytes, list[int]]"  # a datagram, and its descriptors

PACKET = 32_786  # the largest datagram
FDS = 250  # descriptors that one datagram may carry: the kernel lets 253 pass (SCM_MAX_FD, unix(7))
MOST = 16_384  # that one message may have
AGAIN = 0.005  # seconds until a send is tried again that was refused as there were too many descriptors under way
LONGEST = 2_147_483  # seconds that poll(2) and epoll_wait(2) can be asked to wait: 24 days
_ENDLESS = float("inf")  # `math` would have to be loaded for that
DONTWAIT = MSG_DONTWAIT  # a plain number: those of `socket` are enums, which take longer than the call
_CREDENTIALS = 2  # SCM_CREDENTIALS: pid, uid and gid of the sender, as the kernel knows them (unix(7))
_SIZE, _ROOM = (PACKET + 1,), (CMSG_SPACE(FDS * 4) + CMSG_SPACE(12),)  # for `map`
_NOBODY = struct.pack("iI", 0, 65_534)  # as the kernel says when it does not know
_known = {bytes(4)}  # users, as they stand there, whose messages are taken: root, and us
_PASSING = (EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM, ETOOMANYREFS)
_FOREIGN = "not a message of aioelastic's"
_MORE = b"+"  # in front of a datagram: its descriptors are in a socket, which is what came with it


_MOST_IN_ONE = 1 << 20  # bytes in one pipe, as the system has it (sysctl fs.pipe-max-size)


def in_pipes(pieces: Sequence[memoryview]) -> list[int]:
    """The bytes of these, in pipes: in memory as in a memfd, which obeys the limit on the size of files (RLIMIT_FSIZE).
    For `out_of_pipes`, once.

    Raises:
        OSError: no descriptors are left; or it is more than one datagram can take along.
    """
    import fcntl  # hardly anybody needs this

    fds: list[int] = []
    try:
        left = sum(one.nbytes for one in pieces)
        writer, room = -1, 0
        for piece in pieces:
            rest = piece.cast("B")
            while rest:
                if not room:
                    if writer >= 0:
                        shut(writer)
                    if len(fds) == FDS // 2:
                        raise OSError(EFBIG, os.strerror(EFBIG))
                    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                    fds.append(reader)
                    try:
                        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, min(max(left, 4096), _MOST_IN_ONE))
                    except OSError:
                        pass  # this user has so much in pipes already: then it is what it is
                    room = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
                done = os.write(writer, rest[:room])
                rest, room, left = rest[done:], room - done, left - done
        if writer >= 0:
            shut(writer)
        return fds
    except BaseException:
        shut_all(fds)
        if writer >= 0:
            shut(writer)
        raise


def is_pipe(fd: int) -> bool:
    """Whether it is one of `in_pipes`."""
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def out_of_pipes(fds: Sequence[int]) -> bytearray:
    """What is in them, up to what pipes have room for; whoever has the other ends is not waited for.

    Raises:
        OSError: no descriptor is left.
    """
    import fcntl  # as in `in_pipes`

    data = bytearray()
    for fd in fds:
        # opened anew: whether ours waits, is also the sender's to say
        mine = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            room = fcntl.fcntl(mine, fcntl.F_GETPIPE_SZ)
            while room > 0 and (part := os.read(mine, room)):
                data += part
                room -= len(part)
        except BlockingIOError:
            pass  # the other end is open
        finally:
            shut(mine)
    return data


class Missing(ValueError):
    """A datagram whose descriptors could not be taken: this process may have no more.

    Attributes:
        packet: the datagram itself.
    """

    def __init__(self, packet: bytes) -> None:
        super().__init__("not all of its descriptors could be taken: this process may have too many open")
        self.packet = packet


class Crowded(OSError):
    """The system lets no more descriptors of this user be under way, for now. No event tells when it does again."""

    def __init__(self) -> None:
        words = "this user has as many descriptors under way as RLIMIT_NOFILE allows; have what was sent received"
        super().__init__(ETOOMANYREFS, words)


class Foreign(ValueError):
    """A datagram that another user's process has sent, neither ours nor root's.

    Attributes:
        packet, fds: what came; the descriptors are the caller's to close.
        uid: whose it is.
    """

    def __init__(self, packet: bytes, fds: list[int], uid: int) -> None:
        super().__init__(f"it was sent by {'nobody knows whom' if uid < 0 else f'another user (uid {uid})'}")
        self.packet, self.fds, self.uid = packet, fds, uid


def ask_who(sock: socket.socket) -> None:
    """Have `receive` look at who has sent each datagram: it raises `Foreign` for those of other users."""
    sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep messages apart and tell when the other end is gone."""
    import socket

    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def connect(sock: AnySocket, name: str | bytes, until: float = _ENDLESS) -> None:
    """By a blocking socket; waits while others wait to be let in. Raises `BlockingIOError`: not by then (monotonic)."""
    while True:
        left = max(until - time.monotonic(), 1e-6)  # 0 would mean for ever
        if left != _ENDLESS:
            sock.setsockopt(SOL_SOCKET, SO_SNDTIMEO, struct.pack("ll", int(left), max(int(left % 1 * 1e6), 1)))
        sock.connect(name)
        try:
            sock.getpeername()
            return
        except OSError:
            pass  # a signal came, and Python takes that for a connection which is still to come, as over a network


def send(sock: AnySocket, packet: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send one datagram. `BlockingIOError` when a non-blocking socket is full, or any with MSG_DONTWAIT in `flags`.

    Raises:
        Crowded: this user may have no more descriptors under way, for now.
        OSError: it has more descriptors than `MOST` (EMSGSIZE).
    """
    if not fds:
        sock.send(packet, flags | MSG_NOSIGNAL)
    elif len(fds) <= FDS:
        try:
            sock.sendmsg([packet], [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))], flags | MSG_NOSIGNAL)
        except OSError as exc:
            if exc.errno == ETOOMANYREFS:
                raise Crowded from None
            raise
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
                    raise OSError(EMSGSIZE, f"a message with {len(fds)} descriptors has no room in a socket") from None
            send(sock, _MORE + packet, [outer.fileno()], flags)


def deliver(sock: AnySocket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """As `send`, by a blocking socket: waits, too, while there are too many descriptors under way."""
    while True:
        try:
            return send(sock, packet, fds)
        except Crowded:
            if has_ended(sock):
                raise BrokenPipeError("the other end is gone") from None
            time.sleep(AGAIN)


def receive(sock: AnySocket, flags: int = 0, on_reset: Callable[[], object] | None = None) -> tuple[bytes, list[int]]:
    """Receive one datagram; b"" when the other end is gone. `BlockingIOError` when there is none yet.

    It waits for nothing but the datagram itself, and takes no more descriptors than `MOST`, whoever has sent it.

    Args:
        on_reset: called when the other end has gone, with all its copies, and had not taken the last that we had sent.

    Raises:
        Foreign: see `ask_who`.
        Missing: not all of its descriptors could be taken; those that could are closed.
        ValueError: it is none of ours: too large, or its descriptors are; what came with it is closed.
    """
    try:
        came = sock.recvmsg(*_SIZE, *_ROOM, flags | MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # told once (af_unix.c, unix_release_sock); what it had sent is still here
        if on_reset is not None:
            on_reset()
        came = sock.recvmsg(*_SIZE, *_ROOM, flags | MSG_CMSG_CLOEXEC)
    packet, rights, told, _ = came
    if not told & (MSG_TRUNC | MSG_CTRUNC) and (
        not rights or (len(rights) == 1 and rights[0][1] == _CREDENTIALS and rights[0][2][4:8] in _known)
    ):
        return packet, []
    one = Arrival(came)
    try:
        one.take(sock)
        return one.packet, one.fds
    finally:
        if not one.is_over:
            one.fds = []  # they are the caller's now


class Arrival:
    """A datagram, from the moment in which it leaves the socket until somebody has what is in it.

    What a signal's handler raises meanwhile loses nothing of it: `take` goes on with it when it is called again.

    Attributes:
        packet, fds: it, and its descriptors, which are closed with this object.
        is_over: it is not wanted, and closed.
    """

    is_over = _is_made = False

    def __init__(self, *came: Any) -> None:
        self.packet = b""
        self.fds: list[int] = []
        self._problem: ValueError | None = None
        # what recvmsg(2) has given: from the socket, then from the one that came with it
        self._came: list[Any] = [*came]
        self._inner: list[AnySocket] = []  # that one
        self._is_made = True

    def take(self, sock: AnySocket, flags: int = 0, users: Collection[int] | None = None) -> None:
        """As `receive`, with the same errors; what came with a `Foreign` one stays open until `close`.

        Args:
            users: others whose messages are taken; and those of whom nobody knows who has sent them are not.
        """
        if not self._came and not self.packet and self._problem is None:
            try:
                # in one step, between which and the next no handler of a signal comes (`descriptors.into`, and quicker)
                self._came.extend(map(sock.recvmsg, _SIZE, _ROOM, (flags | MSG_CMSG_CLOEXEC,)))
            except ConnectionResetError:  # as above
                self._came.extend(map(sock.recvmsg, _SIZE, _ROOM, (flags | MSG_CMSG_CLOEXEC,)))
        if self._came:
            self._read(users)
        if self._problem is not None:
            if not isinstance(self._problem, Foreign):
                self.close()
            raise self._problem
        if not self.packet:
            shut_all(self.fds)

    @property
    def has_come(self) -> bool:
        """Whether there is something in it."""
        return bool(self.packet or self._came)

    def close(self) -> None:
        """It is not wanted."""
        self.is_over = True
        if self._came:
            self._have(self.packet, self._numbers())
            self._came.clear()
        shut_all(self.fds)
        while self._inner:
            self._inner.pop().close()

    def __del__(self) -> None:
        if self._is_made:  # to the end
            self.close()

    def _have(self, packet: bytes, fds: list[int]) -> None:
        """That is what came."""
        self.packet, self.fds = packet, fds

    def _read(self, users: Collection[int] | None) -> None:
        """Make sense of what came. Until it is cleared that can be done again."""
        packet, rights, flags, _ = self._came[0]
        fds, sender = _parsed(rights)
        self._problem = None
        if flags & (MSG_TRUNC | MSG_CTRUNC):
            self._problem = Missing(packet.removeprefix(_MORE)) if flags & MSG_CTRUNC else ValueError(_FOREIGN)
        elif packet and not _is_taken(sender, users):
            self._problem = Foreign(packet, fds, struct.unpack_from("I", sender, 4)[0] if sender else -1)
        elif fds and packet[:1] == _MORE:
            packet = packet[1:]
            self._problem = self._read_inner(fds) if packet else ValueError(_FOREIGN)
            if isinstance(self._problem, Missing):
                self._problem = Missing(packet)
            fds = self._numbers()
        self._have(packet, fds)
        self._came.clear()
        while self._inner:
            self._inner.pop().close()

    def _read_inner(self, fds: list[int]) -> ValueError | None:
        """All that is in the socket that came with it, which nobody writes to any more. Returns what is wrong."""
        if len(fds) > 1:
            return ValueError(_FOREIGN)
        count, at = 0, 1
        try:
            if not self._inner:
                into(self._inner, AnySocket, -1, -1, -1, fds[0])
            while True:
                if at == len(self._came):
                    into(self._came, self._inner[0].recvmsg, *_SIZE, *_ROOM, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
                packet, rights, flags, _ = self._came[at]
                at += 1
                more = len(_parsed(rights)[0])
                count += more
                if flags & MSG_CTRUNC:
                    return Missing(b"")
                if not packet:
                    return None
                if packet != b"." or not more or count > MOST:
                    return ValueError(_FOREIGN)
        except OSError:  # no such socket, or somebody still writes to it
            return ValueError(_FOREIGN)

    def _numbers(self) -> list[int]:
        """Of all descriptors that came, but for that of a socket which sees to itself."""
        found = [fd for came in self._came for fd in _parsed(came[1])[0]]
        return found[len(self._inner) :]


def waiting(sock: AnySocket) -> int:
    """How many bytes of datagrams there are to be received (FIONREAD, unix(7))."""
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), "little")


def _parsed(rights: Sequence[tuple[int, int, bytes]]) -> tuple[list[int], bytes]:
    """What came beside a datagram: descriptors, and the credentials of its sender."""
    fds: list[int] = []
    sender = b""
    for level, kind, data in rights:
        if level == SOL_SOCKET:
            if kind == SCM_RIGHTS:
                fds += struct.unpack_from(f"{len(data) // 4}i", data)
            elif kind == _CREDENTIALS:
                sender = data
    return fds, sender


def _is_taken(sender: bytes, users: Collection[int] | None) -> bool:
    """Whether what that one sends is taken."""
    if not sender:
        return users is None
    if sender[:8] == _NOBODY:
        return False
    if sender[4:8] in _known:
        return True
    (uid,) = struct.unpack_from("I", sender, 4)
    if uid in (os.getuid(), os.geteuid()):
        _known.add(sender[4:8])
        return True
    return users is not None and uid in users


def is_gone(exc: OSError) -> bool:
    """Whether `send` or `receive` has raised this as there is nobody at the other end any more."""
    return isinstance(exc, ConnectionError) or exc.errno == ENOTCONN


def passes(exc: OSError) -> bool:
    """Whether what has raised this may go well a moment later: there is no room, no memory or no descriptor for now."""
    return exc.errno in _PASSING


def readable(seconds: float, *fds: int) -> bool:
    """Wait so many seconds, or without an end (infinity), until something can be read from one of them."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    until = time.monotonic() + seconds
    while True:
        if poll.poll(None if seconds == _ENDLESS else min(max(seconds, 0), LONGEST) * 1000):
            return True
        seconds = until - time.monotonic()
        if seconds <= 0:
            return False


def has_ended(sock: AnySocket, seconds: float = 0.0) -> bool:
    """Whether the other end is gone, and has left nothing to read; so many seconds are waited for that."""
    try:
        if seconds:
            readable(seconds, sock.fileno())
        return not sock.recv(1, MSG_PEEK | MSG_DONTWAIT)
    except OSError as exc:
        return not passes(exc)
    except ValueError:
        return True  # ours is closed


def close(fds: Sequence[int]) -> None:
    """Close all of them: whatever close(2) says, they are."""
    shut(*fds)
