"""A plug-in that ends a run of tests in which one hangs, with the stacks of all threads: each test, with its fixtures,
has `LONGEST` seconds, and so have the collection of all and the end of the run.

By a timer of the kernel and a signal of its own: a test may use SIGALRM and its timer itself, hang in C code that holds
the interpreter lock, or block all signals (then SIGKILL comes, without stacks). The thread of pytest's own
`faulthandler_timeout` would make each fork one of a process with threads, which Python 3.12 and later warn of.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import struct
import time

import pytest

LONGEST = 300.0  # seconds
DEAF = 20.0  # ... until one is killed that the signal has not ended
SIGNAL = signal.SIGRTMAX  # which nobody else uses here, and which ends a process that does not handle it

_libc = ctypes.CDLL(None, use_errno=True)


class Timer:
    """timer_create(2): sends this process a signal once. A forked copy has none of it."""

    def __init__(self, signum: int) -> None:
        self._id = ctypes.c_void_p()
        event = struct.pack("Pii48x", 0, signum, 0)  # struct sigevent; the last 0 is SIGEV_SIGNAL
        if _libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(self._id)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def start(self, seconds: float) -> None:
        """From now on; 0: not at all."""
        whole, rest = divmod(seconds, 1)
        if _libc.timer_settime(self._id, 0, struct.pack("4l", 0, 0, int(whole), int(rest * 1e9)), None):
            raise OSError(ctypes.get_errno(), "timer_settime")

    def left(self) -> float:
        """Seconds until then; 0: it was not started."""
        found = ctypes.create_string_buffer(32)
        if _libc.timer_gettime(self._id, found):
            raise OSError(ctypes.get_errno(), "timer_gettime")
        whole: int
        rest: int
        _, _, whole, rest = struct.unpack("4l", found.raw)
        return whole + rest / 1e9


class Limit:
    """Of the step that begins at the last of these."""

    def __init__(self) -> None:
        faulthandler.register(SIGNAL, file=os.dup(2), chain=True)  # that of a test is captured
        self.polite, self.last = Timer(SIGNAL), Timer(signal.SIGKILL)
        self._begin()

    def _begin(self) -> None:
        self.polite.start(LONGEST)
        self.last.start(LONGEST + DEAF)

    def pytest_collection(self) -> None:
        self._begin()

    def pytest_runtest_logstart(self) -> None:
        self._begin()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self) -> None:
        self._begin()  # where others run the tests

    def pytest_unconfigure(self) -> None:
        self._begin()

    def pytest_enter_pdb(self) -> None:
        for one in (self.polite, self.last):
            one.start(0)


limit: Limit


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    global limit
    limit = Limit()
    config.pluginmanager.register(limit)
