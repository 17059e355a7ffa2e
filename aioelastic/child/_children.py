"""The children of this process, those it has adopted too: who they are, and their end."""

from __future__ import annotations

import os
import select
import time
from _signal import SIGCHLD, sigtimedwait  # type: ignore[import-not-found]

from .. import shm
from ._read import blocks, slurp

_SIGKILL = 9
_CHILDREN = 32 << 20  # bytes of a list of processes: there are 4 million at most
LOOKS = 20  # in a second, for what the program has left
_READ = os.O_RDONLY | os.O_CLOEXEC


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
            shm.sweep()
            shm.sweep(temporary)
            if not shm.has_left(temporary, pid) and not shm.has_left(shm.SHM, pid):
                break
            time.sleep(1 / LOOKS)  # a copy that it had just forked may have its lock, for an instant
    except Exception:
        pass


def end_children(graces: dict[int, float] | None = None) -> None:
    """Kill whatever is a child of this process, and what becomes one thereby, until there is none. SIGCHLD is blocked.

    Its children are not reaped by anybody else, so their pids are their own. What has changed its user and cannot be
    killed is left to whoever is next to adopt it.

    Args:
        graces: until when (monotonic clock, seconds) which are left alone.
    """
    me, killed = os.getpid(), set()
    graces = dict(graces or {})
    while True:
        refused = False
        now = time.monotonic()
        graces = {pid: until for pid, until in graces.items() if until > now}
        for pid in children(me):
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
        try:
            if graces:
                sigtimedwait((SIGCHLD,), min(graces.values()) - now)
            pid, _ = os.waitpid(-1, os.WNOHANG if graces else 0)
            while pid:  # all that have ended, before the next look
                killed.discard(pid)
                graces.pop(pid, None)
                pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return


def children(parent: int) -> list[int]:
    """The pids of its children, zombies too."""
    try:
        fd = os.open(f"/proc/{parent}/task/{parent}/children", _READ)
    except OSError:
        return by_search(parent)  # not every kernel has the list (CONFIG_PROC_CHILDREN)
    try:
        return [int(one) for one in listed(fd).split()]
    finally:
        os.close(fd)


def children_of_all_threads() -> list[int]:
    """Those of this process, by whichever of its threads they were started."""
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return []
    return [pid for name in threads for pid in _of_thread(f"/proc/self/task/{name}/children")]


def _of_thread(path: str) -> list[int]:
    try:
        return [int(one) for one in b"".join(blocks(path, _CHILDREN)).split()]
    except OSError:
        return []  # that thread has ended


def own_list() -> int:
    """The kernel's list of the children of this process, open for `listed`; -1 where there is none."""
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/children", _READ)
    except OSError:
        return -1


def listed(fd: int) -> bytes:
    """What stands in such a list now: pids, each followed by a space."""
    data = b""
    while more := os.pread(fd, 4096, len(data)):
        data += more
    return data


def by_search(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            data = slurp(f"/proc/{name}/stat")
            # the name, in parentheses, may hold anything
            if data and int(data[data.rindex(b")") + 2 :].split(None, 2)[1]) == parent:
                found.append(int(name))
    return found
