"""What is hard to pickle, or to call, and functions that are given it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from typing import Any


class Interrupted(Exception):
    """What the handler of a signal raises: of no kind that pickling raises."""


class Wrong(AttributeError):
    """The same, of a kind that it does."""


def by_signal(kind: type[Exception]) -> Any:
    """A handler that raises it."""

    def handler(signum: int, frame: object) -> None:
        raise kind("time is up")

    return handler


class Slow:
    """In the middle of its packing a signal comes. It counts how often it is packed."""

    def __init__(self) -> None:
        self.packed = 0

    def __reduce__(self) -> Any:
        self.packed += 1
        signal.raise_signal(signal.SIGUSR1)
        return (int, ())


class Raises:
    """Its own code is wrong."""

    def __init__(self, problem: Exception) -> None:
        self.problem = problem
        self.packed = 0

    def __reduce__(self) -> Any:
        self.packed += 1
        raise self.problem


class Endless:
    """Its attributes have no end."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any) -> int:
        return 1


class Adds:
    """Its instances are called."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, x: int) -> int:
        return x + self.n

    @classmethod
    def by_class(cls, x: int) -> int:
        return cls(2)(x)

    @staticmethod
    def by_nobody(x: int) -> int:
        return x + 3

    def by_method(self, x: int) -> int:
        return x + 10 * self.n


@functools.singledispatch
def kind(one: Any) -> str:
    return "other"


@kind.register
def _(one: int) -> str:
    return "number"


@functools.lru_cache
def cached(x: int) -> int:
    return x * x


async def awaited(x: int) -> int:
    return x + 100


def name_of(one: Any) -> str:
    return type(one).__name__


def gives_a_connection() -> Any:
    return multiprocessing.Pipe()[0]


def sends_a_connection() -> str:
    from aioelastic import sharing

    try:
        sharing.send(gives_a_connection())
    except TypeError as exc:
        return str(exc)
    return "it was sent"


def pid_of(*_: Any) -> int:
    return os.getpid()
