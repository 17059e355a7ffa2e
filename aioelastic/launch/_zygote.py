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
from ..child._read import slurp
from ..errors import SpecError
from ..watch import Poller, protect, unprotect
from ._call import Main, interpreter, own_argv, search_path
from ._direct import reap_soon
from ._ends import Ends, above_two
from ._guardian import Guardian, end_guardian, guardian, here, is_current, let_go
from ._host_state import HostState
from ._plan import WorkerPlan
from ._served import Lost, ServedProcess, Server
from ._spawn import start_helper

IDLE = 60.0  # seconds after which a zygote that nobody wants leaves

Key = tuple[Any, ...]


class Zygote(Server):
    """Our side of one zygote. Used by the groups of one event loop at a time."""

    what = "zygote"

    def __init__(
        self, key: Key, environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None, state: HostState
    ) -> None:
        argv = interpreter("aioelastic.child._zygote:main")
        control, end = _socket.pair()
        super().__init__(control)
        self.key = key
        self.state = state
        self.users = 0
        self._preload = preload
        self._ready: asyncio.Future[None] | None = None
        self._is_ready = False
        self.guardian: Guardian | None = None  # to which falls what its workers leave behind
        self._pid = 0  # where this process has started it itself
        self._number = 0
        self._there = 0  # its pid, once it is ready
        theirs = -1
        try:
            theirs = above_two(end.detach())
            try:
                self.guardian = guardian(state)
            except OSError:
                self._pid = start_helper(argv, environ, theirs)
            else:
                self._number = self.guardian.start_helper(argv, environ, theirs, state)
            packet, fds = _order.encode(_order.SETUP, (here(), search_path(), own_argv(), main, list(preload), IDLE))
            try:
                with contextlib.suppress(BrokenPipeError):  # it could not start: the first to listen learns it
                    _socket.send(control, packet, fds)
            finally:
                _socket.close(fds)
        except BaseException:
            self.end()
            raise
        finally:
            if theirs >= 0:
                os.close(theirs)
        control.setblocking(False)

    def serves(self, state: HostState) -> bool:
        """Whether a worker that begins with that can be forked from it."""
        return not self.gone and state.within(self.state)

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
        self, worker: WorkerPlan, environ: dict[str, str], cwd: str, poller: Poller, lost: Lost, state: HostState
    ) -> asyncio.Future[ServedProcess]:
        """Ask for one."""
        streams, stop = int(worker.pipes), worker.stop_signal
        body = (environ, cwd, worker.place, streams, worker.mark, lost, state.given, stop)

        def given(ends: Ends) -> list[int]:
            return [fd for fd in (ends.their_channel, ends.their_stdout, ends.their_stderr) if fd is not None]

        return self.ask(_order.FORK, worker, body, given, poller)

    def end(self) -> None:
        """It goes, and with it what it has forked."""
        super().end()
        if self._lost:
            return
        unprotect(self._there)
        if self.guardian is not None:
            self.guardian.end_helper(self._number)
            self._let_go()
        pid, self._pid = self._pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, 9)  # not reaped, so it is its own
                reap_soon(pid)

    def _let_go(self) -> None:
        parent, self.guardian = self.guardian, None
        if parent is not None:
            let_go(parent)

    def take(self, kind: bytes, body: tuple[Any, ...]) -> None:
        if kind == _order.READY:
            self._is_ready = True
            self._there = self._pid or body[0]
            protect(self._there)
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
            if why is None and self._preload:
                words = "killed the zygote that was importing them"
                remedy = "import them in a Python of your own to see why"
                why = SpecError("preload", list(self._preload), words, remedy)
            elif why is None:
                words = "ended before it was ready: it could not be started, or importing the main module killed it"
                why = SpecError("start", "zygote", words, 'look at stderr, or use start="spawn"')
            self._ready.set_exception(why)
        super().died()

    def pid_of(self, told: int, pidfd: int) -> int:
        if self.guardian is not None:
            return told
        # this process has started it, perhaps into another pid namespace: here its workers have other pids
        lines = slurp(f"/proc/self/fdinfo/{pidfd}").split(b"\n")  # proc_pid_fdinfo(5)
        return next((int(one[4:]) for one in lines if one.startswith(b"Pid:")), told)

    def refusal(self, code: int, words: str | bytes) -> OSError:
        return OSError(code or errno.EPERM, os.fsdecode(words))


class ZygoteLauncher:
    """The zygotes of one group: `open`, then `start` any number of workers, then `close`."""

    name = "zygote"

    def __init__(self, environ: Mapping[str, str], poller: Poller, lost: Lost = None) -> None:
        self._environ = environ
        self._poller = poller
        self._lost = lost
        self._zygotes: list[Zygote] = []  # the last is the one in use; earlier ones may still have workers of ours

    async def open(
        self,
        environ: Mapping[str, str],
        preload: tuple[str, ...],
        main: Main | None,
        state: HostState,
    ) -> None:
        """Get one that has `preload` imported under `environ`: a warm one, if there is one.

        Raises:
            SpecError: a module could not be imported, or it must not be forked.
        """
        self._wanted = (environ, preload, main)
        self._cwd = here()
        self._zygotes.append(_acquire(*self._wanted, asyncio.get_running_loop(), state))
        try:
            await self._zygotes[-1].warm()
        except BaseException:
            self.close()
            raise

    @property
    def guardian(self) -> Guardian | None:
        """That to which falls what its workers leave behind."""
        return self._zygotes[-1].guardian if self._zygotes else None

    def start(self, worker: WorkerPlan, state: HostState) -> asyncio.Future[ServedProcess]:
        """See `Launcher.start`. `state`: what the worker begins with."""
        if not self._zygotes[-1].serves(state):  # a later attempt gets a new one
            self._zygotes.append(_acquire(*self._wanted, asyncio.get_running_loop(), state))
        environ, cwd = worker.environ(self._environ), worker.cwd or self._cwd
        return self._zygotes[-1].start(worker, environ, cwd, self._poller, self._lost, state)

    def withdraw(self, starting: asyncio.Future[Any]) -> None:
        """See `_contract.withdraw`."""
        for one in self._zygotes:
            one.withdraw(starting)

    def close(self) -> None:
        """The group needs them no more. They stay warm for the next."""
        zygotes, self._zygotes = self._zygotes, []
        with _lock:
            for one in zygotes:
                one.users -= 1
                if one.users == 0 and one.is_starting:  # it does not answer, and nobody will hear what it starts
                    if one in _zygotes:
                        _zygotes.remove(one)
                    one.end()
                elif one.users == 0 and not one.gone:
                    one.detach()
        dismiss_stale()


_lock = threading.Lock()
_zygotes: list[Zygote] = []


def _acquire(
    environ: Mapping[str, str],
    preload: tuple[str, ...],
    main: Main | None,
    loop: asyncio.AbstractEventLoop,
    state: HostState,
) -> Zygote:
    key = (sys.executable, preload, main, here(), tuple(search_path()), frozenset(environ.items()))
    with _lock:
        for one in _zygotes:
            if one.key == key and one.loop in (loop, None) and one.serves(state):
                if one.loop is None and one.has_left():
                    continue  # `dismiss_stale` sees to it
                break
        else:
            one = Zygote(key, environ, preload, main, state)
            _zygotes.append(one)
        if one.loop is None:
            one.attach(loop)
        one.users += 1
    dismiss_stale()
    return one


def dismiss_stale() -> None:
    """End those that nobody uses and that are gone, or not of the present guardian: what their workers would begin with
    is older, perhaps with rights that this program has given up."""
    with _lock:
        for one in list(_zygotes):
            if one.loop is None and (one.has_left() or (one.guardian is not None and not is_current(one.guardian))):
                _zygotes.remove(one)
                one.end()


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
