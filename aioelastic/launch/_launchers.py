"""Each worker by the launcher that its plan names."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from ..child.wire import datagrams
from ..model.entries import Command
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.placement import Orders
from ..model.validation import has_method
from ..planning import Who, WorkerPlan
from ..system.helper_thread import HelperThread
from ..watch import Poller
from . import _host_state
from ._contract import Launcher
from ._direct import DirectLauncher, tried
from ._guardian import Guardian, has_one, hold, left_to_guardian, let_go
from ._guardian_launcher import GuardianLauncher
from ._helper_process import Lost
from ._host_state import HostState

if TYPE_CHECKING:
    from ._fork import ForkLauncher
    from ._lent_executor import ExecutorLauncher
    from ._zygote import ZygoteLauncher

TRIAL = 10.0  # seconds for the trial of a place

By: TypeAlias = Literal["guardian", "direct"]

_DOUBTS: dict[str | None, str] = {
    "fork": 'a worker by start="fork" is a child of this program, and what it leaves behind is adopted by nobody',
    "executor": "what functions have started in the caller's executor is not known",
}
_NOBODY = "no guardian adopted what they left behind"


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
    """The ways to start that a group has. See `Launcher`."""

    name = "by plan"

    def __init__(
        self,
        environ: Mapping[str, str],
        thread: HelperThread,
        poller: Poller,
        spare: Callable[[int], None],
        lost: Lost = None,
    ) -> None:
        """Args: spare: told the session of each guardian.

        Attributes: no_guardian: why workers are started directly; empty where that is what was asked for.
        """
        self._environ = environ
        self._spare = spare
        self._lost = lost
        self._poller = poller
        self._guardians: list[GuardianLauncher] = []  # the last is the one in use; earlier ones may still have workers
        self._kept: list[Guardian] = []  # those to which falls what the workers leave behind
        self._reader: _host_state.Reader | None = None
        self._state: HostState | None = None  # read already, for several starts
        self._opened_with: HostState | None = None  # what helper threads have: they begin with the group
        self.no_guardian = ""  # why none could be had when one was wanted last
        self._doubt = ""  # why there is none for some of them
        self._thread = thread
        self._direct = DirectLauncher(environ, thread, poller)

    # for start-up time, what only functions need is imported where there are some: see `supervisor/function_parts.py`

    @cached_property
    def zygote(self) -> ZygoteLauncher:
        """To be opened before it is used."""
        from ._zygote import ZygoteLauncher  # as said

        return ZygoteLauncher(self._thread, self._poller, self._lost)

    @cached_property
    def executor(self) -> ExecutorLauncher:
        from ._lent_executor import ExecutorLauncher  # as said

        return ExecutorLauncher(self._thread)

    @cached_property
    def _fork(self) -> ForkLauncher:
        from ._fork import ForkLauncher  # as said

        return ForkLauncher(self._environ, self._poller)

    def state(self) -> HostState:
        """What a worker that starts now begins with; on the thread of the loop.

        Raises:
            OSError: it cannot be read here.
        """
        if self._state is not None:
            return self._state
        if self._reader is None:
            try:
                self._reader = _host_state.reader()
            except FileNotFoundError:
                return _host_state.without_proc()
        return self._reader.read()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is started in this block is started without anybody else's turn in between: one look for all."""
        with contextlib.suppress(OSError):
            self._state = self.state()
        try:
            yield
        finally:
            self._state = None

    def begin(self, tries: bool) -> HostState | None:
        """Before the helper thread does its first job; on the thread of the loop. What workers will begin with, as far
        as that has to be known before they start."""
        if tries or not has_one():
            self._opened_with = self.state()
        return self._opened_with

    def open_guardian(self, state: HostState | None) -> None:
        """Have commands and fresh interpreters started by the guardian, where one can run; else directly, and `left`
        tells why.

        Raises:
            OSError: there is no descriptor, memory or process for it just now: no reason to do without.
        """
        try:
            made = GuardianLauncher(self._environ, self._poller, self._lost, state)
        except (OSError, SpecError) as exc:
            if isinstance(exc, OSError) and datagrams.passes(exc):
                raise OSError(exc.errno, f"the guardian cannot be started: {exc.strerror}") from exc
            self.no_guardian = f"none can run here: {exc}"
            return
        self._guardians.append(made)
        self._spare(made.session)

    @property
    def has_guardian(self) -> bool:
        """Whether one runs for it."""
        return bool(self._guardians)

    def tries(self, place: tuple[Orders, str]) -> tuple[int, str]:
        """Whether a worker could have that place, tried in a process that ends at once: errno and field, or (0, "").

        Raises:
            OSError: nobody can tell.
        """
        if not self._guardians:
            raise OSError(errno.ESRCH, "there is no guardian")
        launcher = self._guardians[-1]
        return launcher.server.refuses(place, self._opened_with or launcher.server.state, TRIAL)

    def tries_user(self, who: Who) -> tuple[int, str]:
        """The same of the user, group and umask of one; without a guardian it is a copy of this process that ends.

        Raises:
            OSError: nobody can tell.
        """
        if self._guardians:
            launcher = self._guardians[-1]
            return launcher.server.refuses(None, self._opened_with or launcher.server.state, TRIAL, who)
        return tried(who)

    def is_up(self) -> None:
        """Wait until the guardian answers, if there is one."""
        for one in self._guardians[-1:]:
            with contextlib.suppress(OSError):  # what is wrong with it, the first start will tell
                left_to_guardian(one.session)

    def close(self) -> None:
        """The group needs them no more."""
        for name in ("zygote", "executor"):
            if name in vars(self):  # it was needed
                getattr(self, name).close()
        zygotes = sys.modules.get(f"{__package__}._zygote")
        if zygotes is not None:  # a group of commands, too, may have been given another guardian than theirs
            zygotes.dismiss_stale()
        for launcher in self._guardians:
            launcher.end()
        for one in self._kept:
            let_go(one)
        if self._reader is not None:
            _host_state.release(self._reader)

    def start(self, worker: WorkerPlan) -> asyncio.Future[Any]:
        """See `Launcher.start`."""
        keeper: Guardian | None = None
        if worker.start == "zygote":
            started: asyncio.Future[Any] = self.zygote.start(worker, self.state())
            keeper = self.zygote.guardian
        elif worker.start in (None, "spawn") and (launcher := self._guarding()) is not None:
            started = launcher.start(worker, self.state())
            keeper = launcher.server
        elif worker.start in (None, "spawn"):
            if worker.place is not None or self._lost is not None:
                words = f"its placement or if_lost is given by the guardian; {self.no_guardian}"
                raise OSError(errno.EPERM, words)
            # its helper thread is older: what a child inherits of a thread may be something else now, and Landlock is
            # not seen
            started = self._direct.start(worker, anew=worker.attempt > 0 or self.state() != self._opened_with)
        else:
            started = self._fork.start(worker) if worker.start == "fork" else self.executor.start(worker)
        if keeper is None:
            self._doubt = _DOUBTS.get(worker.start) or _NOBODY + (f" ({self.no_guardian})" if self.no_guardian else "")
        elif keeper not in self._kept:
            hold(keeper)
            self._kept.append(keeper)
        return started

    def withdraw(self, starting: asyncio.Future[Any]) -> None:
        """See `_contract.withdraw`."""
        for one in self._guardians:
            one.withdraw(starting)
        if "zygote" in vars(self):
            self.zygote.withdraw(starting)

    def _guarding(self) -> GuardianLauncher | None:
        """By which a worker can be started now; None: directly."""
        if not self._guardians:
            return None
        state = self.state()
        if not self._guardians[-1].serves(state):
            if self._guardians[-1].is_unused:
                self._guardians.pop().end()
            self.open_guardian(state)  # it has died, or the program has changed more than it could
        if not self._guardians:
            return None
        return self._guardians[-1] if self._guardians[-1].serves(state) else None

    def left(self) -> list[int]:
        """The pids of what its workers, and those of other groups, have left to the guardian: asked, not looked for.

        Raises:
            OSError: nobody can tell, and why.
        """
        if self._doubt:
            raise OSError(self._doubt)
        return [pid for one in self._kept for pid in left_to_guardian(one.session)]
