"""What one worker runs: a `Command` or a `Function`, and the three ways to say it for n ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from .checks import PID_MAX, FrozenDict, check_argv, check_choice, check_env, check_items, check_path, check_whole
from .errors import SpecError
from .shown import told


@dataclass(frozen=True, init=False)
class Command:
    """A program and its arguments: what one worker runs. No shell is involved.

    Args:
        argv: the program (looked up in the worker's PATH) and its arguments, each `str` or path-like.
        env: variables for this worker, over the group's and the caller's own; `None` unsets one.
        cwd: the directory it starts in; the caller's own when not given.
        stdin: `"null"` (an empty input, the default) or `"inherit"` (the caller's own standard input).

    Raises:
        SpecError: an argument is empty, not a string, or holds a NUL byte.

    Example::

        Command("python", "train.py", "--lr", "0.1", env={"OMP_NUM_THREADS": "1"}, cwd="experiments")
    """

    argv: tuple[str, ...]
    env: Mapping[str, str | None]
    cwd: str | None
    stdin: Literal["null", "inherit"]

    def __init__(
        self,
        *argv: str | os.PathLike[str],
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: Literal["null", "inherit"] = "null",
    ) -> None:
        put = object.__setattr__
        put(self, "argv", check_argv(argv))
        put(self, "env", check_env("env", env))
        put(self, "cwd", None if cwd is None else check_path("cwd", cwd))
        if self.cwd == "":
            raise SpecError("cwd", cwd, "is empty", "name a directory, or leave it out")
        check_choice("stdin", stdin, ("null", "inherit"))
        put(self, "stdin", stdin)


@dataclass(frozen=True, init=False, eq=False)
class Function:
    """A Python function and its arguments, as in `functools.partial`: what one worker runs, in a process of its own (or
    in an executor of yours: `supervise(start=...)`).

    Sync, or async (it then runs in an event loop of its own, uvloop's where that is installed). What it returns is
    the worker's `Result.value`; what it raises, the worker's failure. It is found by its qualified name there, and its
    arguments are pickled once for all ranks; with cloudpickle installed it may also be a lambda, a closure, or defined
    in a notebook. Inside, `aioelastic.rank()` and its like tell who it is.

    Args:
        fn: the function.
        args, kwargs: what it is called with.

    Raises:
        SpecError: `fn` cannot be called.

    Example::

        result = await supervise(Function(train, config, lr=1e-3), n=4)
        print(result[2].value)
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    env: Mapping[str, str | None]
    cwd: str | None
    show_locals: bool

    def __init__(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if not callable(fn):
            raise SpecError("fn", fn, "cannot be called", "give a function: Function(train, config)")
        put = object.__setattr__
        put(self, "fn", fn)
        put(self, "args", args)
        put(self, "kwargs", FrozenDict(kwargs))
        put(self, "env", FrozenDict({}))
        put(self, "cwd", None)
        put(self, "show_locals", False)

    def options(
        self,
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        show_locals: bool = False,
    ) -> Function:
        """The same function, with its worker's variables, directory, or local variables in its traceback.

        `env` is set before the function is imported, but after what is preloaded: what a preloaded module reads when it
        is imported belongs into the group's own `env`.
        """
        made = Function(self.fn, *self.args, **self.kwargs)
        put = object.__setattr__
        put(made, "env", check_env("env", env))
        put(made, "cwd", None if cwd is None else check_path("cwd", cwd))
        put(made, "show_locals", bool(show_locals))
        return made

    @property
    def name(self) -> str:
        """Its module and its qualified name, with a colon between them."""
        fn = self.fn
        while hasattr(fn, "func"):  # functools.partial
            fn = fn.func
        kind = fn if hasattr(fn, "__qualname__") else type(fn)
        return f"{kind.__module__}:{kind.__qualname__}"

    @property
    def argv(self) -> tuple[str, ...]:
        """What stands for a command line in plans, results and failures."""
        return (self.name,)


Entry: TypeAlias = "Command | Function | Callable[[int], Command | Function] | Sequence[Command | Function]"


def resolve(entry: Entry, n: int | None) -> tuple[Command | Function, ...]:
    """One entry per rank.

    Raises:
        SpecError: says which is wrong.
    """
    if n is not None:
        check_whole("n", n, 1, PID_MAX)
    if isinstance(entry, Command | Function):
        return (entry,) * (1 if n is None else n)
    if isinstance(entry, str | bytes) or entry is None:
        raise SpecError(
            "entry", entry, "is not a Command", 'give Command("python", "train.py"); no shell splits a string'
        )
    if isinstance(entry, Sequence):
        commands = check_items("entry", entry, "a list of Commands", "give one Command per rank")
        if not commands:
            raise SpecError("entry", entry, "is empty", "give one Command per rank")
        if n is not None and n != len(commands):
            raise SpecError(
                "n", n, f"is not the length of the list, {len(commands)}", "leave n out, or give n commands"
            )
        for rank, one in enumerate(commands):
            _is_command(f"entry[{rank}]", one)
        return commands
    if callable(entry):
        if n is None:
            raise SpecError("n", n, "is needed with a builder", "say how many ranks it is to build")
        return tuple(_built(entry, rank) for rank in range(n))
    raise SpecError("entry", entry, "is not a Command or Function", "give one, a list of them, or rank -> one")


def _built(builder: Callable[[int], Command | Function], rank: int) -> Command | Function:
    try:
        made = builder(rank)
    except Exception as exc:
        raise SpecError(
            f"entry(rank={rank})",
            builder,
            f"raised {told(exc)}",
            "mend the builder: it is called once per rank before anything starts",
        ) from exc
    return _is_command(f"entry(rank={rank})", made)


def _is_command(field: str, value: object) -> Command | Function:
    if not isinstance(value, Command | Function):
        problem = f"is {type(value).__name__}, not a Command or Function"
        raise SpecError(field, value, problem, 'give Command("program", ...), or Function(fn, ...) for a function')
    return value
