"""What the parts of the supervisor need of each other: one protocol for each need."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from ..events import Event
    from ..model.failures import Stage
    from ..model.leftovers import Process
    from ..model.logs import Logs, Std
    from ..model.states import State
    from ..model.stop_policy import Stop
    from ..processes.census import Census
    from ..streams import FileSink, Tap
    from ..system.deadlines import Deadline
    from ..watch import Poller


class StopProgress:
    """What was done to end one worker.

    Attributes:
        stage: how far its cascade came.
        sent: signals that the program sent it through us.
    """

    def __init__(self) -> None:
        self.stage: Stage = "asked"
        self.sent: set[int] = set()

    def sending(self, signum: int, reached: bool) -> bool:
        """Note it if it has `reached` the worker, and return that."""
        if reached:
            self.sent.add(signum)
        return reached


class Stoppable(Protocol):
    """What the cascade needs of a worker."""

    pid: int | None
    owner: str
    state: State
    deadline: Deadline
    stop_progress: StopProgress

    def has_exited(self) -> bool: ...

    def signal_group(self, signum: int) -> bool: ...

    def kill(self, leader_only: bool) -> None: ...

    def give_up(self, state: str, wchan: str) -> None: ...


W_contra = TypeVar("W_contra", contravariant=True)


class WorkerOwner(Protocol[W_contra]):
    """Keeps workers. Everything is called on its loop."""

    loop: asyncio.AbstractEventLoop
    run_id: str
    logs: Logs
    stop_policy: Stop
    census: Census
    poller: Poller

    def emit(self, event: Event) -> None: ...

    def taps(self, worker: W_contra, std: Std) -> list[Tap]: ...

    def file_sink(self, worker: W_contra, std: Std) -> FileSink | None: ...

    def tap_trouble(self, tap: object, exc: BaseException) -> None: ...

    def exited(self, worker: W_contra) -> None: ...

    async def before_stop(self, worker: W_contra) -> None: ...

    def settled(self, worker: W_contra) -> None: ...

    def input_failed(self, problem: BaseException) -> None: ...

    def leaked(self, process: Process, worker: W_contra | None) -> None: ...

    def background(self, work: Coroutine[Any, Any, None]) -> None: ...
