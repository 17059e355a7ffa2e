"""System calls of aioelastic that fail, or take long: `with failing("os.open", error=errno.EMFILE):`."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ..model.errors import SpecError
from ..model.validation import check_seconds, check_whole

NAMES = ("fcntl", "os", "resource", "select", "signal", "socket")
_PACKAGE = __name__.partition(".")[0]


class Fault:
    """What `failing` did.

    Attributes:
        struck: the modules whose calls it struck, in order. A test looks here whether it did happen at all.
    """

    def __init__(self) -> None:
        self.struck: list[str] = []


class _Changed(ModuleType):
    """A module in the eyes of those whose calls shall fail: one name of it is another function."""

    def __init__(self, real: ModuleType, name: str, function: Callable[..., Any]) -> None:
        super().__init__(real.__name__)
        self._real = real
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def failing(
    *calls: str, error: int = 0, times: int | None = 1, seconds: float = 0.0, within: str = _PACKAGE
) -> Iterator[Fault]:
    """In this block system calls that aioelastic makes fail, or take long: for the tests of how your program copes.

    Only aioelastic's own calls in this process are struck, in whatever thread it makes them; those of your program, of
    asyncio and of other libraries are not. Nor are the guardian, zygotes and workers, which are other processes: for
    what these refuse see `Life(refused=...)`, for their death `kill(guardian)`. Modules that aioelastic imports in the
    block are not struck, and calls of objects, as `sock.send()`, neither.

    Args:
        calls: `"open"`, or functions of `os`, `select`, `socket`, `signal`, `fcntl` or `resource`: `"os.pipe2"`.
        error: the errno with which they fail (errno(3)); 0: they do not fail.
        times: how many are struck, the first ones; None: all.
        seconds: how long each takes before that, as on a file system that hangs.
        within: only calls by this module, or package: `"aioelastic.streams"` writes log files and the console.

    Raises:
        SpecError: there is no such function or module, or nothing would come of it.

    Example::

        with failing("os.writev", "os.write", error=errno.ENOSPC, times=None, within="aioelastic.streams") as fault:
            result = await supervise(Command("./train"), logs=Logs(dir="runs"))
        assert fault.struck
        assert result[0].stdout.lost
    """
    if not calls:
        raise SpecError("calls", calls, "are none", 'give "os.open", say')
    for call in calls:
        _check_call(call)
    check_whole("error", error, 0)
    check_seconds("seconds", seconds)
    if times is not None:
        check_whole("times", times, 1)
    if not error and not seconds:
        raise SpecError("error", error, "changes nothing", "give errno.EIO, say, or seconds=5")
    fault, lock, ours = Fault(), threading.Lock(), os.getpid()

    def struck(by: str) -> bool:
        if os.getpid() != ours:  # a forked copy
            return False
        with lock:
            if times is not None and len(fault.struck) >= times:
                return False
            fault.struck.append(by)
            return True

    def changed(by: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            if struck(by):
                time.sleep(seconds)
                if error and function is os.close:
                    function(*args, **kwargs)  # whatever it says, the descriptor is closed (close(2))
                if error:
                    raise OSError(error, os.strerror(error))
            return function(*args, **kwargs)

        return made

    with contextlib.ExitStack() as stack:
        for module in _modules(within):
            space, by = vars(module), module.__name__
            for home, _, name in (call.rpartition(".") for call in calls):
                if not home:
                    stack.callback(_put_back, space, name, space.get(name))
                    space[name] = changed(by, space.get(name, getattr(builtins, name)))
                for key, value in list(space.items()):
                    if isinstance(value, ModuleType) and value.__name__ == home:
                        stack.callback(_put_back, space, key, value)
                        space[key] = _Changed(value, name, changed(by, getattr(value, name)))
        yield fault


def _check_call(call: Any) -> None:
    home, _, name = call.rpartition(".") if isinstance(call, str) else ("", "", "")
    found = builtins if call == "open" else importlib.import_module(home) if home in NAMES else None
    if not callable(getattr(found, name, None)):
        raise SpecError("calls", call, "is no system call", f'give "open", or a function of {", ".join(NAMES)}')


def _modules(within: str) -> list[ModuleType]:
    testing = f"{_PACKAGE}.testing"
    found = [
        module
        for name, module in list(sys.modules.items())
        if f"{name}.".startswith(f"{within}.") and name.startswith(_PACKAGE) and not name.startswith(testing)
    ]
    if not found:
        raise SpecError("within", within, "is no module of aioelastic that is loaded", 'give "aioelastic.streams", say')
    return found


def _put_back(space: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        del space[key]
    else:
        space[key] = value
