"""How bytes get to what stands behind `sys.stdout` or `sys.stderr`: by a descriptor, or by an object's `write`."""

from __future__ import annotations

import array
import codecs
import contextlib
import errno
import fcntl
import io
import os
import select
import socket
import stat
import sys
import termios
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from typing import TextIO

from ..system.descriptors import shut
from ..system.first_streams import AT_FIRST

RECORD = 8192  # bytes of a datagram, at most: what print() would send at once, and its reader is ready for
FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # a plain number: an enum takes longer than the call
MANY = 1_048_576
FEW = 65_536  # for what may block: what is in a thread's hands cannot be dropped

Parts = Sequence[bytes | memoryview]
Key = tuple[int, int, int]


def blocked(exc: Exception) -> bool:
    """Whether nothing was written because the target takes nothing now, and is worth waiting for."""
    return isinstance(exc, BlockingIOError) or (
        isinstance(exc, OSError) and exc.errno in (errno.EINTR, errno.ENOBUFS, errno.ENOMEM)
    )


def words(exc: Exception) -> str:
    """What a user is told of it."""
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else f"{type(exc).__name__}: {exc}"


class Closed(Exception):
    """There is nothing to write to."""


class Writer:
    """One of them.

    Attributes:
        direct: `send` neither waits nor runs foreign code: it may be called on an event loop.
        fd: to be waited for when it is full; -1: nobody tells when it takes more.
        foreign: it is an object with buffers of its own.
        batch, pieces: how much it is given at once.
    """

    direct = False
    foreign = False
    fd = -1
    batch = MANY
    pieces = 64

    def send(self, parts: Parts) -> int:
        """Write; returns how many bytes. `BlockingIOError`: it is full."""
        raise NotImplementedError

    def watch(self, loop: AbstractEventLoop, callback: Callable[[AbstractEventLoop], object]) -> None:
        """Call it on the loop when there is room. `OSError`: nobody can tell."""
        loop.add_writer(self.fd, callback, loop)

    def unwatch(self, loop: AbstractEventLoop) -> None:
        """No more."""
        loop.remove_writer(self.fd)

    def disown(self) -> list[int]:
        """In a forked copy (see `forked_copies`): the descriptors, which are not its own any more."""
        fd, self.fd = self.fd, -1
        return [fd] if fd >= 0 else []

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            shut(fd)


class Opened(Writer):
    """A terminal or pipe that was opened anew: non-blocking, whatever its other owners want."""

    direct = True

    def __init__(self, fd: int) -> None:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        self.fd = os.open(f"/proc/self/fd/{fd}", flags)

    def send(self, parts: Parts) -> int:
        return os.writev(self.fd, parts)


class Stream(Writer):
    """A socket. Its blocking mode is shared with its other owners, so each call says that it must not wait."""

    direct = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._epoll: select.epoll | None = None
        self.fd = sock.fileno()

    def send(self, parts: Parts) -> int:
        return self._socket.sendmsg(parts, (), FLAGS)

    def watch(self, loop: AbstractEventLoop, callback: Callable[[AbstractEventLoop], object]) -> None:
        if self._epoll is None:  # uvloop makes what it watches non-blocking, for all owners: let it have this
            self._epoll = select.epoll()
            self._epoll.register(self.fd, select.EPOLLOUT)
        loop.add_reader(self._epoll.fileno(), callback, loop)

    def unwatch(self, loop: AbstractEventLoop) -> None:
        if self._epoll is not None:
            loop.remove_reader(self._epoll.fileno())

    def disown(self) -> list[int]:
        fds, self.fd = [self._socket.detach()], -1
        if self._epoll is not None:
            fds.append(self._epoll.fileno())
            self._epoll.close()
        return [fd for fd in fds if fd >= 0]

    def close(self) -> None:
        self.fd = -1
        if self._epoll is not None:
            self._epoll.close()
        self._socket.close()


class Records(Stream):
    """A socket that keeps messages apart: each of ours is short, and ends with a line where that is possible."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._most = RECORD

    def send(self, parts: Parts) -> int:
        data = memoryview(b"".join(parts))
        sent = 0
        while sent < len(data):
            one = bytes(data[sent : sent + self._most])
            if sent + len(one) < len(data):
                one = one[: one.rfind(b"\n") + 1] or one
            try:
                sent += self._socket.send(one, FLAGS)
            except OSError as exc:
                if exc.errno == errno.EMSGSIZE and self._most > 1:
                    self._most //= 2
                elif sent:
                    break  # it will come again, if it has not passed
                else:
                    raise
        return sent


class File(Writer):
    """A regular file, or what could not be opened anew: write(2) may take its time."""

    def __init__(self, fd: int, regular: bool) -> None:
        self._regular = regular
        if not regular:
            self.batch = FEW
            self._poll = select.poll()
        self.fd = os.dup(fd)
        if not regular:
            self._poll.register(self.fd, select.POLLOUT)

    def send(self, parts: Parts) -> int:
        if self._regular:
            return os.writev(self.fd, parts)
        if not self._poll.poll(0):
            raise BlockingIOError
        return os.write(self.fd, b"".join(parts)[: select.PIPE_BUF])  # so much does not block now, see pipe(7)


class Text(Writer):
    """An object that takes text: a notebook's, a test's, a codec's."""

    foreign = True
    batch = FEW
    pieces = 1

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.direct = _in_memory(text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._due = False  # a flush of what is written had to wait
        if not self.direct:
            self.fd = _nonblocking(text)  # not ours
        if self.fd >= 0:
            self._poll = select.poll()
            self._poll.register(self.fd, select.POLLOUT)

    def send(self, parts: Parts) -> int:
        data = b"".join(parts)
        if self._due:
            self._text.flush()
            self._due = False
        if self.fd >= 0:  # what it cannot pass on it may lose: give it what a pipe takes whole
            if not self._poll.poll(0):
                raise BlockingIOError
            data = data[: select.PIPE_BUF]
        before = self._decoder.getstate()
        try:
            self._write(self._decoder.decode(data))
        except BaseException:
            self._decoder.setstate(before)
            raise
        try:
            self._text.flush()
        except BlockingIOError:
            self._due = True  # it has taken the text, and will pass it on
        return len(data)

    def disown(self) -> list[int]:
        return []

    def close(self) -> None:
        del self._text

    def _write(self, text: str) -> None:
        try:
            self._text.write(text)
        except UnicodeEncodeError as exc:
            encoding = str(getattr(self._text, "encoding", None) or exc.encoding)
            try:
                self._text.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (UnicodeError, LookupError):
                self._text.write(text.encode("ascii", "backslashreplace").decode("ascii"))


def writer_for(stream: TextIO | None) -> tuple[Key, bool, Callable[[], Writer]]:
    """What stands behind it: what it is known by, whether it is a terminal, and a function that makes the writer.

    Raises:
        Closed: nothing.
    """
    if stream is None:
        raise Closed("is closed")
    try:
        if not _has_file(stream):
            return (-1, id(stream), 0), False, lambda: Text(stream)
        fd = stream.fileno()
        info = os.fstat(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except Exception as exc:  # somebody else's object: anything may come
        raise Closed(f"is closed ({exc})") from exc
    kind = stat.S_IFMT(info.st_mode)
    if flags & os.O_PATH or not kind or (stream in (sys.__stdout__, sys.__stderr__) and _is_another(fd, info)):
        raise Closed(f"is closed (descriptor {fd} is something else by now)")
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise Closed(f"is not open for writing (descriptor {fd})")
    key = (info.st_dev, info.st_ino, info.st_rdev)

    def make() -> Writer:
        if kind == stat.S_IFSOCK:
            sock = _socket(fd)
            return Stream(sock) if sock.type == socket.SOCK_STREAM else Records(sock)
        if kind == stat.S_IFIFO or (kind == stat.S_IFCHR and _can_be_opened(fd, info)):
            try:
                return Opened(fd)
            except OSError:
                pass  # not allowed (another user's terminal), no /proc, or nobody reads
        return File(fd, kind == stat.S_IFREG)

    return key, os.isatty(fd), make


def _is_another(fd: int, info: os.stat_result) -> bool:
    """Whether the number of a standard stream that was closed has been given to something else. What a program has by
    execve(2) or dup2(2) is not close-on-exec; what it opens itself is."""
    if not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
        return False
    return fd in AT_FIRST and AT_FIRST[fd] != (info.st_dev, info.st_ino)


def _can_be_opened(fd: int, info: os.stat_result) -> bool:
    """Whether to open that device anew gives the same one: a terminal, but not the master of one; /dev/null and its
    like."""
    return os.major(info.st_rdev) == 1 or (os.isatty(fd) and info.st_rdev != os.makedev(5, 2))


def room(fd: int) -> bool:
    """Whether what a stream of Python's holds back could be written there at once."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            waiting = array.array("i", [0])
            fcntl.ioctl(fd, termios.FIONREAD, waiting)
            return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) - waiting[0] >= 4 * io.DEFAULT_BUFFER_SIZE
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _socket(fd: int) -> socket.socket:
    """A socket object of our own for it."""
    before = os.get_blocking(fd)
    sock = socket.socket(fileno=os.dup(fd))
    if socket.getdefaulttimeout() is not None:  # it was told to wait so long, and made non-blocking for all its owners
        sock.settimeout(None)
        os.set_blocking(fd, before)
    return sock


def _has_file(stream: TextIO) -> bool:
    """Whether it writes text to a descriptor as it is. Objects with a descriptor that do something else are many."""
    if not isinstance(stream, io.TextIOWrapper) or type(stream).write is not io.TextIOWrapper.write:
        return False
    if stream.closed:
        raise ValueError("I/O operation on closed file")
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return isinstance(raw, io.FileIO | socket.SocketIO)


def _nonblocking(text: TextIO) -> int:
    """Its descriptor, if it has one that does not wait; else -1."""
    try:
        fd = text.fileno()
        return -1 if os.get_blocking(fd) else fd
    except Exception:  # somebody else's object: anything may come
        return -1


def _in_memory(text: TextIO) -> bool:
    """Whether its `write` is Python's own, and there is nothing behind it."""
    if isinstance(text, io.StringIO):
        return type(text).write is io.StringIO.write
    return (
        isinstance(text, io.TextIOWrapper)
        and type(text).write is io.TextIOWrapper.write
        and type(text.buffer) is io.BytesIO
    )
