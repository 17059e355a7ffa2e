"""Why a worker failed, as frozen values: `Cause` and `Failure`."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path
from typing import Literal, TypeAlias

from .errors import RemoteError
from .exits import LINE_SHOWN, Exit, Output
from .frozen import dataclass
from .text import printable

Kind: TypeAlias = Literal[
    "exit_code",
    "exception",
    "no_value",
    "not_started",
    "exec_failed",
    "missing_library",
    "fatal_error",
    "crash",
    "out_of_memory",
    "limit",
    "broken_pipe",
    "our_signal",
    "foreign_signal",
    "child_signal",
    "parent_died",
    "stuck",
    "unknown",
]


Stage: TypeAlias = Literal["asked", "group", "grace_over", "hurried", "at_once", "send_signal"]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a worker ended badly, or why we ended it. `str()` is one line.

    Attributes:
        kind: `"exit_code"` (no more is known), `"exception"` (it raised), `"no_value"` (a function that did not
            return), `"not_started"` (the system refused), `"exec_failed"` (its shell found no such program),
            `"missing_library"`, `"fatal_error"` (of Python), `"crash"` (SIGSEGV and its like), `"out_of_memory"`,
            `"limit"` (RLIMIT_CPU, RLIMIT_FSIZE), `"broken_pipe"`, `"our_signal"`, `"foreign_signal"` (not ours),
            `"child_signal"` (a child of it, told as 128 + n), `"parent_died"` (killed with its zygote), `"stuck"`
            (SIGKILL has not ended it), `"unknown"`.
        words: the same for people.
        evidence: what this is taken from: a line of the kernel's log, a counter, a line of its stderr.
        certain: False: the likeliest reading of the evidence, no more.
        stage: of `"our_signal"`: `"asked"` to stop; the `"group"` was asked too, after the grace; killed with the
            `"grace_over"`, `"hurried"` (the grace was cut short), or `"at_once"` (no grace); by `"send_signal"`.
        core: its core dump, where that is a file and there.
    """

    kind: Kind
    words: str
    evidence: tuple[str, ...] = ()
    certain: bool = True
    stage: Stage | None = None
    core: Path | None = None

    def __str__(self) -> str:
        likely = "" if self.certain else "probably "
        text = f"{likely}{self.words}" + (f": {'; '.join(self.evidence)}" if self.evidence else "")
        return printable(text).replace("\n", "\\n")


COMMAND_SHOWN = 2_000  # how much of a command line a failure shows


# what execve(2) says of a file that is there
NOT_RUNNABLE = {
    getattr(errno, f"E{one}")
    for one in ("ACCES", "PERM", "NOEXEC", "2BIG", "ISDIR", "NOTDIR", "LOOP", "TXTBSY", "LIBBAD", "INVAL", "NOMEM")
}


TOLD = ("exit_code", "exception", "no_value", "not_started")  # causes of which the exit and the traceback say all


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
        """Whether it tells why the worker with this pid has ended so.

        What a child of it has written does only if the worker itself has passed on the exit code of an exception; else
        it may have coped with that long ago.

        Args:
            pid: of the worker.
            exit: how it ended.
        """
        passed_on = exit is not None and exit.code == 1 and exit.stopped_by is None
        return self.pid is None or pid is None or self.pid == pid or passed_on


@dataclass(frozen=True, slots=True)
class Failure:
    """One worker that failed by itself.

    Attributes:
        rank: its rank, 0 to n - 1.
        name: that of its group.
        worker: its own name (`Command.name`), as `"web"` or `"web.1"`; empty when it has none.
        pid: of its process; None when it never started, or ran in an executor of the caller's.
        host: the name of this machine (gethostname(2)).
        attempt: 0 for the first.
        argv: its command; of a function, its module and name.
        cwd: the directory it started in; None: that of this program.
        stdout: its standard output: the last bytes, how many, and the log file.
        stderr: the same of its standard error.
        first: whether it was the first of its group to fail (in that attempt): the root cause. Each failure of a rank
            with `on_failure="continue"` is one of its own.
        exit: how it ended; None when it never started.
        error: what it wrote itself, if it did (`aioelastic.record`; function workers always do).
        exception: what a function worker raised.
        cause: why it could not start, when it never did; else the exit in words. A worker that had raised an error
            of its own before we came to stop it has failed by itself, however it ended then.
        why: the same as data, with the evidence that there is beyond the exit.
        errno: of the system's refusal to start it, when it never started.
        task: of an executor, the call that it had begun, and how long that had run.
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
    worker: str = ""
    task: str = ""

    @property
    def status(self) -> int:
        """The exit status a shell would show, and never 0.

        It is 127 when it never started, 126 when its program was refused, 1 when it had failed before we stopped it, or
        for another reason than its exit code, which is 0.
        """
        if self.exit is None:
            return 126 if self.errno in NOT_RUNNABLE else 127
        return 1 if self.exit.stopped_by is not None and self.exit.code is None else self.exit.status or 1

    @property
    def headline(self) -> str:
        """Who, how and why, in one line."""
        where = "" if self.pid is None else f"pid {self.pid} on {self.host}"
        rank = f"rank {self.rank}"
        if self.worker:
            who = f"{self.worker} ({rank}, {where})" if where else f"{self.worker} ({rank})"
        else:
            who = f"{rank} ({where})" if where else rank
        after = "" if self.exit is None else f" after {self.exit.duration:.2f} s"
        own = self.error is not None and self.exception is None and self.error.is_of(self.pid, self.exit)
        told = self.error.message if self.error and own else ""
        why = f": {told.splitlines()[0]}" if told else ""
        return printable(f"{who} failed: {self.cause}{after}{why[:LINE_SHOWN]}").replace("\n", "\\n")

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """All of it, the reason last: what a person reads at the end of a terminal, and what `str()` is."""
        command = shlex.join(self.argv)
        if len(command) > COMMAND_SHOWN:
            command = command[:COMMAND_SHOWN] + f"… ({len(command)} characters)"
        lines = [self.headline]
        if self.why is not None and self.why.kind not in TOLD:
            lines.append(f"  why: {self.why}")
        if self.task:
            lines.append(f"  task: {self.task}")
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
