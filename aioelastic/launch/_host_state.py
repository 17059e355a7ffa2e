"""What a new process inherits from this one, beside its environment, directory and descriptors: read before each start.

Workers are children of a guardian or a zygote, which are older than the start, and shall have what a child of this
program would have now. A part of it any process may set for itself, and is sent with the order (`given`); another part
cannot be given to a process that is older: then there has to be a new guardian, born now (`fixed`).

Some of it belongs to a thread (capabilities(7), nice, CPUs, namespaces): it is read for the thread that starts.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ..child.kernel import libc, process_setup
from ..system import forked_copies
from ..system.descriptors import shut

_PR_GET_SECUREBITS, _PR_GET_MDWE = 27, 66  # linux/prctl.h
_LINK = 256  # bytes of a link's target that are enough
_AT_FDCWD, _STATX_INO = -100, 0x100  # fcntl.h, linux/stat.h
_CAP_SYS_ADMIN = 1 << 21  # capabilities(7): without it no namespace can be entered but a new user namespace
# that of control groups changes what /proc/self/cgroup says
_NAMESPACES = (b"pid_for_children", b"ipc", b"mnt", b"net", b"time_for_children", b"uts")
_ENOUGH = 8192  # bytes of one of these files, but where a user has hundreds of groups
_RESET_ON_FORK = 0x4000_0000  # SCHED_RESET_ON_FORK, sched(7)
_PYTHONS = (signal.SIGPIPE, signal.SIGXFSZ)  # which it ignores for itself
_OF_LIBC = (32, 33)  # glibc's own: what its posix_spawn(3) starts ignores them, and nobody can handle them
_LIMITS = tuple(range(resource.RLIMIT_RTTIME))  # the last one holds the mark (child/kernel/process_marks.py)


class HostState(NamedTuple):
    """At one moment, as values that can be compared.

    Attributes:
        fixed: ids, groups, capabilities, no_new_privs, seccomp(2) filters, control group, whether memory may be made
            executable, the number of its domain (`witness`), namespaces, root directory.
        given: what `process_setup.become` takes.
    """

    fixed: tuple[Any, ...]
    given: tuple[Any, ...]

    @property
    def no_guardian(self) -> str:
        """Why there cannot be one; empty: there can."""
        if self.fixed[-1] is None:
            return "there is no /proc here"
        own, childrens = self.fixed[-1][2:4]  # of pids: see unshare(2), CLONE_NEWPID
        return "" if own == childrens else "children of this program begin in another pid namespace"

    @property
    def domain(self) -> int:
        """See `witness`; 0: there is no /proc here."""
        return int(self.fixed[-2]) if self.fixed[-1] is not None else 0

    def within(self, other: HostState) -> bool:
        """Whether a child of a process that has been in the state `other` can be in this one, without privileges."""
        if self.fixed != other.fixed:
            return False
        if self.given == other.given:
            return True
        _, nice, policy, ioprio, oom, *_, limits, _ = self.given
        _, least_nice, had_policy, had_ioprio, least_oom, *_, most, _ = other.given
        most_files = dict(most)[resource.RLIMIT_NOFILE][0]  # an older process opens descriptors of its own for a start
        return (
            at_most(dict(limits)[resource.RLIMIT_NOFILE][0], most_files)
            and nice >= least_nice
            and policy == had_policy
            and ioprio == had_ioprio
            and (oom is None or oom >= least_oom)
            and all(at_most(hard, highest) for (_, (_, hard)), (_, (_, highest)) in zip(limits, most, strict=True))
        )


class Reader:
    """Reads it for the thread that has made this one. Keeps five descriptors, since opening takes as long as reading.

    Raises:
        OSError: there is no /proc here, or this process may have no more descriptors.
    """

    def __init__(self) -> None:
        self.users = 0
        self._fds: list[int] = []
        self._buffer = libc.buffer(_LINK)
        self._open()
        self._habits = process_setup.Habits()
        self._domain = _domain_of_this_thread()
        self._get_ioprio = (process_setup.IOPRIO.get(os.uname().machine) or (0, 0))[1]
        self._raw: tuple[Any, ...] = ()
        self._last: HostState | None = None

    def _open(self) -> None:
        try:
            for name in ("status", "cgroup", "limits", "oom_score_adj", "coredump_filter"):
                where = "/proc/self" if name == "coredump_filter" else "/proc/thread-self"
                try:
                    fd = os.open(f"{where}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    if name == "status":
                        raise
                    fd = -1  # not in every kernel
                self._fds.append(fd)
            self._namespaces = os.open("/proc/thread-self/ns", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._fds.append(self._namespaces)
        except BaseException:
            self.close()
            raise
        self._pids = self._link(b"pid")  # that of a process never changes

    def read(self) -> HostState:
        """As it is now."""
        try:
            return self._read()
        except ProcessLookupError:  # that thread is gone, and we have its number
            self.close()
            self._open()
            return self._read()

    def _read(self) -> HostState:
        status_fd, cgroup_fd, limits_fd, oom_fd, filter_fd, _ = self._fds
        status = _all_of(status_fd)
        rights = _part(status, b"\nCapInh:", b"\nCpus_allowed:")
        policy = os.sched_getscheduler(0)
        raw = (
            _part(status, b"\nUmask:", b"\n"),
            _part(status, b"\nUid:", b"\nFDSize:"),
            _part(status, b"\nGroups:", b"\n"),
            _part(status, b"\nSigIgn:", b"\n"),
            rights,
            b"" if cgroup_fd < 0 else _all_of(cgroup_fd),
            b"" if limits_fd < 0 else _all_of(limits_fd),
            b"" if oom_fd < 0 else os.pread(oom_fd, 16, 0),
            b"" if filter_fd < 0 else os.pread(filter_fd, 16, 0),
            os.getpriority(os.PRIO_PROCESS, 0),
            (policy, 0 if policy in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE) else _priority()),
            max(_syscall(self._get_ioprio, 1, 0), 0) if self._get_ioprio else 0,  # in a sandbox it may be forbidden
            os.sched_getaffinity(0),
            self._habits.now(),
            (_prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0), _prctl(_PR_GET_MDWE, 0, 0, 0, 0)),
            self._same_domain(),
            self._links(rights),
        )
        if self._last is None or raw != self._raw:
            self._raw, self._last = raw, _parsed(raw)
        return self._last

    def _same_domain(self) -> int:
        known = list(_witnesses.items())
        if any(domain == self._domain and _is_out_of_sight(pid, self._buffer) for pid, domain in known):
            self._domain = _domain_of_this_thread()
        return self._domain

    # neither waits for a disk; `os.readlink` and `os.stat` might, and are noticed by those who look for such calls

    def _link(self, name: bytes) -> bytes:
        size = _readlinkat(self._namespaces, name, self._buffer, len(self._buffer))
        return (
            bytes(self._buffer)[:size] if size > 0 else b""
        )  # not in every kernel, nor while a pid namespace is empty

    def _root(self) -> bytes:
        """Device and inode of the root directory (struct statx)."""
        if _statx is None:
            root = os.stat("/")
            return b"%d:%d" % (root.st_dev, root.st_ino)
        _statx(_AT_FDCWD, b"/", 0, _STATX_INO, self._buffer)
        about = bytes(self._buffer)
        return about[32:40] + about[136:144]

    def close(self) -> None:
        """Nobody on this thread needs it any more."""
        fds, self._fds = self._fds, []
        for fd in fds:
            if fd >= 0:
                shut(fd)

    def _links(self, rights: bytes) -> tuple[Any, ...]:
        """The namespaces that children begin in (namespaces(7)), and the root directory."""
        user, here = self._link(b"user"), self._root()
        if self._raw and not int(_part(rights, b"CapPrm:", b"\n")[7:] or b"0", 16) & _CAP_SYS_ADMIN:
            last: tuple[Any, ...] = self._raw[-1]
            if last[:2] == (user, here) and rights == self._raw[4]:
                return last  # who may not enter others, and has not left its user namespace, is where it was
        return (user, here, self._pids, *map(self._link, _NAMESPACES))


def reader() -> Reader:
    """That of this thread, to be given back with `release`.

    Raises:
        OSError: see `Reader`.
    """
    key = threading.get_native_id()
    with _lock:
        one = _readers.get(key)
        if one is None:
            _close_idle()
            one = _readers[key] = Reader()
        one.users += 1
        return one


def release(one: Reader) -> None:
    """The counterpart of `reader`; from any thread. The one that was used last stays for the next group."""
    with _lock:
        one.users -= 1
        _close_idle(one)


def close_idle() -> None:
    """Keep none of those that nobody uses."""
    with _lock:
        _close_idle()


def _close_idle(spared: Reader | None = None) -> None:
    for key, one in list(_readers.items()):
        if not one.users and one is not spared:
            del _readers[key]
            one.close()


def now() -> HostState:
    """The state of this thread, for those that ask seldom.

    Raises:
        OSError: see `Reader`.
    """
    one = reader()
    try:
        return one.read()
    finally:
        release(one)


def witness(pid: int, domain: int) -> None:
    """That child of ours was born with what this thread has, in the domain of that number, and lives until `unseen`.

    Nothing tells of a restriction by Landlock (landlock(7)) or its like. But who restricts himself may not look into
    those any more who are not (ptrace(2), PTRACE_MODE_READ): then he is in another domain, by a number of ours.
    """
    if not _is_out_of_sight(pid, libc.buffer(_LINK)):
        _witnesses[pid] = domain


def unseen(pid: int) -> None:
    """It ends, and its number may be another's."""
    _witnesses.pop(pid, None)


def _is_out_of_sight(pid: int, buffer: Any) -> bool:
    if _readlinkat(_AT_FDCWD, b"/proc/%d/cwd" % pid, buffer, _LINK) >= 0:
        return False
    try:
        os.readlink(f"/proc/{pid}/cwd")
    except PermissionError:
        return True
    except OSError:
        pass  # it has ended
    return False


def _domain_of_this_thread() -> int:
    """That of the newest witness in sight; a new one where all are out of sight."""
    global _newest
    buffer = libc.buffer(_LINK)
    known = list(_witnesses.items())
    for pid, domain in reversed(known):
        if not _is_out_of_sight(pid, buffer):
            return domain
    _newest += bool(known)
    return _newest


def without_proc() -> HostState:
    """As far as system calls tell it. (The umask is told by nothing else, and must be set to be asked for.)"""
    umask = os.umask(0o077)
    os.umask(umask)
    ignored = tuple(
        int(one) for one in signal.valid_signals() if signal.getsignal(one) == signal.SIG_IGN and one not in _PYTHONS
    )
    policy = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    policy, nice = _as_a_child(policy, os.getpriority(os.PRIO_PROCESS, 0))
    given = (
        umask,
        nice,
        policy,
        0,
        None,
        None,
        tuple(sorted(os.sched_getaffinity(0))),
        *process_setup.Habits().now(),
        tuple((one, resource.getrlimit(one)) for one in _LIMITS),
        ignored,
    )
    return HostState((os.getresuid(), os.getresgid(), tuple(os.getgroups()), None), given)


def _parsed(raw: tuple[Any, ...]) -> HostState:
    umask, ids, groups, ignored, rights, cgroup, _, oom, dumped, nice, policy, ioprio, cpus, habits, *held = raw
    mask = int(ignored[8:] or b"0", 16)
    limits = tuple((one, resource.getrlimit(one)) for one in _LIMITS)
    policy, nice = _as_a_child(policy, nice)
    if ioprio >> 13 == 2 and ioprio & 7 == (nice + 20) // 5:
        ioprio = 0  # what the kernel makes of the niceness where nothing was set (ioprio_set(2))
    given = (
        int(umask[7:] or b"22", 8),
        nice,
        policy,
        ioprio,
        int(oom or b"0"),
        int(dumped, 16) if dumped else None,
        tuple(sorted(cpus)),
        *habits,
        limits,
        tuple(one for one in range(1, 65) if mask >> (one - 1) & 1 and one not in _OF_LIBC),
    )
    return HostState((ids, groups, rights, cgroup, *held), given)


def _as_a_child(policy: tuple[int, int], nice: int) -> tuple[tuple[int, int], int]:
    """What a child has of its parent's scheduling (sched(7), SCHED_RESET_ON_FORK)."""
    return ((os.SCHED_OTHER, 0), max(nice, 0)) if policy[0] & _RESET_ON_FORK else (policy, nice)


def _part(text: bytes, begin: bytes, end: bytes) -> bytes:
    """From `begin` up to `end`; b"" where it is not in every kernel."""
    at = text.find(begin)
    return text[at : text.find(end, at + 1)] if at >= 0 else b""


def _all_of(fd: int) -> bytes:
    data = os.pread(fd, _ENOUGH, 0)
    size = _ENOUGH
    while len(data) == size:
        size *= 4
        data = os.pread(fd, size, 0)
    return data


def _priority() -> int:
    return os.sched_getparam(0).sched_priority


def at_most(one: int, other: int) -> bool:
    return other == resource.RLIM_INFINITY or (one != resource.RLIM_INFINITY and one <= other)


@forked_copies.in_copies
def _renew() -> None:
    """The copy's own state is read anew: these files tell of its parent."""
    global _lock
    _lock = threading.Lock()
    for one in _readers.values():
        with contextlib.suppress(OSError):
            one.close()
    _readers.clear()
    _witnesses.clear()


_syscall, _prctl, _readlinkat = (libc.function(name, holds=True) for name in ("syscall", "prctl", "readlinkat"))
_statx: Callable[..., Any] | None
try:
    _statx = libc.function("statx", holds=True)
except OSError:  # an old C library
    _statx = None
_lock = threading.Lock()
_readers: dict[int, Reader] = {}
_witnesses: dict[int, int] = {}  # by pid
_newest = 1  # domain that has a number
