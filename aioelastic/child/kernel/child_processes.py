"""The children of this process, those it has adopted too: who they are, and their end; signals to one, and no other."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import errno
import os
import select
import time

from ...system import shared_memory_names
from ...system.descriptors import shut
from .bounded_reads import BLOCK, slurp

_SIGKILL = 9
_LOOK = 1.0  # seconds between two looks at what does not die
LOOKS = 20  # in a second, for what the program has left
_LISTED = 8 << 22  # bytes: as many pids as there can be (proc(5), pid_max), and a space after each
_FORKED_NO_EXEC = 0x40  # among the flags of proc(5) (PF_FORKNOEXEC, linux/sched.h)
_READ = os.O_RDONLY | os.O_CLOEXEC
_MISSING = (errno.ENOSYS, errno.EPERM, errno.EINVAL)  # also in sandboxes that forbid the call


def end_all(graces: dict[int, float] | None, program: int | None, temporary: str, pid: int) -> None:
    """`end_children`, then remove what has a name and they and the program (its pidfd) have left: shared memory, and
    error files below `temporary`.

    Args:
        program: None: it has not ended, and goes on without us.
        pid: that of the program.
    """
    end_children(graces)
    if program is None:
        return
    gone = select.poll()
    gone.register(program, select.POLLIN)
    gone.poll(1000)  # its sockets close before its locks are free; but it may have closed them itself, and go on
    try:
        for _ in range(LOOKS):
            shared_memory_names.sweep()
            shared_memory_names.sweep(temporary)
            if not shared_memory_names.has_left(temporary, pid) and not shared_memory_names.has_left(
                shared_memory_names.SHM, pid
            ):
                break
            time.sleep(1 / LOOKS)  # a copy that it had just forked may have its lock, for an instant
    except Exception:
        pass  # it is the last thing that we do: the next program sweeps what is left


def end_children(graces: dict[int, float] | None = None) -> None:
    """Kill whatever is a child of this process, and what becomes one thereby, until there is none. SIGCHLD is blocked.

    Its children are not reaped by anybody else, so their pids are their own. What has changed its user and cannot be
    killed is left to whoever is next to adopt it.

    Waits as long as one of them lives; not for those that are dead and that a debugger keeps from being reaped.

    Args:
        graces: until when (monotonic clock, seconds) which are left alone.
    """
    me, killed = os.getpid(), set()
    graces = dict(graces or {})
    while True:
        refused = False
        now = time.monotonic()
        graces = {pid: until for pid, until in graces.items() if until > now}
        there = children(me)
        for pid in there:
            if pid not in killed and pid not in graces:
                try:
                    os.kill(pid, _SIGKILL)
                    killed.add(pid)
                except ProcessLookupError:
                    pass
                except PermissionError:
                    refused = True
        if refused and not killed and not graces:
            return
        pid = _reaped()
        if not pid and all(map(is_dead, there)):
            pid = _reaped()  # one may have ended between the two looks, and left us what it had started
            if not pid and children(me) == there:
                return  # there are none, or debuggers hold them, and may do so for ever
        elif not pid:
            _signal.sigtimedwait((_signal.SIGCHLD,), min(min(graces.values()) - now, _LOOK) if graces else _LOOK)
        while pid:  # all that have ended, before the next look
            killed.discard(pid)
            graces.pop(pid, None)
            pid = _reaped()


def _reaped() -> int:
    """The pid of one that has ended, which is free now; 0: none has."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def is_dead(pid: int) -> bool:
    """Whether it has ended, reaped or not."""
    return slurp(f"/proc/{pid}/stat").rpartition(b") ")[2][:1] in (b"", b"Z", b"X")


def is_still_copy(pid: int) -> bool:
    """Whether it runs, and is what fork(2) has made: it has not come to its execve(2)."""
    fields = slurp(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
    return len(fields) > 6 and fields[0] not in (b"Z", b"X") and bool(int(fields[6]) & _FORKED_NO_EXEC)


def status_of_dead(pid: int) -> int | None:
    """The wait status of a process that has ended and is not reaped, where the kernel tells it to us."""
    line = slurp(f"/proc/{pid}/stat").rpartition(b") ")[2]
    status = int(line.split()[49]) if line.startswith(b"Z") else None  # exit_code, proc(5)
    if status == 0:  # also what those are shown who may not see it
        try:
            os.kill(pid, 0)
        except OSError:
            return None
    return status


def children(parent: int) -> list[int]:
    """The pids of its children, zombies too, by whichever of its threads they were started."""
    found: list[int] = []
    for thread in os.listdir(f"/proc/{parent}/task"):
        try:
            fd = os.open(f"/proc/{parent}/task/{thread}/children", _READ)
        except OSError:
            if thread == str(parent):
                return by_search(parent)  # not every kernel has the list (CONFIG_PROC_CHILDREN)
            continue  # it has just ended
        try:
            found += map(int, listed(fd).split())
        finally:
            shut(fd)
    return found


def own_list() -> int:
    """The kernel's list of the children of the first thread of this process, which has those that it adopts, open for
    `listed`; -1 where there is none."""
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/children", _READ)
    except OSError:
        return -1


def listed(fd: int) -> bytes:
    """What stands in such a list now: pids, each followed by a space."""
    found = bytearray()
    while len(found) < _LISTED and (more := os.pread(fd, BLOCK, len(found))):
        found += more
    return bytes(found)


def by_search(parent: int) -> list[int]:
    """Its children, found among all processes."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            data = slurp(f"/proc/{name}/stat")
            # the name, in parentheses, may hold anything
            if data and int(data[data.rindex(b")") + 2 :].split(None, 2)[1]) == parent:
                found.append(int(name))
    return found


def pidfd_or_none(pid: int) -> int | None:
    """A pidfd (close-on-exec), or None where the kernel has none (Linux < 5.3, some sandboxes).

    Raises:
        ProcessLookupError: the process is gone and reaped.
        OSError: out of file descriptors.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as exc:
        if exc.errno in _MISSING:
            return None
        raise


def send_signal(pidfd: int, pid: int, signum: int) -> None:
    """To the process of that pidfd, and to no other. Where pidfd_send_signal(2) is missing or forbidden, by its number,
    which is its own as long as the pidfd does not say that it has ended.

    Raises:
        ProcessLookupError: it has ended.
        PermissionError: it changed its user.
    """
    try:
        _signal.pidfd_send_signal(pidfd, signum)
    except OSError as exc:
        if exc.errno not in _MISSING:
            raise
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        if ended.poll(0):
            raise ProcessLookupError from None
        os.kill(pid, signum)
