"""Checks of single values: each returns the clean value or raises a `SpecError` that names field, value and remedy."""

from __future__ import annotations

import itertools
import math
import os
import re
import string
from _thread import TIMEOUT_MAX  # seconds that it can wait for a lock: 292 years
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from re import _parser  # type: ignore[attr-defined]
from typing import Any, TypeVar, cast

from .errors import SpecError
from .interruptions import is_the_programs
from .text import masked, shown, told

_K = TypeVar("_K")


_V = TypeVar("_V")


_T = TypeVar("_T")


PID_MAX = 4_194_304  # the most processes a Linux machine can have (PID_MAX_LIMIT, linux/threads.h)


DESCRIPTORS = 4096  # that a worker can be given


DESCRIPTOR_MAX = 2**31 - 1  # they are of the type int of C


UID_MAX = 2**32 - 1  # nobody has that number, nor a higher one


NAME_MOST = 200  # bytes: the name of a group is a part of its directory's, which may have 255 bytes


PREFIX_FIELDS = ("worker", "name", "rank", "local_rank", "host", "pid", "attempt", "stream", "time")


class FrozenDict(dict[_K, _V]):
    """A dict that cannot be changed; it pickles, copies and hashes."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a spec cannot be changed; make a new one")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return (type(self), (dict(self),))


class Variables(FrozenDict[str, str | None]):
    """Variables of an environment. Those that are secrets by their names are not shown."""

    def __repr__(self) -> str:
        return repr({name: None if value is None else masked(name, value) for name, value in self.items()})


def check_env(field: str, env: Mapping[str, str | None] | None) -> Variables:
    """A checked copy of the caller's mapping, which itself is never changed."""
    if env is None:
        return Variables()
    if not isinstance(env, Mapping):
        raise SpecError(field, env, "is not a mapping", 'give a dict like {"OMP_NUM_THREADS": "1"}')
    for key, value in cast("Mapping[Any, Any]", env).items():
        check_variable(f"{field} key", key)
        if value is not None and not isinstance(value, str):
            problem, text = f"is {type(value).__name__}, not str", _as_text(value)
            if masked(key, text) != text:
                value, text = masked(key, text), "it as text"
            raise SpecError(f"{field}[{shown(key)}]", value, problem, f"write {text}")
        if value is not None and "\0" in value:
            shows = masked(key, value)
            raise SpecError(f"{field}[{shown(key)}]", shows, "holds a NUL byte", "remove it: execve(2) would cut there")
        check_encodes(f"{field}[{shown(key)}]", value or "", masked(key, value or ""))
    return Variables(env)


def check_name(field: str, value: Any) -> str:
    """Whether it can name something, on a terminal and as a part of a file name."""
    remedy = 'give a plain word like "trainer"'
    if not isinstance(value, str) or not value or "/" in value or not value.isprintable():
        raise SpecError(field, value, "is no plain name", remedy)
    if len(value.encode()) > NAME_MOST:
        raise SpecError(field, value, f"is longer than {NAME_MOST} bytes", "give a shorter one")
    return value


def check_variable(field: str, name: Any) -> None:
    """Whether a variable of an environment can have that name."""
    if not isinstance(name, str) or not name or "=" in name or "\0" in name:
        raise SpecError(field, name, "cannot name a variable", "use a non-empty str without '=' and NUL")
    check_encodes(field, name)


def check_encodes(field: str, text: str, shows: str | None = None) -> None:
    """Whether the system's own encoding can carry it (a lone surrogate it cannot). `shows`: what an error shows."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError as exc:
        given = text if shows is None else shows
        raise SpecError(
            field, given, f"cannot be encoded ({exc.reason})", "use text, or bytes by os.fsdecode"
        ) from None


def check_argv(argv: Sequence[Any]) -> tuple[str, ...]:
    """A program and its arguments, as execve(2) takes them."""
    if not argv or (isinstance(argv[0], str) and not argv[0]):
        raise SpecError("argv", argv, "names no program", 'give Command("program", "argument", ...)')
    out = []
    for index, one in enumerate(argv):
        if isinstance(one, list | tuple) and len(argv) == 1:
            raise SpecError("argv", one, "is one sequence", "unpack it: Command(*argv)")
        out.append(check_path(f"argv[{index}]", one))
    return tuple(out)


def check_path(field: str, value: Any) -> str:
    """It, as a text that the kernel takes whole."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise SpecError(field, value, f"is {type(value).__name__}, not str", f"write {_as_text(value)}")
    if "\0" in text:
        raise SpecError(field, value, "holds a NUL byte", "remove it: the kernel would cut there")
    check_encodes(field, text)
    return text


def check_whole(field: str, value: Any, least: int, most: int | None = None) -> None:
    """Whether it is a whole number from `least` to `most`; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(field, value, f"is {type(value).__name__}, not int", f"give a whole number from {least}")
    if value < least:
        raise SpecError(field, value, f"is less than {least}", f"give a whole number from {least}")
    if most is not None and value > most:
        raise SpecError(field, value, f"is more than {most:,}", f"give a whole number up to {most}")


def _as_text(value: Any) -> str:
    """How to write it as a str, where that is known."""
    return repr(str(value)) if type(value) in (int, float, bool) else "it as a str"


def check_choice(field: str, value: Any, choices: Sequence[str]) -> None:
    """Whether it is one of these words; nothing is compared that is no word."""
    if not isinstance(value, str) or value not in choices:
        *others, last = (f'"{one}"' for one in choices)
        raise SpecError(field, value, "is not known", f"use {', '.join(others)} or {last}")


def has_method(value: Any, name: str) -> bool:
    """Whether it has one of that name; a `__getattr__` of others may raise anything."""
    try:
        return callable(getattr(value, name, None))
    except Exception as exc:  # it is the code of others
        if is_the_programs(exc):
            raise
        return False


def check_items(field: str, given: Any, what: str, remedy: str, most: int = PID_MAX) -> tuple[Any, ...]:
    """The items of a collection, of any kind but a text or a mapping, that has an end."""
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        raise SpecError(field, given, f"is not {what}", remedy)
    try:
        items = tuple(itertools.islice(given, most + 1))
    except Exception as exc:  # it is the caller's, and may do anything
        if is_the_programs(exc):
            raise
        raise SpecError(field, given, f"cannot be read: {told(exc)}", remedy) from exc
    if len(items) > most:
        raise SpecError(field, given, f"has more than {most:,} items", remedy)
    return items


def per_rank(field: str, given: Any, n: int, check: Callable[[str, Any], _T]) -> tuple[_T, ...]:
    """One for each rank, from one for all, a builder `rank -> one`, or a list; each as `check(field, one)` returns it.

    Raises:
        SpecError: says which is wrong.
    """
    if callable(given):
        return tuple(_built(field, given, rank, check) for rank in range(n))
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        remedy = "give one for each rank"
        items = check_items(field, given, "a list", remedy)
        if len(items) != n:
            raise SpecError(field, given, f"is not of the length of the group, {n}", remedy)
        return tuple(check(f"{field}[{rank}]", one) for rank, one in enumerate(items))
    return (check(field, given),) * n


def _built(field: str, builder: Callable[[int], Any], rank: int, check: Callable[[str, Any], _T]) -> _T:
    try:
        made = builder(rank)
    except SpecError as exc:
        raise SpecError(f"{field}(rank={rank}): {exc.field}", exc.value, exc.problem, exc.remedy) from exc
    except Exception as exc:  # it is the user's code
        if is_the_programs(exc):
            raise
        problem = f"raised {told(exc)}"
        raise SpecError(f"{field}(rank={rank})", builder, problem, "mend it: it is called once per rank") from exc
    return check(f"{field}(rank={rank})", made)


def check_bool(field: str, value: Any) -> None:
    """Whether it is True or False, and not only like one."""
    if not isinstance(value, bool):
        raise SpecError(field, value, f"is {type(value).__name__}, not bool", "give True or False")


def check_seconds(field: str, value: Any) -> None:
    """Whether it is a time that something takes: it ends."""
    if not _is_time(value) or value > TIMEOUT_MAX:
        raise SpecError(field, value, "is not a time", "give seconds, 0 or more")


def check_timeout(field: str, value: Any) -> float:
    """How many seconds a call waits at most: infinity for None, and for what is longer than Python can wait.

    Less than 0 is an error, as for `queue.Queue` and locks; 0 looks and does not wait.
    """
    if value is None:
        return math.inf
    if not _is_time(value, Real):  # numpy's are that, too
        raise SpecError(field, value, "is no time-out", "give seconds, 0 or more, or None for no limit")
    return math.inf if value >= TIMEOUT_MAX else float(value)


def check_pattern(field: str, value: Any) -> re.Pattern[str]:
    """A regular expression for text, compiled."""
    remedy = 'give a regular expression, as r"port (\\d+)"'
    if isinstance(value, str):
        try:
            return re.compile(value)
        except re.error as exc:
            raise SpecError(field, value, f"is no regular expression: {exc}", remedy) from None
    if not isinstance(value, re.Pattern) or not isinstance(value.pattern, str):
        raise SpecError(field, value, "is no regular expression for text", remedy)
    return value


def check_line_pattern(field: str, pattern: re.Pattern[Any]) -> None:
    """Whether it can be found in a line, which has no newline."""
    if _needs_newline(_parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)):
        raise SpecError(
            field, pattern.pattern, "has a newline in it, and a line has none", "leave it out, or end with $"
        )


def _needs_newline(parsed: Iterable[Any]) -> bool:
    """Whether all that this part of an expression matches has one."""
    for op, given in parsed:
        kind = str(op)
        if kind == "LITERAL":
            found = given == 10
        elif kind in ("SUBPATTERN", "ASSERT"):
            found = _needs_newline(given[-1])
        elif kind == "ATOMIC_GROUP":
            found = _needs_newline(given)
        elif kind.endswith("_REPEAT"):
            found = given[0] > 0 and _needs_newline(given[2])
        else:
            found = kind == "BRANCH" and all(map(_needs_newline, given[1]))
        if found:
            return True
    return False


def check_descriptors(field: str, given: Any) -> tuple[int, ...]:
    """Numbers of descriptors that a worker is to have beside its streams."""
    fds = check_items(field, given, "a collection of descriptors", "give their numbers, as (3, 7)", DESCRIPTORS)
    for fd in fds:
        check_whole(field, fd, 0, DESCRIPTOR_MAX)
        if fd < 3:
            remedy = "say what it is by stdin, input, stderr or tty, and leave it out here"
            raise SpecError(field, fd, "is one of the standard streams", remedy)
    if len({*fds}) < len(fds):
        raise SpecError(field, fds, "names one twice", "name each once")
    return fds


def check_account(field: str, value: Any) -> None:
    """A user or a group, by name or number; whether there is one, the machine knows."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SpecError(field, value, f"is {type(value).__name__}, not a name or a number", 'give "nobody", or 65534')
    if isinstance(value, str) and (not value or "\0" in value or ":" in value):
        raise SpecError(field, value, "cannot be a name", "give one that is known here, or a number")
    if isinstance(value, str):
        check_encodes(field, value)
    else:
        check_whole(field, value, 0, UID_MAX - 1)


def check_users(field: str, uids: Any) -> frozenset[int]:
    """These, and the one of this process."""
    given = check_items(field, uids, "a list of the numbers of users", "give them in one, as [1000]; see id(1)")
    for uid in given:
        if type(uid) is not int or not 0 <= uid < UID_MAX:
            raise SpecError(field, uid, "is not the number of a user", "give those, as [1000]; see id(1)")
    return frozenset((os.geteuid(), *given))


def _is_time(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and bool(value >= 0)


def prefix_fields(prefix: str) -> list[str]:
    """The names in a prefix template. Raises `ValueError` when it is none."""
    return [name for _, name, _, _ in string.Formatter().parse(prefix) if name is not None]


def check_prefix(prefix: str) -> None:
    """Whether each line can begin with it: no field is unknown, or as wide as to fill a screen."""
    try:
        fields = prefix_fields(prefix)
        wide = [spec for _, _, spec, _ in string.Formatter().parse(prefix) if re.search("[0-9]{4}", spec or "")]
        if all(name in PREFIX_FIELDS for name in fields) and not wide:
            numbers = dict.fromkeys(("rank", "local_rank", "pid", "attempt"), 0)
            prefix.format(**{**dict.fromkeys(PREFIX_FIELDS, ""), **numbers})
            return
        unknown = [name for name in fields if name not in PREFIX_FIELDS]
        problem = f"has an unknown field {unknown[0]!r}" if unknown else f"is wider than 999 in {wide[0]!r}"
    except (ValueError, TypeError, AttributeError, LookupError) as exc:
        problem = f"is not a template ({exc})"
    raise SpecError("Logs.prefix", prefix, problem, f"fields are {{{'}, {'.join(PREFIX_FIELDS)}}}")
