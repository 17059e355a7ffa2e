"""Each worker by the launcher that its plan names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ..thread import HelperThread
from ..watch import Poller
from ._contract import Launcher
from ._direct import DirectLauncher
from ._executor import ExecutorLauncher
from ._fork import ForkLauncher
from ._plan import WorkerPlan
from ._zygote import ZygoteLauncher


class Launchers:
    """The ways to start that a group has. See `Launcher`.

    Attributes:
        zygote: to be opened before it is used, and closed.
    """

    name = "by plan"

    def __init__(self, environ: Mapping[str, str], thread: HelperThread, poller: Poller) -> None:
        direct = DirectLauncher(environ, thread, poller)
        self.zygote = ZygoteLauncher(environ, poller)
        self.executor = ExecutorLauncher(thread)
        self._by_start: dict[str | None, Launcher] = {
            None: direct,
            "spawn": direct,
            "zygote": self.zygote,
            "fork": ForkLauncher(environ, poller),
            "executor": self.executor,
        }

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        """See `Launcher.start`."""
        return self._by_start[worker.start].start(worker)
