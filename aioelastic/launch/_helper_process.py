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

from ..child.kernel.child_processes import send_signal
from ..child.wire import datagrams, requests
from ..model.interruptions import is_the_programs
from ..planning import WorkerPlan
from ..system import forked_copies
from ..system.waiting import settle
from ..watch import Poller
from ._contract import RawExit
from ._direct import early_status, status_of_others
from ._pipe_ends import Ends, disowned

SLICE = 0.0005  # seconds of taking messages after which the loop gets its turn
# the start, our ends of its streams, when it was asked for by both clocks, and who hears the worker
Starting: TypeAlias = "tuple[asyncio.Future[ServedProcess], Ends, float, int, Poller]"
# how workers end with the program: at once, or by a signal and so many seconds to obey it
Lost: TypeAlias = "tuple[int, float] | None"


class Server:
    """One connection to it, heard on one event loop at a time.

    Attributes:
        gone: it is not there any more; nothing can be started.
        loop: on which it is heard; None while nobody does.
        was_ended: by this program, whoever used it.
    """

    what = "process that starts workers"  # for errors
    was_ended = False

    def __init__(self, control: socket.socket) -> None:
        self.gone = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._control = control
        self._starting: dict[int, Starting] = {}
        self._running: dict[int, ServedProcess] = {}
        self._unwatched: list[ServedProcess] = []
        self._count = 0
        self._came = datagrams.Arrival()  # what is being heard
        self._unsent: deque[tuple[bytes, list[int], int]] = deque()
        self._full = False  # the rest waits for room
        self._lost = False  # this is a forked copy
        forked_copies.register(self)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hear it on that loop."""
        self.loop = loop
        loop.add_reader(self._control, self.hear)
        if self._unsent:  # since it was heard last
            self._write()

    def detach(self) -> None:
        """Nobody on its loop needs it at the moment."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.remove_reader(self._control)
            self.loop.remove_writer(self._control)
        self.loop = None

    def has_left(self) -> bool:
        """Whether it is gone already, while nobody listened."""
        return datagrams.has_ended(self._control)

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
        datagrams.close((self._control.detach(),))
        for _, fds, _ in self._unsent:
            datagrams.close(fds)
        self._unsent.clear()
        self._refuse_all(f"its {self.what} was not waited for")

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        self.gone, self.loop, self._lost = True, None, True
        fds = [self._control.detach()] if self._control.fileno() >= 0 else []
        for kept in (self._came.fds, *(one[1] for one in self._unsent)):
            fds += kept
        self._came.fds = []
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
        with contextlib.suppress(OSError):
            self.send(*requests.encode(requests.SIGNAL, (number, int(signum))))
            return True
        return False

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
            packet, fds = requests.encode(kind, (number, *body))
            self._starting[number] = (done, made, at, at_ns, poller)
            self.send(packet, fds, give(made), number)
        except OSError as exc:
            self._starting.pop(number, None)
            if made is not None:
                made.close_ours()
            done.set_exception(exc)
        if made is not None:
            made.close_theirs()
        return done

    def withdraw(self, starting: asyncio.Future[Any]) -> None:
        """That start is not wanted any more: refused soon, if it can answer; and killed should it come all the same."""
        for number, (done, *_) in list(self._starting.items()):
            if done is starting and self.loop is not None:
                with contextlib.suppress(OSError):
                    self.send(*requests.encode(requests.WITHDRAW, (number,)))

    @property
    def is_starting(self) -> bool:
        """Whether a start is under way."""
        return bool(self._starting)

    def send(self, packet: bytes, fds: list[int], lent: Sequence[int] = (), number: int = 0) -> None:
        """Send it now or soon; `fds` are closed then, those `lent` are not.

        Args:
            number: that of the start which is refused if it cannot be sent later.

        Raises:
            OSError: the system does not take a start; or it must wait, and this process may have no more descriptors.
                Nothing was sent.
        """
        if not self._unsent:
            try:
                datagrams.send(self._control, packet, [*fds, *lent])
            except OSError as exc:
                if datagrams.is_gone(exc):
                    datagrams.close(fds)
                    return  # which `hear` is about to learn
                if not isinstance(exc, BlockingIOError) and (number or not datagrams.passes(exc)):
                    datagrams.close(fds)
                    raise
            else:
                datagrams.close(fds)
                return
        kept = [*fds]  # they must live until they are sent
        try:
            for fd in lent:
                kept.append(os.dup(fd))
        except OSError:
            datagrams.close(kept)
            raise
        self._unsent.append((packet, kept, number))
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
            process.orphaned(self._fate())

    def _fate(self) -> str:
        return f"the {self.what} that had started it {'was ended' if self.was_ended else 'died'}"

    def _refuse_all(self, why: str) -> None:
        for number in list(self._starting):
            self._refuse(number, OSError(errno.ESRCH, why))

    def _refuse(self, number: int, why: OSError) -> None:
        done, ends, *_ = self._starting[number]
        ends.close_ours()
        if not done.get_loop().is_closed():
            settle(done, None, why)
        del self._starting[number]

    def _write(self) -> None:
        while self._unsent and self.loop is not None:
            packet, fds, number = self._unsent[0]
            try:
                datagrams.send(self._control, packet, fds)
            except BlockingIOError:
                self.loop.add_writer(self._control, self._write)
                self._full = True
                return
            except OSError as exc:
                if number in self._starting and not datagrams.is_gone(exc):
                    self._refuse(number, exc)
                elif datagrams.passes(exc):
                    self.loop.call_later(datagrams.AGAIN, self._write)
                    break
            self._unsent.popleft()
            datagrams.close(fds)
        if self._full and self.loop is not None:
            self.loop.remove_writer(self._control)
            self._full = False

    def hear(self) -> None:
        """Take what it has sent by now, until the loop should have its turn."""
        until = time.monotonic() + SLICE
        try:
            while self.loop is not None and time.monotonic() < until and self._hear_one():
                pass
        except BaseException:  # a signal's handler has raised it: what had come is taken in another turn
            if self.loop is not None:
                self.loop.call_soon(self.hear)
            raise

    def _hear_one(self) -> bool:
        """False: there is nothing more, for now. Interrupted anywhere, it takes the same message once more."""
        came = self._came
        try:
            came.take(self._control)
            if not came.packet:
                self.died()
                return False
            body, given = requests.decode(came.packet, came.fds)
            self._take(came.packet[:1], body, given)  # what is kept is taken out of them
        except datagrams.Missing as exc:
            if not self._kill_unheld(exc.packet):
                self.died()
        except OSError as exc:
            if is_the_programs(exc):
                raise
            if not came.has_come and datagrams.passes(exc):
                return False
            self.died()
        except Exception as exc:  # not a message of ours
            if is_the_programs(exc):
                raise
            self.died()
        self._came = datagrams.Arrival()
        came.close()
        return True

    def _kill_unheld(self, packet: bytes) -> bool:
        """It has started one, and we may have no descriptor for it: that one goes, and nobody else."""
        return packet[:1] == requests.STARTED and self.signal_group(requests.decode(packet, [])[0][0], signal.SIGKILL)

    def _take(self, kind: bytes, body: tuple[Any, ...], fds: list[int]) -> None:
        if kind == requests.STARTED:
            number, pid, floor = body
            if number not in self._running:
                pid = self.pid_of(pid, fds[0])
                self._running[number] = ServedProcess(self, number, pid, fds[0], floor, self._starting[number])
            fds[:] = [fd for fd in fds if fd != self._running[number]._pidfd]  # the others came without need
            if (starting := self._starting.get(number)) is not None:
                if starting[0].cancelled():
                    raise asyncio.InvalidStateError("who asked for a start has not waited for it")
                settle(starting[0], self._running[number], None)
                del self._starting[number]
        elif kind == requests.REFUSED:
            number, code, words = body
            if number in self._starting:
                self._refuse(number, self.refusal(code, words))
        elif kind == requests.EXITED:
            number, status, rusage, ended_ns, ended_at, left = body
            if number in self._starting:  # for which there was no descriptor
                self._refuse(number, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            else:
                why = self._fate() if self.was_ended and status == signal.SIGKILL else ""
                if number in self._running:
                    self._running[number].tell(RawExit(status, ended_ns, ended_at, why), rusage, left)
                    del self._running[number]
        else:
            self.take(kind, body)
        while self._unwatched and not self._starting:
            self._unwatched.pop(0).look()

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
        "stdin",
        "stdout",
    )

    def __init__(self, server: Server, number: int, pid: int, pidfd: int, floor: int, starting: Starting) -> None:
        self.pid = pid
        _, ends, self.started_at, self.started_ns, self._poller = starting
        self.stdin, self.stdout, self.stderr, self.channel = ends.stdin, ends.stdout, ends.stderr, ends.channel
        self.rss_floor = floor
        self._server = server
        self._number = number
        self._pidfd = pidfd
        self._on_exit: Callable[[RawExit], None] | None = None
        self._told: RawExit | None = None  # its end, known before anybody watched
        self._rusage: tuple[Any, ...] | None = None
        self._ended = False
        self._reaped = False
        self._orphan = ""  # what its server's end means for it
        self._left = True  # others of its process group
        self._watched = False

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        self._watched = True
        if self._told is not None:  # and nothing comes after that
            asyncio.get_running_loop().call_soon(on_exit, self._told)
        else:
            self._on_exit = on_exit
            self._server.look_after(self)

    def look(self) -> None:
        """Watch its pidfd, unless its end is known."""
        if self._told is None and not self._orphan and not self._reaped:
            with contextlib.suppress(OSError):  # no more can be watched: its server tells, too
                self._poller.add_exit(self._pidfd, self._has_died)

    def send_signal(self, signum: int) -> bool:
        if self._has_ended():
            return False
        try:
            send_signal(self._pidfd, self.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def disown(self) -> list[int]:
        """See `forked_copies`."""
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
        return None if self._rusage is None else resource.struct_rusage(self._rusage)

    def abandon(self) -> None:
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
                send_signal(self._pidfd, self.pid, signal.SIGKILL)
            self._poller.remove(self._pidfd)
            try:
                self._poller.add_exit(self._pidfd, self._orphan_ended)
            except OSError:
                self._orphan_ended()

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
        self.tell(RawExit(status_of_others(self.pid, self._pidfd), at_ns, at, self._orphan), None, True)

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
        datagrams.close((self._pidfd,))
