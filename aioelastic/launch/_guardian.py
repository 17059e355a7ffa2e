"""Our side of the guardian, which starts commands, and fresh interpreters for functions. See `child/_guardian.py`.

One process for the whole program, started at the first need; a connection of its own for each group.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import forked
from ..child import _order, _socket
from ..child._children import children
from ..child._read import slurp
from ..placement import Orders
from ..report import temporary
from ..spec import Std
from ..watch import Poller
from . import _host_state
from ._call import interpreter
from ._ends import Ends, above_two
from ._host_state import HostState
from ._interpreter import python
from ._plan import WorkerPlan
from ._served import Lost, ServedProcess, Server
from ._spawn import start_helper
from ._standard import standard

LAST = 5.0  # seconds for what it holds to die
SOON = 0.05  # seconds for one that holds nothing


class Guardian:
    """The process.

    Attributes:
        state: what the program had when it was born.
        session: that of the guardian and its keeper.
        users: connections, and zygotes, that are its. Guarded by the lock of this module.

    Raises:
        OSError: it cannot run here.
    """

    def __init__(self, state: HostState) -> None:
        if state.no_guardian:
            raise OSError(errno.EINVAL, state.no_guardian)
        _find_former()
        self.state = state
        self.users = 0
        self._helpers = 0
        self.session = 0
        self._control, end = _socket.pair()
        theirs = -1
        try:
            theirs = above_two(end.detach())
            program = os.pidfd_open(os.getpid())
            try:
                self._send(_order.PROGRAM, (temporary(), os.getpid()), [program])
            finally:
                os.close(program)
            self.session = start_helper(_argv(), os.environ, theirs)
            self._pidfd = os.pidfd_open(self.session)
        except BaseException:
            self._control.close()
            if self.session:
                _former.add(self.session)  # it leaves, and is to be reaped
            raise
        finally:
            if theirs >= 0:
                os.close(theirs)
        forked.register(self)

    def connect(self, environ: Mapping[str, str], lost: Lost = None) -> socket.socket:
        """A connection for the workers of a group, which begin with `environ` in the directory in which we are, and
        which end with this process as `lost` says."""
        ours, theirs = _socket.pair()
        try:
            self._send(_order.CONNECT, (), [theirs.fileno()])
            packet, fds = _order.encode(_order.GROUP, (_bytes(environ), os.fsencode(here()), lost))
            try:
                _socket.send(ours, packet, fds)
            finally:
                _socket.close(fds)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return ours

    def start_helper(self, argv: Sequence[str], environ: Mapping[str, str], stdin: int, state: HostState) -> int:
        """As `_spawn.start_helper`, by the guardian. Returns its number; should it not start, its stdin closes."""
        self._helpers += 1
        number = self._helpers
        body = (number, [os.fsencode(one) for one in argv], _bytes(environ), self.other(state))
        own = standard(2)
        stderr = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) if own is None else os.dup(own)
        try:
            self._send(_order.HELPER, body, [stdin, stderr])
        finally:
            os.close(stderr)
        return number

    def other(self, state: HostState) -> tuple[Any, ...] | None:
        """What it is to be told that a process shall have; None: what it has itself."""
        return None if state.given == self.state.given else state.given

    def end_helper(self, number: int) -> None:
        """Kill it."""
        with contextlib.suppress(OSError):
            self._send(_order.END, (number,), [])

    def remove(self, path: str) -> None:
        """Remove that directory, a control group or another, should this program be gone before it has done that."""
        self._send(_order.REMOVE, (path,), [])

    def left(self, seconds: float) -> list[int]:
        """The pids of what was left to it: roots of whatever workers that have ended have left running.

        Raises:
            OSError: it does not answer.
        """
        (pids,) = self._ask(_order.LEFT, (), seconds)
        return list(pids)

    def refuses(self, place: tuple[Orders, str], state: HostState, seconds: float) -> tuple[int, str]:
        """Try in a process that ends at once whether a worker could have that place: errno and field, or (0, "").

        Raises:
            OSError: it does not answer.
        """
        code, field = self._ask(_order.TRY, (place, self.other(state)), seconds)
        return code, field

    def _ask(self, kind: bytes, body: tuple[Any, ...], seconds: float) -> tuple[Any, ...]:
        ours, theirs = _socket.pair()
        try:
            with theirs:
                self._send(_order.CONNECT, (), [theirs.fileno()])
            _socket.send(ours, *_order.encode(kind, body))
            answered = select.poll()
            answered.register(ours, select.POLLIN)
            if not answered.poll(seconds * 1000):
                raise TimeoutError("the guardian does not answer")
            packet, fds = _socket.receive(ours)
            if not packet:
                raise ConnectionResetError
            told, _ = _order.decode(packet, fds)
            _socket.close(fds)
            if packet[:1] == _order.REFUSED:
                raise OSError(told[1], os.strerror(told[1]))
            return told
        except ConnectionError:
            raise ProcessLookupError("the guardian has died") from None
        finally:
            ours.close()

    def has_left(self, seconds: float = 0.0) -> bool:
        """Whether it is gone, or is within so many seconds."""
        return _socket.has_ended(self._control, seconds)

    def leave(self, ends: bool) -> None:
        """It is to go, and whatever it still holds ends before; not waited for. `ends`: this program ends, too."""
        with contextlib.suppress(OSError):
            self._send(_order.LEAVE, (ends,), [])
        self._control.close()

    def wait(self, seconds: float) -> bool:
        """After `leave`: wait until it has gone. Whether it has: then nothing of it is left."""
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if not ended.poll(seconds * 1000) and seconds < LAST:
            return False
        os.close(self._pidfd)
        self._pidfd = -1
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.session, os.WNOHANG)
        return True

    def disown(self) -> list[int]:
        """See `forked`."""
        fds, self._pidfd = [self._control.detach(), self._pidfd], -1
        return [fd for fd in fds if fd >= 0]

    def _send(self, kind: bytes, body: tuple[Any, ...], fds: list[int]) -> None:
        # blocks while it is full, which is while the guardian starts; datagrams of several threads do not mix
        packet, large = _order.encode(kind, body)
        try:
            _socket.send(self._control, packet, [*large, *fds])
        finally:
            _socket.close(large)


class GuardianLauncher(Server):
    """Starts commands, and fresh interpreters, by the guardian of this process: the group's connection to it.

    Its workers are no children of ours: no other part of the program can reap them, the size of our memory and our
    threads do not matter to their start, and whatever they leave behind comes back to the guardian. If this process
    dies, however, they die.
    """

    name = "guardian"
    what = "guardian"

    def __init__(
        self,
        environ: Mapping[str, str],
        poller: Poller | None = None,
        lost: Lost = None,
        state: HostState | None = None,
    ) -> None:
        """Connect to it.

        Args:
            lost: how workers end when this process dies: None at once, or a signal and the seconds to obey it.
            state: what workers begin with; None: as by the guardian that was needed last.

        Raises:
            OSError: no guardian can run here.
        """
        self.server = guardian(state)
        try:
            super().__init__(self.server.connect(environ, lost))
        except BaseException:
            let_go(self.server)
            raise
        self.session = self.server.session
        self._poller = poller

    @property
    def is_unused(self) -> bool:
        """Whether it has started nothing."""
        return self._count == 0

    def serves(self, state: HostState) -> bool:
        """Whether a worker that begins with that can be started by it."""
        return not self.gone and state.within(self.server.state)

    def start(self, worker: WorkerPlan, state: HostState | None = None) -> asyncio.Future[ServedProcess]:
        """See `Launcher.start`.

        Args:
            state: what it begins with, if that was read already.
        """
        if self.loop is None and not self.gone:
            self.attach(asyncio.get_running_loop())
        self._poller = self._poller or Poller(asyncio.get_running_loop())
        argv, program = worker.argv, worker.program
        if worker.function is not None:
            argv = tuple(interpreter("aioelastic.child._work:fresh"))
            program = argv[0]
        assert program is not None
        inherited = standard(0) if worker.stdin == "inherit" and worker.function is None else None
        has_stdin = worker.function is not None or inherited is not None
        body = (
            os.fsencode(program),
            [os.fsencode(one) for one in argv],
            _bytes(worker.overlay),
            None if worker.cwd is None else os.fsencode(worker.cwd),
            worker.mark,
            has_stdin | (Std.OUT in worker.pipes) << 1 | (Std.ERR in worker.pipes) << 2,
            worker.place,
            self.server.other(state or _host_state.now()),
            worker.stop_signal,
        )

        def given(ends: Ends) -> list[int]:
            stdin = ends.their_channel if worker.function is not None else inherited
            return [fd for fd in (stdin, ends.their_stdout, ends.their_stderr) if fd is not None]

        return self.ask(_order.EXEC, worker, body, given, self._poller)

    def died(self, why: Exception | None = None) -> None:
        self.server.has_left(SOON)  # its other sockets close with this one: who asks next finds it gone
        super().died(why)

    def end(self) -> None:
        if not self.gone:
            let_go(self.server)
        super().end()


def _bytes(environ: Mapping[str, str | None]) -> dict[bytes, bytes | None]:
    return {_encoded(key): None if value is None else _encoded(value) for key, value in environ.items()}


_encoded = functools.lru_cache(4096)(os.fsencode)  # most of it is the same for all workers


def here() -> str:
    """Where we stand, even when that directory is deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return f"/proc/{os.getpid()}/cwd"


_lock = threading.Lock()
_guardians: list[Guardian] = []  # the one that was needed last is the last
_leaving: list[Guardian] = []
_former: set[int] = set()  # pids


def has_one() -> bool:
    """Whether a guardian runs for this process: most likely workers can be started by it."""
    with _lock:
        return bool(_guardians) and not _guardians[-1].has_left()


def guardian(state: HostState | None) -> Guardian:
    """One of this process by which workers can begin with that, started if need be; to be given back by `let_go`.

    Others that nobody needs go: they may have rights that this program has given up.

    Args:
        state: None: the one that was needed last will do.

    Raises:
        OSError: none can run here.
    """
    with _lock:
        for one in list(_guardians):
            if one.has_left():
                _dismiss(one)
        fits = [one for one in _guardians if state is None or state.within(one.state)]
        one = fits[-1] if fits else Guardian(state or _host_state.now())
        _guardians[:] = [*(other for other in _guardians if other is not one), one]
        one.users += 1
        _dismiss_unused()
        return one


def hold(one: Guardian) -> None:
    """One more who needs it; to be given back by `let_go`."""
    with _lock:
        one.users += 1


def let_go(one: Guardian) -> None:
    """The counterpart of `guardian`. The last one that was needed stays for the next who needs it."""
    with _lock:
        one.users -= 1
        _dismiss_unused()


def _dismiss_unused() -> None:
    for one in _guardians[:-1]:
        if one.users == 0:
            _dismiss(one)
    _leaving[:] = [one for one in _leaving if not one.wait(SOON)]
    if _former:
        _former.difference_update([pid for pid in _former if _is_reaped(pid)])


def _find_former() -> None:
    """Guardians of the program that this one has replaced by execve(2): they end, and are still its children, of which
    it knows nothing."""
    mine = {one.session for one in (*_guardians, *_leaving)}
    for pid in children(os.getpid()):
        if pid not in mine and slurp(f"/proc/{pid}/comm", 64) == b"aio-keeper\n" and not _is_reaped(pid):
            _former.add(pid)


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _dismiss(one: Guardian, ends: bool = False) -> None:
    _guardians.remove(one)
    one.leave(ends)
    _leaving.append(one)


def is_current(one: Guardian | None) -> bool:
    """Whether it is the one that was needed last."""
    with _lock:
        return one is not None and _guardians[-1:] == [one]


def left_to_guardian(session: int) -> list[int]:
    """The pids of what was left to it by workers that have ended.

    Args:
        session: of the guardian that is meant.

    Raises:
        OSError: it has died, or does not answer.
    """
    with _lock:
        one = next((one for one in _guardians if one.session == session), None)
    if one is None:
        raise ProcessLookupError("the guardian has died")
    return one.left(LAST)


def removed_at_the_end(path: str) -> None:
    """Let the guardian, if there is one, remove that directory when this program is gone."""
    with _lock:
        known = _guardians[-1:]
    for one in known:
        with contextlib.suppress(OSError):
            one.remove(path)


def end_guardian() -> None:
    """End it, and with it whatever it still holds."""
    with _lock:
        for one in list(_guardians):
            _dismiss(one, ends=True)
        leaving, _leaving[:] = list(_leaving), []
    for one in leaving:
        one.wait(LAST)
    _host_state.close_idle()


@forked.in_copies
def _renew() -> None:
    """Those of the original are not ours; and whoever had the lock there is not here."""
    global _lock
    _lock = threading.Lock()
    _guardians.clear()
    _leaving.clear()
    _former.clear()


def _argv() -> list[str]:
    """Isolated, and without running the package's own `__init__` files: half the time to start."""
    home = Path(__file__).parent.parent
    code = (
        "import sys\n"
        f"for name, path in (('aioelastic', {str(home)!r}), ('aioelastic.child', {str(home / 'child')!r})):\n"
        "    module = sys.modules[name] = type(sys)(name)\n"
        "    module.__path__ = [path]\n"
        "from aioelastic.child._guardian import main\nmain()\n"
    )
    return [python(), "-I", "-S", "-c", code]
