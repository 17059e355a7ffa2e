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

from . import stack_dump
from .context import variable

SHOWN = 65_536  # characters kept of message and traceback: the report stays far below what is read back
TOLD = 32  # exceptions of a chain that the text tells of: the nearest
PARTS = 10_000  # exceptions in groups that the text tells of, each as often as it stands in one
F = TypeVar("F", bound=Callable[..., Any])


def record(fn: F) -> F:
    """Decorate the main function of a Python command, so that its failure carries the exception and traceback.

    Works on sync and async functions. The exception goes on as before; SystemExit and KeyboardInterrupt are not
    recorded. Outside a supervised worker it does nothing. Also switches `faulthandler` on, for crashes and, inside a
    worker, for `Group.dump_stacks`.

    The file (`AIOELASTIC_ERROR_FILE`) appears whole or not at all. Its schema is that of torch elastic
    (`message.message`, `message.extraInfo`), which therefore can read it, plus an `aioelastic` object.

    Args:
        fn: the function, plain or async.

    Raises:
        TypeError: it is neither.

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
    except BaseException as problem:  # its own __str__ is broken, or leaves
        message = f"{type(exc).__name__}: <str() raised {type(problem).__name__}>"
    try:
        trace = formatted(exc)
    except BaseException:  # as above, of another in the chain
        trace = message
    message = message[:SHOWN]
    trace = cut(trace, SHOWN)
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
            print(f"aioelastic: could not write {path}: {problem}", file=sys.stderr, flush=True)  # noqa: T201


def formatted(exc: BaseException, with_locals: bool = False) -> str:
    """Its traceback, with those of the nearest causes and contexts: a thousand of them take a tenth of a second."""
    told = reachable(exc, TOLD + 1)[:TOLD]
    ids = {id(one) for one in told}
    cut = [(one, one.__cause__, one.__context__, one.__suppress_context__) for one in told if not ids.issuperset(
        id(other) for other in (one.__cause__, one.__context__) if other is not None
    )]  # fmt: skip
    try:
        for one, cause, context, suppress in cut:
            assign(one, "cause", cause if id(cause) in ids else None)
            assign(one, "context", context if id(context) in ids else None)
            assign(one, "suppress_context", suppress)
        if max(map(_parts, told)) > PARTS:
            kind = type(exc)
            words = f"{kind.__module__}.{kind.__qualname__}: {exc}\nIts parts are not shown: they are too many.\n"
            return "".join(["Traceback (most recent call last):\n", *traceback.format_tb(exc.__traceback__), words])
        found = traceback.TracebackException.from_exception(exc, capture_locals=with_locals)
        if with_locals:
            _hide_secrets(found)
        text = "".join(found.format())
    finally:
        for one, cause, context, suppress in cut:
            assign(one, "cause", cause)
            assign(one, "context", context)
            assign(one, "suppress_context", suppress)
    return text


def _parts(exc: BaseException) -> int:
    """How many exceptions `traceback` makes of it and its parts: of what several groups share, one for each."""
    counts, ahead = dict[int, int](), [exc]
    while ahead:
        one = ahead[-1]
        parts = BaseExceptionGroup.exceptions.__get__(one) if isinstance(one, BaseExceptionGroup) else ()
        missing = [part for part in parts if id(part) not in counts]
        if missing:
            ahead += missing
        else:
            counts[id(one)] = 1 + sum(counts[id(part)] for part in parts)
            ahead.pop()
    return counts[id(exc)]


def _hide_secrets(exc: traceback.TracebackException) -> None:
    """Of local variables that are secrets by their names the values are not shown."""
    from ...model.text import masked  # few show them, and all would wait for it

    found: list[traceback.TracebackException | None] = [exc]
    for one in found:  # which grows; a chain ends, as each exception is in it once
        if one is not None:
            for frame in one.stack:
                frame.locals = frame.locals and {name: masked(name, text) for name, text in frame.locals.items()}
            found += [one.__cause__, one.__context__, *(one.exceptions or ())]


def assign(exc: BaseException, name: str, value: object) -> None:
    """Set its `__name__` as `raise` does, past what its class says: a frozen dataclass refuses all, and there are
    properties of these names."""
    BaseException.__dict__[f"__{name}__"].__set__(exc, value)


def cut(text: str, most: int) -> str:
    """Its begin and its end, if it has more characters than that."""
    return text if len(text) <= most else f"{text[: most // 2]}\n…\n{text[len(text) - most // 2 :]}"


def reachable(exc: BaseException, most: int) -> list[BaseException]:
    """It, and its causes, contexts and parts, and theirs: the nearest first, each once."""
    found, seen = [exc], {id(exc)}
    for one in found:  # which grows
        parts = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (one.__cause__, one.__context__, *parts):
            if other is not None and id(other) not in seen and len(found) < most:
                seen.add(id(other))
                found.append(other)
    return found


def clock() -> str:
    """Which clock `time.monotonic_ns` reads: that of one boot of one machine, in one time namespace
    (time_namespaces(7)). Stamps of two processes can be compared if this is equal in both."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
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
        stack_dump.offer()
