"""The zygote: one small process with a single thread that has imported what workers need, and forks them on request.

It speaks over one socket, which is its lifeline too: when that closes, the supervisor is gone, and so are its workers.
It leaves by itself after a time without any.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from . import _order, _socket, _wire, _work
from ._children import status_of_dead
from ._fork import fork
from ._link import Link, complain

REAP = 1.0  # seconds between two looks at whether a debugger has let go of who has ended
# that end a process by default and are not its own fault
_LATER = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPWR),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)


def main() -> NoReturn:
    """Serve until the supervisor is gone or there was nothing to do for long enough."""
    try:
        _main()
    except OSError as exc:  # which its supervisor learns from its end
        complain(f"a zygote could not begin: {exc}")
    os._exit(0)


def _main() -> None:
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


class Zygote:
    """Serves one supervisor. It never waits for a child or for the supervisor, and no request ends it."""

    def __init__(self, control: socket.socket) -> None:
        self._epoll = select.epoll()
        control.setblocking(False)
        self._control = control
        self._link = Link(control, self._epoll)
        # pidfd → (id, pid, how it ends with the supervisor), until they have ended
        self._children: dict[int, tuple[int, int, tuple[int, float] | None]] = {}
        self._unreaped: set[int] = set()  # have ended, and a debugger holds them
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # workers are told theirs

    def serve(self, idle: float) -> None:
        """Until the other end closes, or nobody wanted anything for `idle` seconds."""
        self._epoll.register(self._control, select.EPOLLIN)
        try:
            while True:
                bound = REAP if self._unreaped else None if self._children else idle
                events = self._epoll.poll(bound)
                self._reap()
                if not events and bound is idle:
                    return
                for fd, event in events:
                    try:
                        if fd in self._children:
                            self._tell_exit(fd)
                        elif fd == self._control.fileno() and not self._hear(event):
                            return
                    except OSError as exc:  # it concerns that request alone
                        complain(f"a zygote could not do its work: {exc}")
                    except Exception:
                        traceback.print_exc()  # a bug of ours
        finally:
            self._give_grace()
            for pidfd, (_, pid, _) in self._children.items():
                _kill(pidfd, pid)

    def _hear(self, event: int) -> bool:
        """False: the supervisor is gone."""
        if event & select.EPOLLOUT:
            self._link.write()
        if not event & ~select.EPOLLOUT:
            return True
        try:
            packet, fds = _socket.receive(self._control)
        except BlockingIOError:
            return True
        except _socket.Missing as exc:  # no descriptors left: that start is refused, and no other
            if exc.packet[:1] == _order.FORK:
                self._refuse(_order.number(exc.packet), OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            return True
        if not packet:
            return False
        try:
            body, given = _order.decode(packet, fds)
            if packet[:1] == _order.FORK:
                self._fork(body, given)
            elif packet[:1] == _order.SIGNAL:
                self._signal(*body)
        finally:
            _socket.close(fds)
        return True

    def _reap(self) -> None:
        for pid in list(self._unreaped):
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self._unreaped.discard(pid)
            except ChildProcessError:
                self._unreaped.discard(pid)

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

    def _refuse(self, number: int, exc: OSError) -> None:
        self._link.say(_order.REFUSED, (number, exc.errno or 0, exc.strerror or str(exc)))

    def _fork(self, body: tuple[Any, ...], fds: list[int]) -> None:
        number, environ, cwd, place, streams, mark, lost, state, stop = body
        ends = iter(fds)
        channel = next(ends)
        stdout = next(ends) if streams & 1 else None
        stderr = next(ends) if streams & 2 else None
        words = unsafe()
        if words:
            self._link.say(_order.REFUSED, (number, 0, words))
            return

        def become(_: str) -> None:
            _work.copied(channel, stdout, stderr, environ, cwd, state, place, mark)

        pid, pidfd = 0, -1
        try:
            pid = fork(become, ignored=state[-1], stop=stop, dies_with_us=True)
            pidfd = os.pidfd_open(pid)
            self._epoll.register(pidfd, select.EPOLLIN)
            self._link.say(_order.STARTED, (number, pid, 0), pidfd)  # fork(2) begins a count of its own
        except OSError as exc:
            if pid:
                os.kill(pid, signal.SIGKILL)
                self._unreaped.add(pid)
            _socket.close((pidfd,) if pidfd >= 0 else ())
            self._refuse(number, exc)
            return
        self._children[pidfd] = (number, pid, lost)

    def _tell_exit(self, pidfd: int) -> None:
        at, wall = time.monotonic_ns(), time.time()
        number, pid, _ = self._children.pop(pidfd)
        with contextlib.suppress(OSError):
            self._epoll.unregister(pidfd)  # closing is not enough: the supervisor holds the same open file
        _socket.close((pidfd,))
        status: int | None = None
        used: tuple[Any, ...] | None = None
        with contextlib.suppress(ChildProcessError):  # somebody else has reaped it: how it ended is not known
            reaped, status, rusage = os.wait4(pid, os.WNOHANG)
            if reaped:
                used = tuple(rusage)
            else:
                self._unreaped.add(pid)
                status = status_of_dead(pid)
        try:
            os.killpg(pid, 0)  # the id of a group that has members is never given to a new process
            left = True
        except ProcessLookupError:
            left = False
        except PermissionError:
            left = True  # they changed their user
        self._link.say(_order.EXITED, (number, status, used, at, wall, left))

    def _signal(self, number: int, signum: int) -> None:
        for one, pid, _ in self._children.values():
            if one == number:  # it is not reaped, so the group is its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signum)


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
    except OSError as exc:
        return f"it cannot look at its descriptors ({exc.strerror})"
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
