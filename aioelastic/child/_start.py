"""How the guardian starts one process: by vfork(2) what it is itself, by fork(2) what it could not take back.

Neither waits for the file system that the program is on: by vfork it is another thread that waits (`_relay.py`), by
fork a pipe tells how it went.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import resource

from . import _mark, _place
from ._fork import close_all_but
from ._fork import fork as _copy
from ._spawn import PosixSpawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ._link import Environ

Limit = tuple[int, int]


class Start:
    """What one process shall be.

    Attributes:
        environ, cwd, stdio: its `variables`, its directory, and its descriptors 0, 1 and 2.
        blocked: whether it begins with all signals blocked; else with none.
        stop: the signal that it is stopped by; 0: none of its own.
        mark: see `_mark`; 0: none.
        state, place: as in `_order`; with one of them it is started by `fork`.
    """

    __slots__ = ("argv", "blocked", "cwd", "environ", "mark", "place", "program", "state", "stdio", "stop")

    def __init__(
        self,
        program: bytes,
        argv: list[bytes],
        environ: dict[bytes, bytes],
        cwd: bytes,
        stdio: tuple[int, ...],
        state: tuple[Any, ...] | None,
    ) -> None:
        self.program = program
        self.argv = argv
        self.environ = environ
        self.cwd = cwd
        self.stdio = stdio
        self.state = state
        self.place: tuple[tuple[Any, ...], str] | None = None
        self.blocked = False
        self.stop = 0
        self.mark = 0


class Limits:
    """What this process lends to one that it starts by vfork(2), for that moment: a mark, and the soft limit of
    descriptors, which this process has raised for itself."""

    def __init__(self) -> None:
        self._had: int | None = None
        self.files: Limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, hard = self.files
        self._own: Limit = (hard, hard)
        self.raised = soft != hard
        self._raise()

    def lend(self, mark: int) -> None:
        self._had = _mark.put(mark) if mark else None
        if self.raised:
            resource.setrlimit(resource.RLIMIT_NOFILE, self.files)

    def take_back(self) -> None:
        """Also when nothing is lent."""
        had, self._had = self._had, None
        if had is not None:
            _mark.take_off(had)
        self._raise()

    def _raise(self) -> None:
        if self.raised:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, self._own)
            except (OSError, ValueError):
                self.raised = False  # more than the system has (sysctl fs.nr_open), or forbidden


def variables(environ: Mapping[bytes, bytes | None], over: Environ) -> Environ:
    """`over` with these: by name, as `name=value`; None unsets one."""
    made = dict(over)
    for name, value in environ.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = b"%s=%s" % (name, value)
    return made


def spawner() -> PosixSpawn | None:
    """What `spawn` needs, where it can be had."""
    try:
        return PosixSpawn()
    except OSError:
        return None  # not glibc 2.34: all is done by `fork`


def spawn(by: PosixSpawn, start: Start) -> int:
    """By vfork(2): it is what this process is. May hang as long as the file system does.

    Raises:
        OSError: as `fork` tells it.
    """
    variables = list(start.environ.values())
    return by(start.program, start.argv, variables, start.cwd, start.stdio, start.stop, start.blocked)


def fork(start: Start, files: Limit) -> tuple[int, int]:
    """By fork(2). Returns its pid, and a pipe that tells how it went: see `outcome`.

    Args:
        files: the limit of descriptors that it has where `start.state` does not say it.

    Raises:
        OSError: there is no such control group, or no more processes or descriptors.
    """
    orders, cgroup = start.place or (None, "")
    ignored = None if start.state is None else start.state[-1]

    def become(later: str) -> None:
        os.setsid()
        if later:
            _place.move(later)
        for at, fd in enumerate(start.stdio):
            os.dup2(fd, at)
        close_all_but((theirs,))  # what hangs from here on holds nothing of others
        if start.state is not None:
            _place.become(start.state)
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
        if orders is not None:
            _place.take(orders)
        if start.mark:
            _mark.put(start.mark)
        what = start.cwd
        try:
            os.chdir(what)
            what = start.program
            if not start.blocked:
                _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
            environ = {name: text[len(name) + 1 :] for name, text in start.environ.items()}
            os.execve(what, start.argv, environ)
        except OSError as exc:
            raise OSError(exc.errno, "", os.fsdecode(what)) from None

    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _copy(_telling(become, theirs), ignored=ignored, stop=start.stop, cgroup=cgroup), ours
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)


def trial(place: tuple[tuple[Any, ...], str], state: tuple[Any, ...] | None) -> tuple[int, int]:
    """Whether a process could have that place, tried in one that ends at once. As `fork`."""

    def become(_: str) -> None:
        if state is not None:
            _place.become(state)
        _place.take(place[0])

    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _copy(_telling(become, theirs)), ours
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)


def outcome(pipe: int) -> tuple[int, str] | None:
    """What a pipe of `fork` or `trial` tells: errno and what the system refused, (0, "") when all went well, None as
    long as it goes on."""
    try:
        code, _, what = os.read(pipe, 4096).partition(b" ")
    except BlockingIOError:
        return None
    return int(code or b"0"), os.fsdecode(what)


def _telling(become: Any, pipe: int) -> Any:
    def call(later: str) -> None:
        try:
            become(later)
        except OSError as exc:
            os.write(pipe, b"%d %s" % (exc.errno or 1, os.fsencode(exc.filename or "")))

    return call
