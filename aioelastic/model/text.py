"""How anything becomes words of ours: values of others in one short line, and text that a terminal can be given."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import numbers
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .interruptions import is_the_programs

ITEMS = 8  # of a collection that are shown
DEPTH = 4  # of collections in one another
DIGITS = 60  # of a whole number
MASK = "****"  # what is shown of a secret
ARGUMENTS = 8  # of a call, and as many by name

# What would steer a terminal (C0 but line ends and tabs, DEL, C1), turn the direction of what is read, or cannot be
# encoded: a lone surrogate, of a file name that is not UTF-8.
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
# types of which repr() is short, and runs no code of others
_LARGE = 10**DIGITS
# of a name: PGPASSWORD, DB_PASSWORDS, SSHPASS, MYSQL_PWD, but not PWD
_SECRET = (
    r"(?i)password|passwd|passphrase|secret|._pwd(?:_|$)"
    r"|(?:^|_)(?:tokens?|(?:ssh)?pass|(?:api)?key|api_?keys|credentials?|auth)(?:_|$)"
)
_PLAIN = (bool, type(None), type(Ellipsis), float, complex, range, slice)
_PLAIN_MODULES = ("datetime", "decimal", "fractions")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_NESTED = 20  # partials within partials that are shown


def printable(text: str) -> str:
    r"""The text with control codes as escapes (`\x1b`), so that words of others do nothing to who reads ours."""
    if text.replace("\n", "").isprintable():  # most is, and then no pattern is compiled
        return text
    return re.sub(_CONTROL, _escaped, text)


def masked(name: str, value: str) -> str:
    """The value of a variable, or `****` where its name says that it is a secret: for what people read."""
    return MASK if value and re.search(_SECRET, name) else value


def shown(value: object, limit: int = 60) -> str:
    """A value in one short line; whatever it is, this returns, and soon.

    The code of others is not run for it: a `__repr__` may raise, be endless, or print a whole data set. What is not of
    a type that is known here is shown by the name of that type.
    """
    try:
        text = printable(_short(value, limit, 0)).replace("\n", "\\n")
    except Exception as exc:  # of a value that is changed meanwhile, or lies about itself
        if is_the_programs(exc):
            raise
        text = _instance(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def call_text(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """`"simulate(7, depth=3)"`. The arguments as they are now: who fails later does not hold them. Those by
    name that are secrets by their names are not shown."""
    said = [_argument(one) for one in itertools.islice(args, ARGUMENTS)]
    said += [f"{key[:40]}={masked(key, _argument(one))}" for key, one in itertools.islice(kwargs.items(), ARGUMENTS)]
    if len(args) > ARGUMENTS or len(kwargs) > ARGUMENTS:
        said.append("…")
    return f"{_function_name(fn)}({', '.join(said)})"


def text_of(exc: BaseException) -> str:
    """What an exception of others says; its `__str__` may be broken."""
    try:
        return printable(str(exc))
    except Exception as problem:  # it is the code of others
        if is_the_programs(problem):
            raise
        return f"<str() raised {type(problem).__name__}>"


def told(exc: BaseException) -> str:
    """`"ValueError: bad lr"`."""
    return f"{type(exc).__name__}: {text_of(exc)}"


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _argument(value: Any) -> str:
    # most are such, and each call has some: what would do for all takes ten times as long
    return repr(value) if type(value) is int and -_LARGE < value < _LARGE else shown(value, 40)


def _function_name(fn: Any, depth: int = 0) -> str:
    if isinstance(fn, functools.partial):  # it may hold itself
        return f"partial({_function_name(fn.func, depth + 1) if depth < _NESTED else '…'})"
    try:
        name = getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None)
    except Exception as exc:  # of the code of others
        if is_the_programs(exc):
            raise
        name = None
    return name if isinstance(name, str) else type(fn).__qualname__


def _short(value: Any, limit: int, depth: int) -> str:
    kind = type(value)
    module = type.__getattribute__(kind, "__module__")
    if kind in _PLAIN or module in _PLAIN_MODULES or (module == "numpy" and isinstance(value, numbers.Number)):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"<{_name(value)}.{object.__getattribute__(value, '_name_')}>"
    if isinstance(value, str | bytes | bytearray):
        return _text(value, limit)
    if isinstance(value, int):
        return int.__repr__(value) if int.bit_length(value) < DIGITS * 3 else f"<{_name(value)} of many digits>"
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, pathlib.PurePath):
        return f"{_name(value)}({_text(str(value), limit)})"
    if isinstance(value, type):
        return f"<class {type.__getattribute__(value, '__module__')}.{type.__getattribute__(value, '__qualname__')}>"
    if depth == DEPTH:
        return "…" if isinstance(value, list | tuple | dict | set | frozenset) else _instance(value)
    base: Any  # by its own methods: those of a subclass may be anything
    if isinstance(value, list | tuple):
        base = list if isinstance(value, list) else tuple
        first: Sequence[Any] = base.__getitem__(value, slice(ITEMS))
        return _collection(value, base, (_short(one, limit, depth + 1) for one in first), base.__len__(value))
    if isinstance(value, dict):
        pairs = itertools.islice(dict.items(value), ITEMS)
        said = (f"{_short(key, limit, depth + 1)}: {_hidden(key, _short(one, limit, depth + 1))}" for key, one in pairs)
        return _collection(value, dict, said, dict.__len__(value))
    if isinstance(value, set | frozenset):
        base = set if isinstance(value, set) else frozenset
        first = tuple(itertools.islice(base.__iter__(value), ITEMS))
        return _collection(value, base, (_short(one, limit, depth + 1) for one in first), base.__len__(value))
    if dataclasses.is_dataclass(value):
        return f"{_name(value)}({', '.join(_fields(value, limit, depth))})"
    if isinstance(value, BaseException):
        said = (_short(one, limit, depth + 1) for one in BaseException.__dict__["args"].__get__(value)[:ITEMS])
        return f"{_name(value)}({', '.join(said)})"
    if kind in _FUNCTIONS:
        return f"<{_name(value)} {value.__qualname__}>"
    return _instance(value)


def _collection(value: object, base: type[Any], parts: Iterable[str], size: int) -> str:
    text = ", ".join(parts) + (", …" if size > ITEMS else "")
    brackets: dict[Any, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), frozenset: ("frozenset({", "})")}
    begin, end = brackets.get(base, ("{", "}"))
    if base is tuple and size == 1:
        text += ","
    if base is set and size == 0:
        return "set()"
    return f"{begin}{text}{end}" if type(value) is base else f"{_name(value)}({begin}{text}{end})"


def _fields(value: Any, limit: int, depth: int) -> Iterator[str]:
    for one in dataclasses.fields(value)[:ITEMS]:
        if one.repr:
            text = _short(object.__getattribute__(value, one.name), limit, depth + 1)
            yield f"{one.name}={masked(one.name, text)}"


def _text(value: str | bytes | bytearray, limit: int) -> str:
    """Its beginning, in quotes."""
    if isinstance(value, str):
        first = str.__getitem__(value, slice(limit))
        return repr(first) + ("…" if str.__len__(value) > limit else "")
    base: Any = bytes if isinstance(value, bytes) else bytearray
    return repr(bytes(base.__getitem__(value, slice(limit)))) + ("…" if base.__len__(value) > limit else "")


def _hidden(name: object, text: str) -> str:
    """What is shown of a value by that name."""
    return masked(name, text) if isinstance(name, str) else text


def _name(value: object) -> str:
    """Of its type."""
    return str(type.__getattribute__(type(value), "__name__"))


def _instance(value: object) -> str:
    """What it is, as `reprlib` says it of what has no repr()."""
    return f"<{_name(value)} instance at {id(value):#x}>"
