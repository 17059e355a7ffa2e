"""What came of a group, as frozen values: `Result` of a worker, `GroupResult` of all; and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, overload

from .exits import Exit, Output, Usage
from .failures import Cause, Failure
from .frozen import dataclass
from .leftovers import Process, Remains, Unkillable
from .text import printable, shown

PRINTED = 15  # how many exceptions of a group Python's traceback prints


NEVER_STARTED = "never started"

ATTEMPTS_SHOWN = 100  # how many earlier failures a report lists
ROWS_SHOWN = 16  # from more workers on, those in a row that ended alike are one row of a report


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one worker.

    Attributes:
        rank: its rank, 0 to n - 1.
        name: that of its group.
        worker: its own name (`Command.name`), as `"web"` or `"web.1"`; empty when it has none.
        argv: its command; of a function, its module and name.
        pid: of its process; None when it never started, or ran in an executor of the caller's.
        stdout: its standard output: the last bytes, how many, and the log file.
        stderr: the same of its standard error; empty with `Command(stderr="stdout")` or `tty`.
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
    worker: str = ""

    @property
    def clean(self) -> bool:
        """Nothing of it is left, as the kernel tells; see `GroupResult.clean`."""
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
            return NEVER_STARTED if self.pid is None and self.unkillable is None else "would not die"
        return str(self.exit)


Reason: TypeAlias = Literal["done", "failed", "stopped", "timeout"]


@dataclass(frozen=True, slots=True, repr=False)
class GroupResult(Sequence[Result]):
    """What came of a group: a sequence of `Result`, by rank.

    Attributes:
        name: that of the group.
        results: one for each rank; the group result is itself a sequence of them.
        reason: why it ended: all workers were done (or one, with `on_success="stop"`), one failed, somebody stopped it,
            or its time was over.
        failures: those that failed by themselves, in the order in which they ended, but the one that ended the group
            comes first; root causes are marked (`Failure.first`).
        unkillable: workers that SIGKILL did not end in time.
        leaked: processes that workers had left running, found at the end.
        run_id: names this run.
        log_dir: the directory of this run's logs; None without `Logs(dir=...)`.
        duration: seconds from first start to the end.
        timeout: the limit of `supervise(timeout=...)`, in seconds; None: there was none.
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
        """Nothing of it is left, as the kernel tells, and not for want of looking.

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

    def describe(self, also: Sequence[str] = ()) -> str:
        """All of it, the root cause last: what `str()` is, and what the command line prints at the end.

        Args:
            also: lines to stand before the failures.
        """
        lines = self._table()
        if self.log_dir is not None:
            lines.append(f"logs: {self.log_dir}")
        lines += [f"left running by a worker, and ended: pid {one.pid} ({one.command})" for one in self.leaked]
        lines += [f"would not die: {one}" for one in self.unkillable]
        lines += [*self.history(), *also]
        alone = all(one.first for one in self.failures)
        for failure in reversed(self.failures):
            lines += ["", ("root cause: " if failure.first and not alone else "") + failure.describe()]
        if self.reason == "done" and any(one.stopped for one in self):  # on_success="stop"
            ended = min(
                (one for one in self if one.ok), key=lambda one: one.exit.ended_ns if one.exit else 0, default=None
            )
            if ended is not None:
                lines.append(f"the others were stopped: {ended.worker or f'rank {ended.rank}'} had ended")
        if self.reason == "timeout":
            lines.append(f"timed out after {self.timeout:g} s")
        return printable("\n".join(lines))

    def __str__(self) -> str:
        return self.describe()

    def _table(self) -> list[str]:
        """A line for each worker, or for several that ended alike, below a head."""
        found = [[one] for one in self.results]
        if len(found) > ROWS_SHOWN:
            alike = groupby(self.results, lambda one: (one.outcome, one.attempt, one.worker, shown(one.value)))
            found = [[*some] for _, some in alike]
        columns = [
            ("rank", [_from_to([str(one.rank) for one in some], "-") for some in found]),
            (
                "pid",
                [
                    f"{len(some)} workers" if some[1:] else "-" if some[0].pid is None else str(some[0].pid)
                    for some in found
                ],
            ),
            ("outcome", [some[0].outcome for some in found]),
            (
                "duration",
                [
                    _from_to(sorted(f"{one.exit.duration:.2f}" for one in some if one.exit), " to ", " s")
                    for some in found
                ],
            ),
            ("max RSS", [_largest(some) for some in found]),
            ("CPU time", [_cpu(some) for some in found]),
        ]
        if any(one.attempt or one.earlier for one in self):
            columns.insert(2, ("attempts", [str(some[0].attempt + 1) for some in found]))
        if any(one.worker for one in self):
            columns.insert(1, ("name", [some[0].worker or "-" for some in found]))
        if any(one.value is not None for one in self):
            columns.append(("value", [shown(some[0].value) for some in found]))
        whole = [[head, *cells] for head, cells in columns]
        widths = [max(map(len, column)) for column in whole]
        rows = zip(*whole, strict=True)
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def raise_for_failures(self) -> None:
        """Raise `GroupFailed` if any worker failed by itself, `GroupTimeout` if time was over; else return."""
        if self.failures:
            raise self._error()
        if self.reason == "timeout":
            raise GroupTimeout(self.timeout or 0.0, self)

    def _error(self) -> GroupFailed:
        first = self.failures[0]
        stopped = sum(one.stopped for one in self.results)
        others = f"; {stopped} of {len(self.results)} were stopped" if stopped else ""
        errors = [WorkerFailed(one) for one in self.failures]
        if any(not one.first for one in self.failures):
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


def _from_to(found: list[str], between: str, unit: str = "") -> str:
    """The first and the last."""
    if not found:
        return "-"
    return (found[0] if found[0] == found[-1] else f"{found[0]}{between}{found[-1]}") + unit


def _largest(some: list[Result]) -> str:
    used = [(one.usage.max_rss, one.usage.max_rss_exact) for one in some if one.usage is not None]
    if not used:
        return "-"
    size, is_exact = max(used)
    return f"{'' if is_exact else '<= '}{size / 2**20:.1f} MiB"


def _cpu(some: list[Result]) -> str:
    used = [one.usage.user + one.usage.system for one in some if one.usage is not None]
    return f"{sum(used):.2f} s" if used else "-"


class WorkerFailed(Exception):
    """One worker failed by itself. `str()` tells its command, exit, duration, logs and last lines.

    Attributes:
        failure: the `Failure` with all of it as data.
        __cause__: for a function that raised, the `RemoteError`.
    """

    __module__ = "aioelastic.errors"  # where users find it

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure
        self.__cause__ = failure.exception

    def __str__(self) -> str:
        return self.failure.describe()

    def __repr__(self) -> str:
        return f"WorkerFailed({self.failure.headline!r})"


class GroupFailed(ExceptionGroup[WorkerFailed]):
    """At least one worker failed by itself; the others were stopped, unless it was `on_failure="continue"`. First cause
    first.

    Attributes:
        exceptions (tuple[WorkerFailed, ...]): one per worker that failed by itself, in the order in which they ended,
            but first the one that ended the group.
        result: the whole `GroupResult`, with the workers that did not fail too.

    Example::

        try:
            await supervise(Command("python", "train.py"), n=4)
        except* WorkerFailed as group:
            print(group.exceptions[0].failure.exit)
    """

    __module__ = "aioelastic.errors"  # where users find it

    result: GroupResult

    def __new__(cls, message: str, exceptions: Sequence[WorkerFailed], result: GroupResult) -> Self:
        self = super().__new__(cls, message, exceptions)
        self.result = result
        return self

    def __init__(self, message: str, exceptions: Sequence[WorkerFailed], result: GroupResult) -> None:
        super().__init__(message, exceptions)

    def derive(self, excs: Sequence[Any], /) -> GroupFailed:  # type: ignore[override]  # ours hold WorkerFailed only
        return GroupFailed(self.message, excs, self.result)

    def __reduce__(self) -> tuple[Any, ...]:
        return (GroupFailed, (self.message, list(self.exceptions), self.result), self.__dict__)


class GroupTimeout(TimeoutError):
    """`supervise(timeout=...)` ran out; the group was stopped.

    Attributes:
        timeout: the limit, in seconds.
        result: the `GroupResult` of the stopped group.
    """

    __module__ = "aioelastic.errors"  # where users find it

    def __init__(self, timeout: float, result: GroupResult) -> None:
        super().__init__(timeout, result)
        self.timeout = timeout
        self.result = result

    def __str__(self) -> str:
        running = f"{sum(r.stopped for r in self.result)} of {len(self.result)} workers were still running"
        if self.result.results and all(r.outcome == NEVER_STARTED for r in self.result):
            running = "no worker was started by then: what is imported and looked at before takes that long, or hangs"
        return f"group {self.result.name!r} was stopped: it did not end within {self.timeout:g} s ({running})"
