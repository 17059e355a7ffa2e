"""Functions that run in executors in tests; what a thread needs of its test is in module variables."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import aioelastic

begun = threading.Semaphore(0)  # released by each that has begun
release = threading.Event()  # what those wait for that do not heed stopping()
order: list[int] = []


def fresh() -> None:
    """As at first."""
    global begun, release
    begun, release = threading.Semaphore(0), threading.Event()
    order.clear()


def where() -> tuple[int, str]:
    return os.getpid(), threading.current_thread().name


def told() -> dict[str, Any]:
    return {
        "who": (aioelastic.rank(), aioelastic.world_size(), aioelastic.local_rank(), aioelastic.attempt()),
        "mine": os.environ.get("MINE"),
        "rank": os.environ.get("RANK"),
        "cwd": os.getcwd(),
    }


def outside() -> tuple[Any, str]:
    return os.environ.get("MINE"), os.getcwd()


def nobody() -> None:
    try:
        aioelastic.rank()
    except RuntimeError:
        return
    raise AssertionError("it believes that it is a worker")


def same(value: Any) -> Any:
    return value


def heeds() -> str:
    stop = aioelastic.stopping()
    assert not stop
    assert not stop.wait(0)
    begun.release()
    assert stop.wait()
    assert stop
    assert stop.wait(0)
    return "saved"


async def heeds_async() -> str:
    stop = aioelastic.stopping()
    begun.release()
    await stop
    await stop
    return "saved"


def heeds_and_says(path: str) -> str:
    """In another process: opens that named pipe when it has begun."""
    stop = aioelastic.stopping()
    assert not stop
    os.close(os.open(path, os.O_WRONLY))
    assert stop.wait()
    assert stop
    return "saved"


async def heeds_and_says_async(path: str) -> str:
    stop = aioelastic.stopping()
    os.close(os.open(path, os.O_WRONLY))
    await stop
    return "saved"


def ignores() -> str:
    begun.release()
    release.wait()
    return "late"


def ignores_and_fails() -> None:
    begun.release()
    release.wait()
    raise ValueError("late")


def waits_then_fails(path: str) -> None:
    with open(path) as file:
        file.read()
    raise ValueError(aioelastic.rank())


def in_turn() -> int:
    order.append(aioelastic.rank())
    return aioelastic.rank()


def recorded() -> None:
    aioelastic.record(_raises)()


def _raises() -> None:
    raise LookupError("recorded")


def forks() -> list[int]:
    import asyncio

    from helpers import QUIET

    result = asyncio.run(aioelastic.supervise(aioelastic.Function(aioelastic.rank), 3, start="fork", logs=QUIET))
    return [one.value for one in result]


def leaves(code: Any) -> None:
    sys.exit(code)


class Inline(Executor):
    """Runs everything in `submit`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as exc:
            future.set_exception(exc)
        return future


class Bare:
    """No `Executor`, but it has `submit`."""

    submit = Inline.submit


class Held(Executor):
    """Keeps what it is given, until it is told to do something with it."""

    def __init__(self) -> None:
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if fn is not int:  # a question, not a job
            self.held.append((future, fn))
        return future
