"""Each worker by the launcher that its plan names."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from ..checks import has_method
from ..entry import Command
from ..errors import SpecError
from ..spec import GroupSpec
from ..thread import HelperThread
from ..watch import Poller
from ._contract import Launcher
from ._direct import DirectLauncher
from ._executor import ExecutorLauncher
from ._fork import ForkLauncher
from ._guardian import GuardianLauncher, left_to_guardian
from ._plan import WorkerPlan
from ._served import Lost
from ._zygote import ZygoteLauncher

By: TypeAlias = Literal["guardian", "direct"]

_DOUBTS: dict[str | None, str] = {
    "fork": 'a worker by start="fork" is a child of this program, and what it leaves behind is adopted by nobody',
    "executor": "what functions have started in the caller's executor is not known",
}


def check_launcher(launcher: Launcher | By, spec: GroupSpec) -> None:
    """`supervise(launcher=)`, beside the rest. Raises `SpecError`."""
    if isinstance(launcher, str):
        if launcher not in get_args(By):
            raise SpecError("launcher", launcher, "is none of ours", 'use "guardian" or "direct", or give a Launcher')
    elif not has_method(launcher, "start"):
        raise SpecError("launcher", launcher, "cannot start anything", "give an object like aioelastic.launch.Launcher")
    elif not isinstance(spec.start, str):
        raise SpecError("launcher", launcher, "would not use the executor", "leave out launcher, or start")
    if launcher == "guardian":
        return
    if spec.stop.if_lost == "stop":
        raise SpecError("Stop.if_lost", "stop", "is done by the guardian", "leave out launcher, or if_lost")
    if isinstance(launcher, str) and needs_guardian(spec):
        places = [one for one in spec.places if one is not None]
        raise SpecError("placement", places[0], "is given by the guardian", "leave out launcher, or placement")


def needs_guardian(spec: GroupSpec) -> bool:
    """Whether a worker has a place that only the guardian can give it, between fork(2) and execve(2)."""
    return any(
        place is not None and (isinstance(entry, Command) or spec.start == "spawn")
        for place, entry in zip(spec.places, spec.entries, strict=False)
    )


class Launchers:
    """The ways to start that a group has. See `Launcher`.

    Attributes:
        zygote: to be opened before it is used.
    """

    name = "by plan"

    def __init__(
        self,
        environ: Mapping[str, str],
        thread: HelperThread,
        poller: Poller,
        spare: Callable[[int], None],
        lost: Lost = None,
    ) -> None:
        """Args: spare: told the session of each guardian."""
        self._environ = environ
        self._spare = spare
        self._lost = lost
        self._poller = poller
        self._guardian: GuardianLauncher | None = None
        self._kept: set[int] = set()  # guardians to which falls what the workers leave behind
        self._doubt = ""  # why there is none for some of them
        direct = DirectLauncher(environ, thread, poller)
        self.zygote = ZygoteLauncher(environ, poller, lost)
        self.executor = ExecutorLauncher(thread)
        self._by_start: dict[str | None, Launcher] = {
            None: direct,
            "spawn": direct,
            "zygote": self.zygote,
            "fork": ForkLauncher(environ, poller),
            "executor": self.executor,
        }

    def open_guardian(self) -> None:
        """Have commands and fresh interpreters started by the guardian, where one can run; else directly."""
        try:
            self._guardian = GuardianLauncher(self._environ, self._poller, self._lost)
        except OSError:
            return
        self._by_start[None] = self._by_start["spawn"] = self._guardian
        self._spare(self._guardian.session)

    @property
    def has_guardian(self) -> bool:
        """Whether one runs for it."""
        return self._guardian is not None

    def is_up(self) -> None:
        """Wait until the guardian answers, if there is one."""
        if self._guardian is not None:
            with contextlib.suppress(OSError):  # what is wrong with it, the first start will tell
                left_to_guardian(self._guardian.session)

    def close(self) -> None:
        """The group needs them no more."""
        self.zygote.close()
        self.executor.close()
        if self._guardian is not None:
            self._guardian.end()

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        """See `Launcher.start`."""
        if self._guardian is not None and self._guardian.gone and worker.start in (None, "spawn"):
            self.open_guardian()  # a later attempt gets a new one
        started = self._by_start[worker.start].start(worker)
        if worker.start == "zygote":
            session = self.zygote.guardian
        else:
            session = self._guardian.session if self._guardian and worker.start in (None, "spawn") else 0
        if session:
            self._kept.add(session)
        else:
            self._doubt = _DOUBTS.get(worker.start, "no guardian adopted what they left behind")
        return started

    def left(self) -> list[int]:
        """The pids of what its workers, and those of other groups, have left to the guardian: asked, not looked for.

        Raises:
            OSError: nobody can tell, and why.
        """
        if self._doubt:
            raise OSError(self._doubt)
        return [pid for session in self._kept for pid in left_to_guardian(session)]
