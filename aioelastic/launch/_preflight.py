"""The checks that need the machine: programs, directories, limits. They read; nothing is started."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import shutil
import stat
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import SpecError
from ._plan import LaunchPlan, WorkerPlan, merged

# elf(5) e_machine by platform.machine(); others are left to the kernel to judge
_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "ppc64le": 21, "s390x": 22}
_SLACK = 24  # descriptors that the group itself may need: port, console, threads' pipes, /proc reads


def preflight(plan: LaunchPlan, environ: Mapping[str, str]) -> LaunchPlan:
    """The plan with each program looked up, after everything that can be known before the start was checked.

    Raises:
        SpecError: a program is missing, not executable or for another machine; a directory is missing; the
            limits of the system do not allow that many workers.
    """
    check_limits(plan)
    seen: dict[tuple[str, str | None, str | None], str] = {}
    workers = []
    for worker in plan.workers:
        path = merged(environ, {"PATH": worker.overlay.get("PATH", environ.get("PATH"))}).get("PATH")
        key = (worker.argv[0], path, worker.cwd)
        if key not in seen:
            _check_cwd(worker)
            seen[key] = _program(worker, path)
        workers.append(dataclasses.replace(worker, program=seen[key]))
    return dataclasses.replace(plan, workers=tuple(workers))


def check_limits(plan: LaunchPlan) -> None:
    """Whether this process may hold that many pipes and this user that many processes."""
    n = len(plan.workers)
    first = plan.workers[0]
    each = 1 + first.pipes.bit_count() + sum(log is not None for log in (first.stdout_log, first.stderr_log))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        room = soft - len(os.listdir("/proc/self/fd")) - _SLACK
        if n * each > room:
            raise SpecError(
                "n",
                n,
                f"needs {n * each} file descriptors ({each} per worker) and this process may open {max(room, 0)} more",
                f"{max(room // each, 0)} workers fit; raise the limit with `ulimit -n` or "
                f"resource.setrlimit(resource.RLIMIT_NOFILE, ...) (hard limit: "
                f"{'none' if hard == resource.RLIM_INFINITY else hard})",
            )
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # root is exempt from RLIMIT_NPROC; counting a user's threads is only worth it when it may matter
    if soft != resource.RLIM_INFINITY and os.getuid() != 0 and n * 4 > soft:
        room = soft - _tasks_of_user()
        if n > room:
            raise SpecError(
                "n",
                n,
                f"is more processes than RLIMIT_NPROC ({soft}) leaves this user",
                f"{max(room, 0)} workers fit; raise the limit with `ulimit -u`",
            )
    left = _pids_room()
    if left is not None and n > left:
        raise SpecError(
            "n",
            n,
            "is more processes than this cgroup's pids.max leaves",
            f"{left} workers fit; raise pids.max",
        )


def _check_cwd(worker: WorkerPlan) -> None:
    if worker.cwd is None:
        return
    who = f"cwd of rank {worker.rank}"
    if not os.path.exists(worker.cwd):
        raise SpecError(who, worker.cwd, "does not exist", "make it first, or leave cwd out")
    if not os.path.isdir(worker.cwd):
        raise SpecError(who, worker.cwd, "is not a directory", "name a directory")
    if not os.access(worker.cwd, os.X_OK):
        raise SpecError(who, worker.cwd, "may not be entered by this user", "check its permissions")


def _program(worker: WorkerPlan, path: str | None) -> str:
    name = worker.argv[0]
    field = f"argv[0] of rank {worker.rank}"
    if "/" not in name:
        found = shutil.which(name, path=path if path is not None else os.defpath)
        if found is None:
            raise SpecError(field, name, "was not found on the worker's PATH", _suggest(name))
        _check_elf(field, found)
        return found
    # relative to where the worker starts, as execve(2) takes it after the chdir(2)
    file = name if os.path.isabs(name) else os.path.join(worker.cwd or ".", name)
    try:
        mode = os.stat(file).st_mode
    except OSError as exc:
        raise SpecError(field, name, exc.strerror or str(exc), "give the path of a program") from None
    if stat.S_ISDIR(mode):
        raise SpecError(field, name, "is a directory", "give the program inside it")
    if not os.access(file, os.X_OK):
        raise SpecError(
            field,
            name,
            "is not executable by this user",
            f"run `chmod +x {name}`, or name its interpreter first",
        )
    _check_elf(field, file)
    return name


def _suggest(name: str) -> str:
    if name == "python":
        return f"this Python is {sys.executable}; give that, or python3"
    return "install it, give its full path, or set PATH in env"


def _check_elf(field: str, file: str) -> None:
    """A binary for another machine, or a script whose interpreter is missing: the kernel says only ENOEXEC, ENOENT."""
    try:
        with open(file, "rb") as handle:
            head = handle.read(256)
    except OSError:
        return  # executable but not readable: only the kernel can tell
    if head[:4] == b"\x7fELF" and len(head) >= 20:
        order = "<" if head[5] == 1 else ">"
        machine = struct.unpack_from(order + "H", head, 18)[0]
        mine = _MACHINES.get(platform.machine())
        if mine is not None and machine != mine and not (mine == 62 and machine == 3) and not _binfmt():
            raise SpecError(
                field,
                file,
                f"is a program for another machine (ELF machine {machine})",
                "build it for this one",
            )
    elif head[:2] == b"#!":
        words = head[2:].split(b"\n", 1)[0].split()
        if not words or not os.path.exists(words[0]):
            shown = words[0].decode(errors="replace") if words else ""
            raise SpecError(field, file, f"names an interpreter that does not exist, {shown!r}", "mend its first line")
    elif not _binfmt():
        raise SpecError(
            field,
            file,
            "is neither a program of this system nor a script with a #! line" if head else "is empty",
            "put the interpreter first, as in Command('sh', 'script.sh')",
        )


def _binfmt() -> bool:
    """Whether binfmt_misc may run what the kernel itself does not know (qemu, wine, …)."""
    try:
        return bool(set(os.listdir("/proc/sys/fs/binfmt_misc")) - {"register", "status"})
    except OSError:
        return False


def _tasks_of_user() -> int:
    import psutil

    mine = os.getuid()
    count = 0
    for one in psutil.process_iter(["uids", "num_threads"]):
        if one.info["uids"] and one.info["uids"].real == mine:
            count += one.info["num_threads"] or 1
    return count


def _pids_room() -> int | None:
    """What the tightest pids.max of our cgroup v2 and its parents leaves, or None."""
    try:
        line = next(one for one in Path("/proc/self/cgroup").read_text().splitlines() if one.startswith("0::"))
    except (OSError, StopIteration):
        return None
    rooms = []
    here = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
    while here != here.parent and here.is_relative_to("/sys/fs/cgroup"):
        try:
            limit = (here / "pids.max").read_text().strip()
            if limit != "max":
                rooms.append(int(limit) - int((here / "pids.current").read_text()))
        except (OSError, ValueError):
            pass
        here = here.parent
    return min(rooms, default=None)
