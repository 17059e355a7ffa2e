"""A function and its arguments, pickled once for all the workers that run it."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from ..child import _wire
from ..entry import Function
from ..errors import SpecError
from ..shown import told
from ._interpreter import python

Main = tuple[str, str]


class Call:
    """What is sent to a worker. Holds a memfd while it is large; `close()` lets go of it.

    Attributes:
        main: the caller's main module, as a worker imports it, if the function or an argument is defined there.
        by_value: it holds functions or classes themselves (by cloudpickle), not only their names.
    """

    def __init__(self, function: Function, field: str) -> None:
        """Pickle it.

        Raises:
            SpecError: names what cannot be pickled.
        """
        self.show_locals = function.show_locals
        self.main: Main | None = None
        body = (function.fn, function.args, dict(function.kwargs))
        try:
            self.packet, self.fds = _wire.encode(_wire.CALL, body)
            names_main = self._names_main()
        except OSError:
            raise
        except Exception:
            self.packet, self.fds = b"", []
            names_main = False
        if names_main:
            self.main = importable_main()
        if self.packet and (self.main is not None or not names_main):
            return
        self.close()
        dumps = _wire.by_value()
        if dumps is None:
            explain(function, field, pickle.dumps, names_main)
        try:
            self.packet, self.fds = _wire.encode(_wire.CALL, body, dumps)
        except OSError:
            raise
        except Exception:
            explain(function, field, dumps, False)

    def close(self) -> None:
        """Nobody needs it any more."""
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)

    def _names_main(self) -> bool:
        """Whether something in it is to be found in `__main__`."""
        return b"__main__" in _wire.pickled(self.packet, self.fds)


class Calls:
    """Those of one group, each pickled once, however many ranks run it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Function, Call]] = {}

    def of(self, function: Function, rank: int) -> Call:
        """The call of that rank. Raises `SpecError`."""
        if id(function) not in self._known:
            self._known[id(function)] = (function, Call(function, f"of rank {rank}"))
        return self._known[id(function)][1]

    def close(self) -> None:
        """Nobody needs them any more."""
        for _, call in self._known.values():
            call.close()
        self._known.clear()


def importable_main() -> Main | None:
    """How a worker can import the caller's main module, or None: a notebook, `python -c`, an interactive session."""
    module = sys.modules.get("__main__")
    name = getattr(getattr(module, "__spec__", None), "name", None)
    if name:
        return ("module", name)
    path = getattr(module, "__file__", None)
    if path and os.path.exists(path):
        return ("path", os.path.abspath(path))
    return None


def search_path() -> list[str]:
    """Our `sys.path`, meaning the same wherever a worker stands."""
    named = [one for one in sys.path if isinstance(one, str)]
    try:
        return [os.path.abspath(one) for one in named]
    except FileNotFoundError:  # we stand in a directory that is gone: nothing can be found there
        return [one for one in named if os.path.isabs(one)]


def own_argv() -> list[str]:
    """Our `sys.argv`, which a program that embeds Python may not have set."""
    return list(getattr(sys, "argv", None) or [""])


def interpreter(call: str) -> list[str]:
    """The command line of a Python like this one that calls `call` (`"module:function"`) of ours.

    Raises:
        SpecError: there is none here.
    """
    import subprocess

    module, _, name = call.partition(":")
    code = f"import sys; sys.path[:] = {search_path()!r}; from {module} import {name}; {name}()"
    flags: Iterable[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # -P: Python 3.13.0 can import nothing more where the directory on its path is deleted
    return [python(), *flags, "-P", "-c", code]


def explain(function: Function, field: str, dumps: Callable[..., bytes], names_main: bool) -> NoReturn:
    """Which part of it cannot be pickled."""
    remedy = "define it at the top level of a module, or install cloudpickle"
    if names_main:
        problem = "is defined, or has an argument defined, in a main module that a worker cannot import"
        raise SpecError(f"fn {field}", function.fn, problem, "put it into a module, or install cloudpickle")
    if problem := _trouble(function.fn, dumps):
        raise SpecError(f"fn {field}", function.fn, f"cannot be pickled ({problem})", remedy)
    named: Mapping[str, Any] = {f"args[{i}]": one for i, one in enumerate(function.args)} | dict(function.kwargs)
    for name, value in named.items():
        if problem := _trouble(value, dumps):
            remedy = "give something that can be pickled: a path, a name or plain data, to be opened in the worker"
            raise SpecError(f"{name} of {function.name} {field}", value, f"cannot be pickled ({problem})", remedy)
    raise SpecError(f"fn {field}", function.fn, "cannot be pickled with its arguments", remedy)


def _trouble(value: Any, dumps: Callable[..., bytes]) -> str:
    try:
        _, fds = _wire.encode(_wire.CALL, (value,), dumps)
    except Exception as exc:
        return told(exc)
    for fd in fds:
        os.close(fd)
    return ""
