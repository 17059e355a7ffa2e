"""The errors users meet. Each says whose fault it is and what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .shown import printable, shown, text_of, told

if TYPE_CHECKING:
    from .outcome import Failure, GroupResult


class SpecError(ValueError):
    """A field of what the caller asked for is wrong; raised before anything has started.

    Attributes:
        field: the name of the field, as the caller wrote it (`"n"`, `"Stop.grace"`, `"argv[2] of rank 3"`).
        value: what it was.
        problem: what is wrong with it, in words.
        remedy: what to write instead.
        status: the exit status of a command line that was given this: 2; 127 for a program that was not found, 126 for
            one that cannot be run.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str, status: int = 2) -> None:
        super().__init__(field, value, problem, remedy)
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        self.status = status

    def __str__(self) -> str:
        return printable(f"{self.field}={shown(self.value, 200)} {self.problem}; {self.remedy}")

    def __repr__(self) -> str:
        # asyncio asks for it, of every task that ends with an error
        return f"SpecError({self.field!r}, {shown(self.value, 200)}, {self.problem!r}, {self.remedy!r})"


class LaunchFailed(Exception):
    """One worker could not be started: the operating system refused it.

    Attributes:
        rank: which worker.
        argv: its command.
        cause: the `OSError` with the kernel's errno and the path it names.
    """

    def __init__(self, rank: int, argv: Sequence[str], cause: OSError) -> None:
        super().__init__(rank, tuple(argv), cause)
        self.rank = rank
        self.argv = tuple(argv)
        self.cause = cause

    def __str__(self) -> str:
        return printable(f"rank {self.rank} could not start {shown(list(self.argv), 200)}: {refusal(self.cause)}")


def refusal(cause: OSError) -> str:
    """What the system said, without a number that nobody knows: `"Exec format error: 'prog'"`."""
    if cause.strerror is None:
        return text_of(cause)
    if cause.filename is None:
        return cause.strerror
    name = os.fsdecode(cause.filename) if isinstance(cause.filename, bytes) else cause.filename
    return f"{cause.strerror}: {shown(name, 200)}"


class RemoteError(Exception):
    """What a function worker raised, on this side.

    Attributes:
        phase: `"call"`, or what else was going on there: `"import"`, `"unpickle"`, `"result"`.
        type_name: the qualified name of its class.
        message: its `str()`.
        traceback: its traceback as text, as it was printed there.
        exception: the exception itself, with its arguments, notes, cause and context, and the parts of a group; None
            where it cannot be rebuilt here.
        not_rebuilt: why not.
    """

    def __init__(
        self,
        phase: str,
        type_name: str,
        message: str,
        traceback: str,
        exception: BaseException | None = None,
        not_rebuilt: str = "",
    ) -> None:
        super().__init__(phase, type_name, message, traceback, exception, not_rebuilt)
        self.phase = phase
        self.type_name = type_name
        self.message = message
        self.traceback = traceback
        self.exception = exception
        self.not_rebuilt = not_rebuilt

    @property
    def headline(self) -> str:
        """Type and message, in one line."""
        first = self.message.partition("\n")[0]
        return printable(f"{self.type_name}: {first}" if first else self.type_name)

    def __str__(self) -> str:
        return self.headline

    def __repr__(self) -> str:
        return f"RemoteError({self.phase!r}, {self.headline!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the exception if it cannot be pickled and made again."""
        import pickle

        exception, why = self.exception, self.not_rebuilt
        try:
            pickle.loads(pickle.dumps(exception))
        except Exception as exc:
            exception, why = None, told(exc)
        return (RemoteError, (self.phase, self.type_name, self.message, self.traceback, exception, why))


class WorkerFailed(Exception):
    """One worker failed by itself. `str()` tells its command, exit, duration, logs and last lines.

    Attributes:
        failure: the `Failure` with all of it as data.
        __cause__: for a function that raised, the `RemoteError`.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure
        self.__cause__ = failure.exception

    def __str__(self) -> str:
        return self.failure.describe()

    def __repr__(self) -> str:
        return f"WorkerFailed({self.failure.headline!r})"


class GroupFailed(ExceptionGroup[WorkerFailed]):
    """At least one worker failed by itself; the others were stopped. First cause first.

    Attributes:
        exceptions: one `WorkerFailed` per worker that failed by itself, in the order in which they ended.
        result: the whole `GroupResult`, with the workers that did not fail too.

    Example::

        try:
            await supervise(Command("python", "train.py"), n=4)
        except* WorkerFailed as group:
            print(group.exceptions[0].failure.exit)
    """

    result: GroupResult

    def __new__(cls, message: str, exceptions: Sequence[WorkerFailed], result: GroupResult) -> GroupFailed:
        self = super().__new__(cls, message, exceptions)
        self.result = result
        return self

    def __init__(self, message: str, exceptions: Sequence[WorkerFailed], result: GroupResult) -> None:
        super().__init__(message, exceptions)

    def derive(self, excs: Sequence[Any], /) -> GroupFailed:  # type: ignore[override]  # ours hold WorkerFailed only
        return GroupFailed(self.message, excs, self.result)

    def __reduce__(self) -> tuple[Any, ...]:
        return (GroupFailed, (self.message, list(self.exceptions), self.result), self.__dict__)


class TaskTimeout(TimeoutError):
    """A task of a `WorkerExecutor` took longer than `task_timeout` seconds; its worker was killed and replaced."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return f"the task took longer than {self.timeout:g} s; its worker was killed"


class GroupTimeout(TimeoutError):
    """`supervise(timeout=...)` ran out; the group was stopped.

    Attributes:
        timeout: the limit, in seconds.
        result: the `GroupResult` of the stopped group.
    """

    def __init__(self, timeout: float, result: GroupResult) -> None:
        super().__init__(timeout, result)
        self.timeout = timeout
        self.result = result

    def __str__(self) -> str:
        return (
            f"group {self.result.name!r} was stopped: it did not end within {self.timeout:g} s "
            f"({sum(r.stopped for r in self.result)} of {len(self.result)} workers were still running)"
        )
