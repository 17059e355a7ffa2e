"""The checks that need the machine: programs, directories, limits. They read; nothing is started."""

from __future__ import annotations

import bisect
import dataclasses
import errno
import itertools
import os
import re
import resource
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ..model.entries import Command, Function, is_file
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.lent_executors import kind_of
from ..model.text import masked, shown
from ..system.descriptors import shut
from ..system.permissions import may
from ._launch_plan import LaunchPlan, Who, WorkerPlan, merged

# elf(5) e_machine by os.uname().machine; others are left to the kernel to judge
_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "ppc64le": 21, "s390x": 22}
ONE_MOST = 32 * resource.getpagesize()  # bytes of one argument or variable, with its NUL (MAX_ARG_STRLEN)
TOTAL_LEAST, TOTAL_MOST = 131_072, 6 * 2**20  # bytes of all of them (ARG_MAX, and three quarters of _STK_LIM)
_SLACK = 32  # descriptors that the group itself may need: port, console, threads' pipes, /proc reads, a dump of stacks


class Looking:
    """What is being looked at, for whoever waits for that in vain."""

    def __init__(self) -> None:
        self._at: tuple[str, object] = ("preflight", "")

    def at(self, field: str, value: object) -> None:
        """That field, and its value, from now on."""
        self._at = field, value

    def error(self, seconds: float) -> SpecError:
        """It took longer than that."""
        problem = f"was looked at for {seconds:g} s: its file system, or one on the way to it, does not answer"
        return SpecError(*self._at, problem, "see to its mount (`stat` will hang there, too), or name another place")


def preflight(
    plan: LaunchPlan, environ: Mapping[str, str], looking: Looking | None = None, by_helpers: bool = False
) -> LaunchPlan:
    """The plan with each program looked up, after everything that can be known before the start was checked.

    Args:
        looking: told of each look before it is begun.
        by_helpers: commands and fresh interpreters, too, are no children of this process, and have to go to where it
            stands.

    Raises:
        SpecError: a program is missing, not executable or for another machine; a directory is missing; the
            limits of the system do not allow that many workers.
    """
    seen: dict[tuple[str, str | None, str | None], str] = {}
    workers = []
    sizes = _Sizes(environ)
    looking = looking or Looking()
    for worker in plan.workers:
        if worker.start in (None, "spawn"):  # by execve(2)
            sizes.check(worker)
        if worker.cwd is None and (worker.start == "zygote" or (by_helpers and worker.start in (None, "spawn"))):
            _check_here(worker)
        if worker.function is not None:
            _check_cwd(worker, looking)
            workers.append(worker)
            continue
        if isinstance(worker.input, os.PathLike):
            _check_input(os.fspath(worker.input), looking)
        path = worker.overlay.get("PATH", environ.get("PATH"))
        key = (worker.argv[0], path, worker.cwd)
        if key not in seen:
            _check_cwd(worker, looking)
            seen[key] = _program(worker, path, looking)
        _check_descriptors(worker)
        workers.append(dataclasses.replace(worker, program=seen[key]).run_as(_who(worker, looking)))
    return dataclasses.replace(plan, workers=tuple(workers))


def _check_input(path: str, looking: Looking) -> None:
    looking.at("input", path)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise SpecError("input", path, "is a directory", "name a file")
        if stat.S_ISFIFO(kind):  # open(2) would wait for who writes there
            raise SpecError("input", path, "is a pipe", "give it open, as open(path)")
        shut(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError as exc:
        raise SpecError(
            "input", path, f"cannot be read: {exc.strerror}", "name a file that this user may read"
        ) from None


def _who(worker: WorkerPlan, looking: Looking) -> Who | None:
    if all(one is None for one in (worker.user, worker.group, worker.extra_groups, worker.umask)):
        return None
    from ._user_checks import looked_up  # for start-up time: most run as this program

    looking.at(f"user of rank {worker.rank}", worker.user)
    return looked_up(worker)


def _check_descriptors(worker: WorkerPlan) -> None:
    """Also of those that it will have, as a process may have numbers below that limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    field = f"pass_fds of rank {worker.rank}"
    for number, fd in worker.pass_fds:
        try:
            os.fstat(fd)
        except OSError:
            raise SpecError(field, number, "is not open here", "open it first, or leave it out") from None
        if soft != resource.RLIM_INFINITY and number >= soft:
            raise SpecError(field, number, f"is not below `ulimit -n`, {soft}", "give it a lower number (os.dup2)")


def check_limits(spec: GroupSpec, helpers_are_up: Callable[[], object] = lambda: None) -> None:
    """Whether this process may hold that many pipes and this user that many processes.

    Args:
        helpers_are_up: waits until the processes of our own that will run beside the workers can be counted.

    Raises:
        SpecError: says how many workers fit.
    """
    n = len(spec.entries)
    # a call in an executor is no process of ours
    own = [isinstance(spec.start, str) or isinstance(one, Command) for one in spec.entries]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        room = soft - _open_files() - _SLACK - len(spec.logs.matches)
        # each worker has a pidfd, its pipes and log files, and a channel if it runs a function; each call in another
        # process a pipe to ask it to stop
        call = int(not isinstance(spec.start, str) and kind_of(spec.start).processes)
        needs = (
            1 + _streams(spec.entries[rank]) + spec.logs.saves(rank).bit_count() if mine else call
            for rank, mine in enumerate(own)
        )
        needed = list(itertools.accumulate(needs))
        if needed[-1] > room:
            raise SpecError(
                "n",
                n,
                f"needs {needed[-1]} file descriptors and this process may open {max(room, 0)} more",
                f"{bisect.bisect_right(needed, room)} workers fit; raise the limit with `ulimit -n` or "
                f"resource.setrlimit(resource.RLIMIT_NOFILE, ...) (hard limit: "
                f"{'none' if hard == resource.RLIM_INFINITY else hard})",
            ) from _lack(errno.EMFILE)
    n = sum(own)
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # root is exempt from RLIMIT_NPROC; counting a user's threads is only worth it when it may matter
    if soft != resource.RLIM_INFINITY and os.getuid() != 0 and n * 4 > soft:
        helpers_are_up()
        room = soft - _tasks_of_user()
        if n > room:
            raise SpecError(
                "n",
                n,
                f"is more processes than RLIMIT_NPROC ({soft}) leaves this user",
                f"{max(room, 0)} workers fit; raise the limit with `ulimit -u`",
            ) from _lack(errno.EAGAIN)
    left = _pids_room()
    if left is not None and n > left:
        problem = "is more processes than this cgroup's pids.max leaves"
        raise SpecError("n", n, problem, f"{max(left, 0)} workers fit; raise pids.max") from _lack(errno.EAGAIN)


def _streams(entry: Command | Function) -> int:
    """How many pipes a worker has, or descriptors of its terminal, with the channel of a function."""
    if isinstance(entry, Function):
        return 3
    return 2 - (entry.stderr == "stdout") + (entry.stdin == "pipe" and not is_file(entry.input))


def _lack(code: int) -> OSError:
    """What the kernel would say: it may be there later (`is_lack`)."""
    return OSError(code, os.strerror(code))


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0  # there is no /proc: what is too much, the first start will tell


def absolute(spec: GroupSpec) -> GroupSpec:
    """The spec with its log directory made absolute, so that it means the same wherever a worker stands.

    Raises:
        SpecError: it is relative, and our own current directory is gone.
    """
    if spec.logs.dir is None:
        return spec
    try:
        home = Path(spec.logs.dir).absolute()
    except OSError as exc:
        problem = f"is relative to a directory that is gone ({exc.strerror})"
        raise SpecError("Logs.dir", str(spec.logs.dir), problem, "give an absolute path") from None
    return dataclasses.replace(spec, logs=dataclasses.replace(spec.logs, dir=home))


class _Sizes:
    """Whether arguments and variables are small enough for execve(2), which would say E2BIG and not what is too big."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._own = sum(map(len, environ)) + sum(map(len, environ.values()))

    def check(self, worker: WorkerPlan) -> None:
        """Raises `SpecError`."""
        variables = [one for one in worker.overlay.values() if one is not None]
        given = [*worker.argv, *variables]
        # a character has four bytes at most: nearly always that is all there is to know
        if max(map(len, given)) * 4 < ONE_MOST and (self._own + sum(map(len, given))) * 4 < TOTAL_LEAST:
            return
        who = f"of rank {worker.rank}"
        for index, one in enumerate(worker.argv):
            if (size := len(os.fsencode(one)) + 1) > ONE_MOST:
                problem = f"has {size - 1:,} bytes, and one argument may have {ONE_MOST - 1:,} (execve(2))"
                remedy = "write it to a file, and give the name of that"
                raise SpecError(f"argv[{index}] {who}", one, problem, remedy, status=126)
        environ = merged(self._environ, worker.overlay)
        for key, value in environ.items():
            if (size := len(os.fsencode(key)) + len(os.fsencode(value)) + 2) > ONE_MOST:
                problem = (
                    f"has {size - 1:,} bytes with its name, and one variable may have {ONE_MOST - 1:,} (execve(2))"
                )
                remedy = "write it to a file, and give the name of that"
                raise SpecError(f"env[{shown(key)}] {who}", masked(key, value), problem, remedy, status=126)
        strings = [*worker.argv, *environ, *environ.values()]
        # a NUL behind each argument, "=" and a NUL in each variable, and a pointer to each of them
        total = sum(len(os.fsencode(one)) + 1 for one in strings) + 8 * (len(worker.argv) + len(environ) + 2)
        most = _total_most(worker)
        if total > most:
            problem = f"are more bytes than execve(2) takes with this limit on the stack, {most:,}"
            remedy = "give less, by a file, or raise `ulimit -s` (Placement.limits of STACK)"
            raise SpecError(f"argv and env {who}", total, problem, remedy, status=126)


def _total_most(worker: WorkerPlan) -> int:
    """A quarter of the stack that it may have, within bounds (fs/exec.c, bprm_stack_limits)."""
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    pair = worker.placement.limits.get("STACK") if worker.placement is not None else None
    if isinstance(pair, tuple):
        stack = pair[0]
    quarter = TOTAL_MOST if stack == resource.RLIM_INFINITY else stack // 4
    return max(min(quarter, TOTAL_MOST), TOTAL_LEAST)


def _check_here(worker: WorkerPlan) -> None:
    """As after `sudo -u app` in the home of root: a child would just stay there."""
    if not may(".", os.X_OK):
        problem = "is where this program stands, and may not be entered by this user"
        raise SpecError(f"cwd of rank {worker.rank}", os.getcwd(), problem, 'give another one, as cwd="/"')


def _check_cwd(worker: WorkerPlan, looking: Looking) -> None:
    if worker.cwd is None:
        return
    who = f"cwd of rank {worker.rank}"
    looking.at(who, worker.cwd)
    if not os.path.exists(worker.cwd):
        raise SpecError(who, worker.cwd, "does not exist", "make it first, or leave cwd out")
    if not os.path.isdir(worker.cwd):
        raise SpecError(who, worker.cwd, "is not a directory", "name a directory")
    if not may(worker.cwd, os.X_OK):
        raise SpecError(who, worker.cwd, "may not be entered by this user", "check its permissions")


def _program(worker: WorkerPlan, path: str | None, looking: Looking) -> str:
    name = worker.argv[0]
    field = f"program of rank {worker.rank}"
    if "/" in name:
        found = name
    else:
        # relative entries are looked up from where the worker starts, as execvp(3) does after the chdir(2)
        entries = (path if path is not None else os.defpath).split(os.pathsep)
        here = os.path.abspath(worker.cwd or ".") if not all(map(os.path.isabs, entries)) else ""
        which = None
        for one in entries:
            file = os.path.join(here, one, name)
            looking.at(field, file)
            if may(file, os.X_OK) and not os.path.isdir(file):
                which = file
                break
        if which is None:
            raise SpecError(field, name, "was not found on the worker's PATH", _suggest(name), status=127)
        found = which
    file = found if os.path.isabs(found) else os.path.join(worker.cwd or ".", found)
    looking.at(field, file)
    try:
        mode = os.stat(file).st_mode
    except OSError as exc:
        status = 127 if isinstance(exc, FileNotFoundError) else 126
        raise SpecError(field, name, exc.strerror or str(exc), "give the path of a program", status) from None
    if stat.S_ISDIR(mode):
        raise SpecError(field, name, "is a directory", "give the program inside it", status=126)
    if not stat.S_ISREG(mode):
        raise SpecError(field, name, "is not a regular file", "give the path of a program", status=126)
    if not may(file, os.X_OK):
        remedy = f"run `chmod +x {name}`, or name its interpreter first"
        raise SpecError(field, name, "is not executable by this user", remedy, status=126)
    _check_format(field, file)
    return found


def _suggest(name: str) -> str:
    if name == "python":
        return f"this Python is {sys.executable}; give that, or python3"
    return "install it, give its full path, or set PATH in env"


def _check_format(field: str, file: str) -> None:
    """A binary for another machine, or a script whose interpreter is missing: the kernel says only ENOEXEC, ENOENT."""
    try:
        with open(file, "rb") as handle:
            head = handle.read(256)
    except OSError:
        return  # executable but not readable: only the kernel can tell
    if head[:4] == b"\x7fELF" and len(head) >= 20:
        machine = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0]
        mine = _MACHINES.get(os.uname().machine)
        if mine is not None and machine != mine and not (mine == 62 and machine == 3) and not _binfmt():
            problem = f"is a program for another machine (ELF machine {machine})"
            raise SpecError(field, file, problem, "build it for this one", status=126)
    elif head[:2] == b"#!":
        # as the kernel reads it: a carriage return at the end is a part of the name
        words = [one for one in re.split(rb"[ \t]+", head[2:].split(b"\n", 1)[0]) if one]
        interpreter = os.fsdecode(words[0]) if words else ""
        if not os.path.exists(interpreter):
            problem = f"names an interpreter that does not exist, {interpreter!r}"
            raise SpecError(field, file, problem, "mend its first line", status=126)
        if os.path.isdir(interpreter) or not may(interpreter, os.X_OK):
            problem = f"names an interpreter that is not a program, {interpreter!r}"
            raise SpecError(field, file, problem, "mend its first line", status=126)
    elif not _binfmt():
        problem = "is neither a program of this system nor a script with a #! line" if head else "is empty"
        remedy = "put the interpreter first, as in Command('sh', 'script.sh')"
        raise SpecError(field, file, problem, remedy, status=126)


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
        line = next(one for one in Path("/proc/self/cgroup").read_bytes().split(b"\n") if one.startswith(b"0::"))
    except (OSError, StopIteration):
        return None
    rooms = []
    here = Path("/sys/fs/cgroup") / os.fsdecode(line[3:].lstrip(b"/"))
    while here != here.parent and here.is_relative_to("/sys/fs/cgroup"):
        try:
            limit = (here / "pids.max").read_bytes().strip()
            if limit != b"max":
                rooms.append(int(limit) - int((here / "pids.current").read_bytes()))
        except (OSError, ValueError):
            pass
        here = here.parent
    return min(rooms, default=None)
