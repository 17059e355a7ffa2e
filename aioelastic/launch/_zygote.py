"""`start="zygote"`: function workers forked by a small warm process, which outlives groups and restarts."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from .. import forked
from ..child import _order, _socket
from ..errors import SpecError
from ..watch import Poller
from ._call import Main, interpreter, search_path
from ._ends import Ends, above_two
from ._guardian import Guardian, end_guardian, guardian, here
from ._plan import WorkerPlan
from ._served import Lost, ServedProcess, Server
from ._spawn import start_helper

IDLE = 60.0  # seconds after which a zygote that nobody wants leaves

Key = tuple[Any, ...]


class Zygote(Server):
    """Our side of one zygote. Used by the groups of one event loop at a time."""

    what = "zygote"

    def __init__(self, key: Key, environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None) -> None:
        control, end = _socket.pair()
        super().__init__(control)
        self.key = key
        self.users = 0
        self._preload = preload
        self._ready: asyncio.Future[None] | None = None
        self._is_ready = False
        self._parent: Guardian | None = None
        theirs = above_two(end.detach())
        argv = interpreter("aioelastic.child._zygote:main")
        try:
            try:
                self._parent = guardian()
            except OSError:
                self._number = start_helper(argv, environ, theirs)
            else:
                self._number = self._parent.start_helper(argv, environ, theirs)
        except BaseException:
            control.close()
            raise
        finally:
            os.close(theirs)
        packet, fds = _order.encode(_order.SETUP, (search_path(), sys.argv, main, list(preload), IDLE))
        with contextlib.suppress(BrokenPipeError):  # it could not start: the first to listen learns it
            _socket.send(control, packet, fds)
        _socket.close(fds)
        control.setblocking(False)

    @property
    def guardian(self) -> int:
        """The session of its guardian; 0: there is none."""
        return 0 if self._parent is None else self._parent.session

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

    def start(
        self, worker: WorkerPlan, environ: dict[str, str], poller: Poller, lost: Lost
    ) -> asyncio.Future[ServedProcess]:
        """Ask for one."""
        body = (environ, worker.cwd or here(), worker.place, int(worker.pipes), worker.mark, lost)

        def given(ends: Ends) -> list[int]:
            return [fd for fd in (ends.their_channel, ends.their_stdout, ends.their_stderr) if fd is not None]

        return self.ask(_order.FORK, worker, body, given, poller)

    def end(self) -> None:
        """It goes, and with it what it has forked."""
        super().end()
        if self._lost:
            return
        if self._parent is not None:
            self._parent.end_helper(self._number)
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._number, 9)  # not reaped, so the pid is its own
            os.waitpid(self._number, 0)

    def take(self, kind: bytes, body: tuple[Any, ...]) -> None:
        if kind == _order.READY:
            self._is_ready = True
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif kind == _order.BROKEN:
            words, trace = body
            remedy = f"mend that first\n\n{trace}".rstrip()
            self.died(SpecError("preload", list(self._preload), words, remedy))
        else:
            super().take(kind, body)

    def died(self, why: Exception | None = None) -> None:
        if self.gone:
            return
        _forget(self)
        if self._ready is not None and not self._ready.done():
            words = "killed the zygote that was importing them"
            remedy = "import them in a Python of your own to see why"
            self._ready.set_exception(why or SpecError("preload", list(self._preload), words, remedy))
        super().died()

    def refusal(self, code: int, words: str) -> OSError:
        return OSError(code or errno.EPERM, words)


class ZygoteLauncher:
    """The zygote of one group: `open`, then `start` any number of workers, then `close`."""

    name = "zygote"

    def __init__(self, environ: Mapping[str, str], poller: Poller, lost: Lost = None) -> None:
        self._environ = environ
        self._poller = poller
        self._lost = lost
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

    @property
    def guardian(self) -> int:
        """The session of the guardian to which falls what its workers leave behind; 0: there is none."""
        return 0 if self._zygote is None else self._zygote.guardian

    def start(self, worker: WorkerPlan) -> asyncio.Future[ServedProcess]:
        """See `Launcher.start`."""
        assert self._zygote is not None
        if self._zygote.gone:  # a later attempt gets a new one
            self.close()
            self._zygote = _acquire(*self._wanted, asyncio.get_running_loop())
        return self._zygote.start(worker, worker.environ(self._environ), self._poller, self._lost)

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
    key = (sys.executable, preload, main, tuple(search_path()), frozenset(environ.items()))
    with _lock:
        for one in list(_zygotes):
            if one.loop is None and one.has_left():
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
def end_helpers() -> None:
    """End what stays warm, zygotes and the guardian: at the interpreter's end, or to leave nothing running before."""
    with _lock:
        for one in _zygotes:
            one.end()
        _zygotes.clear()
    end_guardian()


@forked.in_copies
def _renew() -> None:
    global _lock
    _lock = threading.Lock()
    _zygotes.clear()
