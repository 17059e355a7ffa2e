"""What can be seen of a failure outside of the worker: counters, the kernel's log, a core dump.

It looks only after a failure, in the helper thread. Before the first worker it reads two counters and notes the end of
the kernel's log: microseconds, and never again.
"""

from __future__ import annotations

import glob
import os
import re
import resource
import signal
from collections import deque
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..child.kernel.bounded_reads import blocks
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.helper_thread import HelperThread
from ._cause import Evidence, Kills, is_kill, is_out_of_memory

if TYPE_CHECKING:
    from ..model.exits import Exit
    from ..planning import WorkerPlan

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")
FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of linux/proc_ns.h: there our pids are those of the kernel's log
TEXT = 65_536  # bytes of a file that holds counters or a pattern
RECORD = 8192  # bytes; a record of the kernel's log is not longer
RECORDS = 100_000  # read at most
LINES = 5  # of the kernel's log kept about one pid
PIDS = 1000  # that many pids


class Sent(Protocol):
    """What was done to end a worker: the signals that the program sent it through us."""

    @property
    def sent(self) -> Container[int]: ...


class Failed(Protocol):
    """A worker that has failed."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exit(self) -> Exit | None: ...

    @property
    def plan(self) -> WorkerPlan: ...

    @property
    def stop_progress(self) -> Sent: ...


W = TypeVar("W", bound=Failed)


class EvidenceCollector:
    """Of one group.

    Args:
        thread: where it looks.
    """

    def __init__(self, thread: HelperThread) -> None:
        self._thread = thread
        self._log: int | None = None
        self._seen = self._unclaimed = Kills()
        self._failed: deque[Failed] = deque()
        self._asked = False
        self._kills: dict[Failed, Kills] = {}
        self._lines: dict[int, list[str]] = {}  # by pid, latest last
        self._logged: set[int] = set()  # pids of which the log says that the kernel has killed them for lack of memory
        self._ours: set[int | None] = set()  # those of workers that a rise of the counters was taken to explain
        forked_copies.register(self)

    def begin(self) -> None:
        """Before the first worker starts; in the helper thread."""
        self._seen = oom_kills()
        self._unclaimed = self._seen.since(self._seen)
        try:
            # elsewhere its pids are others, and one of them may be a stranger's
            if os.stat("/proc/self/ns/pid").st_ino == FIRST_PID_NAMESPACE:
                self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.lseek(self._log, 0, os.SEEK_END)
        except OSError:
            pass  # not for this user: failures will lack it

    def note(self, worker: Failed) -> None:
        """A worker has just failed: read the counters. Those that fail meanwhile share it."""
        self._failed.append(worker)
        if not self._asked:
            self._asked = True
            self._thread.put(self._look)

    def find(self, workers: Iterable[W]) -> dict[W, Evidence]:
        """What there is about these, when all is over; in the helper thread."""
        failed = [one for one in workers if one.exit is not None and one.exit.stopped_by is None]
        if failed:
            self._failed.extend(one for one in failed if one not in self._kills)
            if self._failed:
                self._look()
            self._read_log()
        found = {}
        for one in failed:
            assert one.exit is not None
            core, words = find_core(one.exit, one.pid, one.plan.cwd)
            kernel = self._lines.get(one.pid, ()) if one.pid is not None else ()
            kills = self._kills.pop(one, Kills())
            if one.exit.signal == signal.SIGKILL:  # else it was one of its children, perhaps, whose pids nobody knows
                # a rise that the log explains by others is no sign of this one's
                others = len(self._logged - self._ours - {one.pid})
                kills = Kills(_sum(kills.group, -others), _sum(kills.machine, -others), kills.own)
            found[one] = Evidence(None, kills, tuple(kernel), core, words)
        return found

    def disown(self) -> list[int]:
        """See `forked_copies`: who reads that descriptor takes it out of what the original reads."""
        log, self._log = self._log, None
        return [] if log is None else [log]

    def close(self) -> None:
        if self._log is not None:
            shut(self._log)
            self._log = None

    def _look(self) -> None:
        self._asked = False  # whoever comes from now on asks again
        now = oom_kills()
        new = now.since(self._seen)
        self._seen = now
        self._unclaimed = Kills(_sum(self._unclaimed.group, new.group), _sum(self._unclaimed.machine, new.machine))
        while self._failed:
            worker = self._failed.popleft()
            own = None if worker.plan.cgroup is None else _counter(worker.plan.cgroup / "memory.events")
            self._kills[worker] = Kills(self._unclaimed.group, self._unclaimed.machine, own)
            assert worker.exit is not None
            if is_kill(worker.exit) and signal.SIGKILL not in worker.stop_progress.sent:
                # one rise explains one death, whenever it is seen: a large process takes its time to end
                self._unclaimed = Kills(_sum(self._unclaimed.group, -1), _sum(self._unclaimed.machine, -1))
                self._ours.add(worker.pid)

    def _read_log(self) -> None:
        for _ in range(RECORDS):
            if self._log is None:
                return
            try:
                record = os.read(self._log, RECORD)
            except BrokenPipeError:
                continue  # what we were to read next is overwritten already
            except OSError:
                return  # all of it is read
            pid, text = parse_record(record)
            if pid is not None:
                self._lines[pid] = [*self._lines.pop(pid, []), text][-LINES:]
                if len(self._lines) > PIDS:
                    del self._lines[next(iter(self._lines))]
                if is_out_of_memory(text) and len(self._logged) < RECORDS:
                    self._logged.add(pid)


def oom_kills() -> Kills:
    """The kernel's counters now: in cgroup v2 memory.events, in v1 memory.oom_control, and /proc/vmstat."""
    return Kills(next((n for one in _cgroup_files() if (n := _counter(one)) is not None), None), _counter(VMSTAT))


def parse_record(record: bytes) -> tuple[int | None, str]:
    """The pid that a record of /dev/kmsg is about, and its text: `6,339,5140900,-;python[42]: segfault at 0 ip …`.

    Only the kernel's own word counts (facility 0): anybody who may write there can write anything. A crash names the
    thread that crashed; the pid of its process is the same only in the first one.
    """
    head, _, text = record.partition(b";")
    line = text.split(b"\n", 1)[0]
    # what cannot be printed is escaped there, and a name may be full of it
    plain = re.sub(rb"\\x([0-9a-f]{2})", lambda it: bytes([int(it[1], 16)]), line)
    about = re.match(_ABOUT, plain, re.DOTALL)
    priority = head.split(b",", 1)[0]
    if about is None or not priority.isdigit() or int(priority) >> 3:
        return None, line.decode(errors="replace")
    return int(about[1] or about[2] or about[3]), line.decode(errors="replace")


# The names of processes are theirs to choose, of control groups and files too: `x[42]: trap ` or `Killed process 42 (`.
# So a line is known from its beginning, where a name has 15 bytes at most, to the words behind the pid.
_ABOUT = (  # where . is any byte
    rb"(?:(?:Out of memory|Memory cgroup out of memory)(?: \([a-z_]+\))?: )?Killed process (\d+) \("
    rb"|(?:traps: )?.{0,15}\[(\d+)\]:? (?:segfault (?:\(\d+\) )?at [0-9a-f]+ |trap [a-z0-9 ]+ ip:[0-9a-f]|"
    rb"unhandled (?:signal \d+|exception: )|general protection (?:fault )?ip:|bad frame in )"
    rb"|NVRM: Xid \([^)]*\): \d+, pid=(\d+)"
)


def find_core(exit: Exit, pid: int | None, cwd: str | None) -> tuple[Path | None, str]:
    """Where the core dump is, and the same in words; see core(5). ("" where there is nothing to say.)"""
    if exit.signal not in _CORE or pid is None:
        return None, ""
    pattern = _text("/proc/sys/kernel/core_pattern")
    handler = _handler(pattern, pid)
    if not exit.core_dumped:
        none_wanted = resource.getrlimit(resource.RLIMIT_CORE)[0] == 0 and not handler
        return None, "no core dump, our own limit for them is 0 (ulimit -c)" if none_wanted else ""
    if handler:
        return None, handler
    uses_pid = _text("/proc/sys/kernel/core_uses_pid") != "0"
    wanted = core_glob(pattern, pid, exit.signal or 0, os.uname().nodename, uses_pid)
    path = os.path.join(glob.escape(cwd or "."), wanted)
    there = []
    for one in glob.glob(path):
        try:
            about = os.stat(one)
        except OSError:
            continue
        if about.st_mtime >= exit.started_at - 1:
            there.append((about.st_mtime, os.path.abspath(one)))
    if not there:
        return None, f"core dump written as {pattern} in its working directory, not found from here"
    core = max(there)[1]
    return Path(core), f"core dump: {core}"


def core_glob(pattern: str, pid: int, signum: int, host: str, uses_pid: bool) -> str:
    """The pattern of core(5) for one process as a pattern of glob(7): what cannot be known here may be anything."""
    known = {"%": "%", "p": str(pid), "s": str(signum), "h": host}
    out = "".join(
        glob.escape(literal) if literal else glob.escape(known[letter]) if letter in known else "*"
        for literal, letter in re.findall(r"([^%]+)|%(.?)", pattern)
    )
    return out if "%p" in pattern or not uses_pid else f"{out}.{pid}"


def _handler(pattern: str, pid: int) -> str:
    """To whom core dumps go, in words; "" where they become files."""
    if pattern.startswith("@"):
        return f"core dump given to the socket {pattern.lstrip('@')}"
    if not pattern.startswith("|"):
        return ""
    program = (pattern[1:].split(maxsplit=1) or ["?"])[0]
    if "systemd-coredump" in program:
        return f"core dump: coredumpctl info {pid}"
    return f"core dump given to {program}" + (", see /var/crash" if "apport" in program else "")


# signals whose default is a core dump (signal(7))
_CORE = frozenset(
    getattr(signal, f"SIG{one}") for one in ("QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "SEGV", "XCPU", "XFSZ", "SYS")
)


def _cgroup_files() -> Iterable[Path]:
    """Where our own memory cgroup counts, likeliest first."""
    for line in _text(str(OWN)).splitlines():
        _, controllers, path = line.split(":", 2)
        here = path.lstrip("/")
        if not controllers:
            yield CGROUPS / here / "memory.events"
        elif "memory" in controllers.split(","):
            yield CGROUPS / "memory" / here / "memory.oom_control"
            yield CGROUPS / "memory" / "memory.oom_control"  # in a container, which sees its own as the root


def _counter(file: Path) -> int | None:
    found = re.search(r"^oom_kill (\d+)$", _text(str(file)), re.MULTILINE)
    return int(found.group(1)) if found else None


def _text(path: str) -> str:
    try:
        return b"".join(blocks(path, TEXT)).decode(errors="replace").rstrip("\n")
    except OSError:
        return ""


def _sum(one: int | None, two: int | None) -> int | None:
    return None if one is None or two is None else max(one + two, 0)
