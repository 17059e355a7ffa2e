"""What a signal handler of the program has raised while code of others ran here: it is the program's, and goes on.

It is told from what that code raises by the traceback: a frame of the handler is in it. Handlers run in the main thread
only, and have such a frame if they are written in Python.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` makes enums of all, which takes longer than a message
import functools
import types
from typing import Any


def is_the_programs(exc: BaseException) -> bool:
    """Whether a signal handler of the program has raised it in here."""
    import threading  # for start-up time: it is asked when something has failed

    if threading.current_thread() is not threading.main_thread():
        return False
    codes = {code for number in _signal.valid_signals() if (code := _code(_signal.getsignal(number))) is not None}
    trace = exc.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _code(handler: Any) -> types.CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not isinstance(handler, types.FunctionType | types.MethodType):
        handler = type(handler).__dict__.get("__call__")
    if isinstance(handler, types.MethodType):
        handler = handler.__func__
    return handler.__code__ if isinstance(handler, types.FunctionType) else None
