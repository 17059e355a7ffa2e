"""Our side of a process that starts workers for us: a guardian, or a zygote. They are its children, not ours."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from .. import forked
from ..child import _order, _socket
from ..watch import Poller
from ._contract import RawExit
from ._direct import early_status, status_of_others
from ._ends import Ends, disowned
from ._plan import WorkerPlan

SLICE = 0.0005  # seconds of taking messages after which the loop gets its turn
# how workers end with the program: at once, or by a signal and so many seconds to obey it
Lost: TypeAlias = "tuple[int, float] | None"


class Server:
    """One connection to it, heard on one event loop at a time.

    Attributes:
        gone: it is not there any more; nothing can be started.
        loop: on which it is heard; None while nobody does.
    """

    what = "process that starts workers"  # for errors

    def __init__(self, control: socket.socket) -> None:
        self.gone = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._control = control
        self._starting: dict[int, tuple[asyncio.Future[ServedProcess], Ends, float, int, Poller]] = {}
        self._running: dict[int, ServedProcess] = {}
        self._unwatched: list[ServedProcess] = []
        self._count = 0
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._full = False  # the rest waits for room
        self._lost = False  # this is a forked copy
        forked.register(self)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hear it on that loop."""
        self.loop = loop
        loop.add_reader(self._control, self.hear)

    def detach(self) -> None:
        """Nobody on its loop needs it at the moment."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.remove_reader(self._control)
            self.loop.remove_writer(self._control)
        self.loop = None

    def has_left(self) -> bool:
        """Whether it is gone already, while nobody listened."""
        return _socket.has_ended(self._control)

    def look_after(self, process: ServedProcess) -> None:
        """Have it look for its end itself once no start is under way: until then our word comes soon enough, and what
        it costs would delay the starts."""
        if self._starting:
            self._unwatched.append(process)
        else:
            process.look()

    def end(self) -> None:
        """No more of it: what it has started ends."""
        if self._lost:
            return
        self.gone = True
        self.detach()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # forked copies of us may have it open
        self._control.close()
        for _, fds in self._unsent:
            _socket.close(fds)
        self._unsent.clear()
        self._refuse_all(f"its {self.what} was not waited for")

    def disown(self) -> list[int]:
        """See `forked`."""
        self.gone, self.loop, self._lost = True, None, True
        fds = [self._control.detach()] if self._control.fileno() >= 0 else []
        for _, kept in self._unsent:
            fds += kept
        for _, ends, *_ in self._starting.values():
            fds += ends.disown()
        for process in self._running.values():
            fds += process.disown()
        for one in (self._unsent, self._starting, self._running, self._unwatched):
            one.clear()
        return fds

    def signal_group(self, number: int, signum: int) -> bool:
        """Have the whole process group of that worker signalled. False: there is nobody to do it any more."""
        if self.gone or self.loop is None:
            return False
        self.send(*_order.encode(_order.SIGNAL, (number, int(signum))))
        return True

    def ask(
        self, kind: bytes, worker: WorkerPlan, body: Sequence[Any], give: Callable[[Ends], list[int]], poller: Poller
    ) -> asyncio.Future[ServedProcess]:
        """Ask it to start one.

        Args:
            body: what it is told, behind the number of the request.
            give: the descriptors it gets; they are not closed.
        """
        done: asyncio.Future[ServedProcess] = asyncio.get_running_loop().create_future()
        number = self._count = self._count + 1
        made: Ends | None = None
        at, at_ns = time.time(), time.monotonic_ns()
        try:
            if self.gone:
                raise OSError(errno.ESRCH, f"its {self.what} has died")
            made = Ends(worker)
            self.send(*_order.encode(kind, (number, *body)), give(made))
        except OSError as exc:
            if made is not None:
                made.close_ours()
                made.close_theirs()
            done.set_exception(exc)
            return done
        self._starting[number] = (done, made, at, at_ns, poller)
        made.close_theirs()
        return done

    def withdraw(self, starting: asyncio.Future[Any]) -> None:
        """That start is not wanted any more: refused soon, if it can answer; and killed should it come all the same."""
        for number, (done, *_) in self._starting.items():
            if done is starting and self.loop is not None:
                with contextlib.suppress(OSError):
                    self.send(*_order.encode(_order.WITHDRAW, (number,)))

    @property
    def is_starting(self) -> bool:
        """Whether a start is under way."""
        return bool(self._starting)

    def send(self, packet: bytes, fds: list[int], lent: Sequence[int] = ()) -> None:
        """Send it now or soon; `fds` are closed then, those `lent` are not.

        Raises:
            OSError: it must wait, and this process may have no more descriptors; nothing was sent.
        """
        if not self._unsent:
            try:
                _socket.send(self._control, packet, [*fds, *lent])
            except BlockingIOError:
                pass
            except OSError:
                _socket.close(fds)  # it is gone: `hear` is about to learn it
                return
            else:
                _socket.close(fds)
                return
        kept = [*fds]  # they must live until they are sent
        try:
            for fd in lent:
                kept.append(os.dup(fd))
        except OSError:
            _socket.close(kept)
            raise
        self._unsent.append((packet, kept))
        if len(self._unsent) == 1:
            self._write()

    def take(self, kind: bytes, body: tuple[Any, ...]) -> None:
        """A message of a kind of its own."""
        raise ValueError(f"unknown message {kind!r}")

    def died(self, why: Exception | None = None) -> None:
        """Whatever it was: it serves nobody any more, and its workers die with it."""
        if self.gone:
            return
        self._refuse_all(f"its {self.what} died")
        self.end()
        self._unwatched.clear()
        running, self._running = self._running, {}
        for process in running.values():
            process.orphaned(f"the {self.what} that had started it died")

    def _refuse_all(self, why: str) -> None:
        starting, self._starting = self._starting, {}
        for done, ends, *_ in starting.values():
            ends.close_ours()
            if not done.get_loop().is_closed():
                done.set_exception(OSError(errno.ESRCH, why))

    def _write(self) -> None:
        assert self.loop is not None
        while self._unsent:
            packet, fds = self._unsent[0]
            try:
                _socket.send(self._control, packet, fds)
            except BlockingIOError:
                self.loop.add_writer(self._control, self._write)
                self._full = True
                return
            except OSError:
                pass  # it is gone: `hear` is about to learn it
            self._unsent.popleft()
            _socket.close(fds)
        if self._full:
            self.loop.remove_writer(self._control)
            self._full = False

    def hear(self) -> None:
        """Take what it has sent by now, until the loop should have its turn."""
        until = time.monotonic() + SLICE
        while self.loop is not None and time.monotonic() < until:
            try:
                packet, fds = _socket.receive(self._control)
            except BlockingIOError:
                return
            except _socket.Missing as exc:
                if self._kill_unheld(exc.packet):
                    continue
                packet, fds = b"", []
            except (OSError, ValueError):
                packet, fds = b"", []
            if not packet:
                self.died()
                return
            try:
                body, given = _order.decode(packet, fds)
                if given is not fds:
                    os.close(fds[0])
                    fds = given
                self._take(packet[:1], body, fds)  # what is kept is taken out of them
            except Exception:
                self.died()
                return
            finally:
                _socket.close(fds)

    def _kill_unheld(self, packet: bytes) -> bool:
        """It has started one, and we may have no descriptor for it: that one goes, and nobody else."""
        if packet[:1] != _order.STARTED:
            return False
        return self.signal_group(_order.decode(packet, [])[0][0], signal.SIGKILL)

    def _take(self, kind: bytes, body: tuple[Any, ...], fds: list[int]) -> None:
        if kind == _order.STARTED:
            number, pid, floor = body
            done, ends, at, at_ns, poller = self._starting[number]
            pid = self.pid_of(pid, fds[0])
            process = ServedProcess(self, number, pid, fds.pop(0), ends, at, at_ns, floor, poller)
            self._running[number] = process
            del self._starting[number]
            done.set_result(process)
        elif kind == _order.REFUSED:
            number, code, words = body
            done, ends, *_ = self._starting.pop(number)
            ends.close_ours()
            done.set_exception(self.refusal(code, words))
        elif kind == _order.EXITED:
            number, status, rusage, ended_ns, ended_at, left = body
            if number in self._starting:  # for which there was no descriptor
                done, ends, *_ = self._starting.pop(number)
                ends.close_ours()
                done.set_exception(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            else:
                self._running.pop(number).tell(RawExit(status, ended_ns, ended_at), rusage, left)
        else:
            self.take(kind, body)
        if self._unwatched and not self._starting:
            unwatched, self._unwatched = self._unwatched, []
            for process in unwatched:
                process.look()

    def pid_of(self, told: int, pidfd: int) -> int:
        """The pid here of a process that it has started."""
        return told

    def refusal(self, code: int, words: str | bytes) -> OSError:
        """Why it could not start a worker: what the system said about the path `words`."""
        return OSError(code, os.strerror(code), os.fsdecode(words))


class ServedProcess:
    """A worker that a server of ours has started. See `LiveProcess`."""

    answer = None

    __slots__ = (
        "_ended",
        "_left",
        "_number",
        "_on_exit",
        "_orphan",
        "_pidfd",
        "_poller",
        "_reaped",
        "_rusage",
        "_server",
        "_told",
        "_watched",
        "channel",
        "pid",
        "rss_floor",
        "started_at",
        "started_ns",
        "stderr",
        "stdout",
    )

    def __init__(
        self,
        server: Server,
        number: int,
        pid: int,
        pidfd: int,
        ends: Ends,
        at: float,
        at_ns: int,
        floor: int,
        poller: Poller,
    ) -> None:
        self.pid = pid
        self.stdout, self.stderr, self.channel = ends.stdout, ends.stderr, ends.channel
        self.started_at, self.started_ns = at, at_ns
        self.rss_floor = floor
        self._server = server
        self._number = number
        self._pidfd = pidfd
        self._poller = poller
        self._on_exit: Callable[[RawExit], None] | None = None
        self._told: RawExit | None = None  # its end, known before anybody watched
        self._rusage: tuple[Any, ...] | None = None
        self._ended = False
        self._reaped = False
        self._orphan = ""  # what its server's end means for it
        self._left = True  # others of its process group
        self._watched = False

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        self._on_exit, self._watched = on_exit, True
        if self._told is not None:
            asyncio.get_running_loop().call_soon(on_exit, self._told)
        else:
            self._server.look_after(self)

    def look(self) -> None:
        """Watch its pidfd, unless its end is known."""
        if self._told is None and not self._orphan and not self._reaped:
            self._poller.add_exit(self._pidfd, self._has_died)

    def send_signal(self, signum: int) -> bool:
        if self._has_ended():
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            return False
        return True

    def disown(self) -> list[int]:
        """See `forked`."""
        if self._reaped:
            return []
        self._reaped, self._on_exit = True, None
        return [self._pidfd, *disowned(self, self._watched)]

    def signal_group(self, signum: int) -> bool:
        # by its server, which alone knows that the number is not somebody else's by now
        return not self._ended and not self._reaped and self._server.signal_group(self._number, signum)

    def group_alive(self) -> bool:
        return self._left

    def reap(self) -> resource.struct_rusage | None:
        self._let_go()
        if self._rusage is None:
            return None
        return resource.struct_rusage(self._rusage)

    def abandon(self) -> None:
        if not self._reaped:
            self._on_exit = None
            self._let_go()

    def tell(self, raw: RawExit, rusage: tuple[Any, ...] | None, left: bool) -> None:
        """It has ended, and whether somebody of its process group is left."""
        self._ended = True
        self._rusage = rusage
        self._left = left
        self._told = raw
        if not self._reaped:  # else the number is another's
            self._poller.remove(self._pidfd)
        if self._on_exit is not None:
            self._on_exit(raw)
            self._on_exit = None  # who has us shall not be held by us

    def orphaned(self, why: str) -> None:
        """Its server is gone, and it dies with it; its pidfd tells when."""
        self._orphan = why
        if self._told is None and not self._reaped:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._poller.remove(self._pidfd)
            self._poller.add_exit(self._pidfd, self._orphan_ended)

    def _has_died(self) -> None:
        """The kernel says so, before its server does: two are woken at the same time, and not one after the other."""
        self._poller.remove(self._pidfd)
        at_ns, at = time.monotonic_ns(), time.time()
        status = early_status(self.pid, self._pidfd)
        if status is None:
            self._server.hear()
        elif self._on_exit is not None:
            self._on_exit(RawExit(status, at_ns, at, early=True))

    def _orphan_ended(self) -> None:
        at_ns, at = time.monotonic_ns(), time.time()
        raw = RawExit(status_of_others(self.pid, self._pidfd), at_ns, at, self._orphan)
        self.tell(raw, None, True)

    def _has_ended(self) -> bool:
        if self._ended or self._reaped:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _let_go(self) -> None:
        if self._reaped:
            return
        self._reaped = True
        self._poller.remove(self._pidfd)
        _socket.close((self._pidfd,))
