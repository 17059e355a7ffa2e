"""A supervisor in a process of its own, so that it can be struck as well."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from ..child.wire.datagrams import readable
from ..model.errors import SpecError
from ..model.validation import check_seconds
from ..system.descriptors import shut
from ._process_tree import descendants

STDOUT = {"pipe": "", "closed": ">&-", "full": ">/dev/full"}


class Program:
    """Runs Python source in a fresh interpreter for the time of a block; what is left of it then is killed.

    Only itself: what it has started is the business of the test.

    Args:
        source: the program.
        env: over our own environment.
        stdout: `"pipe"` (read by `line`), `"closed"` (it has no descriptor 1), `"full"` (each write fails with ENOSPC:
            /dev/full).
        before: words before the command, such as `pid_namespace()`.
        bound: seconds that each wait may take.

    Attributes:
        pid (int): of the interpreter (of the first of the words `before`, if there are any).

    Raises:
        SpecError: `stdout` or `bound` is not usable.

    Example::

        with Program(SOURCE) as program:
            pid = int(program.line("worker"))
            program.kill()
        assert program.code == -signal.SIGKILL
    """

    def __init__(
        self,
        source: str,
        *,
        env: Mapping[str, str] | None = None,
        stdout: Literal["pipe", "closed", "full"] = "pipe",
        before: Sequence[str] = (),
        bound: float = 60.0,
    ) -> None:
        if stdout not in STDOUT:
            raise SpecError("stdout", stdout, "is not known", f"use one of {', '.join(map(repr, STDOUT))}")
        check_seconds("bound", bound)
        # a shell, for it is the only one that can be asked to close descriptor 1; it becomes the program
        shell = ["/bin/sh", "-c", f'exec "$@" {STDOUT[stdout]}', "sh"]
        self._argv = [*shell, *before, sys.executable, "-c", source]
        self._env = {**os.environ, **(env or {})}
        self._bound = bound
        self._output = bytearray()
        self._errors = bytearray()
        self._read_to = 0  # where the next line begins

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=self._env)
        self.pid = self._popen.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self._popen.stdout, self._popen.stderr):
            if stream is not None:
                stream.close()

    @property
    def output(self) -> str:
        """What it has written so far; complete after `wait`."""
        return self._output.decode(errors="replace")

    @property
    def errors(self) -> str:
        """The same of its standard error."""
        return self._errors.decode(errors="replace")

    @property
    def code(self) -> int | None:
        """How it ended, as `subprocess` tells it; None while it runs."""
        return self._popen.poll()

    def line(self, begin: str = "") -> str:
        """The rest of the next line of its output that begins so; those before it are passed over.

        Args:
            begin: how.

        Raises:
            AssertionError: it ended, or `bound` seconds passed, without one.
        """
        until = time.monotonic() + self._bound
        while True:
            line, newline, _ = self._output[self._read_to :].decode(errors="replace").partition("\n")
            if newline:
                self._read_to = self._output.index(b"\n", self._read_to) + 1
                if line.startswith(begin):
                    return line.removeprefix(begin).strip()
            elif not self._read(until):
                raise AssertionError(f"no line {begin!r}; output:\n{self.output}\nerrors:\n{self.errors}")

    def wait(self) -> int:
        """Wait for its end, and for the end of its output. Raises `AssertionError` after `bound` seconds."""
        until = time.monotonic() + self._bound
        while self._read(until):
            pass
        try:
            return self._popen.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end; output:\n{self.output}\nerrors:\n{self.errors}") from None

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has ended it, and its guardian has done what it is for."""
        guardians = []
        for pid, stat in descendants(self.pid).items():
            if stat[0].startswith("aio-"):
                with contextlib.suppress(ProcessLookupError):
                    guardians.append(os.pidfd_open(pid))
        self._popen.kill()
        self._popen.wait()
        for pidfd in guardians:
            readable(self._bound, pidfd)
            shut(pidfd)

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def cont(self) -> None:
        """SIGCONT."""
        self.send_signal(signal.SIGCONT)

    def send_signal(self, signum: int) -> None:
        """Any signal. Nothing happens if it has ended.

        Args:
            signum: its number, or a member of `signal.Signals`.
        """
        self._popen.send_signal(signum)

    def _read(self, until: float) -> bool:
        """Whether there was something. Nothing comes after the end, or after the time."""
        streams = [one for one in (self._popen.stdout, self._popen.stderr) if one is not None and not one.closed]
        ready, _, _ = select.select(streams, [], [], max(until - time.monotonic(), 0.0)) if streams else ([], [], [])
        for stream in ready:
            data = os.read(stream.fileno(), 65536)
            if not data:
                stream.close()
            (self._output if stream is self._popen.stdout else self._errors).extend(data)
        return bool(ready)
