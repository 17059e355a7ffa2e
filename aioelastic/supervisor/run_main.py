"""`run(main)`: a program of its own, in which signals that ask to end stop its groups in order."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from ..model.errors import SpecError
from ..watch import Signals
from .supervisor import hurry_all

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Run a coroutine as `asyncio.run` does, and let SIGINT, SIGTERM and SIGHUP stop its groups by their own `Stop`.

    The first of these signals cancels `main`, so each group gives its workers their grace; one more skips every grace.
    When `main` has ended, the other tasks are cancelled and waited for, as by `asyncio.run`, in the same way.
    By `asyncio.run` alone, SIGTERM would end the program at once, and its workers with SIGKILL. A signal that the
    program was started with ignored (nohup(1)) stays ignored; afterwards all are as they were.

    Args:
        main: the coroutine, or the async function without arguments that makes it.
        debug, loop_factory: as in `asyncio.Runner`.

    Returns:
        What `main` returns, also when it did so after a signal.

    Raises:
        SystemExit: it was ended by SIGTERM or SIGHUP: with 128 and the number of the signal, as shells tell it.
        KeyboardInterrupt: it was ended by SIGINT.
        SpecError: `main` is no coroutine.
        RuntimeError: this is not the main thread, which alone can handle signals, or a loop is running in it.
        BaseException: whatever `main` raises.

    Example::

        async def main() -> None:
            await supervise(Command("serve"), n=4, stop=Stop(grace=60))

        aioelastic.run(main)
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("aioelastic.run handles signals, which only the main thread can: use asyncio.run here")
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("an event loop is running in this thread already: await what is to run")
    work: Coroutine[Any, Any, T] = main() if callable(main) else main
    if not isinstance(work, Coroutine):
        raise SpecError("main", main, "is no coroutine", "give an async function: run(main)")
    came: list[signal.Signals] = []
    with asyncio.Runner(debug=debug, loop_factory=loop_factory) as runner:
        try:
            return runner.run(_until_signalled(work, came))
        except asyncio.CancelledError:
            if not came:
                raise
    if came[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + came[0])


async def _until_signalled(work: Coroutine[Any, Any, T], came: list[signal.Signals]) -> T:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    ending = False

    def stop(signum: signal.Signals) -> None:
        came.append(signum)
        if len(came) > 1:
            hurry_all(loop)
        elif not ending:
            task.cancel()

    with Signals(loop, {one: partial(stop, one) for one in SIGNALS}):
        try:
            return await work
        finally:
            ending = True
            await _end_others(loop, task)


async def _end_others(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    """Cancel them and wait, as the runner would when signals are nobody's any more: their groups have their grace."""
    others = {one for one in asyncio.all_tasks(loop) if one is not task}
    for one in others:
        one.cancel()
    if others:
        await asyncio.wait(others)
