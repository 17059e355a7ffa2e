"""A fork is one function: whoever forks, the copy owns nothing of the original, and no signal is taken by the wrong
one.

All signals are blocked around it. In the copy what would tell the original of a signal (the wake-up descriptor) and
what the original does about it (handlers) are reset before the copy unblocks any, which it does itself once it is
ready.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import sys

from . import _place
from ._libc import function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
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
            yet to `_place.move`.
        ignored: the signals that the program ignores; None: those that this process ignores.
        stop: the signal by which it is to be stopped.
        cgroup: in which it begins.
        dies_with_us: it is killed when the thread that calls this ends (prctl(2), PR_SET_PDEATHSIG).

    Raises:
        OSError: there is no such control group, or no more processes.
    """
    me = os.getpid()
    before = _signal.pthread_sigmask(_signal.SIG_SETMASK, _place.BLOCKED)
    try:
        pid, later = _into(cgroup) if cgroup else (os.fork(), "")
        if pid == 0:
            try:
                if dies_with_us:
                    function("prctl")(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
                    if os.getppid() != me:
                        return 0  # it died before we could ask to be told
                _forget_handlers(ignored, stop)
                become(later)
            finally:
                os._exit(127)  # whatever happens, nothing of the original goes on in its copy
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    return pid


def _forget_handlers(ignored: tuple[int, ...] | None, stop: int) -> None:
    _signal.set_wakeup_fd(-1)  # first: the original's event loop is told by it
    faulthandler = sys.modules.get("faulthandler")
    if faulthandler is not None:
        faulthandler.disable()  # or it believes later that its handlers are there
    _place.dispositions(ignored, stop)


def _into(cgroup: str) -> tuple[int, str]:
    """It is put there as it is made (clone3(2), CLONE_INTO_CGROUP): to move a process later takes up to some 10 ms."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct clone_args: flags, 3 pointers, the signal, stack and its size, 3 more, the cgroup
        words = (_CLONE_INTO_CGROUP, 0, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, fd)
        args = b"".join(one.to_bytes(8, sys.byteorder) for one in words)
        clone = function("syscall", holds=True)
        after = [function(f"PyOS_AfterFork_{one}", holds=True) for one in ("Parent", "Child")]
        function("PyOS_BeforeFork", holds=True)()  # what `os.fork` does: other threads may have Python's locks
        pid = clone(_CLONE3, args, len(args))
        after[pid == 0]()
    finally:
        os.close(fd)
    # forbidden, as by the seccomp filters of some containers
    return (os.fork(), cgroup) if pid < 0 else (pid, "")


def close_all_but(kept: Iterable[int]) -> None:
    """In the copy: beside 0, 1 and 2, no other descriptor stays open."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
