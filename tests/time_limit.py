"""A plug-in that ends a process of tests in which one hangs, with the stacks of all threads: each test, with its
fixtures, has `LONGEST` seconds, and so have the collection of all and the end of the run. Under xdist that test alone
fails, and the rest go on in another runner; its report has the stacks, and what it had started, which is ended, too.

By a timer of the kernel and a signal of its own: a test may use SIGALRM and its timer itself, hang in C code that holds
the interpreter lock, or block all signals (then SIGKILL comes, without stacks). The thread of pytest's own
`faulthandler_timeout` would make each fork one of a process with threads, which Python 3.12 and later warn of. The
process that has started xdist's runners forks nothing for tests: it has a thread, which comes before these timers.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aioelastic.testing._process_tree import descendants

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

    def __init__(self, stacks: str | None, later: float) -> None:
        # stderr of a test is captured
        where = os.dup(2) if stacks is None else os.open(stacks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        if stacks is not None:
            os.write(where, f"{os.getpid()}\n".encode())
        faulthandler.register(SIGNAL, file=where, chain=True)
        self._later = later
        self.polite, self.last = Timer(SIGNAL), Timer(signal.SIGKILL)
        self._begin()

    def _begin(self) -> None:
        self.polite.start(LONGEST + self._later)
        self.last.start(LONGEST + self._later + DEAF)

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


class Watch:
    """Of xdist's runners, by the process that has started them."""

    def __init__(self) -> None:
        self._files = Path(tempfile.mkdtemp())  # of each runner: its pid, and stacks
        self._lock = threading.Condition()
        self._until: dict[str, float] = {}  # by runner
        self._seen: dict[str, str] = {}  # what a runner that hung had started
        self._ended = False
        self._thread = threading.Thread(target=self._watch, name="time-limit", daemon=True)
        self._thread.start()

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["stacks"] = str(self._files / node.gateway.id)

    def pytest_testnodeready(self, node: Any) -> None:
        self._begin(node)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._begin(report.node)

    def pytest_testnodedown(self, node: Any) -> None:
        with self._lock:
            self._until.pop(node.gateway.id, None)

    def pytest_handlecrashitem(self, report: Any) -> None:
        name = report.node.gateway.id
        with contextlib.suppress(OSError):
            report.longrepr += "\n" + (self._files / name).read_text().partition("\n")[2]
        report.longrepr += self._seen.pop(name, "")

    def pytest_unconfigure(self) -> None:
        with self._lock:
            self._ended = True
            self._lock.notify()
        self._thread.join()
        shutil.rmtree(self._files)

    def _begin(self, node: Any) -> None:
        with self._lock:
            self._until[node.gateway.id] = time.monotonic() + LONGEST
            self._lock.notify()

    def _watch(self) -> None:
        while not self._ended:
            with self._lock:
                name, until = min(self._until.items(), key=lambda one: one[1], default=("", math.inf))
                left = until - time.monotonic()
                if left > 0:
                    self._lock.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                del self._until[name]
            self._end(name)

    def _end(self, name: str) -> None:
        """A runner that hangs, and what it has started."""
        pid = int((self._files / name).read_text().partition("\n")[0])
        with contextlib.ExitStack() as stack:
            others = []
            told = "\nwhat it had started:\n"
            for one in descendants(pid):
                with contextlib.suppress(ProcessLookupError):
                    others.append(os.pidfd_open(one))
                    stack.callback(os.close, others[-1])
                    told += "".join(_told(one))
            self._seen[name] = told
            runner = os.pidfd_open(pid)
            stack.callback(os.close, runner)
            for signum in (SIGNAL, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(runner, signum)
                if _has_ended(runner, DEAF):
                    break
            for one in others:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(one, signal.SIGKILL)


def _told(pid: int) -> Iterator[str]:
    """Lines about a process: its words, where it waits, and stacks where py-spy or the kernel shows them."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        yield f"{pid} {words[:1000]}\n"
    if spy := shutil.which("py-spy"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            yield subprocess.run([spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=10).stdout
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            yield f"    thread {thread.name} waits in {(thread / 'wchan').read_text()}\n"
            yield "".join(f"        {line}\n" for line in (thread / "stack").read_text().splitlines())


def _has_ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


limit: Limit


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    global limit
    stacks = getattr(config, "workerinput", {}).get("stacks")
    has_runners = bool(getattr(config.option, "numprocesses", None))
    # a runner is ended by who has started it, if that lives
    limit = Limit(stacks, 4 * DEAF if has_runners else 2 * DEAF if stacks else 0.0)
    config.pluginmanager.register(limit)
    if has_runners:
        config.pluginmanager.register(Watch())
