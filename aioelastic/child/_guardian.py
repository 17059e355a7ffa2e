"""The guardian: one tiny process per program that owns workers. It starts them, reaps them, and outlives its program
for as long as it takes to end them.

It is a child subreaper (prctl(2)): whatever leaves its group or session, by setsid, a double fork or a cleaned
environment, becomes its child when its parent ends. It has one thread and a small heap, so that starting a process is
cheap and safe whatever the program is. When the program dies it kills all that it holds.

It is itself guarded by its keeper, a forked twin that only waits: should the guardian be killed, all its children
become the keeper's, and are killed. (PR_SET_PDEATHSIG would reach the workers, but not what they have started.)

Imports little, and not `ctypes`, `signal` or `socket` but their C halves: the first worker of a program waits for it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import errno
import os
import resource
import select
import time
from _socket import socket

from . import _mark, _order, _place, _socket, _start
from ._children import children, end_all, end_children, listed, own_list
from ._libc import function
from ._link import Link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_SFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


def main() -> NoReturn:
    """Serve until the program is gone. Standard input is its control socket; the first datagram there has its pidfd.

    It was started with all signals blocked, and they stay so: whoever signals a whole service, as systemd does, means
    the program, which has yet to see its workers to their end.
    """
    prctl, signalfd = function("prctl"), function("signalfd")
    control = socket(fileno=os.dup(0))
    packet, fds = _socket.receive(control)
    if not packet:
        os._exit(0)  # it has died meanwhile
    (lifeline,), (temporary, pid) = fds, _order.decode(packet, fds)[0]
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    guardian = os.fork()
    if guardian:
        prctl(_PR_SET_NAME, b"aio-keeper", 0, 0, 0)
        control.close()
        os.dup2(null, 2)
        ended, status = os.waitpid(-1, 0)
        while ended != guardian:  # others only come when it is gone
            ended, status = os.waitpid(-1, 0)
        if status:
            end_children()
        os._exit(0)
    prctl(_PR_SET_NAME, b"aio-guardian", 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # fork(2) does not hand it on
    deaths = signalfd(-1, (1 << (_signal.SIGCHLD - 1)).to_bytes(128, "little"), _SFD_FLAGS)
    keeping = os.pidfd_open(keeper)
    asked, graces, guard = False, None, None
    try:
        if os.getppid() == keeper and deaths >= 0:
            guard = Guardian(control, (lifeline, keeping), deaths, null)
            asked = guard.serve()
            graces = None if asked else guard.ask_to_end()
    except BaseException:
        import traceback

        traceback.print_exc()  # a bug of ours
    finally:
        if not asked:
            os.dup2(null, 2)  # whoever reads that shall not wait for what will not die
            end_all(graces, lifeline if os.getppid() == keeper else None, temporary, pid)
        if guard is not None:
            _place.remove(guard.directories, kill=not asked)
        os._exit(0)


class Child:
    """A worker or a helper that runs, or is not reaped yet."""

    __slots__ = ("link", "mark", "number", "pid")

    def __init__(self, pid: int, mark: int, number: int, link: Link | None) -> None:
        self.pid = pid
        self.mark = mark
        self.number = number
        self.link = link


class Guardian:
    """Serves one program.

    Attributes:
        directories: of its groups, control groups too, to be removed at the end.
    """

    def __init__(self, control: socket, lifelines: tuple[int, ...], deaths: int, null: int) -> None:
        self._control = control
        self._lifelines = lifelines
        self._deaths = deaths
        self._null = null
        self._links: dict[int, Link] = {}
        self._children: dict[int, Child] = {}  # by pidfd, until they are reaped
        self._list = own_list()
        self._adopted: set[int | None] | None = None  # marks of what was left to us, if we have looked
        self._graces: dict[int, float] = {}  # by pid: until when (monotonic clock) a lost worker has time to end
        self._latest = 0.0  # when the last grace of any group is over
        self.directories: list[str] = []
        self._epoll = select.epoll()

    def serve(self) -> bool:
        """Until the program, or the keeper, is gone. Whether it was asked to leave: then its own children are gone."""
        for fd in (*self._lifelines, self._deaths, self._control.fileno()):
            self._epoll.register(fd, select.EPOLLIN)
        looking = False
        while True:
            # exits are queued in their order; a look for others comes after those that are known by then
            events = self._epoll.poll(0 if looking else self._next())
            if looking and not events:
                looking = self._reap_others()
            self._adopted = None
            for fd, event in events:
                if fd in self._children:
                    self._tell_exit(fd)
                elif fd == self._deaths:
                    os.read(self._deaths, 4096)
                    looking = True
                elif fd in self._links:
                    self._serve_link(self._links[fd], event)
                elif fd in self._lifelines:
                    return False
                elif fd == self._control.fileno() and (end := self._hear()) is not None:
                    return end

    def ask_to_end(self) -> dict[int, float]:
        """The program is gone. Returns until when (monotonic clock) which children have time to end by themselves."""
        for link in list(self._links.values()):
            self._forget(link)
        zygotes = {child.pid: self._latest for child in self._children.values() if child.number}
        return zygotes | self._graces  # zygotes see to their own, and leave

    def _hear(self) -> bool | None:
        """None: there will be more. True: it was the last word of the program. False: the program is gone."""
        try:
            packet, fds = _socket.receive(self._control)
        except ValueError:
            return None  # no descriptors left: whoever sent it sees his socket close
        if not packet:
            return False
        if packet[:1] == _order.LEAVE:
            (ends,) = _order.decode(packet, fds)[0]
            self._end_own()
            if not ends:
                self.directories.clear()  # the program goes on, with another guardian
            return True
        try:
            body, given = _order.decode(packet, fds)
            if packet[:1] == _order.CONNECT:
                try:
                    sock = socket(fileno=os.dup(given[0]))
                except OSError:
                    return None  # as above
                sock.setblocking(False)
                self._epoll.register(sock, select.EPOLLIN)
                self._links[sock.fileno()] = Link(sock, self._epoll)
            elif packet[:1] == _order.HELPER:
                number, argv, environ, state = body
                stdin, stderr = given
                try:
                    os.chdir("/")
                    stdio = (stdin, self._null, stderr)
                    if state is None:
                        pid = _start.spawn(argv[0], argv, environ, stdio, _place.BLOCKED)
                    else:
                        pid = _start.fork(argv[0], argv, environ, stdio, _place.BLOCKED, state=state)
                    self._keep(pid, 0, number, None)
                except OSError:
                    pass  # its own socket closes, which says it
            elif packet[:1] == _order.REMOVE:
                self.directories = [one for one in self.directories if os.access(one, os.F_OK)] + [body[0]]
            elif packet[:1] == _order.END:
                for child in self._children.values():
                    if child.link is None and child.number == body[0]:
                        self._kill(child)
        finally:
            _socket.close(fds)
        return None

    def _end_own(self) -> None:
        # groups have ended what their workers left behind, or were told to leave it (`Stop(scope="leader")`)
        for child in self._children.values():
            self._kill(child)
        for child in self._children.values():
            os.waitpid(child.pid, 0)

    def _serve_link(self, link: Link, event: int) -> None:
        if event & select.EPOLLOUT:
            link.write()
        if not event & ~select.EPOLLOUT:
            return
        try:
            packet, fds = _socket.receive(link.sock)
        except BlockingIOError:
            return
        except _socket.Missing as exc:  # no descriptors left: that start is refused, and no other
            packet, fds = exc.packet, []
            if packet[:1] == _order.EXEC and packet[1:2] == _order.HERE:
                number = _order.decode(packet, fds)[0][0]
                link.say(_order.REFUSED, (number, errno.EMFILE, "pipes"))
                return
        except (OSError, ValueError):
            packet, fds = b"", []
        if not packet:
            self._forget(link)
            return
        try:
            body, given = _order.decode(packet, fds)
            if packet[:1] == _order.EXEC:
                self._start(link, body, given)
            elif packet[:1] == _order.SIGNAL:
                number, signum = body
                for child in self._children.values():
                    if child.link is link and child.number == number:
                        self._signal(os.killpg, child, signum)
            elif packet[:1] == _order.LEFT:
                link.say(_order.LEFT, (self._left(),))
            elif packet[:1] == _order.GROUP:
                link.environ, link.cwd, link.lost = body
            elif packet[:1] == _order.TRY:
                link.say(_order.TRIED, _start.attempt(*body))
        except Exception:  # not a message of ours
            self._forget(link)
        finally:
            _socket.close(fds)

    def _forget(self, link: Link) -> None:
        """Its group is over, or its supervisor gone: nothing of it shall run."""
        del self._links[link.sock.fileno()]
        link.close()
        until = 0.0
        if link.lost is not None:
            until = time.monotonic() + link.lost[1]
            self._latest = max(self._latest, until + 1)
        for child in self._children.values():
            if child.link is not link:
                continue
            child.link = None
            child.number = 0
            if link.lost is None:
                self._kill(child)
            else:
                self._signal(os.kill, child, link.lost[0])
                self._signal(os.kill, child, _signal.SIGCONT)
                self._graces[child.pid] = until

    def _next(self) -> float | None:
        """Kill those whose grace is over; returns the seconds until the next one's is."""
        now = time.monotonic()
        for child in self._children.values() if self._graces else ():
            if self._graces.get(child.pid, now) < now:
                del self._graces[child.pid]
                self._kill(child)
        return min(self._graces.values()) - now if self._graces else None

    def _start(self, link: Link, body: tuple[Any, ...], fds: list[int]) -> None:
        number, program, argv, overlay, cwd, mark, streams, place, state, stop = body
        environ = dict(link.environ)
        for key, value in overlay.items():
            if value is None:
                environ.pop(key, None)
            else:
                environ[key] = value
        given = iter(fds)
        stdio = tuple(next(given) if streams >> at & 1 else self._null for at in range(3))
        where = cwd or link.cwd
        try:
            os.chdir(where)
            where = program
            if state is None and place is None:
                pid = _start.spawn(program, argv, environ, stdio, (), stop, mark)
            else:
                pid = _start.fork(program, argv, environ, stdio, (), stop, mark, state, place)
            pidfd = self._keep(pid, mark, number, link)
        except OSError as exc:
            link.say(_order.REFUSED, (number, exc.errno, exc.filename or os.fsdecode(where)))
            return
        floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            link.say(_order.STARTED, (number, pid, floor * 1024), pidfd)
        except OSError as exc:  # no descriptor left: it goes, and nobody else
            child = self._children[pidfd]
            child.link, child.number = None, 0
            self._kill(child)
            link.say(_order.REFUSED, (number, exc.errno, os.fsdecode(program)))

    def _keep(self, pid: int, mark: int, number: int, link: Link | None) -> int:
        """Watch it; returns its pidfd."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._children[pidfd] = Child(pid, mark, number, link)
        self._epoll.register(pidfd, select.EPOLLIN)
        return pidfd

    def _tell_exit(self, pidfd: int) -> None:
        at, wall = time.monotonic_ns(), time.time()
        child = self._children.pop(pidfd)
        self._graces.pop(child.pid, None)
        _, status, rusage = os.wait4(child.pid, 0)
        self._epoll.unregister(pidfd)  # closing is not enough: the supervisor holds the same open file
        os.close(pidfd)
        if child.link is None:
            return
        try:
            os.killpg(child.pid, 0)  # the id of a group that has members is never given to a new process
            left = True
        except ProcessLookupError:
            left = self._has_left(child.mark)
        except PermissionError:
            left = True  # they changed their user
        child.link.say(_order.EXITED, (child.number, status, tuple(rusage), at, wall, left))

    def _has_left(self, mark: int) -> bool:
        """Whether something that has this mark, or none, was left to us. One look for all that ended together."""
        if self._adopted is None and self._list >= 0 and listed(self._list).count(b" ") == len(self._children):
            self._adopted = set()  # all that there are, are known
        if self._adopted is None:
            known = {child.pid for child in self._children.values()}
            self._adopted = {_mark.read(pid) for pid in children(os.getpid()) if pid not in known}
        return mark in self._adopted or None in self._adopted

    def _reap_others(self) -> bool:
        """Reap those that were left to us. Whether to look again, after one of our own."""
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
            if info is None:
                return False
            if any(child.pid == info.si_pid for child in self._children.values()):
                return True
            os.waitpid(info.si_pid, 0)

    def _left(self) -> list[int]:
        """Who was left to us and is not reaped yet."""
        self._reap_others()
        known = {child.pid for child in self._children.values()}
        # twice: the list is not read at one moment, and one that goes may hide its neighbour (proc(5))
        return sorted({pid for _ in range(2) for pid in children(os.getpid())} - known)

    def _kill(self, child: Child) -> None:
        self._signal(os.kill, child, _signal.SIGKILL)
        self._signal(os.killpg, child, _signal.SIGKILL)

    def _signal(self, how: Callable[[int, int], None], child: Child, signum: int) -> None:
        try:
            how(child.pid, signum)  # it is not reaped, so pid and group are its own
        except (ProcessLookupError, PermissionError):
            pass
