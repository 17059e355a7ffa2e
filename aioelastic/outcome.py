"""What came of it, as frozen values: `Exit` of a process, `Result` of a worker, `GroupResult` of all."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import struct_rusage
from typing import Any, Literal, overload

from .checks import signal_name
from .errors import GroupFailed, GroupTimeout, RemoteError, WorkerFailed
from .remains import Process, Remains, Unkillable
from .shown import printable
from .why import Cause

PRINTED = 15  # how many exceptions of a group Python's traceback prints
COMMAND_SHOWN = 2_000  # how much of a command line a failure shows
TAIL_LINES = 20  # how many last lines of stderr a failure shows
ATTEMPTS_SHOWN = 100  # how many earlier failures a report lists
LINE_SHOWN = 500  # how much of one of them
# what execve(2) says of a file that is there
NOT_RUNNABLE = {
    getattr(errno, f"E{one}")
    for one in ("ACCES", "PERM", "NOEXEC", "2BIG", "ISDIR", "NOTDIR", "LOOP", "TXTBSY", "LIBBAD", "INVAL", "NOMEM")
}
TOLD = ("exit_code", "exception", "no_value", "not_started")  # causes of which the exit and the traceback say all


@dataclass(frozen=True, slots=True)
class Exit:
    """How and when a process ended.

    Attributes:
        code: its exit code, or None when a signal ended it (or nobody could tell: see `signal`).
        signal: the number of the signal that ended it, or None. Both None: another part of this program
            reaped it first, and this kernel cannot tell afterwards.
        core_dumped: whether the kernel wrote a core dump.
        started_ns: monotonic clock in nanoseconds (`time.monotonic_ns`), just before the start.
        ended_ns: the same clock when the exit was seen.
        started_at: the start on the wall clock, seconds since the epoch.
        ended_at: the end on the wall clock.
        stopped_by: the last signal that we had sent to stop it before it ended, or None: it ended by itself.
    """

    code: int | None
    signal: int | None
    core_dumped: bool
    started_ns: int
    ended_ns: int
    started_at: float
    ended_at: float
    stopped_by: int | None = None

    @property
    def ok(self) -> bool:
        """Ended with exit code 0."""
        return self.code == 0

    @property
    def duration(self) -> float:
        """Seconds from start to end."""
        return (self.ended_ns - self.started_ns) / 1e9

    @property
    def status(self) -> int:
        """What a shell would show, which is the code, or 128 + signal (255 when unknown)."""
        if self.code is not None:
            return self.code
        return 255 if self.signal is None else 128 + self.signal

    def __str__(self) -> str:
        if self.signal is not None:
            words = signal_name(self.signal) + (" (core dumped)" if self.core_dumped else "")
        elif self.code is not None:
            words = f"exit code {self.code}"
        else:
            words = "ended, but its status was taken by another waiter in this program"
        return words if self.stopped_by is None else f"{words}, stopped by us with {signal_name(self.stopped_by)}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker used, from wait4(2): itself and those of its children that it waited for.

    Attributes:
        user: CPU seconds in the program.
        system: CPU seconds in the kernel for it.
        max_rss: largest resident set, in bytes.
        max_rss_exact: False when `max_rss` is only an upper bound. Linux hands the launching process's own peak to
            a vforked child across execve(2), so a worker smaller than its launcher cannot be told apart.
        voluntary_switches: context switches because it waited.
        involuntary_switches: context switches because its time was over.
        minor_faults: page faults without I/O.
        major_faults: page faults that read from a disk.
        read_bytes: read from block devices.
        written_bytes: written to block devices.
    """

    user: float
    system: float
    max_rss: int
    max_rss_exact: bool
    voluntary_switches: int
    involuntary_switches: int
    minor_faults: int
    major_faults: int
    read_bytes: int
    written_bytes: int

    @classmethod
    def of(cls, rusage: struct_rusage, rss_floor: int) -> Usage:
        """From what the kernel told, and the launcher's own peak resident size in bytes when it started the worker."""
        max_rss = rusage.ru_maxrss * 1024
        return cls(
            user=rusage.ru_utime,
            system=rusage.ru_stime,
            max_rss=max_rss,
            max_rss_exact=max_rss > rss_floor,
            voluntary_switches=rusage.ru_nvcsw,
            involuntary_switches=rusage.ru_nivcsw,
            minor_faults=rusage.ru_minflt,
            major_faults=rusage.ru_majflt,
            read_bytes=rusage.ru_inblock * 512,
            written_bytes=rusage.ru_oublock * 512,
        )


@dataclass(frozen=True, slots=True)
class Output:
    """One stream of one worker.

    Attributes:
        path: its log file, or None.
        tail: the last bytes it wrote (at most 16 KiB), kept in memory.
        total: how many bytes it wrote in all.
        lost: bytes that did not reach the log file (a full disk, say).
        holders: pids that still held it open when the wait for its end was given up.
    """

    path: Path | None = None
    tail: bytes = b""
    total: int = 0
    lost: int = 0
    holders: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.tail.decode(errors="replace")

    def last_lines(self, count: int = TAIL_LINES) -> list[str]:
        """The last lines as text, long ones cut."""
        lines = str(self).splitlines()[-count:]
        return [one if len(one) <= LINE_SHOWN else one[:LINE_SHOWN] + "…" for one in lines]


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """What a worker itself wrote to its `error.json` (ours, or torch's schema).

    Attributes:
        message: `"ValueError: bad lr"`.
        traceback: the formatted traceback, or "".
        time: seconds since the epoch when it was raised, or None.
        exact: False when `time` is in whole seconds (torch's schema).
        monotonic: the same moment on the monotonic clock in nanoseconds, by which order and blame are told; None where
            the report has none, or one of another machine or time namespace.
        pid: who wrote it, if that is told. Often a child of the worker, which is a shell script, say.
    """

    message: str
    traceback: str = ""
    time: float | None = None
    exact: bool = True
    monotonic: int | None = None
    pid: int | None = None

    def is_of(self, pid: int | None, exit: Exit | None) -> bool:
        """Whether it tells why the worker with this pid has ended so. What a child of it has written does only if the
        worker itself has passed on the exit code of an exception; else it may have coped with that long ago."""
        passed_on = exit is not None and exit.code == 1 and exit.stopped_by is None
        return self.pid is None or pid is None or self.pid == pid or passed_on


@dataclass(frozen=True, slots=True)
class Failure:
    """One worker that failed by itself.

    Attributes:
        attempt: 0 for the first.
        first: whether it was the first of its group to fail (in that attempt): the root cause.
        exit: how it ended; None when it never started.
        error: what it wrote itself, if it did (`aioelastic.record`; function workers always do).
        exception: what a function worker raised.
        cause: why it could not start, when it never did; else the exit in words. A worker that had raised an error
            of its own before we came to stop it has failed by itself, however it ended then.
        why: the same as data, with the evidence that there is beyond the exit.
        errno: of the system's refusal to start it, when it never started.
    """

    rank: int
    name: str
    pid: int | None
    host: str
    attempt: int
    argv: tuple[str, ...]
    cwd: str | None
    exit: Exit | None
    cause: str
    error: ErrorReport | None
    stdout: Output
    stderr: Output
    first: bool = False
    exception: RemoteError | None = None
    why: Cause | None = None
    errno: int | None = None

    @property
    def status(self) -> int:
        """The exit status a shell would show, and never 0: 127 when it never started, 126 when its program was refused,
        1 when it had failed before we stopped it, or for another reason than its exit code, which is 0."""
        if self.exit is None:
            return 126 if self.errno in NOT_RUNNABLE else 127
        return 1 if self.exit.stopped_by is not None and self.exit.code is None else self.exit.status or 1

    @property
    def headline(self) -> str:
        """One line: who, how, why."""
        where = "" if self.pid is None else f" (pid {self.pid} on {self.host})"
        after = "" if self.exit is None else f" after {self.exit.duration:.2f} s"
        own = self.error is not None and self.exception is None and self.error.is_of(self.pid, self.exit)
        told = self.error.message if self.error and own else ""
        why = f": {told.splitlines()[0]}" if told else ""
        return printable(f"rank {self.rank}{where} failed: {self.cause}{after}{why[:LINE_SHOWN]}").replace("\n", "\\n")

    def describe(self) -> str:
        """All of it, the reason last: what a person reads at the end of a terminal."""
        command = shlex.join(self.argv)
        if len(command) > COMMAND_SHOWN:
            command = command[:COMMAND_SHOWN] + f"… ({len(command)} characters)"
        lines = [self.headline]
        if self.why is not None and self.why.kind not in TOLD:
            lines.append(f"  why: {self.why}")
        lines.append(f"  command: {command}")
        if self.cwd is not None:
            lines.append(f"  in: {self.cwd}")
        lines += [f"  log: {out.path}" for out in (self.stdout, self.stderr) if out.path]
        tail, which = self.stderr.last_lines(), "stderr"
        if not tail:
            tail, which = self.stdout.last_lines(), "stdout"
        teller = self.exception or self.error
        trace = teller.traceback.strip() if teller else ""
        whose = "its"
        if trace and self.exception is None and self.error is not None and self.error.pid not in (None, self.pid):
            whose = f"a child's (pid {self.error.pid})"
            if not self.error.is_of(self.pid, self.exit):
                lines += [f"  {whose} traceback:", *(f"    {one}" for one in trace.splitlines())]
                trace = ""
        if tail and not (trace and trace.splitlines()[-1] in "\n".join(tail)):
            lines += [f"  last lines of {which}:", *(f"    {one}" for one in tail)]
            tail = []
        if trace:
            lines += [f"  {whose} traceback:", *(f"    {one}" for one in trace.splitlines())]
        elif tail:
            lines += [f"  last lines of {which}:", *(f"    {one}" for one in tail)]
        return printable("\n".join(lines))


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one worker.

    Attributes:
        exit: how it ended; None when it never started or could not be killed.
        usage: what it used; None as above.
        value: what a function worker returned; always None for a command.
        failure: set when it failed by itself.
        attempt: which attempt this is about, the last one; 0 when it was never restarted.
        unkillable: set when it would not die.
        earlier: its failures within the limits of `Restart`, oldest first. Each was answered by a new attempt; the last
            one may be of this very attempt, if the group was stopped before a new one began.
        stacks: its Python stacks when they were last taken (`Group.dump_stacks`, `Stop.dump`), or why they could not
            be; None when nobody asked.
        why: why it ended badly, or how far we had to go to end it; None when it ended well by itself.
        remains: what it left behind, and what the group did of which nobody knows whose it is.
    """

    rank: int
    name: str
    argv: tuple[str, ...]
    pid: int | None
    attempt: int
    exit: Exit | None
    usage: Usage | None
    stdout: Output
    stderr: Output
    failure: Failure | None = None
    value: Any = None
    earlier: tuple[Failure, ...] = ()
    unkillable: Unkillable | None = None
    stacks: str | None = None
    why: Cause | None = None
    remains: tuple[Remains, ...] = ()

    @property
    def clean(self) -> bool:
        """Nothing of it is left, by the kernel's word; see `GroupResult.clean`."""
        return not self.remains

    @property
    def ok(self) -> bool:
        """Ran and ended with exit code 0, and a function returned."""
        return self.exit is not None and self.exit.ok and self.failure is None

    @property
    def stopped(self) -> bool:
        """Ended because we stopped it, and not by a failure of its own."""
        return self.exit is not None and self.exit.stopped_by is not None and self.failure is None

    @property
    def outcome(self) -> str:
        """One phrase for a table."""
        if self.failure is not None:
            return self.failure.cause
        if self.exit is None:
            return "never started" if self.pid is None and self.unkillable is None else "would not die"
        return str(self.exit)


Reason = Literal["done", "failed", "stopped", "timeout"]


@dataclass(frozen=True, slots=True, repr=False)
class GroupResult(Sequence[Result]):
    """What came of a group: a sequence of `Result`, by rank.

    Attributes:
        reason: why it ended: all workers were done, one failed, somebody stopped it, or its time was over.
        failures: those that failed by themselves, in the order in which they ended; the first is marked.
        unkillable: workers that SIGKILL did not end in time.
        leaked: processes that workers had left running, found at the end.
        run_id: names this run.
        log_dir: the directory of this run's logs; None without `Logs(dir=...)`.
        duration: seconds from first start to the end.
        remains: what is left of it, and what cannot be proven to be gone.
    """

    name: str
    run_id: str
    reason: Reason
    results: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()
    unkillable: tuple[Unkillable, ...] = ()
    leaked: tuple[Process, ...] = ()
    log_dir: Path | None = None
    duration: float = 0.0
    timeout: float | None = None
    remains: tuple[Remains, ...] = ()

    @property
    def clean(self) -> bool:
        """Nothing of it is left, by the kernel's word and not for want of looking.

        The guardian, to which every process falls whose parent has ended, holds none that workers have left; every
        worker was seen to end; their streams were read to their end; the group's `ports` are free; and no named shared
        memory of processes that are gone is there. Otherwise `remains` says exactly what is not so.
        """
        return not self.remains

    @property
    def ok(self) -> bool:
        """Nobody failed by itself, time was not over, and nothing outlived SIGKILL."""
        return not self.failures and self.reason != "timeout" and not self.unkillable

    @property
    def first_failure(self) -> Failure | None:
        """The root cause, or None."""
        return self.failures[0] if self.failures else None

    @property
    def earlier(self) -> tuple[Failure, ...]:
        """All failures within the limits of `Restart`, by attempt, the first of each attempt first."""
        found = [one for result in self.results for one in result.earlier]
        return tuple(sorted(found, key=lambda one: (one.attempt, not one.first, one.rank)))

    def history(self) -> list[str]:
        """One line for each of the `earlier` failures (some are left out when there are very many)."""
        lines = [f"attempt {one.attempt}: {one.headline}" for one in self.earlier]
        if len(lines) > ATTEMPTS_SHOWN:
            half = ATTEMPTS_SHOWN // 2
            lines[half:-half] = [f"… {len(lines) - 2 * half} more, see `earlier` of the result"]
        return lines

    def raise_for_failures(self) -> None:
        """Raise `GroupFailed` if any worker failed by itself, `GroupTimeout` if time was over; else return."""
        if self.failures:
            raise self._error()
        if self.reason == "timeout":
            raise GroupTimeout(self.timeout or 0.0, self)

    def _error(self) -> GroupFailed:
        first = self.failures[0]
        stopped = sum(one.stopped for one in self.results)
        others = f"; {stopped} of {len(self.results)} were stopped by us" if stopped else ""
        errors = [WorkerFailed(one) for one in self.failures]
        if len(errors) > 1:
            # a traceback prints the group top-down: end it with the root cause
            errors[min(len(errors), PRINTED) - 1].add_note(f"\nroot cause, the first to fail:\n{first.describe()}")
        text = first.headline
        if history := self.history():
            count = "1 attempt" if first.attempt == 0 else f"{first.attempt + 1} attempts"
            text = "\n  ".join([f"failed after {count}:", *history, f"attempt {first.attempt}: {text}"])
        return GroupFailed(printable(f"group {self.name!r}: {text}{others}"), errors, self)

    @overload
    def __getitem__(self, rank: int) -> Result: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[Result, ...]: ...
    def __getitem__(self, rank: int | slice) -> Result | tuple[Result, ...]:
        return self.results[rank]

    def __repr__(self) -> str:
        well = sum(one.ok for one in self.results)
        return f"<GroupResult {self.name!r}: {self.reason}, {well} of {len(self.results)} ok, {self.duration:.2f} s>"

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)
