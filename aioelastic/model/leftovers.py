"""What outlived its worker, or its group, as frozen values."""

from __future__ import annotations

from typing import Literal

from .frozen import dataclass
from .text import printable


@dataclass(frozen=True, slots=True)
class Process:
    """A process found in /proc (proc(5)).

    Attributes:
        pid: its process id.
        command: its command line; control codes in it are escaped.
        state: in one letter: `R` runs, `S` sleeps, `D` sleeps and cannot be woken, `Z` has ended; `?`: unknown.
    """

    pid: int
    command: str
    state: str = "?"

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", printable(self.command).replace("\n", "\\n"))


@dataclass(frozen=True, slots=True)
class Unkillable:
    """A worker that SIGKILL did not end within `Stop.bound`, or a function in an executor of the caller's, which no
    signal can reach.

    Attributes:
        rank: its rank, 0 to n - 1.
        pid: its process; None in an executor.
        state: its state letter from /proc (`D` is uninterruptible sleep: a hung disk or driver), "?" if unreadable.
        wchan: the kernel function in which it sleeps, when readable.
    """

    rank: int
    pid: int | None
    state: str
    wchan: str

    def __str__(self) -> str:
        if self.pid is None:
            return f"rank {self.rank}: it goes on in the caller's executor, where nobody but itself can end it"
        return printable(f"rank {self.rank}, pid {self.pid}, state {self.state} {self.wchan}".rstrip())


@dataclass(frozen=True, slots=True)
class Remains:
    """One thing that a group has left behind, or of which the contrary cannot be proven.

    Attributes:
        kind: a `"process"` that runs; a `"stream"` of a worker that somebody holds open; a `"port"` that was declared
            and is taken; shared `"memory"` that has a name; memory of a `"gpu"` that the worker was given; or
            `"unproven"`: nothing was found, but nobody can be sure.
        words: what, and who has it.
        rank: whose it is; None: the group's, or nobody knows.
        pid: of the process, or of who holds it, if known.
    """

    kind: Literal["process", "stream", "port", "memory", "gpu", "unproven"]
    words: str
    rank: int | None = None
    pid: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", printable(self.words))  # names and command lines are of others' choice

    def __str__(self) -> str:
        return self.words if self.rank is None else f"rank {self.rank}: {self.words}"
