"""What a group stands on while it lives: helper threads, the rendezvous port, sinks, a place for error files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..child.worker import error_record
from ..diagnosis import ErrorFiles, Evidence, EvidenceCollector, read_report
from ..diagnosis.stacks import Stacks
from ..launch import (
    By,
    HostState,
    Launcher,
    Launchers,
    check_input,
    keep_standard,
    let_standard_go,
    needs_guardian,
    removed_at_the_end,
)
from ..model.entries import Command, Function
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.leftovers import Remains
from ..planning import (
    TAG,
    LaunchPlan,
    Looking,
    Port,
    WorkerPlan,
    absolute,
    check_limits,
    check_places,
    merged,
    plan,
    preflight,
)
from ..processes.census import Census
from ..processes.cgroups import ControlGroups
from ..streams import FileThread, Sinks
from ..system import forked_copies
from ..system.deadlines import LOOK, Deadline
from ..system.helper_thread import HelperThread
from ..system.waiting import NO_ANSWER, TAKE_BACK, completed
from ..watch import Poller
from .leak_check import gpus_left, names_left, ports_left
from .start_checks import check_free, check_gpus

if TYPE_CHECKING:
    from ..launch import PassedDescriptors
    from ..planning import Calls
    from .worker_life import WorkerLife

PREFLIGHT = 30.0  # seconds for the looks at programs and directories: as many as a stop waits for a start


class Resources:
    """Opened before the first worker, closed after the last; either way nothing of it stays.

    Two threads, so that a log disk that hangs cannot keep us from looking after processes.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        spec: GroupSpec,
        on_trouble: Callable[[str, str, int], None],
        launcher: Launcher | By = "guardian",
    ):
        self._passed: PassedDescriptors | None = None
        if any(isinstance(one, Command) and one.pass_fds for one in spec.entries):
            try:
                from ..launch import PassedDescriptors  # for start-up time: most groups have none

                self._passed = PassedDescriptors(spec)
            except OSError as exc:
                if exc.errno in _NONE_LEFT:
                    raise _no_descriptor(exc) from None
                raise
        if any(isinstance(one, Function) for one in spec.entries):
            from . import function_parts  # noqa: F401  # for start-up time: see there
        if any(isinstance(one, Command) and one.stdin == "pipe" for one in spec.entries):
            from . import worker_input  # noqa: F401  # for start-up time: see there
        self.loop = loop
        self._lost = False  # this is a forked copy
        self.needs_main = False  # what workers are sent later will
        forked_copies.register(self)
        self._launcher = launcher
        self.environ: Mapping[str, str] = dict(os.environ)
        self._spec = spec
        self._on_trouble = on_trouble
        self._files = FileThread(loop, "aioelastic-files")
        self._proc = HelperThread(loop, "aioelastic-proc")
        self.poller = Poller(loop)
        self.census = Census(self._proc, TAG)
        self.sinks = Sinks(loop, spec.logs, self._files, on_trouble)
        self.stacks = Stacks(loop, self._proc, self._files, self.poller, self.environ, on_trouble)
        self.collector = EvidenceCollector(self._proc)
        lost = (int(spec.stop.signum), spec.stop.grace) if spec.stop.if_lost == "stop" else None
        self._launchers = Launchers(self.environ, self._proc, self.poller, self.census.spare, lost)
        self._calls: Calls | None = None
        self._port: Port | None = None
        self._error_files: ErrorFiles | None = None
        self._error_dir: Path | None = None
        self._cgroups: dict[str | None, ControlGroups] = {}
        self._first: LaunchPlan | None = None

    async def open(self, run_id: str) -> LaunchPlan:
        """Check the machine, make the log files, and say exactly what will run.

        Raises:
            SpecError: something asked for cannot be had; nothing of it is left.
        """
        keep_standard()
        self.poller.keep()
        try:
            tries = self._launcher != "guardian" or any(self._spec.places) or self._changes_users
            state = self._launchers.begin(tries)
            planned = await completed(self._proc.submit(lambda: self._plan(run_id, state)))
            checked = await self._checked(planned)
            planned = await completed(self._proc.submit(lambda: self._ready(checked)))
            await self._warm_up(planned)
            await self.sinks.open(planned)
        except BaseException as exc:
            deadline = Deadline()
            await self.sinks.close(deadline, TAKE_BACK)
            with contextlib.suppress(SpecError):  # no thread could be started: then there is nothing to remove
                self._proc.put(self._close_error_files)
            for thread in (self._files, self._proc):
                await _ended(thread, deadline, TAKE_BACK)
            self._release()
            if isinstance(exc, OSError) and exc.errno in _NONE_LEFT:
                raise _no_descriptor(exc) from None
            raise
        return planned

    def again(self, attempt: int, ranks: Container[int] | None) -> asyncio.Future[LaunchPlan]:
        """The plan of a later attempt: of these ranks, or of all of them, on a port of its own.

        Programs are those that the first attempt has found. Should one be gone, the system will say so.
        """
        return self._proc.submit(lambda: self._prepare_again(attempt, ranks))

    async def another(self, like: WorkerPlan, rank: int, attempt: int, world_size: int) -> WorkerPlan:
        """The plan of one more start of what an executor runs; `forget` it when nothing of that is left.

        Raises:
            SpecError: there is no control group for it.
        """
        fresh = like.as_start(rank, attempt, world_size)
        if fresh.cgroup is not None or like.placement is None or not like.placement.cgroup:
            return fresh
        try:
            async with asyncio.timeout(PREFLIGHT) as limit:
                return await completed(self._proc.submit(lambda: self._boxed(fresh)))
        except TimeoutError:
            if not limit.expired():
                raise
            self._proc.relieve()
            problem = f"could not be made within {PREFLIGHT:g} s: the file system of control groups does not answer"
            raise SpecError(
                "Placement.cgroup", like.placement.cgroup, problem, "leave it out, or see to that mount"
            ) from None

    def give_up_passed(self) -> None:
        """No more workers are started: who reads from a pipe that they were given shall see its end with theirs."""
        if self._passed is not None:
            self._passed.close()

    def forget(self, worker: WorkerPlan) -> None:
        """Nothing of that one is left."""
        if worker.cgroup is not None:
            for one in self._cgroups.values():
                self._proc.put(partial(one.remove, worker.cgroup))

    def disown(self) -> list[int]:
        """See `forked_copies`: what it stands on has each its own; its loop is told by this."""
        self._lost = True
        return []

    def launcher(self) -> Launcher:
        """What starts the workers."""
        return self._launchers if isinstance(self._launcher, str) else self._launcher

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Workers that are started in this block are started without anybody else's turn in between."""
        return self._launchers.at_once()

    def adopted(self) -> list[int]:
        """See `Census.left`."""
        if self._launchers is not self.launcher():
            raise OSError("they were started by a launcher of the caller's")
        return self._launchers.left()

    async def left(self, pids: Collection[int], found: Collection[Remains], within: float) -> list[Remains]:
        """What is left beside processes: ports, names of shared memory, GPU memory of those that there were; and what
        only its control group knows of."""

        def look() -> list[Remains]:
            there = [one for cgroups in self._cgroups.values() for one in cgroups.left()]
            return [*there, *ports_left(self._spec.ports), *names_left(), *gpus_left(self._gpus(), pids)]

        unknown = Remains("unproven", f"whether ports, names or memory are left is not known: {NO_ANSWER}")
        left = await self._proc.known(self._proc.submit(look), within, [unknown])
        known = {one.pid for one in found if one.kind == "process"}
        return [one for one in left if one.kind != "process" or one.pid not in known]

    async def close(
        self, deadline: Deadline, bound: float, ended_badly: Collection[WorkerLife]
    ) -> dict[WorkerLife, Evidence]:
        """Flush what is queued, each within `bound` seconds; returns what there is about those that ended badly."""
        found: dict[WorkerLife, Evidence] = {}
        await self.stacks.close(deadline.left())
        await self.sinks.close(deadline, bound)
        if await _ended(self._files, deadline, bound):
            try:
                found = await self.evidence(ended_badly, deadline.left())
            finally:
                await self._proc.known(self._proc.submit(self._close_error_files), deadline.left(), None)
        else:  # then do not touch that disk any more
            self._files.abandoned = True
            words = "a write hangs in the kernel; its thread was left behind"
            self._on_trouble("log files", words, self._files.behind)
        await _ended(self._proc, deadline, bound)
        self._release()
        return found

    async def evidence(self, ended_badly: Collection[WorkerLife], within: float = LOOK) -> dict[WorkerLife, Evidence]:
        """What they wrote about themselves, and what was seen from outside."""
        return await self._proc.known(self._proc.submit(lambda: self._find(ended_badly)), within, {})

    async def _checked(self, planned: LaunchPlan) -> LaunchPlan:
        """After all that looks at where workers are to run; a file system that is gone costs an error that names it."""
        looking = Looking()
        try:
            async with asyncio.timeout(PREFLIGHT) as limit:
                return await completed(self._proc.submit(lambda: self._check(planned, looking)))
        except TimeoutError:
            if not limit.expired():
                raise
            raise looking.error(PREFLIGHT) from None

    def _check(self, planned: LaunchPlan, looking: Looking) -> LaunchPlan:
        if any(self._spec.places):
            check_places(planned, self._launchers.tries)
        checked = preflight(planned, self.environ, looking, self._launchers.has_guardian)
        if self._changes_users and isinstance(self._launcher, str):
            from ..planning import check_users  # for start-up time: most run as this program

            check_users(checked, self._launchers.tries_user)
        return checked

    @property
    def _changes_users(self) -> bool:
        return any(isinstance(one, Command) and one.changes_user for one in self._spec.entries)

    def _plan(self, run_id: str, state: HostState | None) -> LaunchPlan:
        """All that looks at the machine; in the helper thread, since that may be slow."""
        self._open_guardian(state)
        check_limits(self._spec, self._launchers.is_up)
        check_free(self._spec.ports)
        if any(isinstance(one, Command) and one.stdin == "inherit" for one in self._spec.entries):
            check_input()
        check_gpus(self._gpus())
        self.collector.begin()
        self._port = Port()
        if self._spec.logs.dir is None:
            self._error_files = ErrorFiles(run_id)
            self._error_dir = self._error_files.open()
        self._spec = absolute(self._spec)  # it means the same later, wherever we stand then
        return plan(
            self._spec,
            run_id=run_id,
            host=socket.gethostname(),
            master_port=self._port.number,
            environ=self.environ,
            error_dir=self._error_dir,
        )

    def _ready(self, planned: LaunchPlan) -> LaunchPlan:
        self._first = self._placed(self._pack(planned))
        executors = {id(one.executor): one.executor for one in planned.workers if one.executor}.values()
        if executors:
            from ..launch import check_open  # for start-up time: see `function_parts.py`

            for executor in executors:
                check_open(executor)
        return self._first

    def _open_guardian(self, state: HostState | None) -> None:
        """First of all: it takes longer to come up than all the rest."""
        spec = self._spec
        # whoever starts the workers, it is there to remove what a killed program leaves
        ours = isinstance(spec.start, str) or any(isinstance(one, Command) for one in spec.entries)
        if self._launcher == "guardian" and ours:
            self._launchers.open_guardian(state)
            if needs_guardian(spec) and not self._launchers.has_guardian:
                words = f"is given by the guardian; {self._launchers.no_guardian}"
                raise SpecError("placement", spec.places, words, "leave it out")

    def _prepare_again(self, attempt: int, ranks: Container[int] | None) -> LaunchPlan:
        assert self._first is not None
        assert self._port is not None
        if ranks is None:
            try:
                fresh = Port()  # taken before the old one is given back, so it is another
            except (OSError, SpecError):
                fresh = self._port  # none is to be had: the old one is better than none
            if fresh is not self._port:
                self._port.close()
                self._port = fresh
        later = plan(
            self._spec,
            run_id=self._first.run_id,
            host=self._first.host,
            master_port=self._port.number,
            environ=self.environ,
            error_dir=self._error_dir,
            attempt=attempt,
            ranks=ranks,
        )
        first = self._first.workers
        workers = tuple(
            replace(one, program=begun.program, call=begun.call).run_as(begun.who)
            for one in later.workers
            for begun in (first[one.rank],)
        )
        return self._placed(replace(later, workers=workers))

    def _placed(self, plan: LaunchPlan) -> LaunchPlan:
        """With the control groups made that workers are to have, and the descriptors that are held for them."""
        workers = plan.workers
        if self._passed is not None:
            workers = tuple(replace(one, pass_fds=self._passed.of(one.pass_fds)) for one in workers)
        return replace(plan, workers=tuple(map(self._boxed, workers)))

    def _boxed(self, worker: WorkerPlan) -> WorkerPlan:
        asked = worker.placement.cgroup if worker.placement is not None else False
        if not asked:
            return worker
        below = None if asked is True else str(asked)
        if below not in self._cgroups:
            made = self._cgroups[below] = ControlGroups(below, worker.identity.run_id)
            removed_at_the_end(str(made.path))
        return replace(worker, cgroup=self._cgroups[below].make(worker.rank, worker.attempt))

    def _gpus(self) -> set[int | str]:
        return {gpu for place in self._spec.places if place is not None for gpu in place.gpus or ()}

    def _find(self, ended_badly: Collection[WorkerLife]) -> dict[WorkerLife, Evidence]:
        found = self.collector.find(ended_badly)
        clock = error_record.clock()
        for one in ended_badly:
            if one.plan.error_file is None:
                continue
            names = ("run_id", "rank", "attempt")
            owner = {name: one.plan.overlay.get(f"AIOELASTIC_{name.upper()}") for name in names}
            if (report := read_report(one.plan.error_file, clock, owner)) is not None:
                found[one] = replace(found.get(one, Evidence()), report=report)
        return found

    def _close_error_files(self) -> None:
        if self._error_files is not None:
            self._error_files.close()

    async def _warm_up(self, planned: LaunchPlan) -> None:
        zygotes = [one for one in planned.workers if one.start == "zygote"]
        if zygotes:
            from ..child.worker.main_module import importable  # for start-up time: see `function_parts.py`

            mains = [one.call.main for one in zygotes if one.call is not None and one.call.main is not None]
            # what is imported before the fork must find the group's own variables
            environ = merged(self.environ, self._spec.env)
            main = mains[0] if mains else importable() if self.needs_main else None
            await self._launchers.zygote.open(environ, self._spec.preload, main, self._launchers.state())

    def _pack(self, planned: LaunchPlan) -> LaunchPlan:
        """With each function pickled; a forked copy has its own already."""
        for one in planned.workers:
            if one.executor is not None:
                self._launchers.executor.pack(one)
        return replace(planned, workers=tuple(map(self._with_call, planned.workers)))

    def _with_call(self, worker: WorkerPlan) -> WorkerPlan:
        if worker.function is None or worker.start in ("fork", "executor"):
            return worker
        if self._calls is None:
            from ..planning import Calls  # for start-up time: see `function_parts.py`

            self._calls = Calls()
        return replace(worker, call=self._calls.of(worker.function, worker.rank))

    def _release(self) -> None:
        if self._lost:
            return
        self._launchers.close()
        self.give_up_passed()
        if self._calls is not None:
            self._calls.close()
        self.collector.close()
        self.census.close()
        self.poller.let_go()
        for cgroups in self._cgroups.values():
            cgroups.close()
        if self._port is not None:
            self._port.close()
        let_standard_go()


_NONE_LEFT = (errno.EMFILE, errno.ENFILE)


def _no_descriptor(exc: OSError) -> SpecError:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    problem = f"leaves this program no descriptor for a group of workers ({exc.strerror})"
    most = "none" if hard == resource.RLIM_INFINITY else hard
    return SpecError("RLIMIT_NOFILE", soft, problem, f"close some, or raise it with `ulimit -n` (hard limit: {most})")


async def _ended(thread: HelperThread, deadline: Deadline, bound: float) -> bool:
    ended = thread.end()
    ended.add_done_callback(lambda _: deadline.notice())
    return await deadline.until(ended.done, bound, grace=False, late=deadline.CLOSED)
