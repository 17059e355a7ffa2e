"""`start="zygote"`: function workers forked by a small warm process, which outlives groups and restarts."""

from __future__ import annotations

import _locale
import asyncio
import atexit
import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..child.kernel.bounded_reads import slurp
from ..child.kernel.child_processes import pidfd_or_none
from ..child.wire import datagrams, requests
from ..child.worker import host_program, multiprocessing_state
from ..child.worker.main_module import Main
from ..child.zygote.imported_state import seen
from ..model.errors import SpecError
from ..planning import WorkerPlan, merged
from ..processes.strays import protect, unprotect
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.helper_thread import HelperThread
from ..system.interpreter import interpreter
from ..system.waiting import settle
from ..watch import Poller
from ._direct import reap_soon
from ._guardian import Guardian, end_guardian, guardian, here, is_current, let_go
from ._helper_process import Lost, ServedProcess, Server
from ._host_state import HostState
from ._pipe_ends import Ends
from ._spawn import start_helper
from ._standard_streams import above_two

IDLE = 60.0  # seconds after which a zygote that nobody wants leaves
# how many that nobody wants may wait, and how many bytes of their own they may have together
WARM = {"AIOELASTIC_WARM_PROCESSES": 4, "AIOELASTIC_WARM_MEMORY": 1 << 30}
LAST_USE = 0.9  # of `IDLE`: after which one is not taken any more, as it may leave before it is asked
_PAGE = os.sysconf("SC_PAGE_SIZE")
LOOK = 1.0  # seconds for a look at what they were imported from

# variables that are read when an interpreter, its allocator or its linker starts, and not again
_EARLY = ("PYTHON", "LC_", "MALLOC_", "LD_", "GLIBC_TUNABLES")
_EARLY_WORDS = frozenset(("TZ", "TZDIR", "LANG", "LANGUAGE"))

Key = tuple[Any, ...]


class Zygote(Server):
    """Our side of one zygote. Used by the groups of one event loop at a time."""

    what = "zygote"

    def __init__(
        self, key: Key, environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None, state: HostState
    ) -> None:
        if (tried := pidfd_or_none(os.getpid())) is None:
            problem = "needs pidfd_open(2), which this kernel has not or this sandbox forbids"
            raise SpecError("start", "zygote", problem, 'use start="spawn"')
        shut(tried)
        argv = interpreter("aioelastic.child.zygote.main_loop:main")
        control, end = datagrams.pair()
        super().__init__(control)
        self.key = key
        self.state = state
        self.environ = environ
        self.users = 0
        self.idle_since = 0.0
        self._files: list[tuple[str, int, int]] = []  # from which it has imported
        self._preload = preload
        self._is_ready = False
        self._waiting: set[asyncio.Future[None]] = set()  # until it is: each who waits, on a loop of their own
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
            authkey, tracker = multiprocessing_state.own()
            body = (here(), host_program.own(), _locales(), main, list(preload), IDLE, authkey)
            packet, fds = requests.encode(requests.SETUP, body)
            try:
                datagrams.send(control, packet, [*fds, *tracker])
            except OSError as exc:
                if not datagrams.is_gone(exc):
                    raise
                # it could not start: the first to listen learns it
            finally:
                datagrams.close(fds)
        except BaseException as exc:
            self.end()
            if isinstance(exc, OSError) and exc.errno == errno.E2BIG:
                size = sum(len(os.fsencode(f"{name}={value}")) + 1 for name, value in environ.items())
                problem = "are more bytes than execve(2) takes, and a zygote begins with them"
                raise SpecError("env", size, problem, 'give less, by a file, or use start="fork"') from None
            raise
        finally:
            if theirs >= 0:
                shut(theirs)
        control.setblocking(False)

    def serves(self, state: HostState) -> bool:
        """Whether a worker that begins with that can be forked from it."""
        return not self.gone and not self.was_ended and state.within(self.state)

    def has_left(self) -> bool:
        """Whether it is gone while nobody used it, or about to leave."""
        return super().has_left() or time.monotonic() - self.idle_since > LAST_USE * IDLE

    @property
    def has_files(self) -> bool:
        """Whether it has imported what may be edited."""
        return bool(self._files)

    def is_old(self) -> bool:
        """Whether something that it has imported was edited since. Reads directories."""
        return any(seen(path) != (at, size) for path, at, size in self._files)

    def memory(self) -> int:
        """Bytes that it has, and shares with no file (proc_pid_statm(5)); 0 when that cannot be read."""
        words = slurp(f"/proc/{self._there}/statm").split()
        return (int(words[1]) - int(words[2])) * _PAGE if self._there and len(words) > 2 else 0

    async def warm(self) -> None:
        """Wait until it has imported everything.

        Raises:
            SpecError: it could not.
        """
        if self._is_ready:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def start(
        self, worker: WorkerPlan, cwd: str, poller: Poller, lost: Lost, state: HostState
    ) -> asyncio.Future[ServedProcess]:
        """Ask for one."""
        streams, stop = int(worker.pipes), worker.stop_signal
        # what says the same as its own is left out: imports may have changed that since
        had = self.environ.get
        overlay = {key: value for key, value in worker.overlay.items() if had(key) != value}
        body = (overlay, cwd, worker.place, streams, worker.mark, lost, state.given, stop)

        def given(ends: Ends) -> list[int]:
            return [fd for fd in (ends.their_channel, ends.their_stdout, ends.their_stderr) if fd is not None]

        return self.ask(requests.FORK, worker, body, given, poller)

    def end(self) -> None:
        """It goes, and with it what it has forked."""
        super().end()
        if self._lost:
            return
        unprotect(self._there)
        self._kill()
        parent, self.guardian = self.guardian, None
        if parent is not None:
            let_go(parent)

    def leave(self) -> None:
        """End it from any thread, though groups use it: they learn that by its connection, on their loop."""
        self.was_ended = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._kill()

    def _kill(self) -> None:
        parent = self.guardian
        if parent is not None:
            parent.end_helper(self._number)
        pid, self._pid = self._pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, 9)  # not reaped, so it is its own
                reap_soon(pid)

    def take(self, kind: bytes, body: tuple[Any, ...]) -> None:
        if kind == requests.READY:
            self._is_ready = True
            self._there = self._pid or body[0]
            self._files = body[1]
            protect(self._there)
            for waiter in self._waiting:
                settle(waiter, None, None)
        elif kind == requests.BROKEN:
            field, value, words, trace = body
            remedy = f"mend that first\n\n{trace}".rstrip() if trace else 'mend that first, or use start="spawn"'
            self.died(SpecError(field, value, words, remedy))
        else:
            super().take(kind, body)

    def died(self, why: Exception | None = None) -> None:
        if self.gone:
            return
        _forget(self)
        if not self._is_ready:
            if why is None and self._preload:
                words = "killed the zygote that was importing them"
                remedy = "import them in a Python of your own to see why"
                why = SpecError("preload", list(self._preload), words, remedy)
            elif why is None:
                words = "ended before it was ready: it could not be started, or importing the main module killed it"
                why = SpecError("start", "zygote", words, 'look at stderr, or use start="spawn"')
            for waiter in self._waiting:
                settle(waiter, None, why)
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

    def __init__(self, thread: HelperThread, poller: Poller, lost: Lost = None) -> None:
        self._thread = thread
        self._poller = poller
        self._lost = lost
        self._zygotes: list[Zygote] = []  # that of the last start is the last; others may still have workers of ours

    async def open(
        self,
        environ: Mapping[str, str],
        preload: tuple[str, ...],
        main: Main | None,
        state: HostState,
    ) -> None:
        """Get one that has `preload` imported under `environ`: a warm one, if there is one.

        Raises:
            SpecError: a module could not be imported, it must not be forked, or see `check_bounds`.
        """
        check_bounds()
        self._wanted = (preload, main)
        self._environ = environ
        self._cwd = here()
        await self._forget_old()
        self._zygotes.append(_acquire(environ, *self._wanted, asyncio.get_running_loop(), state))
        try:
            await self._zygotes[-1].warm()
        except BaseException:
            self.close()
            raise

    async def _forget_old(self) -> None:
        """Those that have imported what was edited since serve no more groups."""
        key = _key(self._environ, *self._wanted)
        with _lock:
            found = [one for one in _zygotes if one.key == key and one.has_files]
        if found:
            looked = self._thread.submit(lambda: [one for one in found if one.is_old()])
            if not (await asyncio.wait({looked}, timeout=LOOK))[0]:
                self._thread.relieve()
            with _lock:
                for one in looked.result() if looked.done() else ():
                    if one in _zygotes:
                        _zygotes.remove(one)
                    if one.users == 0:
                        one.end()

    @property
    def guardian(self) -> Guardian | None:
        """That to which falls what the worker that was started last leaves behind."""
        return self._zygotes[-1].guardian if self._zygotes else None

    def start(self, worker: WorkerPlan, state: HostState) -> asyncio.Future[ServedProcess]:
        """See `Launcher.start`. `state`: what the worker begins with."""
        environ = self._environ
        early = _early(worker, environ)
        if early:
            environ = merged(environ, early)
        # a later attempt may get a new one; so does a worker that is to be started under other variables
        for one in reversed(self._zygotes):
            if one.serves(state) and (one.environ is environ or one.environ == environ):
                break
        else:
            one = _acquire(environ, *self._wanted, asyncio.get_running_loop(), state)
            self._zygotes.append(one)
        if one is not self._zygotes[-1]:
            self._zygotes.remove(one)
            self._zygotes.append(one)
        return one.start(worker, worker.cwd or self._cwd, self._poller, self._lost, state)

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
                    one.idle_since = time.monotonic()
                    if one not in _zygotes:  # what it has imported was edited
                        one.end()
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
    key = _key(environ, preload, main)
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


def _key(environ: Mapping[str, str], preload: tuple[str, ...], main: Main | None) -> Key:
    return (
        sys.executable,
        preload,
        main,
        here(),
        tuple(host_program.search_path()),
        *map(tuple, host_program.hooks()),
        _locales(),
        frozenset(environ.items()),
    )


def _locales() -> tuple[tuple[int, str], ...]:
    """What the program has set by `locale.setlocale`: Python itself sets none of these."""
    wanted = (_locale.LC_NUMERIC, _locale.LC_TIME, _locale.LC_COLLATE, _locale.LC_MONETARY, _locale.LC_MESSAGES)
    found = ((one, _locale.setlocale(one, None)) for one in wanted)
    return tuple((one, name) for one, name in found if name != "C")


def _early(worker: WorkerPlan, environ: Mapping[str, str]) -> dict[str, str | None]:
    """What that worker says otherwise than `environ` about variables that only a new interpreter heeds."""
    found = {
        key: value
        for key, value in worker.overlay.items()
        if (key.startswith(_EARLY) or key in _EARLY_WORDS) and environ.get(key) != value
    }
    if found.get("PYTHONUNBUFFERED") == "1" and "PYTHONUNBUFFERED" not in environ:
        del found["PYTHONUNBUFFERED"]  # which is what all workers get
    return found


def dismiss_stale() -> None:
    """End those that nobody uses and that are gone, or not of the present guardian: what their workers would begin with
    is older, perhaps with rights that this program has given up; and the least recently used, if too many wait, or have
    too much memory."""
    with _lock:
        idle = [one for one in _zygotes if one.loop is None]
        ended = [one for one in idle if one.has_left() or (one.guardian is not None and not is_current(one.guardian))]
        rest = sorted((one for one in idle if one not in ended), key=lambda one: -one.idle_since)
        count, room = (_bound(name, default) for name, default in WARM.items())
        for one in rest:
            count, room = count - 1, room - one.memory()
            if count < 0 or room < 0:
                ended.append(one)
        for one in ended:
            _zygotes.remove(one)
            one.end()


def _bound(name: str, default: int) -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else default


def check_bounds() -> None:
    """Raises `SpecError`: what the program's variables say about warm processes is no number."""
    for name, default in WARM.items():
        given = os.environ.get(name)
        if given is not None and not given.isdecimal():
            raise SpecError(name, given, "is no whole number from 0 on", f"leave it out for {default:,}")


def _forget(zygote: Zygote) -> None:
    with _lock:
        if zygote in _zygotes:
            _zygotes.remove(zygote)


@atexit.register
def end_helpers() -> None:
    """End zygotes and the guardian, whoever uses them: at the interpreter's end. Workers that they have started die."""
    with _lock:
        for one in _zygotes:
            if one.users:
                one.leave()
            else:
                one.end()
        _zygotes.clear()
    end_guardian()


def end_idle_helpers() -> None:
    """End zygotes and the guardian that stay warm for the next group: what no group and no executor uses."""
    with _lock:
        for one in [one for one in _zygotes if not one.users]:
            _zygotes.remove(one)
            one.end()
    end_guardian(unused=True)


@forked_copies.in_copies
def _renew() -> None:
    global _lock
    _lock = threading.Lock()
    _zygotes.clear()
