"""Who am I? What user code inside any worker may ask, and tell."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import socket

importing_main = False  # while the caller's main module is imported here: it must not start workers of its own
channel: socket.socket | None = None  # to the supervisor; a function worker's own
serving = False  # tasks of an executor come by it


def rank() -> int:
    """This worker's rank, 0 to `world_size() - 1`. `RuntimeError` outside a worker."""
    return _number("RANK")


def world_size() -> int:
    """How many workers the whole group has."""
    return _number("WORLD_SIZE")


def local_rank() -> int:
    """This worker's rank among those of this machine."""
    return _number("LOCAL_RANK")


def attempt() -> int:
    """0 for the first start of this worker, 1 after its first restart, and so on."""
    return _number("ATTEMPT")


def ready() -> None:
    """Tell the supervisor that this function worker has set itself up (event `Ready`). Does nothing elsewhere."""
    told = here.get()
    if told is not None:
        told.ready()
    elif channel is not None:
        from . import _socket, _wire

        _socket.send(channel, *_wire.encode(_wire.RUNS, ()))


def stopping() -> Stopping:
    """Whether this worker was asked to stop: true or false, `.wait(timeout)`, or `await` it.

    The first call makes the stop signal something to be noticed instead of the end; it is to be made in the main
    thread, before the signal may come. What is not done when the grace is over is lost. In an executor that the caller
    has lent no signal is needed, and the call may be made in any of its threads.

    Example::

        def train() -> None:
            stop = aioelastic.stopping()
            while not stop:
                step()
            save()

    Raises:
        RuntimeError: the first call was not made in the main thread.
    """
    global _stopping
    told = here.get()
    if told is not None:
        return told.stopping
    if _stopping is None:
        _stopping = Stopping()
    return _stopping


class Stopping:
    """See `stopping`."""

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("call aioelastic.stopping() first in the main thread: only there are signals handled")
        self._asked = False
        # it stays readable once it was written, for any number of waiters
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        signal.signal(int(os.environ.get("AIOELASTIC_STOP_SIGNAL", signal.SIGTERM)), self._ask)

    def __bool__(self) -> bool:
        return self._asked

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until asked, at most `timeout` seconds; from any thread. Returns whether it was asked."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return self._asked or bool(poll.poll(None if timeout is None else max(timeout, 0) * 1000))

    def __await__(self) -> Generator[Any, None, None]:
        import asyncio

        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        # a descriptor of its own: several tasks may wait
        fd = os.dup(self._fd)
        loop.add_reader(fd, settle, asked)
        try:
            yield from asked
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def _ask(self, *_: object) -> None:
        self._asked = True
        os.eventfd_write(self._fd, 1)


def settle(future: Any) -> None:
    """Wake who awaits it."""
    if not future.done():
        future.set_result(None)


def forget() -> None:
    """In a forked copy of a process: none of this is ours."""
    global _stopping, channel
    _stopping = channel = None
    here.set(None)


class Here(NamedTuple):
    """What a worker has that shares its process with others, instead of variables, a signal and a channel."""

    variables: Mapping[str, str | None]
    stopping: Stopping
    ready: Callable[[], object]


here: ContextVar[Here | None] = ContextVar("aioelastic_worker", default=None)
_stopping: Stopping | None = None


def variable(name: str) -> str | None:
    """A variable of this worker."""
    told = here.get()
    return os.environ.get(name) if told is None else told.variables.get(name)


def _number(name: str) -> int:
    value = variable(f"AIOELASTIC_{name}")
    if value is None:
        raise RuntimeError(f"this is no worker of aioelastic's: AIOELASTIC_{name} is not set")
    return int(value)
