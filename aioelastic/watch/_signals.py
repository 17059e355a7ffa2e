"""Signals to this process, as calls on the loop. Only for who owns the process: the command line, `run(main)`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Signals:
    """Handles signals for as long as its block lasts; afterwards they are as they were before.

    A signal that was ignored before (`nohup`, a job in the background of a script) stays ignored.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, handlers: dict[signal.Signals, Callable[[], object]]) -> None:
        self._loop = loop
        self._handlers = handlers
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for signum, handler in self._handlers.items():
            before = signal.getsignal(signum)
            if before is not signal.SIG_IGN:
                self._before[signum] = before
                self._loop.add_signal_handler(signum, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, before in self._before.items():
            self._loop.remove_signal_handler(signum)
            signal.signal(signum, before)
