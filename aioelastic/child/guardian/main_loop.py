"""The guardian: one tiny process per program that owns workers. It starts them, reaps them, and outlives its program
for as long as it takes to end them.

It is a child subreaper (prctl(2)): whatever leaves its group or session, by setsid, a double fork or a cleaned
environment, becomes its child when its parent ends. It has a small heap, so that starting a process is cheap and safe
whatever the program is. When the program dies it kills all that it holds.

It never blocks, and no request can end it. A start that hangs (the file system of a program, or of a directory, does
not answer) hangs in a thread, whose work another takes over (`replaceable_thread.py`); what is started meanwhile is
forked, and told by a pipe. A dead worker that a debugger holds is told at once, and reaped later (`children.py`). What
fails concerns the request or the connection that it came by. Only the end of the program, or its order to leave,
ends it.

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

from ...system.descriptors import shut
from ..kernel import process_setup
from ..kernel.child_processes import end_all, end_children
from ..kernel.forking import fork
from ..kernel.libc import function
from ..wire import datagrams, requests
from ..wire.links import Link, complain, show_error, silence
from . import process_start
from .children import Child, Children
from .process_start import Start
from .replaceable_thread import ReplaceableThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_SFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
LOOK = 1.0  # seconds between two looks for others that have ended, where no signalfd tells of them
LEAVING = 4.0  # seconds for what it holds to die


def main() -> NoReturn:
    """The whole life of that process."""
    try:
        _main()
    except OSError as exc:  # which the program learns from its end
        complain(f"the guardian could not begin: {exc}")
    os._exit(1)


def _main() -> NoReturn:
    """Serve until the program is gone. Standard input is its control socket; the first datagram there has its pidfd.

    It was started with all signals blocked, and they stay so: whoever signals a whole service, as systemd does, means
    the program, which has yet to see its workers to their end.
    """
    prctl = function("prctl")
    control = socket(fileno=os.dup(0))
    packet, fds = datagrams.receive(control)
    if not packet:
        os._exit(0)  # it has died meanwhile
    (lifeline,), (temporary, pid) = fds, requests.decode(packet, fds)[0]
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    guardian = fork(lambda _: _guard(control, lifeline, keeper, null, temporary, pid))
    prctl(_PR_SET_NAME, b"aio-keeper", 0, 0, 0)
    control.close()
    silence(null)
    end = os.pidfd_open(guardian)
    ends = select.poll()
    for fd in (end, lifeline):
        ends.register(fd, select.POLLIN)
    while end not in (ended := [fd for fd, _ in ends.poll()]):
        # the program is gone, and whoever has stopped the guardian shall not keep it from its last work
        ends.unregister(ended[0])
        try:
            os.kill(guardian, _signal.SIGCONT)
        except OSError:
            pass  # its end is waited for all the same
    if os.waitpid(guardian, os.WNOHANG) != (guardian, 0):  # or a debugger holds it, and so it was not asked to leave
        end_children()
    os._exit(0)


def _guard(control: socket, lifeline: int, keeper: int, null: int, temporary: str, pid: int) -> None:
    prctl, signalfd = function("prctl"), function("signalfd")
    prctl(_PR_SET_NAME, b"aio-guardian", 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # fork(2) does not hand it on
    asked, graces, guard = False, None, None
    try:
        deaths = signalfd(-1, (1 << (_signal.SIGCHLD - 1)).to_bytes(128, "little"), _SFD_FLAGS)
        keeping = os.pidfd_open(keeper)
        if os.getppid() == keeper:
            guard = Guardian(control, (lifeline, keeping), deaths, null)
            asked = guard.run()
            graces = None if asked else guard.ask_to_end()
    except BaseException:  # whatever it is, what it holds is ended
        show_error()
    finally:
        if not asked:
            silence(null)  # whoever reads that shall not wait for what will not die
            end_all(graces, lifeline if os.getppid() == keeper else None, temporary, pid)
        if guard is not None:
            process_setup.remove(guard.directories, kill=not asked)
        os._exit(0)


class _Gone(Exception):
    pass


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
        self._telling: dict[int, Child] = {}  # by the pipe that tells how its start goes on
        self._graces: dict[int, float] = {}  # by pid: until when (monotonic clock) a lost worker has time to end
        self._latest = 0.0  # when the last grace of any group is over
        self._leaves: float | None = None  # it was asked to, and does by then
        self._looking = False  # for others that have ended
        self.directories: list[str] = []
        self._epoll = select.epoll()
        self._children = Children(self._epoll)
        self._limits = process_start.Limits()
        self._spawner = process_start.spawner()
        self._thread = ReplaceableThread(self._serve, self._took_over)
        for fd in (*self._lifelines, self._deaths, self._control.fileno(), self._thread.wakeup):
            if fd >= 0:
                self._epoll.register(fd, select.EPOLLIN)

    def run(self) -> bool:
        """Until the program, or the keeper, is gone. Whether it was asked to leave: then its own children are gone."""
        asked: bool = self._thread.run()
        return asked

    def ask_to_end(self) -> dict[int, float]:
        """The program is gone. Returns until when (monotonic clock) which children have time to end by themselves."""
        for link in list(self._links.values()):
            self._forget(link)
        self._children.close()
        zygotes = {child.pid: self._latest for child in self._children if child.number}
        return zygotes | self._graces  # zygotes see to their own, and leave

    def _serve(self) -> bool:
        while True:
            # exits are queued in their order; a look for others comes after those that are known by then
            events = self._epoll.poll(0 if self._looking else self._next())
            if self._looking and not events:
                self._looking = self._children.reap_others()
            elif self._deaths < 0 and not events:
                self._looking = True
            self._children.new_look()
            for fd, event in events:
                if fd in self._lifelines:
                    return False
                try:
                    self._take(fd, event)
                except _Gone:
                    return False
                except Exception:  # a bug of ours ends no worker
                    show_error()
            if self._leaves is not None and (not self._children.running or time.monotonic() > self._leaves):
                return True

    def _take(self, fd: int, event: int) -> None:
        if fd in self._children.running:
            self._tell_exit(fd)
        elif fd == self._deaths:
            os.read(self._deaths, 4096)
            self._looking = True
        elif fd in self._links:
            self._serve_link(self._links[fd], event)
        elif fd in self._telling:
            self._tell_start(fd)
        elif fd == self._thread.wakeup:
            child, pid, problem = self._thread.late()
            self._children.known(pid or 0)
            self._started(child, pid or 0, problem)
        elif fd == self._control.fileno():
            self._hear()

    def _hear(self) -> None:
        """Raises `_Gone`: the program is."""
        try:
            packet, fds = datagrams.receive(self._control, datagrams.DONTWAIT)
        except ValueError:
            return  # no descriptors left: whoever sent it sees his socket close
        except OSError as exc:
            if datagrams.passes(exc):
                return
            packet = b""
        if not packet:
            raise _Gone
        try:
            try:
                body, given = requests.decode(packet, fds)
            except (ValueError, EOFError, TypeError):
                return  # not a message of ours
            if packet[:1] == requests.LEAVE:
                # groups have ended what their workers left behind, or were told to leave it (`Stop(scope="leader")`)
                for child in self._children:
                    self._children.kill(child)
                if self._children.unknown is not None:
                    self._give_up(self._children.unknown)
                if not body[0]:
                    self.directories.clear()  # the program goes on, with another guardian
                self._leaves = time.monotonic() + LEAVING
                self._epoll.unregister(self._control)
            elif packet[:1] == requests.CONNECT:
                sock = socket(fileno=given[0])
                fds.remove(given[0])
                sock.setblocking(False)
                self._epoll.register(sock, select.EPOLLIN)
                self._links[sock.fileno()] = Link(sock, self._epoll)
            elif packet[:1] == requests.HELPER:
                number, argv, environ, state = body
                stdin, stderr = given
                environ = process_start.variables(environ, {})
                start = Start(argv[0], argv, environ, b"/", (stdin, self._null, stderr), state)
                start.blocked = True
                self._begin(start, Child(0, number, None, argv[0]))  # should it fail, its own socket closes
            elif packet[:1] == requests.REMOVE:
                self.directories = [one for one in self.directories if os.access(one, os.F_OK)] + [str(body[0])]
            elif packet[:1] == requests.END and (helper := self._children.of(None, body[0])) is not None:
                self._children.kill(helper)
        finally:
            datagrams.close(fds)

    def _serve_link(self, link: Link, event: int) -> None:
        if event & select.EPOLLOUT:
            link.write()
        if not event & ~select.EPOLLOUT:
            return
        try:
            packet, fds = datagrams.receive(link.sock)
        except datagrams.Missing as exc:  # no descriptors left: that start is refused, and no other
            if exc.packet[:1] == requests.EXEC:
                link.say(requests.REFUSED, (requests.number(exc.packet), errno.EMFILE, "pipes"))
                return
            packet, fds = b"", []
        except OSError as exc:
            if datagrams.passes(exc):
                return
            packet, fds = b"", []
        except ValueError:
            packet, fds = b"", []
        if not packet:
            self._forget(link)
            return
        try:
            body, given = requests.decode(packet, fds)
            if packet[:1] == requests.EXEC:
                self._exec(link, body, given)
            elif packet[:1] == requests.SIGNAL:
                number, signum = body
                if (worker := self._children.of(link, number)) is not None:
                    self._children.signal(os.killpg, worker, signum)
            elif packet[:1] == requests.WITHDRAW:
                self._withdraw(link, body[0])
            elif packet[:1] == requests.LEFT:
                link.say(requests.LEFT, (self._children.left(),))
            elif packet[:1] == requests.GROUP:
                environ, link.cwd, link.lost = body
                link.environ = process_start.variables(environ, {})
            elif packet[:1] == requests.TRY:
                child = Child(0, 0, link)
                child.trial = True
                child.pid, child.pipe = process_start.trial(*body)
                self._await(child)
        except OSError as exc:  # an answer that could not be given: nobody shall wait for it
            if packet[:1] in (requests.LEFT, requests.TRY):
                link.say(requests.REFUSED, (0, exc.errno, ""))
        except Exception:  # not a message of ours
            self._forget(link)
        finally:
            datagrams.close(fds)

    def _forget(self, link: Link) -> None:
        """Its group is over, or its supervisor gone: nothing of it shall run."""
        if self._links.pop(link.sock.fileno(), None) is None:
            return
        link.close()
        until = 0.0
        if link.lost is not None:
            until = time.monotonic() + link.lost[1]
            self._latest = max(self._latest, until + 1)
        for child in self._children:
            if child.link is not link:
                continue
            child.link = None
            child.number = 0
            if link.lost is None or child.pipe >= 0:
                self._children.kill(child)
            else:
                self._children.signal(os.kill, child, link.lost[0])
                self._children.signal(os.kill, child, _signal.SIGCONT)
                self._graces[child.pid] = until
        if self._children.unknown is not None and self._children.unknown.link is link:
            self._give_up(self._children.unknown)

    def _next(self) -> float | None:
        """Kill those whose grace is over, and say again what could not be sent; returns the seconds until there is more
        of that, or until we leave."""
        now = time.monotonic()
        for link in self._links.values():
            if link.again:
                link.write()
        for child in self._children if self._graces else ():
            if self._graces.get(child.pid, now) < now:
                del self._graces[child.pid]
                self._children.kill(child)
        due = [*self._graces.values(), *([] if self._leaves is None else [self._leaves])]
        if self._deaths < 0:
            due.append(now + LOOK)
        if any(link.again for link in self._links.values()):
            due.append(now + datagrams.AGAIN)
        return min(max(min(due) - now, 0), datagrams.LONGEST) if due else None

    def _exec(self, link: Link, body: tuple[Any, ...], fds: list[int]) -> None:
        number, program, argv, overlay, cwd, mark, streams, place, state, stop, who, numbers = body
        given = iter(fds)
        # 0 and 1 of ours are /dev/null
        stdio: tuple[int | bytes, ...]
        if streams & requests.TERMINAL:
            try:
                stdio = (os.fsencode(os.ttyname(next(given))), 0, 0)
            except OSError as exc:  # it has no name here: /dev/pts of another mount namespace
                link.say(requests.REFUSED, (number, exc.errno, "/dev/pts"))
                return
        else:
            stdio = tuple(next(given) if streams >> at & 1 else (0, 1, self._null)[at] for at in range(3))
        start = Start(program, argv, process_start.variables(overlay, link.environ), cwd or link.cwd, stdio, state)
        start.place, start.mark, start.stop, start.who = place, mark, stop, who
        start.passed = list(zip(given, numbers, strict=True))
        self._begin(start, Child(mark, number, link, program))

    def _begin(self, start: Start, child: Child) -> None:
        by, pid, problem = self._spawner, 0, None
        try:
            forked = any(one is not None for one in (start.state, start.place, start.who))
            if by is None or forked or self._children.unknown is not None or self._thread.alone:
                child.pid, child.pipe = process_start.fork(start, self._limits.files)
                self._await(child)
                return
            self._children.unknown = child
            self._limits.lend(start.mark)
            pid = self._thread.call(child, lambda: process_start.spawn(by, start))
        except OSError as exc:
            problem = exc
        if self._children.unknown is child:
            self._limits.take_back()
            self._children.known(pid)
        self._started(child, pid, problem)

    def _took_over(self) -> None:
        """A start hangs, in the other thread."""
        self._limits.take_back()
        self._children.find_unknown(self._thread.thread)

    def _await(self, child: Child) -> None:
        """How it goes on, a pipe will tell."""
        try:
            self._children.add(child)
            self._telling[child.pipe] = child
            self._epoll.register(child.pipe, select.EPOLLIN)
        except OSError:
            self._telling.pop(child.pipe, None)
            pipe, child.pipe = child.pipe, -1
            shut(pipe)
            self._children.kill(child)  # nobody would learn how it goes on
            raise

    def _tell_start(self, pipe: int, ended: bool = False) -> None:
        told = process_start.outcome(pipe)
        if told is None and ended:
            told = 0, ""  # a process that is being started has a copy of the other end, for an instant
        if told is None:
            return
        child = self._telling.pop(pipe)
        child.pipe = -1
        self._epoll.unregister(pipe)
        shut(pipe)
        code, what = told
        if (link := child.link) is None:
            return
        if child.trial or code:
            child.link = None
            self._children.kill(child)  # it ends by itself, if it was the one who told
            link.say(*((requests.TRIED, told) if child.trial else (requests.REFUSED, (child.number, code, what))))
        else:
            self._say_started(child)

    def _started(self, child: Child, pid: int, problem: OSError | None) -> None:
        """It has that pid; or 0, and why."""
        if problem is None:
            child.pid = pid
            try:
                self._children.add(child)
            except OSError as exc:
                problem = exc
        if problem is not None:
            if child.link is not None:
                what = problem.filename or os.fsdecode(child.program)
                child.link.say(requests.REFUSED, (child.number, problem.errno or errno.EIO, what))
                child.link = None
        elif child.link is not None:
            self._say_started(child)
        elif not child.number:  # it was withdrawn
            self._children.kill(child)

    def _say_started(self, child: Child) -> None:
        link, floor = child.link, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert link is not None
        try:
            link.say(requests.STARTED, (child.number, child.pid, floor * 1024), child.pidfd)
        except OSError as exc:  # no descriptor left: it goes, and nobody else
            child.link = None
            self._children.kill(child)
            link.say(requests.REFUSED, (child.number, exc.errno, os.fsdecode(child.program)))

    def _withdraw(self, link: Link, number: int) -> None:
        """That start is not wanted any more: it is killed, now or when it comes."""
        starting = [*self._telling.values(), *([] if self._children.unknown is None else [self._children.unknown])]
        for child in starting:
            if child.is_of(link, number):
                self._give_up(child)
                link.say(requests.REFUSED, (number, errno.ECANCELED, os.fsdecode(child.program)))

    def _give_up(self, child: Child) -> None:
        child.link, child.number = None, 0
        if child is self._children.unknown:
            self._children.find_unknown(self._thread.thread)
        self._children.kill(child)

    def _tell_exit(self, pidfd: int) -> None:
        at, wall = time.monotonic_ns(), time.time()
        starting = self._children.running[pidfd].pipe
        if starting >= 0:
            self._tell_start(starting, ended=True)  # all that it will ever tell
        child, status, rusage = self._children.ended(pidfd)
        self._graces.pop(child.pid, None)
        if child.link is not None:
            left = self._children.has_others(child)
            child.link.say(requests.EXITED, (child.number, status, rusage, at, wall, left))
