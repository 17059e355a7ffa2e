"""What another process has sent is unpickled under one rule: whatever that raises, SystemExit too, is the sender's
trouble and ends nothing here; but for what a signal handler of this program has raised meanwhile, which is the
program's.

The two are told apart as in `model/interruptions.py`. Python's own handler, which raises KeyboardInterrupt, gets
a frame meanwhile.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` makes enums of all, which takes longer than a message
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from ...model.interruptions import is_the_programs

T = TypeVar("T")


def attempt(unpickle: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
    """What it returns, or what is wrong with it. Raises nothing but what the program's own signal handlers do."""
    lent = threading.current_thread() is threading.main_thread() and _lend()
    try:
        return step(unpickle, *args)
    finally:
        if lent and _signal.getsignal(_signal.SIGINT) is _interrupted:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def step(unpickle: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
    """As `attempt`, for a part of what is attempted already: what that does about signals takes longer than most."""
    try:
        return unpickle(*args), None
    except BaseException as exc:
        if is_the_programs(exc):
            raise
        return None, bearable(exc)


def take(unpickle: Callable[..., T], *args: Any) -> T:
    """What it returns; raises an `Exception` if it cannot."""
    value, problem = attempt(unpickle, *args)
    if problem is not None:
        raise problem
    return value  # type: ignore[return-value]


def bearable(exc: BaseException) -> Exception:
    """It, or what says so in words: there are some that a future does not take (StopIteration), or that would end
    whoever waits for it, or have him believe that it is himself who was cancelled."""
    if isinstance(exc, Exception) and not can_end(exc):
        return exc
    words = f"unpickling it raised {type(exc).__name__}: {_text(exc)}"
    told = RuntimeError(words)
    told.__cause__ = exc
    return told


def can_end(exc: BaseException) -> bool:
    """Whether who waits for a future would not get it as an exception like others."""
    if not isinstance(exc, Exception) or isinstance(exc, StopIteration):
        return True
    futures = sys.modules.get("concurrent.futures._base")  # not imported: that may need a descriptor, and there is none
    return futures is not None and isinstance(exc, futures.CancelledError)


def _lend() -> bool:
    if _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler:
        return False
    try:
        _signal.signal(_signal.SIGINT, _interrupted)
    except ValueError:  # a main thread, but not of the main interpreter
        return False
    return True


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException as problem:  # it runs the sender's code, too
        return f"<str() raised {type(problem).__name__}>"
