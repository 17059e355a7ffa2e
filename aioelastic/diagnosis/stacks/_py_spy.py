"""py-spy, where it is installed: the stacks of a Python process that cannot write them by itself."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from collections.abc import Mapping
from functools import partial

from ...launch import DirectLauncher, DirectProcess, RawExit
from ...model.logs import Std
from ...planning import Identity, WorkerPlan, new_run_id
from ...system import forked_copies
from ...system.deadlines import Deadline
from ...system.descriptors import shut
from ...system.helper_thread import HelperThread
from ...system.waiting import finished
from ...watch import Poller

AT_ONCE = 2  # each takes three descriptors and most of a CPU, for some 50 ms
LIMIT = 4_194_304  # bytes of its output
SHOWN = 500  # characters of its complaint
LAST = 1.0  # seconds for it to die after SIGKILL


def program() -> str | None:
    """Its path: beside this Python, or on PATH."""
    places = (os.path.join(place, "py-spy") for place in (os.path.dirname(sys.executable), *os.get_exec_path()))
    return next((one for one in places if os.access(one, os.X_OK) and os.path.isfile(one)), None)


class Spy:
    """Asks py-spy, for a few processes at a time."""

    def __init__(self, environ: Mapping[str, str], thread: HelperThread, poller: Poller) -> None:
        self._environ = environ
        self._thread = thread
        self._poller = poller
        self._launcher: DirectLauncher | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def ask(self, pid: int, like: WorkerPlan, why: str) -> str:
        """The stacks of `pid`, or why there are none. Being cancelled ends it, and leaves nothing."""
        path = program()
        if path is None:
            return f"no Python stack: {why}; py-spy, which could look at it from outside, is not installed"
        # it only reads: a process that is stopped for a look stays so if the looking one is killed
        argv = (path, "dump", "--nonblocking", "--pid", str(pid))
        overlay = {"RUST_BACKTRACE": "0", "NO_COLOR": "1"}
        identity = Identity.of(new_run_id("py-spy"), like.rank, like.attempt)  # it is nothing of the worker's
        plan = dataclasses.replace(
            like,
            identity=identity,
            argv=argv,
            program=path,
            cwd="/",
            stdin="null",
            overlay=overlay,
            pipes=Std.ALL,
            function=None,
        )
        async with self._turns:
            self._launcher = self._launcher or DirectLauncher(self._environ, self._thread, self._poller)
            try:
                exit, out, err = await _run(self._launcher, plan, self._poller)
            except OSError as exc:
                return f"no Python stack: {why}; py-spy could not start: {exc.strerror or exc}"
        if exit.status == 0 and out.strip():
            return out
        code = "unknown" if exit.status is None else os.waitstatus_to_exitcode(exit.status)
        words = " ".join((err.strip() or out.strip()).split())[:SHOWN]
        return f"no Python stack: {why}; py-spy failed (exit code {code}): {words}"


async def _run(launcher: DirectLauncher, plan: WorkerPlan, poller: Poller) -> tuple[RawExit, str, str]:
    starting = launcher.start(plan)
    cancelled: asyncio.CancelledError | None = None
    try:
        await finished(starting)
    except asyncio.CancelledError as exc:
        cancelled = exc
    running = _Running(starting.result(), poller)
    try:
        if cancelled is not None:
            raise cancelled
        exit = await asyncio.shield(running.ended)
        return exit, running.text(Std.OUT), running.text(Std.ERR)
    finally:
        await running.end()


class _Running:
    """One process, its output, and its end, which is a future."""

    def __init__(self, process: DirectProcess, poller: Poller) -> None:
        self.ended: asyncio.Future[RawExit] = asyncio.get_running_loop().create_future()
        self._process = process
        self._poller = poller
        self._patience = Deadline()
        self._texts = {Std.OUT: bytearray(), Std.ERR: bytearray()}
        self._fds = {Std.OUT: process.stdout, Std.ERR: process.stderr}
        forked_copies.register(self)
        process.watch(self._on_exit)
        for std, fd in self._fds.items():
            assert fd is not None
            poller.add_reader(fd, partial(self._read, std))

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fds = [fd for fd in self._fds.values() if fd is not None]
        self._fds = dict.fromkeys(self._fds)
        return fds

    def text(self, std: Std) -> str:
        return self._texts[std].decode(errors="replace")

    async def end(self) -> None:
        """See that it has ended, at the latest now."""
        if not self.ended.done():
            self._process.send_signal(signal.SIGKILL)
            if not await self._patience.until(self.ended.done, LAST, grace=False):
                self._process.abandon()
        for std in self._fds:
            self._close(std)

    def _read(self, std: Std) -> bool:
        """Some of its output. False: there is none at the moment, or it was the last."""
        fd = self._fds[std]
        if fd is None:
            return False
        try:
            data = os.read(fd, 65_536)
        except BlockingIOError:
            return False
        if not data:
            self._close(std)
            return False
        if len(self._texts[std]) < LIMIT:
            self._texts[std] += data
        return True

    def _close(self, std: Std) -> None:
        fd, self._fds[std] = self._fds[std], None
        if fd is not None:
            self._poller.remove(fd)
            shut(fd)

    def _on_exit(self, raw: RawExit) -> None:
        self._process.reap()
        for std in self._fds:
            while self._read(std):
                pass
        if not self.ended.done():
            self.ended.set_result(raw)
        self._patience.notice()
