"""What one worker runs: a `Command` or a `Function`, and the three ways to say it for n ranks."""

from __future__ import annotations

import functools
import os
import types
from collections import Counter
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import IO, Any, Literal, ParamSpec, TypeAlias, cast

from .errors import SpecError
from .frozen import dataclass
from .interruptions import is_the_programs
from .secrets import Secrets, check_secrets
from .text import MASK, call_text, shown, told
from .validation import (
    PID_MAX,
    FrozenDict,
    Variables,
    check_account,
    check_argv,
    check_choice,
    check_descriptors,
    check_env,
    check_items,
    check_name,
    check_path,
    check_whole,
    has_method,
)

Input: TypeAlias = bytes | str | os.PathLike[str] | IO[Any] | AsyncIterable[bytes | str]

P = ParamSpec("P")

GROUPS = 65_536  # the most that a process can have (NGROUPS_MAX, getgroups(2))


@dataclass(frozen=True, init=False)
class Command:
    """A program and its arguments: what one worker runs. No shell is involved.

    Args:
        argv: the program (looked up in the worker's PATH) and its arguments, each `str` or path-like.
        env: variables for this worker, over the group's and the caller's own; `None` unsets one.
        cwd: the directory it starts in; the caller's own when not given.
        stdin: its standard input: `"null"` (empty, the default), `"inherit"` (the caller's own), or `"pipe"`, which is
            written to by `group[rank].stdin`.
        input: what it reads from its standard input, and then the end of it: bytes; text, which is sent as UTF-8; a
            file, by its path (a `pathlib.Path`, which each worker reads from its beginning) or open (its descriptor is
            given to the workers); or an asynchronous iterable of bytes or text, for one worker that is not restarted.
        stderr: `"pipe"`, a stream of its own (the default, but with `tty`), or `"stdout"`: the same as its standard
            output, in order.
        pass_fds: descriptors of this program that it has, too, by the same numbers, as in `subprocess.Popen`; all
            others are closed there. Each worker and attempt gets what they were when the group began: the group keeps
            duplicates until all workers are started, or, with `restart`, to its end, so they may be closed here while
            it runs. Who reads from a pipe sees its end no sooner than the last duplicate is closed.
        user, group: as which it runs, by name or number. A user brings its primary group, unless `group` says another,
            and its supplementary groups, as `User=` of systemd.exec(5) does. HOME, USER, LOGNAME and SHELL are not
            touched: give them in `env`. For another user `record` has no place to write to, which it could not: its
            traceback is in the last lines of stderr.
        extra_groups: its supplementary groups, in place of those of `user`, by names or numbers (setgroups(2)).
        umask: of the files that it makes (umask(2)), as 0o027.
        secrets: values, text or bytes, that stand in no command line and no environment. For each name `X` the worker
            has a variable `X_FILE` with a path that it may read as often as it likes: a sealed file in memory
            (memfd_create(2)) that no other worker has. A variable `X` is not inherited.
        tty: run it on a terminal of its own (pty(7)), 24 by 80, or as many rows and columns as are given: programs then
            write each line at once, in colour, and ask questions. All three streams are the terminal; it is written to
            by `group[rank].stdin`. It does not echo, and lines end by a newline alone, as in a pipe.
        name: what its worker is called, before its lines, in plans, results and failures; with `.1`, `.2`, … behind it
            where several workers have it. By default it is told by the group's name and its rank.

    Raises:
        SpecError: an argument is empty, not a string, or holds a NUL byte; `input` is none of these, or `stdin` says
            otherwise; `name` is not usable; a descriptor is negative, a standard stream, or named twice; a secret has
            a variable of its name, or its value stands in `argv`, `env`, `cwd` or `name`.
            When the group begins: a descriptor is not open, a user or group is unknown here, or this program may not
            run anything as that one.

    Example::

        Command("python", "train.py", "--lr", "0.1", env={"OMP_NUM_THREADS": "1"}, cwd="experiments")
    """

    argv: tuple[str, ...]
    env: Mapping[str, str | None]
    cwd: str | None
    stdin: Literal["null", "inherit", "pipe"]
    input: Input | None = field(repr=False)
    stderr: Literal["pipe", "stdout"]
    tty: tuple[int, int] | None
    name: str | None
    pass_fds: tuple[int, ...]
    user: str | int | None
    group: str | int | None
    extra_groups: tuple[str | int, ...] | None
    umask: int | None
    secrets: Secrets

    def __init__(
        self,
        *argv: str | os.PathLike[str],
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: Literal["null", "inherit", "pipe"] = "null",
        input: Input | None = None,  # noqa: A002 - as subprocess.run has it
        stderr: Literal["pipe", "stdout"] | None = None,
        tty: bool | tuple[int, int] = False,
        name: str | None = None,
        pass_fds: Iterable[int] = (),
        user: str | int | None = None,
        group: str | int | None = None,
        extra_groups: Iterable[str | int] | None = None,
        umask: int | None = None,
        secrets: Mapping[str, str | bytes] | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "argv", check_argv(argv))
        put(self, "env", check_env("env", env))
        put(self, "cwd", None if cwd is None else check_path("cwd", cwd))
        if self.cwd == "":
            raise SpecError("cwd", cwd, "is empty", "name a directory, or leave it out")
        check_choice("stdin", stdin, ("null", "inherit", "pipe"))
        if input is not None and stdin == "inherit":
            raise SpecError("stdin", stdin, "is another input than `input`", "leave one of them out")
        put(self, "input", None if input is None else _check_input(input))
        if stderr is not None:
            check_choice("stderr", stderr, ("pipe", "stdout"))
        put(self, "tty", _check_tty(tty))
        if self.tty is not None and (stdin == "inherit" or is_file(self.input)):
            remedy = "leave tty out, or write to it by group[rank].stdin, or give text as input"
            raise SpecError("tty", tty, "is itself what is read from", remedy)
        put(self, "stdin", stdin if input is None and self.tty is None else "pipe")
        if self.tty is not None and stderr == "pipe":
            problem = "is no stream of its own on a terminal, which has one for all"
            raise SpecError("stderr", stderr, problem, "leave it out, or leave out tty")
        put(self, "stderr", (stderr or "pipe") if self.tty is None else "stdout")
        put(self, "name", None if name is None else check_name("name", name))
        put(self, "pass_fds", check_descriptors("pass_fds", pass_fds))
        for field_name, given in (("user", user), ("group", group)):
            if given is not None:
                check_account(field_name, given)
        put(self, "user", user)
        put(self, "group", group)
        if extra_groups is not None:
            extra_groups = check_items("extra_groups", extra_groups, "a collection of groups", "give [100]", GROUPS)
            for one in extra_groups:
                check_account("extra_groups", one)
        put(self, "extra_groups", extra_groups)
        if umask is not None:
            check_whole("umask", umask, 0)
            if umask > 0o777:
                raise SpecError("umask", oct(umask), "is no umask", "give 0 to 0o777, as 0o027")
        put(self, "umask", umask)
        put(self, "secrets", check_secrets(secrets))
        check_no_secret_in(self.env, self)
        places = [(f"argv[{index}]", one) for index, one in enumerate(self.argv)]
        self.secrets.check_not_in([*places, ("name", self.name), ("cwd", self.cwd)])

    @property
    def changes_user(self) -> bool:
        """Whether it is to run as somebody else than this program."""
        return not (self.user is None and self.group is None and self.extra_groups is None)


def check_no_secret_in(env: Mapping[str, str | None], command: Command) -> None:
    """Whether no variable says what a secret of that command does, or where it is, or has its value."""
    for name in command.secrets:
        for key in (name, f"{name}_FILE"):
            if env.get(key) is not None:
                problem = f"is given, and so is the secret {shown(name)}"
                raise SpecError(f"env[{shown(key)}]", MASK, problem, "leave one of them out")
    command.secrets.check_not_in((f"env[{shown(key)}]", value) for key, value in env.items())


def _check_tty(given: Any) -> tuple[int, int] | None:
    if isinstance(given, bool):
        return (24, 80) if given else None
    if not (isinstance(given, tuple) and len(given) == 2 and all(type(one) is int for one in given)):
        raise SpecError("tty", given, "is no size of a terminal", "give True, or rows and columns: tty=(24, 80)")
    for name, one in zip(("rows", "columns"), given, strict=True):
        check_whole(f"tty ({name})", one, 1, 65_535)
    return given


def _check_input(given: Any) -> Input:
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    if isinstance(given, str):
        try:
            given.encode()
        except UnicodeEncodeError as exc:
            size = f"{len(given)} characters"  # it may be a secret
            remedy = "encode it, and give bytes"
            raise SpecError("input", size, f"cannot be sent as UTF-8 ({exc.reason})", remedy) from None
        return given
    if isinstance(given, os.PathLike):
        check_path("input", given)
    elif is_file(given):
        try:
            cast("IO[Any]", given).fileno()
        except (OSError, ValueError) as exc:
            remedy = "give an open file, or what it holds: input=file.getvalue()"
            raise SpecError("input", given, f"has no descriptor: {exc}", remedy) from None
    elif not has_method(given, "__aiter__"):
        remedy = "give bytes, text, a pathlib.Path, an open file, or an asynchronous iterable of bytes or text"
        raise SpecError("input", given, "is nothing to read", remedy)
    return cast("Input", given)


def is_file(given: Input | None) -> bool:
    """Whether it is a file, whose descriptor the worker gets."""
    return isinstance(given, os.PathLike) or (has_method(given, "fileno") and not has_method(given, "__aiter__"))


def input_words(given: Input | None) -> str:
    """What is read, for a plan."""
    if given is None:
        return ""
    if isinstance(given, bytes | str):
        return f"{len(given.encode() if isinstance(given, str) else given)} bytes"
    return f"from {os.fspath(given)}" if isinstance(given, os.PathLike) else f"from {shown(given)}"


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

    Attributes:
        env: variables for its worker, set by `options`; None unsets one.
        cwd: the directory in which its worker starts, set by `options`; None: that of this program.
        show_locals: whether its traceback shows local variables, set by `options`.

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

    def __init__(self, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not callable(fn):
            raise SpecError("fn", fn, "cannot be called", "give a function: Function(train, config)")
        _innermost(fn)
        put = object.__setattr__
        put(self, "fn", fn)
        put(self, "args", args)
        put(self, "kwargs", FrozenDict(kwargs))
        put(self, "env", Variables())
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

        Args:
            env: variables for this worker, over the group's and the caller's own; None unsets one.
            cwd: the directory it starts in; the caller's own when not given.
            show_locals: whether the traceback of what it raises shows the local variables of each frame, but not the
                values of those whose names say that they are secrets.

        Raises:
            SpecError: one of them is not usable.

        Example::

            Function(train, config).options(env={"OMP_NUM_THREADS": "1"}, cwd="experiments")
        """
        made = Function(self.fn, *self.args, **self.kwargs)
        put = object.__setattr__
        put(made, "env", check_env("env", env))
        put(made, "cwd", None if cwd is None else check_path("cwd", cwd))
        put(made, "show_locals", bool(show_locals))
        return made

    def __repr__(self) -> str:
        return f"<Function {call_text(self.fn, self.args, self.kwargs)}>"  # an argument may be a secret by its name

    @property
    def name(self) -> str:
        """Its module and its qualified name, with a colon between them."""
        fn = _innermost(self.fn)
        module, qualname = _own(fn, "__module__"), _own(fn, "__qualname__")
        kind = type(fn)
        return f"{module or kind.__module__}:{qualname or kind.__qualname__}"

    @property
    def argv(self) -> tuple[str, ...]:
        """What stands for a command line in plans, results and failures."""
        return (self.name,)


def _innermost(fn: Any) -> Any:
    """What partials and methods call in the end."""
    seen: list[Any] = []  # to be the same, and not equal
    while isinstance(fn, functools.partial | types.MethodType):
        if any(fn is one for one in seen):
            raise SpecError("fn", fn, "is a partial of itself", "give a function: Function(train, config)")
        seen.append(fn)
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    return fn


def _own(fn: Any, name: str) -> str:
    """What it says there by itself: an object whose `__getattr__` answers to any name is not asked."""
    try:
        said = object.__getattribute__(fn, name)
    except AttributeError:
        return ""
    return said if isinstance(said, str) else ""


Entry: TypeAlias = "Command | Function | Callable[[int], Command | Function] | Sequence[Command | Function]"


def names_of(entries: Sequence[Command | Function]) -> tuple[str, ...]:
    """What each worker is called: the name of its command, numbered where several have it; empty where it has none."""
    given = [one.name if isinstance(one, Command) else None for one in entries]
    several = {name: 0 for name, count in Counter(given).items() if name is not None and count > 1}
    names = []
    for name in given:
        if name in several:
            several[name] += 1
            names.append(f"{name}.{several[name]}")
        else:
            names.append(name or "")
    return tuple(names)


_PLAIN = {"None", "int", "float", "str", "bytes", "bool", "dict", "list", "tuple", "set"}  # what no builder returns


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
        _check_builder(entry)
        if n is None:
            raise SpecError("n", n, "is needed with a builder", "say how many ranks it is to build")
        return tuple(_built(entry, rank) for rank in range(n))
    raise SpecError("entry", entry, "is not a Command or Function", "give one, a list of them, or rank -> one")


def _check_builder(builder: Callable[[int], Command | Function]) -> None:
    """Whether it may be one: a function that is to run in workers is not called here."""
    import inspect  # for start-up time: a command needs none of it

    remedy = "give Function(f, ...) to run it in workers, or a builder: def f(rank): return Command(...)"
    if inspect.iscoroutinefunction(builder) or inspect.isasyncgenfunction(builder):
        raise SpecError("entry", builder, "is an async function, and no builder of Commands", remedy)
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):
        return  # of C: nobody can tell
    try:
        signature.bind(0)
    except TypeError:
        raise SpecError("entry", builder, "is a function that does not take a rank", remedy) from None
    told = signature.return_annotation
    name = told if isinstance(told, str) else "None" if told is None else getattr(told, "__name__", "")
    if name.partition("[")[0] in _PLAIN:
        raise SpecError("entry", builder, f"returns {name}, and no Command", remedy)
    if _returns_nothing(builder):
        raise SpecError("entry", builder, "returns nothing, and no Command", remedy)


def _returns_nothing(function: Any) -> bool:
    """Whether None is all that it can return, as far as its bytecode tells."""
    import dis  # for start-up time: `inspect` has imported it

    code = getattr(function, "__code__", None)
    returned, last = list[bool](), None
    for one in dis.get_instructions(code) if isinstance(code, types.CodeType) else ():
        if one.opname == "RETURN_CONST":
            returned.append(one.argval is None)
        elif one.opname == "RETURN_VALUE":  # what jumps here returns something else
            returned.append(
                last is not None and last.opname == "LOAD_CONST" and last.argval is None and not one.is_jump_target
            )
        last = one
    return bool(returned) and all(returned)


def _built(builder: Callable[[int], Command | Function], rank: int) -> Command | Function:
    try:
        made = builder(rank)
    except Exception as exc:  # it is the user's code
        if is_the_programs(exc):
            raise
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
