"""Both ends of what a worker is given: two pipes, and a function worker's channel with its function in it."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any

from ..child import _socket, _wire
from ..spec import Std
from ._call import own_argv, search_path
from ._plan import WorkerPlan
from ._standard import hold_standard


class Ends:
    """Ours are non-blocking; all are close-on-exec, and none of the worker's is 0, 1 or 2.

    Raises:
        OSError: out of descriptors; nothing stays open.
    """

    def __init__(self, worker: WorkerPlan) -> None:
        self.stdout: int | None = None
        self.stderr: int | None = None
        self.channel: socket.socket | None = None
        self.their_stdout: int | None = None
        self.their_stderr: int | None = None
        self.their_channel: int | None = None
        hold_standard()
        try:
            if Std.OUT in worker.pipes:
                self.stdout, self.their_stdout = _pipe()
            if Std.ERR in worker.pipes:
                self.stderr, self.their_stderr = _pipe()
            if worker.function is not None:
                self.channel, theirs = _socket.pair()
                self.their_channel = above_two(theirs.detach())
                if worker.call is not None:
                    call = worker.call
                    setup = (search_path(), own_argv(), call.main, call.show_locals)
                    packet, fds = _wire.encode(_wire.SETUP, setup)
                    try:
                        _socket.send(self.channel, packet, fds)
                    finally:
                        _socket.close(fds)
                    _socket.send(self.channel, call.packet, call.fds)
                self.channel.setblocking(False)
        except BaseException:
            self.close_ours()
            self.close_theirs()
            raise

    def disown(self) -> list[int]:
        """In a forked copy (see `forked`): the descriptors, which are not ours to close any more."""
        fds = disowned(self)
        fds += [fd for fd in (self.their_stdout, self.their_stderr, self.their_channel) if fd is not None]
        self.stdout = self.stderr = self.channel = None
        self.their_stdout = self.their_stderr = self.their_channel = None
        return fds

    def close_ours(self) -> None:
        """It was not started."""
        for fd in (self.stdout, self.stderr):
            if fd is not None:
                os.close(fd)
        if self.channel is not None:
            self.channel.close()
        self.stdout = self.stderr = self.channel = None

    def close_theirs(self) -> None:
        """It has its copies, or never will."""
        for fd in (self.their_stdout, self.their_stderr, self.their_channel):
            if fd is not None:
                os.close(fd)
        self.their_stdout = self.their_stderr = self.their_channel = None


def disowned(one: Any, read: bool = False) -> list[int]:
    """The descriptors of our ends, in a forked copy; those of pipes are another's once somebody `read` there."""
    fds = [fd for fd in (one.stdout, one.stderr) if fd is not None and not read]
    if one.channel is not None and one.channel.fileno() >= 0:
        fds.append(one.channel.detach())
    return fds


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    try:
        return reader, above_two(writer)
    except OSError:
        os.close(reader)
        raise


def above_two(fd: int) -> int:
    """Our own standard streams may be closed: keep clear of the child's."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)
