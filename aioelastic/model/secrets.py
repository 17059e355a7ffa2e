"""Secrets that a command is given: values that are shown nowhere, pickled nowhere, and in no environment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import SpecError
from .text import MASK, shown
from .validation import check_variable

FIRST = 20  # the least descriptor that has one: scripts use those below for their own (`exec 3<file`; bash from 10 on)
LEAST = 6  # bytes of a value that is looked for within a text; a shorter one may be in it by chance
OWN = ("AIOELASTIC_", "TORCHELASTIC_")  # how variables begin that are not for others
_PATH = "/proc/self/fd/"


class Secrets(Mapping[str, bytes]):
    """By the names under which a worker asks for them."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, bytes]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> bytes:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(dict.fromkeys(self._values, MASK))

    def __reduce__(self) -> Any:
        if self._values:
            raise TypeError("secrets are not pickled: give them where the group is made")
        return (Secrets, ({},))

    def __deepcopy__(self, memo: object) -> Secrets:
        return self

    def check_not_in(self, places: Iterable[tuple[str, str | None]]) -> None:
        """Whether none of those values stands in texts, each by its field, that anybody may see. Raises `SpecError`,
        which does not show it."""
        values = [(name, value.strip()) for name, value in self.items() if value.strip()]
        for field, text in places if values else ():
            data = (text or "").encode(errors="surrogateescape")
            for name, value in values:
                if value == data or (len(value) >= LEAST and value in data):
                    remedy = f"leave it out there: the worker reads it from the file that {name}_FILE names"
                    raise SpecError(field, MASK, f"has the value of the secret {shown(name)}", remedy)

    def numbers(self, taken: tuple[int, ...]) -> dict[str, int]:
        """Which descriptor has which, beside those that are `taken`."""
        free = (number for number in range(FIRST, FIRST + len(self) + len(taken)) if number not in taken)
        return dict(zip(self, free, strict=False))

    def paths(self, taken: tuple[int, ...]) -> dict[str, str]:
        """The variables by which they are found, each with its path."""
        return {f"{name}_FILE": f"{_PATH}{number}" for name, number in self.numbers(taken).items()}


def inherited(environ: Mapping[str, str]) -> dict[str, int]:
    """Variables by which this program finds secrets of its own, each with its descriptor: a worker of it does not have
    that, and may have another by this number."""
    found = (
        (name, re.fullmatch(f"{_PATH}([0-9]{{1,7}})", environ[name])) for name in environ if name.endswith("_FILE")
    )
    return {name: int(one[1]) for name, one in found if one is not None and int(one[1]) >= FIRST}


def check_secrets(given: Any) -> Secrets:
    """A checked copy of the caller's mapping, whose values no error shows."""
    if given is None:
        return Secrets({})
    if not isinstance(given, Mapping):
        kind = f"<{type(given).__name__}>"
        raise SpecError("secrets", kind, "is not a mapping", 'give a dict like {"DB_PASSWORD": value}')
    values: dict[str, bytes] = {}
    for name, value in given.items():
        check_variable("secrets key", name)
        field, kind = f"secrets[{shown(name)}]", f"<{type(value).__name__}>"
        if isinstance(value, str):
            try:
                value = value.encode()
            except UnicodeEncodeError as exc:
                problem = f"cannot be encoded as UTF-8 ({exc.reason})"
                raise SpecError(field, kind, problem, "give it as bytes") from None
        if not isinstance(value, bytes | bytearray | memoryview):
            raise SpecError(field, kind, f"is {type(value).__name__}, not str or bytes", "give text or bytes")
        if name.startswith(OWN):
            raise SpecError(field, kind, "is named as a variable of aioelastic's own", "give it another name")
        if name.endswith("_FILE") and name.removesuffix("_FILE") in given:
            problem = f"is named as the variable by which {shown(name.removesuffix('_FILE'))} is found"
            raise SpecError(field, kind, problem, "give one of them another name")
        values[name] = bytes(value)
    return Secrets(values)
