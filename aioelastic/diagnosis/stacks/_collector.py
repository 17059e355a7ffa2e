"""The stacks of some workers at once, each within a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...child.worker.stack_dump import SIGNAL
from ...model.text import printable, told
from ...streams import iso_time
from ...system.helper_thread import HelperThread
from ...system.waiting import settled
from ...watch import Poller
from ._file_changes import Changes
from ._py_spy import Spy
from ._self_dump import NoStacks, Offer, look

if TYPE_CHECKING:
    from ...model.exits import Exit
    from ...planning import WorkerPlan

BOUND = 2.0  # seconds for all of it
QUIET = 0.005  # seconds without a write, after which it is worth asking the kernel whether the dump is complete


class Asked(Protocol):
    """A worker whose stacks are taken."""

    stacks: str | None

    @property
    def rank(self) -> int: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def plan(self) -> WorkerPlan: ...

    def send_signal(self, signum: int) -> bool: ...

    async def wait(self) -> Exit | None: ...


class Stacks:
    """Takes the stacks of one group's workers.

    Args:
        proc: the helper thread that reads /proc and starts processes.
        files: the one that writes log files.
        on_trouble: told when a file cannot be written.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proc: HelperThread,
        files: HelperThread,
        poller: Poller,
        environ: Mapping[str, str],
        on_trouble: Callable[[str, str, int], None],
    ) -> None:
        self._loop = loop
        self._proc = proc
        self._files = files
        self._on_trouble = on_trouble
        self._changes = Changes(poller)
        self._spy = Spy(environ, proc, poller)
        self._under_way: dict[Asked, asyncio.Task[str]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def take(self, workers: Iterable[Asked], bound: float) -> dict[int, str]:
        """rank → text, of all of them, in at most `bound` seconds. Each worker keeps its text too, and its file.

        One that is being looked at already is not bothered again; its text is the same for both who asked.
        """
        until = self._loop.time() + bound
        mine: list[asyncio.Task[str]] = []
        asked: dict[int, asyncio.Task[str]] = {}
        for worker in workers:
            task = self._under_way.get(worker)
            if task is None:
                task = self._under_way[worker] = self._start(self._one(worker, bound))
                task.add_done_callback(partial(self._done, worker))
                mine.append(task)
            asked[worker.rank] = task
        if mine:
            await asyncio.wait(mine)
        others = [one for one in asked.values() if not one.done()]
        if others:
            await asyncio.wait(others, timeout=max(until - self._loop.time(), 0))
        return {rank: _text(task, bound) for rank, task in asked.items()}

    async def close(self, within: float) -> None:
        """All workers are over: so is this, within so many seconds."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await settled(asyncio.gather(*self._tasks, return_exceptions=True), within)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _done(self, worker: Asked, task: asyncio.Task[str]) -> None:
        del self._under_way[worker]
        if not task.cancelled():
            at, path = time.time(), worker.plan.stacks_file
            worker.stacks = _text(task, 0)
            if path is not None:  # nobody waits for it: that disk may be why it hangs
                self._files.put(partial(self._append, path, f"--- {iso_time(at)}\n{worker.stacks.rstrip()}\n\n"))

    def _append(self, path: Path, text: str) -> None:
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as exc:
            self._files.tell(self._on_trouble, str(path), exc.strerror or str(exc), len(text))

    async def _one(self, worker: Asked, bound: float) -> str:
        part: list[str] = []  # what has come so far
        work = self._start(self._ask(worker, part))
        ended = self._start(worker.wait())
        try:
            await asyncio.wait({work, ended}, timeout=bound, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return printable(str(work.result()))  # names of functions, threads and files are of others' choice
            words = "it ended meanwhile" if ended.done() else f"it did not answer within {bound:g} s"
            return "\n".join(
                [*map(printable, part[-1:]), f"no Python stack: {words}" if not part else f"(cut off: {words})"]
            )
        finally:  # what they have to tidy up is waited for by `close`
            work.cancel()
            ended.cancel()

    async def _ask(self, worker: Asked, part: list[str]) -> str:
        assert worker.pid is not None
        found = await self._proc.submit(partial(look, worker.pid))
        if isinstance(found, Offer):
            return await self._listen(worker, found, part)
        if isinstance(found, NoStacks):
            return f"no Python stack: {found.why}"
        return await self._spy.ask(worker.pid, worker.plan, found.why)

    async def _listen(self, worker: Asked, offer: Offer, part: list[str]) -> str:
        """Send the signal, and read when the first is written, until it is out of its handler."""
        news = asyncio.Event()
        number = None
        try:
            try:
                number = self._changes.add(offer.path, news.set)
            except FileNotFoundError:
                raise
            except OSError:
                news.set()  # no more watches to be had: then by its quiet alone
            if not worker.send_signal(SIGNAL):
                return "no Python stack: it ended just now"
            await news.wait()
            while True:
                news.clear()
                await asyncio.sleep(QUIET)
                if not news.is_set():
                    text, busy = await self._proc.submit(offer.read)
                    if not busy:
                        return text
                    if text:
                        part[:] = [text]
        except (FileNotFoundError, ProcessLookupError):
            return "no Python stack: it ended, or became another program, just now"
        except OSError as exc:
            return f"no Python stack: {exc.strerror or exc}"
        finally:
            if number is not None:
                self._changes.remove(number)


def _text(task: asyncio.Task[str], bound: float) -> str:
    if not task.done():
        return f"no Python stack: it did not answer within {bound:g} s"
    if task.cancelled():
        return "no Python stack: nobody waited for it"
    problem = task.exception()
    return task.result() if problem is None else f"no Python stack: {told(problem)}"
