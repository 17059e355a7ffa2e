"""What came of a group: from its workers, when nothing of them is left, to a `GroupResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from ..diagnosis import Evidence, Facts, cause_of, raised_ns
from ..model.exits import Exit
from ..model.failures import Cause, ErrorReport, Failure
from ..model.leftovers import Process, Remains
from ..model.logs import Std
from ..model.results import GroupResult, Reason, Result
from ..model.text import printable
from ..planning import LaunchPlan
from ..system.time_slices import TimeSlices
from .leak_check import of_worker
from .worker_life import WorkerLife


async def build_result(
    plan: LaunchPlan,
    workers: Sequence[WorkerLife],
    ended: Sequence[WorkerLife],
    answered: Callable[[WorkerLife], bool],
    found: Mapping[WorkerLife, Evidence],
    *,
    reason: Reason,
    leaked: Sequence[Process],
    remains: Sequence[Remains],
    timeout: float | None,
    duration: float,
) -> GroupResult:
    """The result. Made in slices: of thousands of workers it takes a while.

    Args:
        workers: the last one of each rank.
        ended: those of earlier attempts.
        answered: whether a failure was within the limits of `Restart`, so that it is not the group's.
        found: what there is about those that ended badly.
    """
    failed = {one: at for one in (*ended, *workers) if (at := failed_at(one, _report(found, one))) is not None}
    order = sorted(failed, key=failed.__getitem__)
    final = [one for one in order if not answered(one)]
    past = [one for one in order if answered(one)]
    stopping = [one for one in final if one.plan.on_failure == "stop"]
    if stopping and reason == "failed":  # those that failed before, and let the group go on, did not end it
        stopping.sort(key=WorkerLife.lost_its_reader)
        final.sort(key=lambda one: one is not stopping[0])
    firsts = set(final) - set(stopping[1:])
    # an attempt of the whole group has one root cause; where each rank restarts, or fails, by itself, each is its own
    shared: dict[int, WorkerLife] = {}
    for one in sorted(past, key=WorkerLife.lost_its_reader):
        shared.setdefault(one.attempt, one)
    firsts.update(shared.values() if plan.restart.scope == "all" else past)
    earlier: dict[int, list[Failure]] = {}
    for one in sorted(past, key=lambda one: one.attempt):
        failure = _result(one, plan, found.get(one), failed=True, first=one in firsts).failure
        assert failure is not None
        earlier.setdefault(one.rank, []).append(failure)
    ours = set(final)
    slices, made = TimeSlices(), []
    for one in workers:
        before = tuple(earlier.get(one.rank, ()))
        made.append(_result(one, plan, found.get(one), failed=one in ours, first=one in firsts, earlier=before))
        await slices.rest()
    results = tuple(made)
    remains = [*remains, *(one for result in results for one in of_worker(result))]
    if remains:  # what nobody knows the owner of, each may have left
        mine = {one.rank: tuple(it for it in remains if it.rank in (None, one.rank)) for one in results}
        results = tuple(dataclasses.replace(one, remains=mine[one.rank]) for one in results)
    return GroupResult(
        name=plan.name,
        run_id=plan.run_id,
        reason=reason,
        results=results,
        failures=tuple(failure for one in final if (failure := results[one.rank].failure) is not None),
        unkillable=tuple(one.unkillable for one in workers if one.unkillable is not None),
        leaked=tuple(leaked),
        remains=tuple(remains),
        log_dir=plan.run_dir,
        timeout=timeout,
        duration=duration,
    )


def failed_at(worker: WorkerLife, report: ErrorReport | None) -> int | None:
    """When it failed by itself (monotonic, ns), or None if it did not.

    Its own report counts for more than its exit: who raised first may well end last, after it has broken the
    connections of others; and one that had raised before we came to stop it has failed by itself.
    """
    exit = worker.exit
    if exit is not None and not exit.ok:
        told = None if worker.answer is None else worker.answer.raised_ns
        if report is not None and not report.is_of(worker.pid, exit):
            report = None
        raised = raised_ns(exit, told, report, None if exit.stopped_by is None else worker.first_signal)
        if raised is not None:
            return min(raised, worker.ended_ns)
    return worker.ended_ns if worker.failed else None


def failure_of(worker: WorkerLife, plan: LaunchPlan, found: Evidence | None = None, first: bool = True) -> Failure:
    """Of one attempt that has failed by itself."""
    return Failure(
        rank=worker.rank,
        name=plan.name,
        pid=worker.pid,
        host=plan.host,
        attempt=worker.attempt,
        argv=worker.plan.argv,
        cwd=worker.plan.cwd,
        exit=_exit(worker),
        cause=printable(worker.cause or str(worker.exit)),
        error=None if found is None else found.report,
        stdout=worker.output.of(Std.OUT),
        stderr=worker.output.of(Std.ERR),
        first=first,
        exception=worker.error,
        why=why(worker, found, failed=True),
        errno=None if worker.refused is None else worker.refused.cause.errno,
        worker=worker.plan.name,
    )


def _result(
    worker: WorkerLife,
    plan: LaunchPlan,
    found: Evidence | None,
    failed: bool,
    first: bool,
    earlier: tuple[Failure, ...] = (),
) -> Result:
    """Of one attempt, with its failure if it `failed` by itself."""
    stdout, stderr = worker.output.of(Std.OUT), worker.output.of(Std.ERR)
    failure = failure_of(worker, plan, found, first) if failed else None
    return Result(
        rank=worker.rank,
        name=plan.name,
        argv=worker.plan.argv,
        pid=worker.pid,
        attempt=worker.attempt,
        exit=_exit(worker),
        usage=worker.usage,
        stdout=stdout,
        stderr=stderr,
        failure=failure,
        value=worker.value,
        unkillable=worker.unkillable,
        stacks=worker.stacks,
        why=why(worker, found, failed=False) if failure is None else failure.why,
        earlier=earlier,
        worker=worker.plan.name,
    )


def _exit(worker: WorkerLife) -> Exit | None:
    """Its exit, as whoever saw it first has seen it."""
    exit, first_ns = worker.exit, worker.ended_ns
    if exit is None or not 0 < first_ns < exit.ended_ns:  # 0: what follows an exit is still to come
        return exit
    return dataclasses.replace(exit, ended_ns=first_ns)


def why(worker: WorkerLife, found: Evidence | None, failed: bool) -> Cause | None:
    """Why it ended badly; or why it ended, if it was stopped and has not `failed` by itself. None: all is well."""
    exit, stuck = worker.exit, worker.unkillable
    stopped = exit is not None and exit.stopped_by is not None
    if not failed and not stopped and stuck is None:
        return None
    found = found or Evidence()
    report = found.report
    own = report is not None and report.pid in (None, worker.pid)
    told = worker.error.headline if worker.error else report.message if report and (own or worker.pid is None) else ""
    child = report.message if report and not told and report.is_of(worker.pid, exit) else ""
    return cause_of(
        Facts(
            exit,
            stage=None if failed or not stopped else worker.stop_progress.stage,
            refused=worker.cause if exit is None else "",
            stuck="" if stuck is None else str(stuck),
            parent=worker.parent,
            raised=told,
            child=child,
            instead=worker.cause if worker.answer is not None and worker.cause != str(exit) else "",
            sent=frozenset(worker.stop_progress.sent),
            said=str(worker.output.of(Std.ERR)),
            found=found,
        )
    )


def _report(found: Mapping[WorkerLife, Evidence], worker: WorkerLife) -> ErrorReport | None:
    return found[worker].report if worker in found else None
