"""Each worker by the launcher that its plan names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from ..errors import SpecError
from ..thread import HelperThread
from ..watch import Poller
from ._contract import Launcher
from ._direct import DirectLauncher
from ._executor import ExecutorLauncher
from ._fork import ForkLauncher
from ._guardian import GuardianLauncher
from ._plan import WorkerPlan
from ._zygote import ZygoteLauncher

By: TypeAlias = Literal["guardian", "direct"]


def check_launcher(launcher: Launcher | By, start: object) -> None:
    """`supervise(launcher=)`, beside `start=`. Raises `SpecError`."""
    if isinstance(launcher, str):
        if launcher not in get_args(By):
            raise SpecError("launcher", launcher, "is none of ours", 'use "guardian" or "direct", or give a Launcher')
    elif not callable(getattr(launcher, "start", None)):
        raise SpecError("launcher", launcher, "cannot start anything", "give an object like aioelastic.launch.Launcher")
    elif not isinstance(start, str):
        raise SpecError("launcher", launcher, "would not use the executor", "leave out launcher, or start")


class Launchers:
    """The ways to start that a group has. See `Launcher`.

    Attributes:
        zygote: to be opened before it is used.
    """

    name = "by plan"

    def __init__(self, environ: Mapping[str, str], thread: HelperThread, poller: Poller) -> None:
        self._environ = environ
        self._poller = poller
        self._guardian: GuardianLauncher | None = None
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

    def open_guardian(self) -> int:
        """Have commands and fresh interpreters started by the guardian, where one can run; else directly.

        Returns:
            its session, 0 where none can run.
        """
        try:
            self._guardian = GuardianLauncher(self._environ, self._poller)
        except OSError:
            return 0
        self._by_start[None] = self._by_start["spawn"] = self._guardian
        return self._guardian.session

    def close(self) -> None:
        """The group needs them no more."""
        self.zygote.close()
        if self._guardian is not None:
            self._guardian.end()

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        """See `Launcher.start`."""
        return self._by_start[worker.start].start(worker)
