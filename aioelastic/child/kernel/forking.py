"""A fork is one function: whoever forks, the copy owns nothing of the original, and no signal is taken by the wrong
one.

All signals are blocked around it. In the copy what would tell the original of a signal (the wake-up descriptor) and
what the original does about it (handlers) are reset before the copy unblocks any, which it does itself once it is
ready.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import itertools
import os
import sys

from ...system.descriptors import shut
from . import process_setup
from .libc import function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from typing import Any

_PR_SET_PDEATHSIG = 1
_CLONE3 = 435
_CLONE_INTO_CGROUP = 0x2_0000_0000
_SIGCHLD = 17


def fork(
    become: Callable[[str], Any],
    *,
    ignored: tuple[int, ...] | None = None,
    stop: int = 0,
    cgroup: str = "",
    dies_with_us: bool = False,
) -> int:
    """Call `become` in a copy of this process, which ends with that call. Returns its pid.

    Args:
        become: with all signals blocked, and no handler of this process's; told the control group into which it has
            yet to `process_setup.move`.
        ignored: the signals that the program ignores; None: those that this process ignores.
        stop: the signal by which it is to be stopped.
        cgroup: in which it begins.
        dies_with_us: it is killed when the thread that calls this ends (prctl(2), PR_SET_PDEATHSIG).

    Raises:
        OSError: there is no such control group, or no more processes.
    """
    me = os.getpid()
    before = _signal.pthread_sigmask(_signal.SIG_SETMASK, process_setup.BLOCKED)
    try:
        pid, later = _into(cgroup) if cgroup else (os.fork(), "")
        if pid == 0:
            try:
                if dies_with_us:
                    function("prctl")(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
                    if os.getppid() != me:
                        return 0  # it died before we could ask to be told
                _forget_handlers(ignored, stop)
                _forget_imports()
                become(later)
            finally:
                os._exit(127)  # whatever happens, nothing of the original goes on in its copy
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    return pid


def _forget_handlers(ignored: tuple[int, ...] | None, stop: int) -> None:
    _signal.set_wakeup_fd(-1)  # first: the original's event loop is told by it
    process_setup.dispositions(ignored, stop)


def _forget_imports() -> None:
    """What other threads were importing, which the copy has not: it would wait for them for ever at the same import."""
    locks: dict[str, Any] = getattr(sys.modules.get("_frozen_importlib"), "_module_locks", {})
    for name, ref in list(locks.items()):
        if (lock := ref()) is not None and lock.owner not in (None, _thread.get_ident()):
            del locks[name]
            sys.modules.pop(name, None)  # half of it is there: it is imported anew


def _into(cgroup: str) -> tuple[int, str]:
    """It is put there as it is made (clone3(2), CLONE_INTO_CGROUP): to move a process later takes up to some 10 ms.

    By `os.fork` where there are other threads: one of them may ask for the interpreter lock just then, and a copy that
    runs Python before `PyOS_AfterFork_Child` would wait for ever until that thread, which it has not, has taken it.
    """
    if not _is_alone():
        return os.fork(), cgroup
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct clone_args: flags, 3 pointers, the signal, stack and its size, 3 more, the cgroup
        words = (_CLONE_INTO_CGROUP, 0, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, fd)
        args = b"".join(one.to_bytes(8, sys.byteorder) for one in words)
        after = [function(f"PyOS_AfterFork_{one}", holds=True) for one in ("Parent", "Child")]
        syscall = function("syscall", holds=True)
        function("PyOS_BeforeFork", holds=True)()  # what `os.fork` does
        pid = syscall(_CLONE3, args, len(args))
        after[pid == 0]()
    finally:
        shut(fd)
    # forbidden, as by the seccomp filters of some containers
    return (os.fork(), cgroup) if pid < 0 else (pid, "")


def _is_alone() -> bool:
    """Whether this process has no other thread, of Python or not."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def moves(passed: Sequence[tuple[int, int]], kept: int = 0) -> list[tuple[int, int]]:
    """The calls of dup2(2), in order, by which each of these descriptors gets its number in a new process. One whose
    own number is wanted for another is put aside first, by a number that is not wanted.

    Args:
        kept: none of them takes the place of that one.

    >>> moves([(5, 3), (3, 7)])
    [(3, 4), (5, 3), (4, 7)]
    """
    wanted = {number for _, number in passed}
    spare = unused({kept, *(number for pair in passed for number in pair)})
    aside, last = [], []
    for fd, number in passed:
        if fd != number and fd in wanted:
            aside.append((fd, next(spare)))
            last.append((aside[-1][1], number))
        else:
            last.append((fd, number))
    return aside + last


def unused(used: Collection[int]) -> Iterator[int]:
    """The numbers from 3 on that are none of these, the lowest first: one above all could be above the limit, too."""
    return itertools.filterfalse(used.__contains__, itertools.count(3))


def close_all_but(kept: Iterable[int]) -> None:
    """In the copy: beside 0, 1 and 2, no other descriptor stays open."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
