"""Take one's place: what a new process sets for itself before it becomes the worker (`aioelastic.Placement`).

Also for the guardian, which imports little: see there.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import resource
import select
import sys

from ...system.descriptors import shut
from .bounded_reads import slurp
from .libc import buffer, errno_of, function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MPOL_BIND = 2
# what workers begin with the default of, whatever this process ignores: Python ignores the first two for itself, the
# third makes their children's exits unknown, and by the others they are ended
DEFAULT = (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGCHLD, _signal.SIGTERM, _signal.SIGINT)
BLOCKED = tuple(_signal.valid_signals())  # in helpers from their first instruction on
# numbers of ioprio_set(2) and ioprio_get(2)
IOPRIO = {"x86_64": (251, 252), "aarch64": (30, 31), "riscv64": (30, 31), "ppc64le": (273, 274), "s390x": (282, 283)}
_BOUND = 5000  # ms; what does not die within that will not
# numbers of set_mempolicy(2) and get_mempolicy(2)
_MEMPOLICY = {
    "x86_64": (238, 239),
    "aarch64": (237, 236),
    "riscv64": (237, 236),
    "ppc64le": (261, 260),
    "s390x": (270, 269),
}
_NODES = 512  # bytes of a set of NUMA nodes: enough for any kernel
# linux/prctl.h
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK, _PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 29, 30, 41, 42


def move(cgroup: str) -> None:
    """This process goes into that control group.

    Raises:
        OSError: it may not; its `filename` says what.
    """
    try:
        with open(f"{cgroup}/cgroup.procs", "wb") as file:
            file.write(b"0")
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, "Placement.cgroup") from None


def remove(directories: list[str], kill: bool) -> None:
    """Those of this program and what is below, in control groups after all that is in them was killed, or may stay."""
    for path in directories:
        try:
            if not os.access(f"{path}/cgroup.procs", os.F_OK):
                _remove_files(path)
                continue
            if kill:
                empty(path)
            for name in os.listdir(path):
                if os.path.isdir(f"{path}/{name}"):
                    os.rmdir(f"{path}/{name}")
            os.rmdir(path)
        except OSError:
            pass  # the program has removed it; or something runs in it, which nobody may end


def _remove_files(path: str) -> None:
    with os.scandir(path) as found:
        entries = list(found)
    for one in entries:
        if one.is_dir(follow_symlinks=False):
            _remove_files(one.path)
        else:
            os.unlink(one.path)
    os.rmdir(path)


def empty(cgroup: str) -> None:
    """Kill all that is in it, and wait for that as long as it goes on dying."""
    events = os.open(f"{cgroup}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    with open(f"{cgroup}/cgroup.kill", "wb") as file:
        file.write(b"1")
    changed = select.poll()
    changed.register(events, select.POLLPRI)
    while b"populated 1" in os.pread(events, 4096, 0) and changed.poll(_BOUND):
        pass
    shut(events)


def take(orders: tuple[Any, ...]) -> None:
    """Set what `Placement.orders` says.

    Raises:
        OSError: its `filename` is the field that the system refused.
    """
    cpus, nodes, nice, oom_score_adj, limits = orders
    where = ""
    try:
        if oom_score_adj is not None:
            where = "oom_score_adj"
            with open("/proc/self/oom_score_adj", "wb") as file:
                file.write(b"%d" % oom_score_adj)
        if nice is not None:
            where = "nice"
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        if cpus:
            where = "cpus"
            os.sched_setaffinity(0, cpus)
        if nodes:
            where = "nodes"
            bind_memory(nodes)
        for number, pair in limits:
            where = limit_name(number)
            resource.setrlimit(number, pair)
    except (OSError, ValueError) as exc:
        code = exc.errno if isinstance(exc, OSError) and exc.errno else 1  # setrlimit says ValueError for EPERM
        raise OSError(code, os.strerror(code), f"Placement.{where}") from None


def change_user(who: tuple[Any, ...]) -> None:
    """Take that umask, supplementary groups, group and user, each where it is not None and not what this process has.

    In this order: without the rights of the first user the others could not be taken.

    Raises:
        OSError: its `filename` is what the system refused.
    """
    umask, groups, gid, uid = who
    what = ""
    try:
        if umask is not None:
            os.umask(umask)
        if groups is not None and sorted({*groups}) != sorted({*os.getgroups()}):
            what = "extra_groups"
            os.setgroups(groups)
        if gid is not None and os.getresgid() != (gid, gid, gid):
            what = "group"
            os.setresgid(gid, gid, gid)
        if uid is not None and os.getresuid() != (uid, uid, uid):
            what = "user"
            os.setresuid(uid, uid, uid)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, what) from None


def limit_name(number: int) -> str:
    """A resource limit as a field of `Placement`."""
    return f"limits[{number}]"


def bind_memory(nodes: tuple[int, ...]) -> None:
    """Memory of this thread, and of what it starts, comes from these NUMA nodes. Raises `OSError`."""
    _set_memory_policy((_MPOL_BIND, sum(1 << one for one in nodes)))


def _set_memory_policy(policy: tuple[int, int]) -> None:
    numbers = _MEMPOLICY.get(os.uname().machine)
    if numbers is None:
        raise OSError(38, os.strerror(38))
    mode, mask = policy
    size = mask.bit_length() // 64 * 8 + 8
    # the kernel takes one bit less than it is told
    nodes = (mask.to_bytes(size, sys.byteorder), size * 8 + 1) if mask else (None, 0)
    _check(function("syscall")(numbers[0], mode, *nodes))


class Habits:
    """What a thread has that only system calls tell, and a child of it begins with: its memory policy (mode and NUMA
    nodes), its personality(2), its timer slack, and whether it wants no huge pages. None: the system does not tell."""

    def __init__(self) -> None:
        self._syscall, self._prctl = function("syscall", holds=True), function("prctl", holds=True)
        self._personality = function("personality", holds=True)
        self._mode, self._nodes = buffer(4), buffer(_NODES)
        self._get_mempolicy = (_MEMPOLICY.get(os.uname().machine) or (0, 0))[1]

    def now(self) -> tuple[tuple[int, int] | None, int | None, int | None, int | None]:
        """Those of this thread."""
        policy = None
        if self._get_mempolicy and not self._syscall(self._get_mempolicy, self._mode, self._nodes, 8 * _NODES, None, 0):
            mode = int.from_bytes(bytes(self._mode), sys.byteorder)
            policy = mode, int.from_bytes(bytes(self._nodes), sys.byteorder) if mode else 0
        others = (
            self._personality(-1),
            self._prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0),
            self._prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0),
        )
        personality, slack, pages = (one if one >= 0 else None for one in others)
        return policy, personality, slack, pages


def _take_habits(wanted: tuple[Any, ...]) -> None:
    """Raises `OSError`."""
    has = Habits().now()
    policy, personality, slack, pages = (new if new != old else None for new, old in zip(wanted, has, strict=True))
    if policy is not None:
        _set_memory_policy(policy)
    if personality is not None:
        _check(min(function("personality")(personality), 0))
    if slack is not None:
        _check(function("prctl")(_PR_SET_TIMERSLACK, slack, 0, 0, 0))
    if pages is not None:
        _check(function("prctl")(_PR_SET_THP_DISABLE, pages & 1, pages & ~1, 0, 0))


def _check(result: int) -> None:
    if result:
        raise OSError(errno_of(), os.strerror(errno_of()))


def become(state: tuple[Any, ...]) -> None:
    """Take what the program has now (`launch/_host_state.py`), as far as this process has something else.

    Raises:
        OSError: its `filename` is what the system refused.
    """
    umask, nice, policy, ioprio, oom_score_adj, dumped, cpus, *habits, limits, _ = state
    what = ""
    try:
        os.umask(umask)
        for what, wanted, base in (("oom_score_adj", oom_score_adj, 10), ("coredump_filter", dumped, 16)):
            if wanted is not None and int(slurp(f"/proc/self/{what}") or b"0", base) != wanted:
                with open(f"/proc/self/{what}", "wb") as file:
                    file.write(b"%d" % wanted)
        what = "CPU affinity"
        if tuple(sorted(os.sched_getaffinity(0))) != cpus:
            os.sched_setaffinity(0, cpus)
        what = "scheduling policy"
        if (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) != policy:
            os.sched_setscheduler(0, policy[0], os.sched_param(policy[1]))
        what = "nice"
        if os.getpriority(os.PRIO_PROCESS, 0) != nice:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        what = "I/O priority"
        numbers = IOPRIO.get(os.uname().machine)
        if ioprio and numbers is not None and function("syscall")(numbers[0], 1, 0, ioprio):
            raise OSError(errno_of(), "")
        what = "memory policy, personality, timer slack or huge pages"
        _take_habits(tuple(habits))
        what = "resource limits"
        for number, limit in limits:
            if resource.getrlimit(number) != limit:
                resource.setrlimit(number, limit)
    except (OSError, ValueError) as exc:
        code = exc.errno if isinstance(exc, OSError) and exc.errno else 1  # setrlimit says ValueError for EPERM
        raise OSError(code, os.strerror(code), what) from None


def taken() -> tuple[Any, ...]:
    """What this process has of what `become` takes, but for the signals that it ignores."""
    umask = os.umask(0o077)
    os.umask(umask)
    numbers = IOPRIO.get(os.uname().machine)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # in a sandbox it may be forbidden
    ioprio = 0 if numbers is None else max(function("syscall")(numbers[1], 1, 0), 0)
    return (
        umask,
        nice,
        (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority),
        0 if (ioprio >> 13, ioprio & 7) == (2, (nice + 20) // 5) else ioprio,  # that of the niceness (ioprio_set(2))
        int(slurp("/proc/self/oom_score_adj") or b"0"),
        int(slurp("/proc/self/coredump_filter") or b"0", 16),
        tuple(sorted(os.sched_getaffinity(0))),
        *Habits().now(),
        tuple((one, resource.getrlimit(one)) for one in range(resource.RLIMIT_RTTIME)),
    )


def dispositions(ignored: tuple[int, ...] | None, stop: int) -> None:
    """Those that a worker begins with: whatever the program ignores is ignored, but not what a worker is ended by or
    what Python has ignored for itself. All others are the default. To be called with all signals blocked.

    Args:
        ignored: by the program; None: what this process ignores.
        stop: the signal that workers are stopped by; 0: none of its own.
    """
    default = {*DEFAULT, stop}
    for signum in _signal.valid_signals():
        if signum in (_signal.SIGKILL, _signal.SIGSTOP):
            continue
        had = _signal.getsignal(signum)
        ignores = had == _signal.SIG_IGN if ignored is None else signum in ignored
        wanted = _signal.SIG_IGN if ignores and signum not in default else _signal.SIG_DFL
        if had != wanted:
            _signal.signal(signum, wanted)
