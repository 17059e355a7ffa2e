"""What a worker needs of whoever keeps it: a group, or an executor's pool."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .events import Event
    from .remains import Process
    from .spec import Logs, Std, Stop
    from .streams import FileSink, Tap
    from .watch import Census, Poller
    from .worker import Worker


class Keeper(Protocol):
    """Keeps workers. Everything is called on its loop."""

    loop: asyncio.AbstractEventLoop
    run_id: str
    logs: Logs
    stop_policy: Stop
    census: Census
    poller: Poller

    def emit(self, event: Event) -> None: ...

    def taps(self, worker: Worker, std: Std) -> list[Tap]: ...

    def file_sink(self, worker: Worker, std: Std) -> FileSink | None: ...

    def tap_trouble(self, tap: object, exc: Exception) -> None: ...

    def exited(self, worker: Worker) -> None: ...

    async def before_stop(self, worker: Worker) -> None: ...

    def settled(self, worker: Worker) -> None: ...

    def leaked(self, process: Process, worker: Worker | None) -> None: ...

    def background(self, work: Coroutine[Any, Any, None]) -> None: ...
