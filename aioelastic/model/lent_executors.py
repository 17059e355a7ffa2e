"""Executors that the caller lends for `start=`: what a function can have in each kind, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from .entries import Command, Function
from .errors import SpecError
from .frozen import dataclass
from .validation import has_method


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of executor.

    Attributes:
        where: where it runs functions; `{}` is the executor's name.
        limits: what functions cannot have there, as the plan tells it.
        processes: each has a process of this machine to itself while it runs, which is not ours.
        threads: it runs in this process.
    """

    where: str
    limits: tuple[str, ...]
    processes: bool = False
    threads: bool = False


_NOT_OURS = "no pid, session or output of its own: what it prints goes where its executor's output goes"
_LEFT = "is left behind as Unkillable after its grace and bound"
_END = (
    f"cannot be signalled or killed: while it waits it is cancelled; once it runs it must heed stopping(), or {_LEFT}"
)
_CHILDREN = "processes that it starts are not looked after"

THREADS = Kind(
    "in a thread of the caller's {}",
    (_NOT_OURS, _END, _CHILDREN, "rank() and its like work, but the variables are not in os.environ"),
    threads=True,
)
PROCESSES = Kind(
    "in a process of the caller's {}",
    (_NOT_OURS, _END, _CHILDREN, "its variables and directory are lent for the call; ready() is not heard"),
    processes=True,
)
UNKNOWN = Kind(
    "wherever the caller's {} runs it",
    (
        _NOT_OURS,
        (
            f"cannot be signalled or killed: while it waits it is cancelled; once it runs it {_LEFT}, unless it is in "
            "this process and heeds stopping()"
        ),
        _CHILDREN,
        "rank() and its like work, but the variables are not in os.environ; ready() is heard in this process only",
    ),
)

# by name, so that nothing is imported to ask; a subclass is of the kind of its nearest base
_KINDS = {
    "concurrent.futures.thread.ThreadPoolExecutor": THREADS,
    "concurrent.futures.process.ProcessPoolExecutor": PROCESSES,
    "concurrent.futures.interpreter.InterpreterPoolExecutor": UNKNOWN,
    "loky.process_executor.ProcessPoolExecutor": PROCESSES,
    "joblib.externals.loky.process_executor.ProcessPoolExecutor": PROCESSES,
    "aioelastic.executor.worker_executor.WorkerExecutor": PROCESSES,
}


def kind_of(executor: Executor) -> Kind:
    """What it is."""
    for one in type(executor).__mro__:
        kind = _KINDS.get(f"{one.__module__}.{one.__qualname__}")
        if kind is not None:
            return kind
    return UNKNOWN


def where(executor: Executor) -> str:
    """Where it runs functions, in words."""
    return kind_of(executor).where.format(type(executor).__name__)


def check_lent(start: Any, entries: Sequence[Command | Function], env: Mapping[str, str | None] | None) -> None:
    """Whether it is an executor, and can give the functions what is asked for them.

    Raises:
        SpecError: says what it cannot.
    """
    if isinstance(start, type):
        raise SpecError("start", start, "is a class", f"make one: start={start.__name__}()")
    if isinstance(start, str) or not has_method(start, "submit"):
        problem = "is neither a way to start nor an executor"
        raise SpecError("start", start, problem, 'use "zygote", "spawn", "fork", or an executor with submit()')
    if kind_of(start).processes:
        return
    functions = [(rank, one) for rank, one in enumerate(entries) if isinstance(one, Function)]
    asked: list[tuple[str, object]] = [("env", env)] if functions else []
    for rank, one in functions:
        asked += [(f"env of rank {rank}", one.env), (f"cwd of rank {rank}", one.cwd)]
    for field, value in asked:
        if value:
            problem = f"cannot be given to a function {where(start)}"
            raise SpecError(field, value, problem, "pass it as an argument; give commands their own")
