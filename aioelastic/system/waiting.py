"""Waiting in an event loop for what cannot be taken back, through cancellations, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import sys
from functools import partial
from typing import Any, TypeVar

from . import forked_copies

T = TypeVar("T")


TAKE_BACK = 1.0  # seconds for what a cancelled opening has begun


NO_ANSWER = "the system did not answer in time"


async def finished(future: asyncio.Future[Any]) -> None:
    """Wait for what cannot be taken back: a cancellation is raised when it is done, never lost."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        _check(future.get_loop())
        waiter = future.get_loop().create_future()
        wake = partial(_settle_by, waiter)
        future.add_done_callback(wake)
        try:
            await waiter  # asyncio.wait() does the same in thrice the time, and each start of a worker comes here
        except asyncio.CancelledError as exc:
            _check(future.get_loop())
            cancelled = exc
        finally:
            future.remove_done_callback(wake)
    if cancelled is not None:
        raise cancelled


async def completed(future: asyncio.Future[T]) -> T:
    """The result of what cannot be taken back. A cancellation is raised when it is done, or `TAKE_BACK` later: what
    tidies up behind it is a job of the same thread, and so is done after it whatever happens."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        _check(future.get_loop())
        future.add_done_callback(_seen)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({future}, timeout=TAKE_BACK)
        raise


async def settled(future: asyncio.Future[Any], within: float | None = None) -> bool:
    """Wait for `future` even while we are being cancelled, for so many seconds. Whether it is done."""
    loop = future.get_loop()
    until = None if within is None else loop.time() + within
    while not future.done():
        _check(loop)
        left = None if until is None else until - loop.time()
        if left is not None and left <= 0:
            future.add_done_callback(_seen)
            return False
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({future}, timeout=left)
    return True


async def all_over(tasks: set[asyncio.Task[None]], within: float) -> None:
    """Wait until there are none; those that are not done within so many seconds are cancelled."""
    if tasks:
        await asyncio.wait(tasks, timeout=within)
    while tasks:
        for one in tasks:
            one.cancel()
        await asyncio.wait(tasks)


async def insist(future: asyncio.Future[T]) -> T:
    """Wait for `future` even while we are being cancelled: for the steps of a clean-up that must not be left out."""
    await settled(future)
    return future.result()


def _check(loop: asyncio.AbstractEventLoop) -> None:
    """In a forked copy nothing can be waited for that the original had begun."""
    if forked_copies.is_lost(loop):
        raise asyncio.CancelledError("this is a forked copy")


def check_loop() -> None:
    """Raises `OSError`: this process has no descriptors for an event loop. asyncio itself would leave one that is half
    made, and complains when it is collected."""
    one, other = socket.socketpair()
    with one, other, select.epoll():
        pass


def is_short() -> bool:
    """Whether this process lacks descriptors just now."""
    try:
        check_loop()
    except OSError:
        return True
    return False


def anyio_shield() -> contextlib.AbstractContextManager[object]:
    """A cancelled anyio scope cancels again and again: that is one wish, not many."""
    if "anyio._backends._asyncio" not in sys.modules:
        return contextlib.nullcontext()  # nobody is in a scope; and what clean-up needs is not imported during it
    import anyio

    return anyio.CancelScope(shield=True)


def raise_soon(exc: BaseException) -> None:
    """Raise it in a turn of the loop of its own: who ends the program (Ctrl-C, `sys.exit()`) while we call the caller's
    code shall not end our own work in its middle, which nobody would take up again."""

    def out() -> None:
        raise exc

    loop = asyncio._get_running_loop()
    if loop is None:  # the caller's code has forked, and this is the copy, whose loop does not run
        raise exc
    loop.call_soon(out)


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _settle_by(waiter: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    settle(waiter, None, None)


def nothing(*_: object) -> None:
    """The callback of who needs none, or shall be told nothing more."""


def settle(future: asyncio.Future[Any], value: Any, exc: BaseException | None) -> None:
    """Tell who waits for it, unless nobody does any more."""
    if future.done():
        return
    if exc is None:
        future.set_result(value)
    else:
        future.set_exception(exc)
