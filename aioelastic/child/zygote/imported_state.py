"""What imports have set for the process of a zygote: its workers begin with that, as if it were they who had imported.

Variables, `sys.path`, streams, descriptors and the like a fork has anyway. What is here would otherwise be what the
program has, or has to be something else in the zygote itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import sys
import time
from typing import Any

from ...system.descriptors import shut
from ..kernel import process_setup
from ..kernel.libc import function
from ..worker import function_run

_sigaction = function("sigaction")
_ADDRESS = ctypes.sizeof(ctypes.c_void_p)
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Imported:
    """To be made before the imports; `end` is called after them, and the rest for each worker."""

    def __init__(self) -> None:
        self._began = time.time_ns()
        self._modules = set(sys.modules)
        self._had = self._has = process_setup.taken()
        self._cwd = self._went = _here()
        for fd in range(3):
            _mark(fd)
        self._streams = [_file(fd) for fd in range(3)]
        # descriptors at which workers have a stream of theirs, that stream's number, and whether it is inherited
        self.ends: list[tuple[int, int, bool]] = []
        self._handlers = _handlers()
        self._actions = _actions()
        self._timers: list[tuple[float, float]] = []
        self._wakeup = -1

    def end(self) -> None:
        """From here on this process heeds nothing that was set: no handler, no timer. All signals are blocked."""
        function_run.mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        self._has = process_setup.taken()
        self._went = _here()
        self.ends = self._ends()
        self._timers = [signal.setitimer(one, 0) for one in _TIMERS]
        self._wakeup = signal.set_wakeup_fd(-1)
        before = self._actions
        self._actions = {
            one: how for one, how in _actions().items() if how[:_ADDRESS] != before.get(one, b"")[:_ADDRESS]
        }
        had, has = self._handlers, _handlers()
        self._handlers = {one: how for one, how in has.items() if how != had.get(one)}
        for signum in self._handlers:
            signal.signal(signum, had.get(signum, signal.SIG_DFL))

    def _ends(self) -> list[tuple[int, int, bool]]:
        """What imports have replaced is none, and copies of a stream are others."""
        found = []
        try:
            opened = {0, 1, 2, *map(int, os.listdir("/proc/self/fd"))}
        except OSError:
            opened = {0, 1, 2}
        for fd in sorted(opened):
            file = _file(fd)
            if fd < 3 and file in (None, self._streams[fd]):
                found.append((fd, fd, True))
            elif file in self._streams and file is not None and (fd < 3 or file[2]):
                found.append((fd, self._streams.index(file), os.get_inheritable(fd)))
        return found

    def state(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a worker begins with (`process_setup.become`) whose program has `given`."""
        if self._has == self._had:
            return given
        *had, had_limits = self._had
        *has, has_limits = self._has
        *theirs, their_limits, ignored = given
        rest = [new if new != old else one for new, old, one in zip(has, had, theirs, strict=True)]
        set_here = {which: pair for which, pair in has_limits if pair != dict(had_limits)[which]}
        limits = tuple((which, _within(set_here.get(which, pair), pair[1])) for which, pair in their_limits)
        return (*rest, limits, ignored)

    def cwd(self, given: str) -> str:
        """Where a worker begins whose program, or whose options, say `given`."""
        return self._went if given == self._cwd else given

    def hold(self) -> None:
        """In a worker, whose signals are still those of any new process."""
        for signum, how in self._handlers.items():
            signal.signal(signum, how)
        for signum, action in self._actions.items():
            _sigaction(signum, action, None)
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._wakeup)
        for which, left in zip(_TIMERS, self._timers, strict=True):
            if left[0]:
                signal.setitimer(which, *left)

    def files(self) -> list[tuple[str, int, int]]:
        """Those that were imported from, beside Python's own and what is installed: path, last change, size."""
        found = {}
        apart = tuple({f"{one}/lib" for one in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)})
        for name in set(sys.modules) - self._modules | {"__main__"}:
            path = getattr(sys.modules.get(name), "__file__", None)
            if isinstance(path, str) and not path.startswith(apart):
                found[os.path.abspath(path)] = seen(path)
        # one that was written meanwhile may have been read before that
        return [(path, 0 if at >= self._began else at, size) for path, (at, size) in found.items()]


def seen(path: str) -> tuple[int, int]:
    """When that file, or the zip file it is in, was changed last, in ns, and its size; zeros where there is none."""
    while True:
        try:
            about = os.stat(path)
            return about.st_mtime_ns, about.st_size
        except NotADirectoryError:
            path = os.path.dirname(path)
        except (OSError, ValueError):
            return 0, 0


def _within(pair: tuple[int, int], most: int) -> tuple[int, int]:
    """A limit, no higher than that."""
    if most == resource.RLIM_INFINITY:
        return pair
    soft, hard = (most if one == resource.RLIM_INFINITY else min(one, most) for one in pair)
    return soft, hard


def _handlers() -> dict[int, Any]:
    """Those that Python knows."""
    found = {int(one): signal.getsignal(one) for one in signal.valid_signals()}
    return {one: how for one, how in found.items() if how is not None}


def _actions() -> dict[int, bytes]:
    """All handlers, also those of C (faulthandler), by signal: what sigaction(2) tells and takes, whatever is in it."""
    found = {}
    room = ctypes.create_string_buffer(512)  # it takes some 150
    for signum in map(int, signal.valid_signals()):
        # the address comes first, and 0 and 1 are the default and to ignore it; some of the rest is never written
        if _sigaction(signum, None, room) == 0 and int.from_bytes(room.raw[:_ADDRESS], sys.byteorder) > 1:
            found[signum] = room.raw
    return found


def _mark(fd: int) -> None:
    """Where it is /dev/null it is opened anew, and by a number that means nothing without O_ASYNC (fcntl(2)) copies of
    it can be told from what imports open as /dev/null."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.stat(os.devnull)):
            own = os.open(os.devnull, os.O_RDWR)
            os.dup2(own, fd)
            shut(own)
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGRTMAX - fd)


def _file(fd: int) -> tuple[int, int, int] | None:
    """What is open there: device, inode and mark."""
    try:
        about = os.fstat(fd)
        return about.st_dev, about.st_ino, fcntl.fcntl(fd, fcntl.F_GETSIG)
    except OSError:
        return None


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # it is deleted
