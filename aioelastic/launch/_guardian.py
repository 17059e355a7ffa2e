"""Our side of the guardian, which starts commands, and fresh interpreters for functions. See `child/_guardian.py`.

One process for the whole program, started at the first need; a connection of its own for each group.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import forked
from ..child import _order, _socket
from ..spec import Std
from ..watch import Poller
from ._call import interpreter
from ._ends import Ends, above_two
from ._plan import WorkerPlan
from ._served import Lost, ServedProcess, Server
from ._spawn import start_helper

LAST = 5.0  # seconds for what it holds to die


class Guardian:
    """The process.

    Attributes:
        session: that of the guardian and its keeper.

    Raises:
        OSError: it cannot run here.
    """

    def __init__(self) -> None:
        self.key = _key()
        os.close(os.pidfd_open(os.getpid()))  # it needs those
        self._surroundings = surroundings()
        self._helpers = 0
        self._control, end = _socket.pair()
        theirs = above_two(end.detach())
        try:
            self.session = start_helper(_argv(), os.environ, theirs)
            self._pidfd = os.pidfd_open(self.session)
        except BaseException:
            self._control.close()
            raise
        finally:
            os.close(theirs)
        forked.register(self)

    def connect(self, environ: Mapping[str, str], lost: Lost = None) -> socket.socket:
        """A connection for the workers of a group, which begin with `environ` and with what this process has now, and
        which end with this process as `lost` says."""
        now = surroundings()
        ours, theirs = _socket.pair()
        try:
            self._send(_order.CONNECT, (), [theirs.fileno()])
            changed = None if now == self._surroundings else now
            packet, fds = _order.encode(_order.GROUP, (_bytes(environ), os.fsencode(here()), changed, lost))
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

    def start_helper(self, argv: Sequence[str], environ: Mapping[str, str], stdin: int) -> int:
        """As `_spawn.start_helper`, by the guardian. Returns its number; should it not start, its stdin closes."""
        self._helpers += 1
        number = self._helpers
        body = (number, [os.fsencode(one) for one in argv], _bytes(environ))
        try:
            stderr = os.dup(2)
        except OSError:
            stderr = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._send(_order.HELPER, body, [stdin, stderr])
        finally:
            os.close(stderr)
        return number

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
        ours, theirs = _socket.pair()
        try:
            try:
                self._send(_order.CONNECT, (), [theirs.fileno()])
            finally:
                theirs.close()
            _socket.send(ours, *_order.encode(_order.LEFT, ()))
            answered = select.poll()
            answered.register(ours, select.POLLIN)
            if not answered.poll(seconds * 1000):
                raise TimeoutError("the guardian does not answer")
            packet, fds = _socket.receive(ours)
            if not packet:
                raise ConnectionResetError
            (pids,), _ = _order.decode(packet, fds)
            _socket.close(fds)
            return list(pids)
        except ConnectionError:
            raise ProcessLookupError("the guardian has died") from None
        finally:
            ours.close()

    def has_left(self) -> bool:
        """Whether it is gone."""
        return _socket.has_ended(self._control)

    def end(self) -> None:
        """It leaves, and whatever it still holds ends before."""
        with contextlib.suppress(OSError):
            self._send(_order.LEAVE, (), [])
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        ended.poll(LAST * 1000)
        os.close(self._pidfd)
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.session, os.WNOHANG)

    def disown(self) -> list[int]:
        """See `forked`."""
        return [self._control.detach(), self._pidfd] if self._control.fileno() >= 0 else []

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

    def __init__(self, environ: Mapping[str, str], poller: Poller | None = None, lost: Lost = None) -> None:
        """Connect to it.

        Args:
            lost: how workers end when this process dies: None at once, or a signal and the seconds to obey it.

        Raises:
            OSError: no guardian can run here.
        """
        server = guardian()
        super().__init__(server.connect(environ, lost))
        self.session = server.session
        self._poller = poller

    def start(self, worker: WorkerPlan) -> asyncio.Future[ServedProcess]:
        """See `Launcher.start`."""
        loop = asyncio.get_running_loop()
        if self.loop is None and not self.gone:
            self.attach(loop)
        self._poller = self._poller or Poller(loop)
        argv, program = worker.argv, worker.program
        if worker.function is not None:
            argv, program = tuple(interpreter("aioelastic.child._work:fresh")), sys.executable
        assert program is not None
        has_stdin = worker.function is not None or worker.stdin == "inherit"
        body = (
            os.fsencode(program),
            [os.fsencode(one) for one in argv],
            _bytes(worker.overlay),
            None if worker.cwd is None else os.fsencode(worker.cwd),
            worker.mark,
            has_stdin | (Std.OUT in worker.pipes) << 1 | (Std.ERR in worker.pipes) << 2,
            worker.place,
        )

        def given(ends: Ends) -> list[int]:
            stdin = ends.their_channel if worker.function is not None else 0 if has_stdin else None
            return [fd for fd in (stdin, ends.their_stdout, ends.their_stderr) if fd is not None]

        return self.ask(_order.EXEC, worker, body, given, self._poller)


def surroundings() -> tuple[Any, ...]:
    """What a child inherits beside its environment and descriptors, and may have changed since the guardian began."""
    with open("/proc/self/status", "rb") as file:
        umask = next((int(line.split()[1], 8) for line in file if line.startswith(b"Umask:")), 0o022)
    limits = tuple((one, resource.getrlimit(one)) for one in range(resource.RLIMIT_RTTIME))
    return umask, os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0)), limits


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
_guardian: Guardian | None = None


def guardian() -> Guardian:
    """The guardian of this process, started if need be. Raises `OSError`."""
    global _guardian
    with _lock:
        one = _guardian
        if one is not None and (one.key != _key() or one.has_left()):
            _guardian = None
            one.end()
        if _guardian is None:
            _guardian = Guardian()
        return _guardian


def left_to_guardian(session: int) -> list[int]:
    """The pids of what was left to it by workers that have ended.

    Args:
        session: of the guardian that is meant.

    Raises:
        OSError: it has died, or does not answer.
    """
    with _lock:
        one = _guardian
    if one is None or one.session != session:
        raise ProcessLookupError("the guardian has died")
    return one.left(LAST)


def removed_at_the_end(path: str) -> None:
    """Let the guardian, if there is one, remove that directory when this program is gone."""
    with _lock:
        one = _guardian
    if one is not None:
        with contextlib.suppress(OSError):
            one.remove(path)


def end_guardian() -> None:
    """End it, and with it whatever it still holds."""
    global _guardian
    with _lock:
        one, _guardian = _guardian, None
        if one is not None:
            one.end()


@forked.in_copies
def _renew() -> None:
    """That of the original is not ours; and whoever had the lock there is not here."""
    global _lock, _guardian
    _lock, _guardian = threading.Lock(), None


def _key() -> tuple[Any, ...]:
    """Whose it is: a forked copy, or one that has changed its user, needs another."""
    return os.getpid(), os.getresuid(), os.getresgid(), os.getgroups()


def _argv() -> list[str]:
    """Isolated, and without running the package's own `__init__` files: half the time to start."""
    home = Path(__file__).parent.parent
    code = (
        "import sys\n"
        f"for name, path in (('aioelastic', {str(home)!r}), ('aioelastic.child', {str(home / 'child')!r})):\n"
        "    module = sys.modules[name] = type(sys)(name)\n"
        "    module.__path__ = [path]\n"
        f"from aioelastic.child._guardian import main\nmain({os.getpid()})\n"
    )
    return [sys.executable, "-I", "-S", "-c", code]
