"""Checks of single values: each returns the clean value or raises a `SpecError` that names field, value and remedy."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal as _signal
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import SpecError
from .shown import shown, told

_K = TypeVar("_K")
_V = TypeVar("_V")

PID_MAX = 4_194_304  # the most processes a Linux machine can have (PID_MAX_LIMIT, linux/threads.h)
PREFIX_FIELDS = ("name", "rank", "local_rank", "host", "pid", "attempt", "stream", "time")


_BY_EFFECTIVE = os.access in os.supports_effective_ids


def may(path: str | os.PathLike[str], mode: int) -> bool:
    """Whether the system would let this program: access(2) asks for the real user and without capabilities, while
    open(2) and execve(2) go by the effective ones."""
    return os.access(path, mode, effective_ids=_BY_EFFECTIVE)


class FrozenDict(dict[_K, _V]):
    """A dict that cannot be changed; it pickles, copies and hashes."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a spec cannot be changed; make a new one")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return (FrozenDict, (dict(self),))


def parse_signal(field: str, value: int | str) -> int:
    """`15`, `"TERM"`, `"SIGTERM"`, `"SIGRTMIN+3"` or a member → the member; a number where there is none (real-time
    signals, signal(7)). Raises `SpecError`.
    """
    number: object = value
    if isinstance(value, str):
        name = value.strip().upper()
        name = name if name.isdigit() or name.startswith("SIG") else f"SIG{name}"
        number = int(name) if name.isdecimal() else _NUMBERS.get(name)
    if isinstance(number, int) and not isinstance(number, bool) and number in _VALID:
        return _signal.Signals(number) if number in _MEMBERS else int(number)
    remedy = 'give a name like "SIGTERM" or "SIGRTMIN+3", a number, or signal.SIGINT'
    raise SpecError(field, value, "is not a signal of this system", remedy)


def signal_name(number: int) -> str:
    """`11` → `"SIGSEGV"`, `37` → `"SIGRTMIN+3"`; unknown ones by number."""
    if number in _MEMBERS:
        return _signal.Signals(number).name
    if _signal.SIGRTMIN < number < _signal.SIGRTMAX:
        return f"SIGRTMIN+{number - _signal.SIGRTMIN}"
    return f"signal {number}"


_VALID = frozenset(map(int, _signal.valid_signals()))  # to ask takes 0.1 ms
_MEMBERS = {int(one) for one in _signal.Signals}
_REAL_TIME = range(_signal.SIGRTMIN, _signal.SIGRTMAX + 1)
_NUMBERS: dict[str, int] = {
    **{f"SIGRTMIN+{at}": number for at, number in enumerate(_REAL_TIME)},
    **{f"SIGRTMAX-{at}": number for at, number in enumerate(reversed(_REAL_TIME))},
    **{name: int(one) for name, one in _signal.Signals.__members__.items()},
}


def check_env(field: str, env: Mapping[str, str | None] | None) -> FrozenDict[str, str | None]:
    """A checked copy of the caller's mapping, which itself is never changed."""
    if env is None:
        return FrozenDict()
    if not isinstance(env, Mapping):
        raise SpecError(field, env, "is not a mapping", 'give a dict like {"OMP_NUM_THREADS": "1"}')
    for key, value in env.items():
        if not isinstance(key, str) or not key or "=" in key or "\0" in key:
            raise SpecError(f"{field} key", key, "cannot name a variable", "use a non-empty str without '=' and NUL")
        if value is not None and not isinstance(value, str):
            raise SpecError(
                f"{field}[{shown(key)}]", value, f"is {type(value).__name__}, not str", f"write {_as_text(value)}"
            )
        if value is not None and "\0" in value:
            raise SpecError(f"{field}[{shown(key)}]", value, "holds a NUL byte", "remove it: execve(2) would cut there")
        check_encodes(f"{field} key", key)
        check_encodes(f"{field}[{shown(key)}]", value or "")
    return FrozenDict(env)


def check_encodes(field: str, text: str) -> None:
    """Whether the system's own encoding can carry it (a lone surrogate it cannot)."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError as exc:
        raise SpecError(field, text, f"cannot be encoded ({exc.reason})", "use text, or bytes by os.fsdecode") from None


def check_argv(argv: Sequence[Any]) -> tuple[str, ...]:
    if not argv or (isinstance(argv[0], str) and not argv[0]):
        raise SpecError("argv", argv, "names no program", 'give Command("program", "argument", ...)')
    out = []
    for index, one in enumerate(argv):
        if isinstance(one, list | tuple) and len(argv) == 1:
            raise SpecError("argv", one, "is one sequence", "unpack it: Command(*argv)")
        out.append(check_path(f"argv[{index}]", one))
    return tuple(out)


def check_path(field: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise SpecError(field, value, f"is {type(value).__name__}, not str", f"write {_as_text(value)}")
    if "\0" in text:
        raise SpecError(field, value, "holds a NUL byte", "remove it: the kernel would cut there")
    check_encodes(field, text)
    return text


def check_whole(field: str, value: Any, least: int, most: int | None = None) -> None:
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
    except Exception:
        return False


def check_items(field: str, given: Any, what: str, remedy: str, most: int = PID_MAX) -> tuple[Any, ...]:
    """The items of a collection, of any kind but a text or a mapping, that has an end."""
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        raise SpecError(field, given, f"is not {what}", remedy)
    try:
        items = tuple(itertools.islice(given, most + 1))
    except Exception as exc:  # it is the caller's, and may do anything
        raise SpecError(field, given, f"cannot be read: {told(exc)}", remedy) from exc
    if len(items) > most:
        raise SpecError(field, given, f"has more than {most:,} items", remedy)
    return items


def check_bool(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SpecError(field, value, f"is {type(value).__name__}, not bool", "give True or False")


def check_seconds(field: str, value: Any) -> None:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= float(value) < math.inf:
            return
    except OverflowError:
        pass
    raise SpecError(field, value, "is not a time", "give seconds, 0 or more")


def prefix_fields(prefix: str) -> list[str]:
    """The names in a prefix template. Raises `ValueError` when it is none."""
    return [name for _, name, _, _ in string.Formatter().parse(prefix) if name is not None]


def check_prefix(prefix: str) -> None:
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
