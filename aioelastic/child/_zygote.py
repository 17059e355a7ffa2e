"""The zygote: one small process with a single thread that has imported what workers need, and forks them on request.

It speaks over one socket, which is its lifeline too: when that closes, the supervisor is gone, and so are its workers.
It leaves by itself after a time without any.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from . import _order, _place, _socket, _wire, _work

_PR_SET_PDEATHSIG = 1
# that end a process by default and are not its own fault
_LATER = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPWR),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)


def main() -> NoReturn:
    """Serve until the supervisor is gone or there was nothing to do for long enough."""
    control = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    _outlive_signals()
    # it was started with all signals blocked; what is imported may start processes, which would inherit that
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        packet, fds = _socket.receive(control)
        (cwd, path, argv, where, preload, idle), _ = _order.decode(packet, fds)
        _socket.close(fds)
        _work.adopt(path, argv)
        with contextlib.suppress(OSError):  # gone, or not to be entered: what needs it will say so
            os.chdir(cwd)
        problem = _warm_up(preload, where)
        os.chdir("/")  # a file system that is to be unmounted is not held
        _outlive_signals()  # whatever was imported has set
        if problem is None:
            _socket.send(control, *_order.encode(_order.READY, (os.getpid(),)))
            Zygote(control).serve(idle)
        else:
            _socket.send(control, *_order.encode(_order.BROKEN, problem))
    except (BrokenPipeError, ConnectionResetError):
        pass
    os._exit(0)


class Zygote:
    """Serves one supervisor."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._libc = ctypes.CDLL(None)
        # pidfd → (id, pid, how it ends with the supervisor), until they are reaped
        self._children: dict[int, tuple[int, int, tuple[int, float] | None]] = {}
        self._epoll = select.epoll()

    def serve(self, idle: float) -> None:
        """Until the other end closes, or nobody wanted anything for `idle` seconds."""
        self._epoll.register(self._control, select.EPOLLIN)
        try:
            while events := self._epoll.poll(None if self._children else idle):
                for fd, _ in events:
                    if fd == self._control.fileno():
                        try:
                            packet, fds = _socket.receive(self._control)
                        except _socket.Missing as exc:  # no descriptors left: that start is refused, and no other
                            self._refuse(exc.packet)
                            continue
                        if not packet:
                            return
                        self._take(packet, fds)
                    elif fd in self._children:
                        self._tell_exit(fd)
        finally:
            self._give_grace()
            for pidfd, (_, pid, _) in self._children.items():
                _kill(pidfd, pid)

    def _give_grace(self) -> None:
        """The supervisor is gone, and some of its groups give their workers time to end."""
        now = time.monotonic()
        graces = {}
        for pidfd, (_, pid, lost) in list(self._children.items()):
            if lost is None:
                _kill(pidfd, pid)
                continue
            for signum in (lost[0], signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(pidfd, signum)
            graces[pidfd] = now + lost[1]
        if graces:
            self._epoll.unregister(self._control)
        while graces:
            for pidfd, _ in self._epoll.poll(max(min(graces.values()) - time.monotonic(), 0)):
                _, pid, _ = self._children.pop(pidfd)
                self._epoll.unregister(pidfd)
                _kill(pidfd, pid)  # others of its group
                graces.pop(pidfd, None)
            for pidfd in [one for one, until in graces.items() if until <= time.monotonic()]:
                del graces[pidfd]

    def _take(self, packet: bytes, fds: list[int]) -> None:
        try:
            body, given = _order.decode(packet, fds)
            if packet[:1] == _order.FORK:
                self._fork(body, given)
            elif packet[:1] == _order.SIGNAL:
                self._signal(*body)
        finally:
            _socket.close(fds)

    def _refuse(self, packet: bytes) -> None:
        body, _ = _order.decode(packet, [])
        if packet[:1] == _order.FORK:
            self._say(_order.REFUSED, (body[0], errno.EMFILE, os.strerror(errno.EMFILE)))

    def _fork(self, body: tuple[Any, ...], fds: list[int]) -> None:
        number, environ, cwd, place, streams, mark, lost, state, stop = body
        ends = iter(fds)
        channel = next(ends)
        stdout = next(ends) if streams & 1 else None
        stderr = next(ends) if streams & 2 else None
        words = unsafe()
        if words:
            self._say(_order.REFUSED, (number, 0, words))
            return
        me = os.getpid()
        # a signal for the new process waits until that has its own dispositions
        signal.pthread_sigmask(signal.SIG_SETMASK, _place.BLOCKED)
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                    if os.getppid() == me:  # else it died before we could ask to be told
                        _work.copied(channel, stdout, stderr, environ, cwd, state, stop, place, mark)
                finally:
                    os._exit(1)
        except OSError as exc:
            self._say(_order.REFUSED, (number, exc.errno, exc.strerror or str(exc)))
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as exc:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._say(_order.REFUSED, (number, exc.errno, exc.strerror or str(exc)))
            return
        self._children[pidfd] = (number, pid, lost)
        self._epoll.register(pidfd, select.EPOLLIN)
        self._say(_order.STARTED, (number, pid, 0), [pidfd])  # fork(2) begins a count of its own

    def _tell_exit(self, pidfd: int) -> None:
        at, wall = time.monotonic_ns(), time.time()
        number, pid, _ = self._children.pop(pidfd)
        _, status, rusage = os.wait4(pid, 0)
        self._epoll.unregister(pidfd)  # closing is not enough: the supervisor holds the same open file
        os.close(pidfd)
        try:
            os.killpg(pid, 0)  # the id of a group that has members is never given to a new process
            left = True
        except ProcessLookupError:
            left = False
        except PermissionError:
            left = True  # they changed their user
        self._say(_order.EXITED, (number, status, tuple(rusage), at, wall, left))

    def _signal(self, number: int, signum: int) -> None:
        for one, pid, _ in self._children.values():
            if one == number:  # it is not reaped, so the group is its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signum)

    def _say(self, kind: bytes, body: tuple[Any, ...], fds: list[int] | None = None) -> None:
        packet, large = _order.encode(kind, body)
        _socket.send(self._control, packet, [*large, *(fds or [])])
        _socket.close(large)


def _outlive_signals() -> None:
    """Whoever signals a whole service, as systemd does, means the program, which has yet to see its workers to their
    end. Not ignored, which programs that are started meanwhile would inherit."""
    for signum in _LATER:
        signal.signal(signum, _nothing)


def _nothing(signum: int, frame: object) -> None:
    pass


def _kill(pidfd: int, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # not reaped, so the group is its own


def unsafe() -> str:
    """Why this process must not be forked, in words; empty when it may."""
    others = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
    if others:
        return f"threads run in it ({', '.join(others)}), and a forked copy would have their locks but not them"
    try:
        opened = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return ""  # there is no /proc, and so no telling
    for fd in opened:
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("/dev/nvidia"):
            return "CUDA is initialised in it, and a forked copy cannot use the GPU"
    return ""


def _warm_up(preload: list[str], where: tuple[str, str] | None) -> tuple[str, str] | None:
    """Import all; returns what went wrong, in words, and its traceback."""
    for name in preload:
        try:
            importlib.import_module(name)
        except BaseException as exc:
            return f"preload {name!r} could not be imported: {type(exc).__name__}: {exc}", traceback.format_exc()
    try:
        _work.import_main(where)
    except BaseException as exc:
        return f"the main module could not be imported: {type(exc).__name__}: {exc}", traceback.format_exc()
    _wire.memory()  # workers that have arrays will need it
    words = unsafe()
    if words:
        return f"it cannot be forked after its imports: {words}", ""
    sys.stdout.flush()
    gc.collect()
    gc.freeze()  # collecting would write to, and so copy, every page that workers share
    return None
