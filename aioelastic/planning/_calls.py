"""A function and its arguments, pickled once for all the workers that run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..child.wire import messages, pickling
from ..child.worker import function_run, main_module, task_loop
from ..child.worker.main_module import Main
from ..model.entries import Function
from ..model.errors import SpecError
from ..model.text import told
from ..system.descriptors import shut


class Call:
    """What is sent to a worker. Holds a memfd while it is large; `close()` lets go of it.

    Attributes:
        main: the caller's main module, as a worker imports it, if the function or an argument is defined there.
    """

    def __init__(self, function: Function, field: str) -> None:
        """Pickle it.

        Raises:
            SpecError: names what cannot be pickled.
        """
        self.show_locals = function.show_locals
        self.fds: list[int] = []
        try:
            self.packet, self.fds = function_run.pack(
                messages.CALL, (function.fn, function.args, dict(function.kwargs))
            )
        except pickling.FAILURES as exc:
            explain(function, field, exc)
        self.main: Main | None = main_module.importable() if messages.needs_main(self.packet) else None

    def close(self) -> None:
        """Nobody needs it any more."""
        fds, self.fds = self.fds, []
        shut(*fds)


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


def explain(function: Function, field: str, problem: BaseException) -> NoReturn:
    """Which part of it cannot be pickled."""
    if isinstance(problem, function_run.NoMain):
        words = "is defined, or has an argument defined, in a main module that a worker cannot import"
        raise SpecError(f"fn {field}", function.fn, words, "put it into a module, or install cloudpickle") from problem
    if function.fn is task_loop.serve:
        initializer, initargs, *_ = function.args
        parts = {"initializer": initializer} | {f"initargs[{i}]": one for i, one in enumerate(initargs)}
    else:
        named: Mapping[str, Any] = {f"args[{i}]": one for i, one in enumerate(function.args)} | dict(function.kwargs)
        parts = {f"fn {field}": function.fn} | {
            f"{name} of {function.name} {field}": one for name, one in named.items()
        }
    for name, value in parts.items():
        if (exc := _trouble(value)) is not None:
            remedy = "define it at the top level of a module, or install cloudpickle"
            if value is not function.fn:
                remedy = "give something that can be pickled: a path, a name or plain data, to be opened in the worker"
            known = pickling.remedy_of(exc)
            words = told(exc).removesuffix(f": {known}") if known else told(exc)
            raise SpecError(name, value, f"cannot be pickled ({words})", known or remedy) from exc
    remedy = "give each worker what it can make it of"
    raise SpecError(
        f"fn {field}", function.fn, f"cannot be pickled with its arguments ({told(problem)})", remedy
    ) from problem


def _trouble(value: Any) -> BaseException | None:
    try:
        _, fds = function_run.pack(messages.CALL, (value,))
    except pickling.FAILURES as exc:
        return exc
    shut(*fds)
    return None
