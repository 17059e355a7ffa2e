"""`@record`: an exception that leaves a worker's main function is written down where the supervisor looks."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from . import _stacks
from ._context import variable

SHOWN = 65_536  # characters kept of message and traceback: the report stays far below what is read back
F = TypeVar("F", bound=Callable[..., Any])


def record(fn: F) -> F:
    """Decorate the main function of a Python command, so that its failure carries the exception and traceback.

    Works on sync and async functions. The exception goes on as before; SystemExit and KeyboardInterrupt are not
    recorded. Outside a supervised worker it does nothing. Also switches `faulthandler` on, for crashes and, inside a
    worker, for `Group.dump_stacks`.

    The file (`AIOELASTIC_ERROR_FILE`) appears whole or not at all. Its schema is that of torch elastic
    (`message.message`, `message.extraInfo`), which therefore can read it, plus an `aioelastic` object.

    Example::

        @record
        def main() -> None:
            train()
    """
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def async_main(*args: Any, **kwargs: Any) -> Any:
            _initialise()
            try:
                return await fn(*args, **kwargs)
            except Exception as exc:
                write_error(exc)
                raise

        return async_main  # type: ignore[return-value]
    if not inspect.isfunction(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(f"@record decorates a plain or async function, not {fn!r}")

    @functools.wraps(fn)
    def main(*args: Any, **kwargs: Any) -> Any:
        _initialise()
        try:
            return fn(*args, **kwargs)
        except Exception as exc:
            write_error(exc)
            raise

    return main  # type: ignore[return-value]


def write_error(exc: BaseException, path: str | None = None) -> None:
    """Write the report of `exc`; a failure to do so is printed, never raised."""
    path = path or variable("AIOELASTIC_ERROR_FILE")
    if not path:
        return
    now, now_ns = time.time(), time.monotonic_ns()
    try:
        message = f"{type(exc).__name__}: {exc}"
    except Exception as problem:  # its own __str__ is broken
        message = f"{type(exc).__name__}: <str() raised {type(problem).__name__}>"
    try:
        trace = "".join(traceback.format_exception(exc))
    except Exception:
        trace = message
    message = message[:SHOWN]
    if len(trace) > SHOWN:
        trace = f"{trace[: SHOWN // 2]}\n…\n{trace[-SHOWN // 2 :]}"
    report = {
        "message": {
            "message": message,
            "extraInfo": {"py_callstack": trace, "timestamp": str(int(now))},
        },
        "aioelastic": {
            "message": message,
            "traceback": trace,
            "time": now,
            "monotonic": now_ns,
            "clock": clock(),
            "run_id": variable("AIOELASTIC_RUN_ID"),
            "rank": variable("AIOELASTIC_RANK"),
            "attempt": variable("AIOELASTIC_ATTEMPT"),
            "pid": os.getpid(),
        },
    }
    part = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(report, file)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
    except OSError as problem:
        with contextlib.suppress(Exception):  # closed, or replaced by something odd: the user's exception comes first
            print(f"aioelastic: could not write {path}: {problem}", file=sys.stderr, flush=True)


def clock() -> str:
    """Which clock `time.monotonic_ns` reads: that of one boot of one machine, in one time namespace
    (time_namespaces(7)). Stamps of two processes can be compared if this is equal in both."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/time') if os.path.lexists('/proc/self/ns/time') else ''}"
    except OSError:
        return ""  # no /proc here: nobody can know


def _initialise() -> None:
    try:
        faulthandler.enable(all_threads=True)
    except (AttributeError, OSError, ValueError, RuntimeError):
        pass  # stderr is closed or replaced: a crash will be told by its signal alone
    if "AIOELASTIC_RANK" in os.environ:
        _stacks.offer()
