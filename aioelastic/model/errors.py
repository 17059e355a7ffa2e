"""The errors users meet. Each says whose fault it is and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from .interruptions import is_the_programs
from .text import printable, shown, text_of, told


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

    __module__ = "aioelastic.errors"  # where users find it

    def __init__(self, field: str, value: object, problem: str, remedy: str, status: int = 2) -> None:
        super().__init__(field, value, problem, remedy)
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        self.status = status

    def __str__(self) -> str:
        # what stands in brackets may be any text of the caller's
        name, of, whose = self.field[(begin := self.field.rfind("]") + 1) :].partition(" of ")
        given = "" if self.problem == "is missing" else f"={shown(self.value, 200)}"
        return printable(f"{self.field[:begin]}{name}{given}{of}{whose} {self.problem}; {self.remedy}")

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

    __module__ = "aioelastic.errors"  # where users find it

    def __init__(self, rank: int, argv: Sequence[str], cause: OSError) -> None:
        super().__init__(rank, tuple(argv), cause)
        self.rank = rank
        self.argv: tuple[str, ...] = tuple(argv)
        self.cause = cause

    def __str__(self) -> str:
        return printable(f"rank {self.rank} could not start {shown(list(self.argv), 200)}: {refusal(self.cause)}")


_LACKS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS)


def is_lack(problem: BaseException | None) -> bool:
    """Whether something failed since this process may have no more descriptors, threads or memory just now."""
    for _ in range(10):  # of its causes
        if isinstance(problem, LaunchFailed):
            problem = problem.cause
        if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno in _LACKS):
            return True
        if type(problem) is RuntimeError and str(problem) == "can't start new thread":
            return True
        problem = problem and (problem.__cause__ or problem.__context__)
    return False


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
        task: of an executor, the call that raised it, and how long that had run:
            `"simulate(7), 0.21 s after its start"`.
    """

    __module__ = "aioelastic.errors"  # where users find it

    def __init__(
        self,
        phase: str,
        type_name: str,
        message: str,
        traceback: str,
        exception: BaseException | None = None,
        not_rebuilt: str = "",
        task: str = "",
    ) -> None:
        super().__init__(phase, type_name, message, traceback, exception, not_rebuilt, task)
        self.phase = phase
        self.type_name = type_name
        self.message = message
        self.traceback = traceback
        self.exception = exception
        self.not_rebuilt = not_rebuilt
        self.task = task

    @property
    def headline(self) -> str:
        """Type and message, in one line."""
        first = self.message.partition("\n")[0]
        return printable(f"{self.type_name}: {first}" if first else self.type_name)

    def __str__(self) -> str:
        lines = [self.headline]
        if self.task:
            lines.append(f"  task: {self.task}")
        if self.exception is None and self.not_rebuilt:
            lines.append(f"  could not be rebuilt here: {self.not_rebuilt}")
        if self.task and self.traceback:  # in a group it is `WorkerFailed` that shows it
            lines += ["  its traceback:", *(f"    {one}" for one in self.traceback.strip().splitlines())]
        return printable("\n".join(lines))

    def __repr__(self) -> str:
        return f"RemoteError({self.phase!r}, {self.headline!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the exception if it cannot be pickled and made again."""
        import pickle

        exception, why = self.exception, self.not_rebuilt
        try:
            data = pickle.dumps(exception)
        except (pickle.PicklingError, TypeError, AttributeError) as exc:
            exception, why = None, told(exc)
        else:
            try:
                pickle.loads(data)
            except Exception as exc:  # it runs the code of others, here as where this error goes
                if is_the_programs(exc):
                    raise
                exception, why = None, told(exc)
        return (RemoteError, (self.phase, self.type_name, self.message, self.traceback, exception, why, self.task))


class TaskTimeout(TimeoutError):
    """A task of a `WorkerExecutor` ran longer than `task_timeout` seconds; its worker was killed and replaced.

    Attributes:
        timeout: the limit, in seconds, counted from its start on a worker.
        task: the call: `"simulate(7)"`.
    """

    __module__ = "aioelastic.errors"  # where users find it

    def __init__(self, timeout: float, task: str) -> None:
        super().__init__(timeout, task)
        self.timeout = timeout
        self.task = task

    def __str__(self) -> str:
        return printable(f"{self.task} took longer than {self.timeout:g} s on its worker, which was killed")
