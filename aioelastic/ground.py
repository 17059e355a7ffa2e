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

from . import forked
from .cgroups import ControlGroups
from .child import _record
from .entry import Command
from .errors import SpecError
from .launch import (
    TAG,
    By,
    Calls,
    HostState,
    Launcher,
    Launchers,
    LaunchPlan,
    Port,
    WorkerPlan,
    absolute,
    check_input,
    check_limits,
    check_open,
    check_places,
    keep_standard,
    let_standard_go,
    merged,
    needs_guardian,
    plan,
    preflight,
    removed_at_the_end,
)
from .proof import check_free, check_gpus, gpus_left, names_left, ports_left
from .remains import Remains
from .report import ErrorFiles, read_report
from .sinks import Sinks
from .spec import GroupSpec
from .stacks import Stacks
from .stop import LOOK, Patience
from .streams import FileThread
from .thread import NO_ANSWER, TAKE_BACK, HelperThread, completed
from .watch import Census, Poller
from .why import Evidence
from .witness import Witness

if TYPE_CHECKING:
    from .worker import Worker


class Ground:
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
        self.loop = loop
        self._lost = False  # this is a forked copy
        forked.register(self)
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
        self.witness = Witness(self._proc)
        lost = (int(spec.stop.signum), spec.stop.grace) if spec.stop.if_lost == "stop" else None
        self._launchers = Launchers(self.environ, self._proc, self.poller, self.census.spare, lost)
        self._calls = Calls()
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
            state = self._launchers.begin(tries=self._launcher != "guardian" or any(self._spec.places))
            planned = await completed(self._proc.submit(lambda: self._prepare(run_id, state)))
            await self._warm_up(planned)
            await self.sinks.open(planned)
        except BaseException as exc:
            patience = Patience()
            await self.sinks.close(patience, TAKE_BACK)
            with contextlib.suppress(SpecError):  # no thread could be started: then there is nothing to remove
                self._proc.put(self._close_error_files)
            for thread in (self._files, self._proc):
                await _ended(thread, patience, TAKE_BACK)
            self._release()
            if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
                raise _no_descriptor(exc) from None
            raise
        return planned

    def again(self, attempt: int, ranks: Container[int] | None) -> asyncio.Future[LaunchPlan]:
        """The plan of a later attempt: of these ranks, or of all of them, on a port of its own.

        Programs are those that the first attempt has found. Should one be gone, the system will say so.
        """
        return self._proc.submit(lambda: self._prepare_again(attempt, ranks))

    async def another(self, like: WorkerPlan, rank: int) -> WorkerPlan:
        """The plan of one more start of what an executor runs; `forget` it when nothing of that is left.

        Raises:
            SpecError: there is no control group for it.
        """
        fresh = like.as_start(rank)
        if like.cgroup is None:
            return fresh
        return await completed(self._proc.submit(lambda: self._boxed(fresh)))

    def forget(self, worker: WorkerPlan) -> None:
        """Nothing of that one is left."""
        if worker.cgroup is not None:
            for one in self._cgroups.values():
                self._proc.put(partial(one.remove, worker.cgroup))

    def disown(self) -> list[int]:
        """See `forked`: what it stands on has each its own; its loop is told by this."""
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

    async def close(self, patience: Patience, bound: float, ended_badly: Collection[Worker]) -> dict[Worker, Evidence]:
        """Flush what is queued, each within `bound` seconds; returns what there is about those that ended badly."""
        found: dict[Worker, Evidence] = {}
        await self.stacks.close(patience.left())
        await self.sinks.close(patience, bound)
        if await _ended(self._files, patience, bound):
            try:
                found = await self.evidence(ended_badly, patience.left())
            finally:
                await self._proc.known(self._proc.submit(self._close_error_files), patience.left(), None)
        else:  # then do not touch that disk any more
            self._files.abandoned = True
            words = "a write hangs in the kernel; its thread was left behind"
            self._on_trouble("log files", words, self._files.behind)
        await _ended(self._proc, patience, bound)
        self._release()
        return found

    async def evidence(self, ended_badly: Collection[Worker], within: float = LOOK) -> dict[Worker, Evidence]:
        """What they wrote about themselves, and what was seen from outside."""
        return await self._proc.known(self._proc.submit(lambda: self._find(ended_badly)), within, {})

    def _prepare(self, run_id: str, state: HostState | None) -> LaunchPlan:
        """All that looks at the machine; in the helper thread, since a file system may be slow."""
        self._open_guardian(state)
        check_limits(self._spec, self._launchers.is_up)
        check_free(self._spec.ports)
        if any(isinstance(one, Command) and one.stdin == "inherit" for one in self._spec.entries):
            check_input()
        check_gpus(self._gpus())
        self.witness.begin()
        self._port = Port()
        if self._spec.logs.dir is None:
            self._error_files = ErrorFiles(run_id)
            self._error_dir = self._error_files.open()
        self._spec = absolute(self._spec)  # it means the same later, wherever we stand then
        planned = plan(
            self._spec,
            run_id=run_id,
            host=socket.gethostname(),
            master_port=self._port.number,
            environ=self.environ,
            error_dir=self._error_dir,
        )
        if any(self._spec.places):
            check_places(planned, self._launchers.tries)
        self._first = self._placed(self._pack(preflight(planned, self.environ)))
        for executor in {id(one.executor): one.executor for one in planned.workers if one.executor}.values():
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
                words = "is given by the guardian, which cannot run here"
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
            replace(one, program=first[one.rank].program, call=first[one.rank].call) for one in later.workers
        )
        return self._placed(replace(later, workers=workers))

    def _placed(self, plan: LaunchPlan) -> LaunchPlan:
        """With the control groups made that workers are to have."""
        return replace(plan, workers=tuple(map(self._boxed, plan.workers)))

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

    def _find(self, ended_badly: Collection[Worker]) -> dict[Worker, Evidence]:
        found = self.witness.find(ended_badly)
        clock = _record.clock()
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
            mains = [one.call.main for one in zygotes if one.call is not None and one.call.main is not None]
            # what is imported before the fork must find the group's own variables
            environ = merged(self.environ, self._spec.env)
            main = mains[0] if mains else None
            await self._launchers.zygote.open(environ, self._spec.preload, main, self._launchers.state())

    def _pack(self, planned: LaunchPlan) -> LaunchPlan:
        """With each function pickled; a forked copy has its own already."""
        for one in planned.workers:
            if one.executor is not None:
                self._launchers.executor.pack(one)
        workers = tuple(
            one
            if one.function is None or one.start in ("fork", "executor")
            else replace(one, call=self._calls.of(one.function, one.rank))
            for one in planned.workers
        )
        return replace(planned, workers=workers)

    def _release(self) -> None:
        if self._lost:
            return
        self._launchers.close()
        self._calls.close()
        self.witness.close()
        self.census.close()
        self.poller.let_go()
        for cgroups in self._cgroups.values():
            cgroups.close()
        if self._port is not None:
            self._port.close()
        let_standard_go()


def _no_descriptor(exc: OSError) -> SpecError:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    problem = f"leaves this program no descriptor for a group of workers ({exc.strerror})"
    most = "none" if hard == resource.RLIM_INFINITY else hard
    return SpecError("RLIMIT_NOFILE", soft, problem, f"close some, or raise it with `ulimit -n` (hard limit: {most})")


async def _ended(thread: HelperThread, patience: Patience, bound: float) -> bool:
    ended = thread.end()
    ended.add_done_callback(lambda _: patience.notice())
    return await patience.until(ended.done, bound, grace=False, late=patience.CLOSED)
