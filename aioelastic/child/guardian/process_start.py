"""How the guardian starts one process: by vfork(2) what it is itself, by fork(2) what it could not take back.

Neither waits for the file system that the program is on: by vfork it is another thread that waits
(`replaceable_thread.py`), by fork a pipe tells how it went.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import errno
import os
import resource

from ...system.descriptors import shut
from ..kernel import process_marks, process_setup
from ..kernel.forking import close_all_but, moves, unused
from ..kernel.forking import fork as _copy
from ..kernel.posix_spawn import PosixSpawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..wire.links import Environ

Limit = tuple[int, int]
Packed = tuple[bytes, list[bytes]]  # `name=value` with null bytes between; names of those that are to be unset


class Start:
    """What one process shall be.

    Attributes:
        environ, cwd, stdio: its `variables`, its directory, and its descriptors 0, 1 and 2, as in `PosixSpawn`.
        blocked: whether it begins with all signals blocked; else with none.
        stop: the signal that it is stopped by; 0: none of its own.
        mark: see `process_marks`; 0: none.
        passed: further descriptors, each with its number there, 3 or more.
        state, place, who: as in `wire/requests.py`; with one of them it is started by `fork`.
    """

    __slots__ = (
        "argv",
        "blocked",
        "cwd",
        "environ",
        "mark",
        "passed",
        "place",
        "program",
        "state",
        "stdio",
        "stop",
        "who",
    )

    def __init__(
        self,
        program: bytes,
        argv: list[bytes],
        environ: dict[bytes, bytes],
        cwd: bytes,
        stdio: tuple[int | bytes, ...],
        state: tuple[Any, ...] | None,
    ) -> None:
        self.program = program
        self.argv = argv
        self.environ = environ
        self.cwd = cwd
        self.stdio = stdio
        self.state = state
        self.passed: list[tuple[int, int]] = []
        self.place: tuple[tuple[Any, ...], str] | None = None
        self.who: tuple[Any, ...] | None = None
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
        self._had = process_marks.put(mark) if mark else None
        if self.raised:
            resource.setrlimit(resource.RLIMIT_NOFILE, self.files)

    def take_back(self) -> None:
        """Also when nothing is lent."""
        had, self._had = self._had, None
        if had is not None:
            process_marks.take_off(had)
        self._raise()

    def _raise(self) -> None:
        if self.raised:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, self._own)
            except (OSError, ValueError):
                self.raised = False  # more than the system has (sysctl fs.nr_open), or forbidden


def packed(environ: Mapping[str, str | None]) -> Packed:
    """As `variables` takes them: all in one, since a start has some twenty, and each call takes its time."""
    text = "\0".join([f"{name}={value}" for name, value in environ.items() if value is not None])
    unset = [os.fsencode(name) for name, value in environ.items() if value is None]
    return os.fsencode(text), unset


def variables(new: Packed, over: Environ) -> Environ:
    """`over` with these: by name, as `name=value`."""
    text, unset = new
    made = dict(over)
    for name in unset:
        made.pop(name, None)
    for one in text.split(b"\0") if text else ():
        made[one.partition(b"=")[0]] = one
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
    return by(start.program, start.argv, variables, start.cwd, start.stdio, start.stop, start.blocked, start.passed)


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
            process_setup.move(later)
        for at, fd in enumerate(start.stdio):
            os.dup2(os.open(fd, os.O_RDWR) if isinstance(fd, bytes) else fd, at)
        if start.passed:
            used = {number for pair in start.passed for number in pair}
            try:
                if theirs in used:  # one is to have the number of our pipe
                    tells.append(os.dup2(theirs, next(unused(used)), inheritable=False))
                for fd, number in moves(start.passed, kept=tells[-1]):
                    if fd != number:
                        os.dup2(fd, number)
                    else:
                        os.set_inheritable(fd, True)
            except OSError:  # EBADF, of a number above the limit
                raise OSError(errno.EMFILE, "", "descriptors") from None
        # what hangs from here on holds nothing of others
        close_all_but((tells[-1], *(number for _, number in start.passed)))
        if start.state is not None:
            process_setup.become(start.state)
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
        if orders is not None:
            process_setup.take(orders)
        if start.mark:
            process_marks.put(start.mark)
        what = start.cwd
        try:
            os.chdir(what)
            if start.who is not None:
                process_setup.change_user(start.who)
            what = start.program
            if not start.blocked:
                _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
            environ = {name: text[len(name) + 1 :] for name, text in start.environ.items()}
            os.execve(what, start.argv, environ)
        except OSError as exc:
            raise OSError(exc.errno, "", exc.filename or os.fsdecode(what)) from None

    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    tells = [theirs]
    try:
        told = _telling(become, tells)
        return _copy(told, ignored=ignored, stop=start.stop, cgroup=cgroup), ours
    except OSError:
        shut(ours)
        raise
    finally:
        shut(theirs)


def trial(
    place: tuple[tuple[Any, ...], str] | None,
    state: tuple[Any, ...] | None,
    who: tuple[Any, ...] | None = None,
) -> tuple[int, int]:
    """Whether a process could have that place, and be of that user, tried in one that ends at once. As `fork`."""

    def become(_: str) -> None:
        if state is not None:
            process_setup.become(state)
        if place is not None:
            process_setup.take(place[0])
        if who is not None:
            process_setup.change_user(who)

    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _copy(_telling(become, [theirs])), ours
    except OSError:
        shut(ours)
        raise
    finally:
        shut(theirs)


def outcome(pipe: int) -> tuple[int, str] | None:
    """What a pipe of `fork` or `trial` tells: errno and what the system refused, (0, "") when all went well, None as
    long as it goes on."""
    try:
        code, _, what = os.read(pipe, 4096).partition(b" ")
    except BlockingIOError:
        return None
    except OSError as exc:
        return exc.errno or 1, ""
    return int(code or b"0"), os.fsdecode(what)


def _telling(become: Any, pipes: list[int]) -> Any:
    """Args: pipes: the last of them is the one."""

    def call(later: str) -> None:
        try:
            become(later)
        except OSError as exc:
            os.write(pipes[-1], b"%d %s" % (exc.errno or 1, os.fsencode(exc.filename or "")))

    return call
