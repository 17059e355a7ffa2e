"""As whom a command runs: names become numbers, and whether this program may do that is tried before any start."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable

from ..child.kernel.bounded_reads import slurp
from ..model.errors import SpecError
from ._launch_plan import LaunchPlan, Who, WorkerPlan

_CAP_KILL = 1 << 5  # capabilities(7)

# tries it in a process that ends at once: (errno, field), or (0, "")
Try = Callable[[Who], tuple[int, str]]


def looked_up(worker: WorkerPlan) -> Who | None:
    """As whom it runs, in numbers; None: as this program.

    Raises:
        SpecError: there is no such user or group here; or one that is not known has no group.
    """
    user, group, extra, umask = worker.user, worker.group, worker.extra_groups, worker.umask
    if user is None and group is None and extra is None:
        return None if umask is None else (umask, None, None, None)
    rank = f"of rank {worker.rank}"
    uid, gid = None, None if group is None else _gid(f"group {rank}", group)
    groups = None if extra is None else tuple(_gid(f"extra_groups {rank}", one) for one in extra)
    if user is not None:
        entry = _entry(f"user {rank}", user)
        uid = user if isinstance(user, int) else entry.pw_uid if entry is not None else None
        if gid is None:
            if entry is None:
                problem = "is not known here, so nobody knows its group"
                raise SpecError(f"user {rank}", user, problem, "give group, too, or the name of a user")
            gid = entry.pw_gid
        if groups is None:
            groups = (gid,) if entry is None else tuple(os.getgrouplist(entry.pw_name, gid))
    return umask, groups, gid, uid


def _entry(field: str, user: str | int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except KeyError:
        if isinstance(user, int):
            return None
        raise SpecError(field, user, "is no user here", "give one that `getent passwd` knows, or a number") from None


def _gid(field: str, group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SpecError(field, group, "is no group here", "give one that `getent group` knows, or a number") from None


def check_users(plan: LaunchPlan, attempt: Try) -> None:
    """Whether this program may run something as those, and end it.

    Raises:
        SpecError: names the rank and the field.
    """
    first: dict[Who, WorkerPlan] = {}
    for one in plan.workers:
        if one.who is not None:
            first.setdefault(one.who, one)
    for who, worker in first.items():
        try:
            code, field = attempt(who)
        except OSError:
            continue  # the start itself will tell
        if code and field in ("user", "group", "extra_groups"):  # else it is about what the program itself has
            given = getattr(worker, field)  # of a user come its groups, too
            field, given = ("user", worker.user) if given is None else (field, given)
            problem = f"may not be taken by this program ({os.strerror(code)})"
            remedy = "leave it out, or run with CAP_SETUID and CAP_SETGID, as root has them"
            raise SpecError(f"{field} of rank {worker.rank}", given, problem, remedy)
        uid = who[-1]
        if uid is not None and uid not in (os.getuid(), os.geteuid()) and not _may_kill():
            remedy = "leave it out, or run with CAP_KILL, too"
            raise SpecError(f"user of rank {worker.rank}", worker.user, "could not be stopped by this program", remedy)


def _may_kill() -> bool:
    for line in slurp("/proc/thread-self/status", 65_536).splitlines():
        if line.startswith(b"CapEff:"):
            return bool(int(line.split()[1], 16) & _CAP_KILL)
    return True  # nobody can tell
