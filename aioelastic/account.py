"""What came of a group: from its workers, when nothing of them is left, to a `GroupResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from .launch import LaunchPlan
from .outcome import ErrorReport, Failure, GroupResult, Reason, Result
from .proof import of_worker
from .remains import Process, Remains
from .shown import printable
from .spec import Std
from .turns import Turns
from .why import Cause, Evidence, Facts, cause_of
from .worker import Worker


async def account(
    plan: LaunchPlan,
    workers: Sequence[Worker],
    ended: Sequence[Worker],
    answered: Callable[[Worker], bool],
    found: Mapping[Worker, Evidence],
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
    failed = {one: at for one in (*ended, *workers) if (at := one.failed_at(_report(found, one))) is not None}
    order = sorted(failed, key=failed.__getitem__)
    final = [one for one in order if not answered(one)]
    past = [one for one in order if answered(one)]
    firsts = set(final[:1])
    # an attempt of the whole group has one root cause; where each rank begins again by itself, each failure is its own
    firsts.update({one.attempt: one for one in reversed(past)}.values() if plan.restart.scope == "all" else past)
    earlier: dict[int, list[Failure]] = {}
    for one in sorted(past, key=lambda one: one.attempt):
        failure = _result(one, plan, found.get(one), failed=True, first=one in firsts).failure
        assert failure is not None
        earlier.setdefault(one.rank, []).append(failure)
    ours = set(final)
    turns, made = Turns(), []
    for one in workers:
        before = tuple(earlier.get(one.rank, ()))
        made.append(_result(one, plan, found.get(one), failed=one in ours, first=one in firsts, earlier=before))
        await turns.rest()
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


def failure_of(worker: Worker, plan: LaunchPlan, found: Evidence | None = None, first: bool = True) -> Failure:
    """Of one attempt that has failed by itself."""
    return Failure(
        rank=worker.rank,
        name=plan.name,
        pid=worker.pid,
        host=plan.host,
        attempt=worker.attempt,
        argv=worker.plan.argv,
        cwd=worker.plan.cwd,
        exit=worker.exit,
        cause=printable(worker.cause or str(worker.exit)),
        error=None if found is None else found.report,
        stdout=worker.output(Std.OUT),
        stderr=worker.output(Std.ERR),
        first=first,
        exception=worker.error,
        why=why(worker, found, failed=True),
        errno=None if worker.refused is None else worker.refused.cause.errno,
    )


def _result(
    worker: Worker,
    plan: LaunchPlan,
    found: Evidence | None,
    failed: bool,
    first: bool,
    earlier: tuple[Failure, ...] = (),
) -> Result:
    """Of one attempt, with its failure if it `failed` by itself."""
    stdout, stderr = worker.output(Std.OUT), worker.output(Std.ERR)
    failure = failure_of(worker, plan, found, first) if failed else None
    return Result(
        rank=worker.rank,
        name=plan.name,
        argv=worker.plan.argv,
        pid=worker.pid,
        attempt=worker.attempt,
        exit=worker.exit,
        usage=worker.usage,
        stdout=stdout,
        stderr=stderr,
        failure=failure,
        value=worker.value,
        unkillable=worker.unkillable,
        stacks=worker.stacks,
        why=why(worker, found, failed=False) if failure is None else failure.why,
        earlier=earlier,
    )


def why(worker: Worker, found: Evidence | None, failed: bool) -> Cause | None:
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
            stage=None if failed or not stopped else worker.trail.stage,
            refused=worker.cause if exit is None else "",
            stuck="" if stuck is None else str(stuck),
            parent=worker.parent,
            raised=told,
            child=child,
            instead=worker.cause if worker.answer is not None and worker.cause != str(exit) else "",
            sent=frozenset(worker.trail.sent),
            said=str(worker.output(Std.ERR)),
            found=found,
        )
    )


def _report(found: Mapping[Worker, Evidence], worker: Worker) -> ErrorReport | None:
    return found[worker].report if worker in found else None
