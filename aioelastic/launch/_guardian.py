"""The guardian, as a process of ours: one for the whole program, started at the first need. See
`child/guardian/main_loop.py`.

Imports no asyncio: the command line starts it before that, so that both come up at the same time.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..child.guardian import process_start
from ..child.wire import datagrams, requests
from ..model.errors import SpecError
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.interpreter import home, python
from ..system.temporary_directories import temporary
from . import _former_guardians, _host_state
from ._host_state import HostState
from ._outbox import Outbox
from ._spawn import start_helper
from ._standard_streams import above_two, standard

if TYPE_CHECKING:
    from ..model.placement import Orders
    from ..planning import Who
    from ._helper_process import Lost

LAST = 5.0  # seconds for what it holds to die
SOON = 0.05  # seconds for one that holds nothing


class Guardian:
    """The process.

    Attributes:
        state: what the program had when it was born.
        session: that of the guardian and its keeper.
        users: connections, and zygotes, that are its. Guarded by the lock of this module.
        was_ended: by `end_guardian`, whoever used it.

    Raises:
        OSError: it cannot run here.
    """

    def __init__(self, state: HostState) -> None:
        if state.no_guardian:
            raise OSError(errno.EINVAL, state.no_guardian)
        _former_guardians.find({one.session for one in (*_guardians, *_leaving)})
        self.state = state
        self.users = 0
        self.was_ended = False
        self._helpers = 0
        self.session: int = 0
        control, end = datagrams.pair()
        self._outbox = Outbox(control)
        theirs = -1
        try:
            theirs = above_two(end.detach())
            program = os.pidfd_open(os.getpid())
            try:
                self._send(requests.PROGRAM, (temporary(), os.getpid()), [program])
            finally:
                shut(program)
            self.session = start_helper(_argv(), os.environ, theirs)
            self._pidfd = os.pidfd_open(self.session)
            _host_state.witness(self.session, state.domain)
        except BaseException:
            self._outbox.close()
            if self.session:
                _former_guardians.pids.add(self.session)  # it leaves, and is to be reaped
            raise
        finally:
            shut(theirs)
        forked_copies.register(self)

    def connect(self, environ: Mapping[str, str], lost: Lost = None) -> socket.socket:
        """A connection for the workers of a group, which begin with `environ` in the directory in which we are, and
        which end with this process as `lost` says."""
        ours, theirs = datagrams.pair()
        try:
            self._send(requests.CONNECT, (), [theirs.fileno()])
            packet, fds = requests.encode(requests.GROUP, (process_start.packed(environ), os.fsencode(here()), lost))
            try:
                datagrams.send(ours, packet, fds)
            finally:
                datagrams.close(fds)
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
        body = (number, [os.fsencode(one) for one in argv], process_start.packed(environ), self.other(state))
        own = standard(2)
        stderr = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) if own is None else os.dup(own)
        try:
            self._send(requests.HELPER, body, [stdin, stderr])
        finally:
            shut(stderr)
        return number

    def other(self, state: HostState) -> tuple[Any, ...] | None:
        """What it is to be told that a process shall have; None: what it has itself."""
        return None if state.given == self.state.given else state.given

    def end_helper(self, number: int) -> None:
        """Kill it."""
        with contextlib.suppress(OSError):
            self._send(requests.END, (number,), [])

    def remove(self, path: str) -> None:
        """Remove that directory, a control group or another, should this program be gone before it has done that."""
        self._send(requests.REMOVE, (path,), [])

    def left(self, seconds: float) -> list[int]:
        """The pids of what was left to it: roots of whatever workers that have ended have left running.

        Raises:
            OSError: it does not answer.
        """
        (pids,) = self._ask(requests.LEFT, (), seconds)
        return list(pids)

    def refuses(
        self, place: tuple[Orders, str] | None, state: HostState, seconds: float, who: Who | None = None
    ) -> tuple[int, str]:
        """Try in a process that ends at once whether a worker could have that place, and be of that user: errno and
        field, or (0, "").

        Raises:
            OSError: it does not answer.
        """
        code, field = self._ask(requests.TRY, (place, self.other(state), who), seconds)
        return code, field

    def _ask(self, kind: bytes, body: tuple[Any, ...], seconds: float) -> tuple[Any, ...]:
        ours, theirs = datagrams.pair()
        try:
            with theirs:
                self._send(requests.CONNECT, (), [theirs.fileno()])
            datagrams.send(ours, *requests.encode(kind, body))
            if not datagrams.readable(seconds, ours.fileno()):
                raise TimeoutError(f"the guardian does not answer within {seconds:g} s")
            packet, fds = datagrams.receive(ours)
            if not packet:
                raise ConnectionResetError
            told, _ = requests.decode(packet, fds)
            datagrams.close(fds)
            if packet[:1] == requests.REFUSED:
                raise OSError(told[1], os.strerror(told[1]))
            return told
        except OSError as exc:
            if datagrams.is_gone(exc):
                raise ProcessLookupError("the guardian has died") from None
            raise
        finally:
            ours.close()

    def has_left(self, seconds: float = 0.0) -> bool:
        """Whether it is gone, or is within so many seconds."""
        return datagrams.has_ended(self._outbox.sock, seconds)

    def leave(self, ends: bool) -> None:
        """It is to go, and whatever it still holds ends before; not waited for. `ends`: this program ends, too."""
        _host_state.unseen(self.session)
        with contextlib.suppress(OSError):
            self._send(requests.LEAVE, (ends,), [])
        self._outbox.close()
        if not self._has_ended(0):  # so the number is its own
            with contextlib.suppress(OSError):
                os.killpg(self.session, signal.SIGCONT)  # whoever has stopped it: it could not leave

    def wait(self, seconds: float) -> bool:
        """After `leave`: wait until it has gone. Whether it has: then nothing of it is left."""
        if not self._has_ended(seconds) and seconds < LAST:
            return False
        self._outbox.give_up()
        shut(self._pidfd)
        self._pidfd = -1
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.session, os.WNOHANG)
        return True

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fds, self._pidfd = [self._pidfd], -1
        return [fd for fd in fds if fd >= 0]

    def _has_ended(self, seconds: float) -> bool:
        return datagrams.readable(seconds, self._pidfd)

    def _send(self, kind: bytes, body: tuple[Any, ...], fds: list[int]) -> None:
        # waits for nothing, also while the guardian starts, or is stopped
        packet, large = requests.encode(kind, body)
        try:
            self._outbox.send(packet, [*large, *fds])
        finally:
            datagrams.close(large)


def here() -> str:
    """Where we stand, even when that directory is deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return f"/proc/{os.getpid()}/cwd"


_lock = threading.Lock()
_guardians: list[Guardian] = []  # the one that was needed last is the last
_leaving: list[Guardian] = []


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


def begin_guardian() -> None:
    """Start one, if there is none, for the group that comes next: it comes up meanwhile. What keeps it from that, the
    group finds out."""
    with contextlib.suppress(OSError, SpecError):
        let_go(guardian(None))


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
    unused = [one for one in _guardians[:-1] if one.users == 0]
    for one in unused:
        _dismiss(one)
    # only once for each: one that hangs delays nobody again and again
    _leaving[:] = [one for one in _leaving if not one.wait(SOON if one in unused else 0)]
    _former_guardians.reap()


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


def dismiss_guardian() -> None:
    """The program is about to end: what nobody needs any more leaves meanwhile, and `end_guardian` waits for it."""
    with _lock:
        for one in [one for one in _guardians if not one.users]:
            _dismiss(one, ends=True)


@atexit.register
def end_guardian(unused: bool = False) -> None:
    """End it, and with it whatever it still holds.

    Args:
        unused: only if nobody needs it: this program goes on.
    """
    with _lock:
        for one in [one for one in _guardians if not (unused and one.users)]:
            one.was_ended = True
            _dismiss(one, ends=not unused)
        leaving, _leaving[:] = list(_leaving), []
    for one in leaving:
        one.wait(LAST)
    _host_state.close_idle()


@forked_copies.in_copies
def _renew() -> None:
    """Those of the original are not ours; and whoever had the lock there is not here."""
    global _lock
    _lock = threading.Lock()
    _guardians.clear()
    _leaving.clear()


def _argv() -> list[str]:
    """Isolated, and without running the package's own `__init__` file: half the time to start."""
    code = (
        "import sys\n"
        "module = sys.modules['aioelastic'] = type(sys)('aioelastic')\n"
        f"module.__path__ = [{os.path.join(home(), 'aioelastic')!r}]\n"
        "from aioelastic.child.guardian.main_loop import main\nmain()\n"
    )
    return [python(), "-I", "-S", "-c", code]
