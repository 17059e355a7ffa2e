"""Who am I? What user code inside any worker may ask, and tell."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from ...system.descriptors import shut

if TYPE_CHECKING:
    import socket

NO_GUARD = 'a worker imports your main script: put what starts workers below if __name__ == "__main__":'
importing_main = False  # while the caller's main module is imported here: it must not start workers of its own
channel: socket.socket | None = None  # to the supervisor; a function worker's own
serving = False  # tasks of an executor come by it
_tell_ready: Callable[[], None] | None = None
_pid = 0  # of who has the channel: copies that it forks are not the worker
_cookie = b""  # which socket of the kernel's it is
_SO_COOKIE = 57  # socket(7); Python does not name it


def take(sock: socket.socket, tell_ready: Callable[[], None]) -> None:
    """It is the channel.

    Args:
        tell_ready: tells the supervisor by it that the worker has set itself up.
    """
    global channel, _cookie, _pid, _tell_ready
    channel, _tell_ready, _pid = sock, tell_ready, os.getpid()
    _cookie = sock.getsockopt(1, _SO_COOKIE, 8)  # 1: SOL_SOCKET


def check_channel() -> None:
    """Whether it is what it was: somebody's code may have closed it, and have something else by its number, to which
    nothing of ours shall be written. Raises `OSError`."""
    assert channel is not None
    if channel.getsockopt(1, _SO_COOKIE, 8) != _cookie:
        raise OSError(errno.EBADF, "the channel to the supervisor was closed by the code that runs here")


def is_copy() -> bool:
    """Whether the worker has forked this process."""
    return channel is not None and os.getpid() != _pid


def rank() -> int:
    """This worker's rank, 0 to `world_size() - 1`.

    Raises:
        RuntimeError: this is no worker.
    """
    return _number("RANK")


def world_size() -> int:
    """How many workers the whole group has. Raises as `rank`."""
    return _number("WORLD_SIZE")


def local_rank() -> int:
    """This worker's rank among those of this machine. Raises as `rank`."""
    return _number("LOCAL_RANK")


def attempt() -> int:
    """0 for the first start of this worker, 1 after its first restart, and so on. Raises as `rank`."""
    return _number("ATTEMPT")


def ready() -> None:
    """Tell the supervisor that this function worker has set itself up (event `Ready`). Does nothing elsewhere, nor in a
    process that the worker has forked."""
    told = here.get()
    if told is not None:
        told.ready()
    elif _tell_ready is not None and not is_copy():
        _tell_ready()


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
    """Whether this worker was asked to stop: true or false, or to be waited for. Made by `stopping`."""

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("call aioelastic.stopping() first in the main thread: only there are signals handled")
        self._asked = False
        # it stays readable once it was written, for any number of waiters
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._before: Any = None  # what was done at that signal
        self._signum = 0
        self.catch()

    def catch(self) -> None:
        """Be asked by the signal that stops this worker. That of the zygote which made it was another, perhaps."""
        own = int(os.environ.get("AIOELASTIC_STOP_SIGNAL", signal.SIGTERM))
        if own == self._signum:
            return
        if self._signum and signal.getsignal(self._signum) == self._ask:
            signal.signal(self._signum, self._before or signal.SIG_DFL)
        self._before, self._signum = signal.signal(own, self._ask), own

    def __bool__(self) -> bool:
        return self._asked

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until asked, at most `timeout` seconds; from any thread. Returns whether it was asked.

        Args:
            timeout: seconds; None, or infinity, for no limit.

        Raises:
            SpecError: `timeout` is no time-out.
        """
        from ...model.validation import check_timeout  # few workers need it, and all would wait for it
        from ..wire.datagrams import readable  # as above

        seconds = check_timeout("timeout", timeout)
        return self._asked or readable(seconds, self._fd)

    def __await__(self) -> Generator[Any, None, None]:
        from ..wire.sent_objects import readable  # as above

        return readable(self._fd).__await__()

    def renew(self) -> None:
        """In a forked copy of a process: who asks the other does not ask this one."""
        fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        os.dup2(fresh, self._fd, inheritable=False)
        shut(fresh)

    def _ask(self, *_: object) -> None:
        self._asked = True
        os.eventfd_write(self._fd, 1)


def forget(of_program: bool) -> None:
    """In a forked copy of a process: none of this is ours, but for what imports of a zygote have made."""
    global _stopping, channel, serving, importing_main, _tell_ready
    if channel is not None:
        channel.close()
    channel = _tell_ready = None
    serving = importing_main = False
    if _stopping is not None:
        _stopping.renew()
    if of_program:
        _stopping = None  # its handler is gone
    here.set(None)


def catch() -> None:
    """In a worker whose variables are set: what a preloaded module holds is asked by this worker's stop signal."""
    if _stopping is not None:
        _stopping.catch()


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
