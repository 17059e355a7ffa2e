"""A forked copy of the program owns nothing of it: one registry of what lives, and its end in the copy.

fork(2) copies descriptors, and with them the hold on sockets, pipes and epoll sets of the original: what the copy takes
out of such a set is out of the original's, too, and who waits for the original's end waits for the copy's as well. So
in the copy, before anything else runs in it, each live thing closes what it has and does nothing from then on; and the
event loops that it lived on get sets of their own, since even closing such a loop would make the original's deaf.
Numbers of closed descriptors stay taken until those loops are gone, which may still speak of them.
"""

from __future__ import annotations

import _ctypes
import contextlib
import os
import select
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .descriptors import shut

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

C = TypeVar("C", bound=Callable[[], object])


class Held(Protocol):
    """What lives. Those that belong to an event loop have it as `loop`."""

    def disown(self) -> Iterable[int]:
        """In a forked copy: do nothing from now on, wait for nothing, take no lock. Returns descriptors to be closed;
        nobody else closes them."""


class Owned:
    """What the calls of are for the program that has it, and not for its copies.

    Attributes:
        lost: what they raise, in a copy.
    """

    lost: RuntimeError | None = None

    def check_ours(self) -> None:
        """Raises `RuntimeError`: this is a forked copy."""
        if self.lost is not None:
            raise self.lost


_held: weakref.WeakSet[Held] = weakref.WeakSet()
_calls: list[Callable[[], object]] = []
_running: AbstractEventLoop | None = None  # of the thread that forks
_lost: weakref.WeakSet[AbstractEventLoop] = weakref.WeakSet()
_is_copy = False
_kept: list[list[int]] = []  # numbers that stay taken


def register(one: Held) -> None:
    """It lives from now on, until it is collected."""
    _held.add(one)


def living(*kinds: type[Held]) -> list[Held]:
    """Those of these kinds that live now."""
    return [one for one in list(_held) if isinstance(one, kinds)]


def in_copies(call: C) -> C:
    """Have `call`, which renews the state of a module, made first of all in a forked copy; a decorator, too."""
    _calls.append(call)
    return call


def is_lost(loop: AbstractEventLoop) -> bool:
    """Whether we are a copy, and something of the original's lived on this loop: nothing will come on it any more."""
    return _is_copy and loop in _lost


def error(what: str) -> RuntimeError:
    """What is raised for a call of something of the original's, such as `group 'x'`."""
    return RuntimeError(f"this is a forked copy of the program that started {what}: it owns nothing of it")


def forget() -> None:
    """This copy never goes on in a loop of the original's: what they can speak of need not stay taken."""
    for numbers in _kept:
        for fd in numbers:
            shut(fd)
        numbers.clear()


def _before() -> None:
    global _running
    events = sys.modules.get("asyncio.events")  # who has not imported it has no loop
    _running = events._get_running_loop() if _held and events is not None else None


def _in_parent() -> None:
    global _running
    _running = None


def _in_child() -> None:
    global _running, _is_copy
    running, _running = _running, None
    held = list(_held)  # before the calls, which may let go of the last that has one of them
    for call in _calls:
        call()
    _held.clear()
    if not held:
        return
    _is_copy = True
    loops = {id(one): one for one in (running, *(getattr(one, "loop", None) for one in held)) if one is not None}
    numbers: set[int] = set()
    try:
        for one in held:
            numbers.update(one.disown())
    finally:
        _close(numbers, [one for one in loops.values() if not one.is_closed()])


def _close(numbers: set[int], loops: list[AbstractEventLoop]) -> None:
    """What none of the loops can speak of is closed; else its number stays taken by something that is never ready."""
    if not loops:
        for fd in numbers:
            shut(fd)
        return
    null = _never_ready(numbers)
    kept = []
    for fd in numbers:
        try:
            if null is not None and fd != null.fileno():
                os.dup2(null.fileno(), fd, inheritable=False)
                kept.append(fd)
        except OSError:  # above the limit of now: nobody gets that number
            shut(fd)
    if null is not None:
        null.close()
    _kept.append(kept)
    gone = [len(loops)]
    for loop in loops:
        _lost.add(loop)
        try:
            part(loop)
        except OSError:  # it cannot have one
            _blind(loop)
        weakref.finalize(loop, _loop_gone, gone, kept).atexit = False


def _never_ready(numbers: set[int]) -> select.epoll | None:
    """Something that is never ready. Where no descriptor is left, some of these are closed for it; None: there is none
    though all of them are."""
    while True:
        try:
            return select.epoll()
        except OSError:
            if not numbers:
                return None
            shut(numbers.pop())


def _loop_gone(gone: list[int], kept: list[int]) -> None:
    gone[0] -= 1
    if not gone[0]:
        for fd in kept:
            shut(fd)
        kept.clear()


def part(loop: Any) -> None:
    """Give the copy of a loop an epoll set, and wake-up sockets, of its own. What others watch by it stays in it."""
    if hasattr(loop, "_get_backend_id"):
        _part_uvloop(loop)
        return
    wakeups = [one for name in ("_ssock", "_csock") if (one := getattr(loop, name, None)) is not None]
    if len(wakeups) == 2:
        for one, theirs in zip(socket.socketpair(), wakeups, strict=True):
            with one:
                one.setblocking(False)
                os.dup2(one.fileno(), theirs.fileno(), inheritable=False)
    if hasattr(getattr(loop, "_selector", None), "fileno"):
        number = loop._selector.fileno()
        with select.epoll() as fresh:
            for fd, mask in _watched(number):
                if fd == (wakeups[0].fileno() if wakeups else -1) or not _is_end_of_pair(fd):
                    with contextlib.suppress(OSError):
                        fresh.register(fd, mask)
            os.dup2(fresh.fileno(), number, inheritable=False)


def _blind(loop: Any) -> None:
    """What its copy shares with the original is closed: it is of no use then, and no harm."""
    shared: list[Any] = [getattr(loop, name, None) for name in ("_selector", "_ssock", "_csock")]
    for one in shared:
        if hasattr(one, "fileno"):
            shut(one.fileno())


# `ctypes` itself takes a millisecond to import


class _Address(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "P"


class _Object(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "O"


class _Call(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI
    _restype_ = _Address


def _part_uvloop(loop: Any) -> None:
    """By libuv's own means: it has rings in shared memory, too."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.set_wakeup_fd(-1)  # ours shall not wake the original
    module = sys.modules["uvloop.loop"]
    try:
        fork: Any = _Call(_ctypes.dlsym(_ctypes.dlopen(str(module.__file__), 0), "uv_loop_fork"))
        pointer_of: Any = _Call(_ctypes.dlsym(_ctypes.dlopen(None, 0), "PyCapsule_GetPointer"))  # type: ignore[arg-type]
        pointer_of.argtypes, fork.argtypes = (_Object, _Address), (_Address,)
        fork(pointer_of(module.libuv_get_loop_t_ptr(loop), None))
    except (AttributeError, OSError):
        return  # of a libuv that is not its own


def _watched(epoll: int) -> list[tuple[int, int]]:
    """What is in an epoll set, and for which events (proc(5))."""
    found = []
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{epoll}", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if words[:1] == ["tfd:"]:
                found.append((int(words[1]), int(words[3], 16)))
    return found


def _is_end_of_pair(fd: int) -> bool:
    """Whether it is one of a socketpair(2), whose other end is the original's."""
    mine = -1
    try:
        mine = os.dup(fd)
        one = socket.socket(fileno=mine)
    except OSError:
        if mine >= 0:
            shut(mine)  # it is no socket
        return False
    with one:
        try:
            return one.family == socket.AF_UNIX and not one.getsockname() and not one.getpeername()
        except OSError:
            return False


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
