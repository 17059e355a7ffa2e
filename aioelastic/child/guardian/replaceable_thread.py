"""Work that goes on in another thread when a call in it hangs.

One of two threads does the work, the other waits. A call that may hang is made in the thread that works, so that it
costs nothing where it does not; a timer (timerfd_create(2)) is set meanwhile. Should that expire, the
waiting thread takes over, and the other one waits in its place when its call has returned at last. Both live as long as
the process.
"""

from __future__ import annotations

import _thread
import os
import select
import struct

from ..kernel.libc import function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PATIENCE = 0.02  # seconds that a call may take: ten times as long as any that does not hang
_MONOTONIC, _FLAGS = 1, os.O_CLOEXEC | os.O_NONBLOCK  # time.h; TFD_CLOEXEC and TFD_NONBLOCK are the same
_ARMED = struct.pack("4q", 0, 0, 0, int(PATIENCE * 1e9))  # struct itimerspec


class Replaced(BaseException):
    """Of the thread in which this is raised: another does its work. Nothing of that may be touched any more."""


class ReplaceableThread:
    """Attributes:
        alone: there is no second thread, or no timer, and `call` must not be used.
        wakeup: an eventfd(2) that is readable when a call that had hung has returned (`late`).
            Between a call that hangs and its wakeup there is nobody to take over, and `call` must not be used.

    Raises:
        OSError: no descriptors are left.
    """

    def __init__(self, work: Callable[[], Any], took_over: Callable[[], None]) -> None:
        """Args:
        work: done in one of the threads, from the beginning each time.
        took_over: called before, in the thread that takes over.
        """
        self._work = work
        self._took_over = took_over
        self._set = function("timerfd_settime", holds=True)
        self._timer = function("timerfd_create")(_MONOTONIC, _FLAGS)
        self.wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.thread = 0  # that in which a call hangs, as the kernel numbers it
        self._late: tuple[Any, Any, OSError | None] | None = None
        self._calling: list[tuple[Any, int]] = []  # whoever takes it out of there, goes on: `pop` is atomic
        self._armed = False
        self._over = _thread.allocate_lock()
        self.alone = self._timer < 0  # not in every sandbox
        self._result: Any = None
        self._problem: BaseException | None = None

    def run(self) -> Any:
        """Until the work is done; its result, or what it raised. This thread only waits."""
        self._over.acquire()
        try:
            if not self.alone:
                _thread.start_new_thread(self._take_turns, (True,))
                _thread.start_new_thread(self._take_turns, (False,))
        except RuntimeError:  # no more threads
            self.alone = True
        if self.alone:
            self._take_turns(False)
        self._over.acquire()
        if self._problem is not None:
            raise self._problem
        return self._result

    def call(self, what: Any, function: Callable[[], Any]) -> Any:
        """The result of `function`, which may raise `OSError`; should it take too long, it is for `late`."""
        self._calling.append((what, _thread.get_native_id()))
        if not self._armed:
            self._armed = True
            self._set(self._timer, 0, _ARMED, None)
        result, problem = None, None
        try:
            result = function()
        except OSError as exc:
            problem = exc
        try:
            self._calling.pop()
        except IndexError:
            self._late = what, result, problem
            os.eventfd_write(self.wakeup, 1)
            raise Replaced from None
        if problem is not None:
            raise problem
        return result

    def late(self) -> tuple[Any, Any, OSError | None]:
        """After the wakeup: what was said of the call, and what came of it. From now on there is one to take over."""
        os.eventfd_read(self.wakeup)
        told, self._late = self._late, None
        assert told is not None
        return told

    def _take_turns(self, waits: bool) -> None:
        try:
            while True:
                if waits:
                    self._wait()
                    self._took_over()
                try:
                    self._result = self._work()
                    break
                except Replaced:
                    waits = True
        except BaseException as exc:  # it is raised in the thread that waits
            self._problem = exc
        self._over.release()

    def _wait(self) -> None:
        """Until a call takes too long: it is the same at two ticks of the timer. It is set as long as there are any."""
        ticks = select.poll()
        ticks.register(self._timer, select.POLLIN)
        seen: list[tuple[Any, int]] = []
        while True:
            ticks.poll()
            try:
                os.read(self._timer, 8)
            except OSError:
                pass  # the look itself counts
            self._armed = False  # before the look: a call that comes after it sets the timer itself
            there = self._calling[:]
            if there and seen and there[0] is seen[0]:
                try:
                    _, self.thread = self._calling.pop()
                    return
                except IndexError:
                    there = []  # it has just returned
            seen = there
            if there:
                self._armed = True
                self._set(self._timer, 0, _ARMED, None)
