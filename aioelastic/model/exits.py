"""How a process ended and what it used and wrote, as frozen values."""

from __future__ import annotations

from pathlib import Path
from resource import struct_rusage

from .frozen import dataclass
from .signal_names import signal_name

TAIL_LINES = 20  # how many last lines of stderr a failure shows


LINE_SHOWN = 500  # how much of one of them


@dataclass(frozen=True, slots=True)
class Exit:
    """How and when a process ended.

    Attributes:
        code: its exit code, or None when a signal ended it (or nobody could tell: see `signal`).
        signal: the number of the signal that ended it, or None. Both None: another part of this program
            reaped it first, and this kernel cannot tell afterwards.
        core_dumped: whether the kernel wrote a core dump.
        started_ns: monotonic clock in nanoseconds (`time.monotonic_ns`), just before the start.
        ended_ns: the same clock when the exit was seen: by this program, and in a result by whoever saw it first, which
            makes the order of `GroupResult.failures`.
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
        if self.stopped_by is None:
            return words
        how = f"stopped ({signal_name(self.stopped_by)})"
        return how if self.signal == self.stopped_by and not self.core_dumped else f"{how}: {words}"


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
        """The last lines as text, long ones cut.

        Args:
            count: how many, at most.
        """
        lines = str(self).splitlines()[-count:]
        return [one if len(one) <= LINE_SHOWN else one[:LINE_SHOWN] + "…" for one in lines]
