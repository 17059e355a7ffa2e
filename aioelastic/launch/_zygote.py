"""`start="zygote"`: function workers forked by a small warm process, which outlives groups and restarts."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..child import _socket, _wire
from ..errors import SpecError
from ..watch import Poller
from ._call import Main, interpreter, search_path
from ._contract import RawExit
from ._direct import status_of_reaped
from ._ends import Ends, above_two
from ._plan import WorkerPlan
from ._spawn import start_helper

IDLE = 60.0  # seconds after which a zygote that nobody wants leaves

Key = tuple[Any, ...]


class Zygote:
    """Our side of one zygote. Used by the groups of one event loop at a time."""

    def __init__(self, key: Key, environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None) -> None:
        self.key = key
        self.users = 0
        self.gone = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._preload = preload
        self._ready: asyncio.Future[None] | None = None
        self._is_ready = False
        self._starting: dict[int, tuple[asyncio.Future[ZygoteProcess], Ends, float, int, Poller]] = {}
        self._running: dict[int, ZygoteProcess] = {}
        self._count = 0
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._control, end = _socket.pair()
        theirs = above_two(end.detach())
        try:
            self._pid = start_helper(interpreter("aioelastic.child._zygote:main"), environ, theirs)
        except BaseException:
            self._control.close()
            raise
        finally:
            os.close(theirs)
        packet, fds = _wire.encode(_wire.SETUP, (search_path(), sys.argv, main, list(preload), IDLE))
        _socket.send(self._control, packet, fds)
        _socket.close(fds)
        self._control.setblocking(False)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hear it on that loop."""
        self.loop = loop
        loop.add_reader(self._control, self._hear)

    def detach(self) -> None:
        """Nobody on its loop needs it at the moment."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.remove_reader(self._control)
            self.loop.remove_writer(self._control)
        self.loop = None

    def has_left(self) -> bool:
        """Whether it is gone already, while nobody listened."""
        try:
            return not self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def warm(self) -> None:
        """Wait until it has imported everything.

        Raises:
            SpecError: it could not.
        """
        if self._is_ready:
            return
        if self._ready is None:
            assert self.loop is not None
            self._ready = self.loop.create_future()
            self._ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._ready)

    def start(self, worker: WorkerPlan, environ: dict[str, str], poller: Poller) -> asyncio.Future[ZygoteProcess]:
        """Ask for one."""
        assert self.loop is not None
        done: asyncio.Future[ZygoteProcess] = self.loop.create_future()
        try:
            if self.gone:
                raise OSError(errno.ESRCH, "its zygote has died")
            ends = Ends(worker)
        except OSError as exc:
            done.set_exception(exc)
            return done
        self._count += 1
        number = self._count
        body = (number, environ, worker.cwd or os.getcwd(), (), int(worker.pipes))
        packet, fds = _wire.encode(_wire.FORK, body)
        own = [fd for fd in (ends.their_channel, ends.their_stdout, ends.their_stderr) if fd is not None]
        self._starting[number] = (done, ends, time.time(), time.monotonic_ns(), poller)
        # the descriptors must live until they are sent, which may be later
        copies = [os.dup(fd) for fd in own]
        ends.close_theirs()
        self._send(packet, [*fds, *copies])
        return done

    def signal_group(self, number: int, signum: int) -> bool:
        """Have the whole process group of that worker signalled. False: there is nobody to do it any more."""
        if self.gone or self.loop is None:
            return False
        self._send(*_wire.encode(_wire.SIGNAL, (number, signum)))
        return True

    def disown(self) -> None:
        """We are a forked copy, and the number of its descriptor may be something else's here."""
        self._control.detach()

    def end(self) -> None:
        """It goes, and with it what it has forked."""
        self.gone = True
        self.detach()
        self._control.close()
        for _, fds in self._unsent:
            _socket.close(fds)
        self._unsent.clear()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)  # not reaped, so the pid is its own
            os.waitpid(self._pid, 0)

    def _send(self, packet: bytes, fds: list[int]) -> None:
        self._unsent.append((packet, fds))
        if len(self._unsent) == 1:
            self._write()

    def _write(self) -> None:
        assert self.loop is not None
        while self._unsent:
            packet, fds = self._unsent[0]
            try:
                _socket.send(self._control, packet, fds)
            except BlockingIOError:
                self.loop.add_writer(self._control, self._write)
                return
            except OSError:
                pass  # it is gone: `_hear` is about to learn it
            self._unsent.popleft()
            _socket.close(fds)
        self.loop.remove_writer(self._control)

    def _hear(self) -> None:
        while self.loop is not None:
            try:
                packet, fds = _socket.receive(self._control)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                packet, fds = b"", []
            if not packet:
                self._died()
                return
            try:
                self._take(packet[:1], _wire.decode(packet, fds), fds)
            except Exception:
                _socket.close(fds)
                self._died()
                return

    def _take(self, kind: bytes, body: tuple[Any, ...], fds: list[int]) -> None:
        if kind == _wire.READY:
            self._is_ready = True
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif kind == _wire.BROKEN:
            words, trace = body
            problem = SpecError("preload", list(self._preload), words, f"mend that first\n\n{trace}".rstrip())
            self._died(problem)
        elif kind == _wire.STARTED:
            number, pid = body
            done, ends, at, at_ns, poller = self._starting.pop(number)
            process = ZygoteProcess(self, number, pid, fds[0], ends, at, at_ns, poller)
            self._running[number] = process
            done.set_result(process)
        elif kind == _wire.REFUSED:
            number, code, words = body
            done, ends, *_ = self._starting.pop(number)
            ends.close_ours()
            done.set_exception(OSError(code or errno.EPERM, words))
        elif kind == _wire.EXITED:
            number, status, rusage, ended_ns, ended_at, left = body
            self._running.pop(number).tell(RawExit(status, ended_ns, ended_at), rusage, left)

    def _died(self, why: Exception | None = None) -> None:
        """Whatever it was: it serves nobody any more, and its workers die with it."""
        if self.gone:
            return
        _forget(self)
        if self._ready is not None and not self._ready.done():
            words = "killed the zygote that was importing them"
            remedy = "import them in a Python of your own to see why"
            self._ready.set_exception(why or SpecError("preload", list(self._preload), words, remedy))
        self.end()
        for done, ends, *_ in self._starting.values():
            ends.close_ours()
            done.set_exception(OSError(errno.ESRCH, "its zygote died"))
        self._starting.clear()
        running, self._running = self._running, {}
        for process in running.values():
            process.orphaned()


class ZygoteProcess:
    """A worker that a zygote has forked: the zygote's child, not ours. See `LiveProcess`."""

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
        "_told",
        "_zygote",
        "channel",
        "pid",
        "rss_floor",
        "started_at",
        "started_ns",
        "stderr",
        "stdout",
    )

    def __init__(
        self, zygote: Zygote, number: int, pid: int, pidfd: int, ends: Ends, at: float, at_ns: int, poller: Poller
    ) -> None:
        self.pid = pid
        self.stdout, self.stderr, self.channel = ends.stdout, ends.stderr, ends.channel
        self.started_at, self.started_ns = at, at_ns
        self.rss_floor = 0  # fork(2) begins a count of its own
        self._zygote = zygote
        self._number = number
        self._pidfd = pidfd
        self._poller = poller
        self._on_exit: Callable[[RawExit], None] | None = None
        self._told: RawExit | None = None  # its end, known before anybody watched
        self._rusage: tuple[Any, ...] | None = None
        self._ended = False
        self._reaped = False
        self._orphan = False
        self._left = True  # others of its process group

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        self._on_exit = on_exit
        if self._told is not None:
            asyncio.get_running_loop().call_soon(on_exit, self._told)

    def send_signal(self, signum: int) -> bool:
        if self._has_ended():
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            return False
        return True

    def signal_group(self, signum: int) -> bool:
        # by its zygote, which alone knows that the number is not somebody else's by now
        return not self._ended and not self._reaped and self._zygote.signal_group(self._number, signum)

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
        """Its zygote says that it has ended, and whether somebody of its process group is left."""
        self._ended = True
        self._rusage = rusage
        self._left = left
        self._told = raw
        if self._on_exit is not None:
            self._on_exit(raw)

    def orphaned(self) -> None:
        """Its zygote is gone; the kernel kills it for that (PR_SET_PDEATHSIG), and its pidfd tells when."""
        self._orphan = True
        if self._told is None and not self._reaped:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._poller.add_exit(self._pidfd, self._orphan_ended)

    def _orphan_ended(self) -> None:
        self._poller.remove(self._pidfd)
        at_ns, at = time.monotonic_ns(), time.time()
        raw = RawExit(status_of_reaped(self._pidfd), at_ns, at, "the zygote that had forked it died")
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
        if self._orphan:
            self._poller.remove(self._pidfd)
        os.close(self._pidfd)


class ZygoteLauncher:
    """The zygote of one group: `open`, then `start` any number of workers, then `close`."""

    name = "zygote"

    def __init__(self, environ: Mapping[str, str], poller: Poller) -> None:
        self._environ = environ
        self._poller = poller
        self._zygote: Zygote | None = None

    async def open(self, environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None) -> None:
        """Get one that has `preload` imported under `environ`: a warm one, if there is one.

        Raises:
            SpecError: a module could not be imported, or it must not be forked.
        """
        self._wanted = (environ, preload, main)
        self._zygote = _acquire(*self._wanted, asyncio.get_running_loop())
        try:
            await self._zygote.warm()
        except BaseException:
            self.close()
            raise

    def start(self, worker: WorkerPlan) -> asyncio.Future[ZygoteProcess]:
        """See `Launcher.start`."""
        assert self._zygote is not None
        if self._zygote.gone:  # a later attempt gets a new one
            self.close()
            self._zygote = _acquire(*self._wanted, asyncio.get_running_loop())
        return self._zygote.start(worker, worker.environ(self._environ), self._poller)

    def close(self) -> None:
        """The group needs it no more. It stays warm for the next."""
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            with _lock:
                zygote.users -= 1
                if zygote.users == 0 and not zygote.gone:
                    zygote.detach()


_lock = threading.Lock()
_zygotes: list[Zygote] = []


def _acquire(
    environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None, loop: asyncio.AbstractEventLoop
) -> Zygote:
    key = (os.getpid(), sys.executable, preload, main, tuple(search_path()), frozenset(environ.items()))
    with _lock:
        for one in list(_zygotes):
            if one.key[0] != os.getpid():
                _zygotes.remove(one)  # we are a copy of the process that has it, without its descriptors
                one.disown()
            elif one.loop is None and one.has_left():
                _zygotes.remove(one)
                one.end()
        for one in _zygotes:
            if one.key == key and one.loop in (loop, None) and not one.gone:
                break
        else:
            one = Zygote(key, environ, preload, main)
            _zygotes.append(one)
        if one.loop is None:
            one.attach(loop)
        one.users += 1
    return one


def _forget(zygote: Zygote) -> None:
    with _lock:
        if zygote in _zygotes:
            _zygotes.remove(zygote)


@atexit.register
def end_zygotes() -> None:
    """End all that are warm: at the interpreter's end, or to leave nothing running before that."""
    with _lock:
        for one in _zygotes:
            if one.key[0] == os.getpid():
                one.end()
        _zygotes.clear()
