"""The standard input of one worker: a pipe, and what writes `Command.input` into it.

Imported, with what a dialogue needs, before a group of such workers starts, and not where there are none: a run of a
command comes up sooner without it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable
from typing import Protocol

from ..planning import WorkerPlan
from ..streams import Dialogue, DialogueTap, StandardInput

PART = 65_536  # characters of a text that are encoded at a time

__all__ = ["Dialogue", "DialogueTap", "WorkerInput"]


class InputOwner(Protocol):
    """Hears what the caller's own input raises."""

    loop: asyncio.AbstractEventLoop

    def input_failed(self, problem: BaseException) -> None: ...


class WorkerInput:
    """From the start of a worker to its end.

    Args:
        fd: our end of the pipe.

    Attributes:
        pipe: what is written to.
        feeding: the task that writes what was given, while it is at it.
    """

    def __init__(self, plan: WorkerPlan, owner: InputOwner, fd: int) -> None:
        self._who = f"worker {plan.rank}"
        self.pipe = StandardInput(owner.loop, fd, self._who, plan.tty is not None)
        self._given = plan.input
        self._owner = owner
        self.feeding: asyncio.Task[None] | None = None
        if self._given is not None:
            self.feeding = owner.loop.create_task(self._feed())
            self.feeding.add_done_callback(self._fed)

    def end(self) -> None:
        """The worker has ended."""
        self.pipe.ended()
        if self.feeding is not None:
            self.feeding.cancel()

    async def _feed(self) -> None:
        async with self.pipe, contextlib.AsyncExitStack() as stack:
            if not isinstance(self._given, AsyncIterable):
                assert isinstance(self._given, bytes | str)
                await self._send(self._given)
                return
            if hasattr(self._given, "aclose"):
                stack.push_async_callback(self._given.aclose)
            async for part in self._given:
                if not await self._send(part):
                    return

    async def _send(self, part: bytes | str) -> bool:
        """False: as `yes | head`, it has read enough. Such an error of the caller's iterable is another thing."""
        try:
            if not isinstance(part, str):
                await self.pipe.send(part)
                return True
            for at in range(0, len(part), PART):  # a copy of a large text for each worker would take too much memory
                await self.pipe.send(part[at : at + PART].encode())
        except BrokenPipeError:
            return False
        return True

    def _fed(self, task: asyncio.Task[None]) -> None:
        self.feeding = None
        if not task.cancelled():
            problem = task.exception()
        elif not task.cancelling():  # the caller's iterable has waited for something that was cancelled
            problem = RuntimeError(f"the input of {self._who} was cancelled")
        else:
            problem = None
        if problem is not None:
            self._owner.input_failed(problem)
