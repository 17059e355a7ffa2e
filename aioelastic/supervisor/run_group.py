"""`supervise()`: a group from its beginning to its end, in one call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if "asyncio" in sys.modules:  # a program with an event loop waits for the import here, and not in its loop
    from . import any_group  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..events import Event
    from ..launch import By, Launcher
    from ..model.entries import Entry
    from ..model.group_spec import OnFailures, OnSuccess, Start
    from ..model.logs import Logs
    from ..model.placement import Places
    from ..model.restart_policy import Restart
    from ..model.results import GroupResult
    from ..model.stop_policy import Stop


async def supervise(
    entry: Entry,
    n: int | None = None,
    *,
    name: str = "worker",
    env: Mapping[str, str | None] | None = None,
    logs: Logs | None = None,
    stop: Stop | None = None,
    start: Start = "zygote",
    preload: Sequence[str] = (),
    ports: Sequence[int] = (),
    placement: Places | None = None,
    restart: Restart | None = None,
    on_failure: OnFailures = "stop",
    on_success: OnSuccess = "continue",
    timeout: float | None = None,
    check: bool = True,
    on_event: Callable[[Event], object] | None = None,
    launcher: Launcher | By = "guardian",
) -> GroupResult:
    """Run a group of workers to its end.

    It ends when all workers have ended, or one has failed and is not to be restarted (the others are then stopped; see
    `on_failure` and `on_success`), or the time is over, or the calling task is cancelled; whichever it is, nothing of
    the group is left when this returns or raises.

    Args:
        entry: a `Command` or `Function` for all `n` ranks, a builder `rank -> entry`, or a list with one per rank.
        n: how many workers; 1 when not given, the length of a list.
        name: of the group, for prefixes and directories.
        env: variables for all workers, over the caller's own environ; None unsets one.
        logs: where output goes; to the console with a prefix per line when not given.
        stop: how workers are stopped; SIGTERM and 30 s of grace when not given.
        start: how a `Function` gets its process: `"zygote"` (forked by a warm helper that has `preload` imported, which
            stays for the next group), `"spawn"` (a fresh interpreter), or `"fork"` (a copy of this process and all its
            memory; its dangers are in the documentation). Or an open `concurrent.futures.Executor`, in which functions
            run, supervised as far as it allows; the plan says what it does not. It is never shut down by us.
        preload: modules that the zygote imports once.
        ports: TCP ports on which workers will listen: a `SpecError` says who has one that is taken before the start,
            and `GroupResult.remains` who has one that is not free at the end.
        placement: where workers run: a `Placement` for all ranks (CPUs, NUMA nodes, GPUs, limits, a control group), a
            builder `rank -> Placement`, or a list with one per rank; as this program does when not given.
        restart: which failures are answered by a new attempt; none when not given.
        on_failure: when one has failed for good: `"stop"` the others, or `"continue"` until all have ended; for all
            ranks, by a builder `rank -> answer`, or a list with one per rank. `check` raises what failed either way.
        on_success: when one has succeeded: `"continue"` until all have ended, or `"stop"` the others: for processes of
            which none is to end; or, with `on_failure="continue"`, trials of which one is enough.
        timeout: seconds from the call after which the group is stopped, or its start given up; None, or infinity, for
            never.
        check: raise when a worker failed or the time was over; else look at the result.
        on_event: called on the loop with each event (`aioelastic.events`); must be quick.
        launcher: who starts commands and fresh interpreters: `"guardian"`, a small process that outlives this one for
            as long as it takes to end them, or `"direct"`, this process itself; or an implementation of `Launcher`.

    Returns:
        A `GroupResult`, which is a sequence of one `Result` per rank.

    Raises:
        SpecError: an argument is wrong; nothing was started.
        GroupFailed: `check`, and at least one worker failed by itself (or could not start).
        GroupTimeout: `check`, and the time was over.

    Example::

        result = await supervise(Command("python", "train.py"), n=4, logs=Logs(dir="runs", tee=Std.ALL))
        print(result[2].exit.code, result[2].usage.max_rss)
    """
    from .any_group import Group  # asyncio and all that is below: who only imports a name of ours does not wait for it

    group = Group(
        entry,
        n,
        name=name,
        env=env,
        logs=logs,
        stop=stop,
        start=start,
        preload=preload,
        ports=ports,
        placement=placement,
        restart=restart,
        on_failure=on_failure,
        on_success=on_success,
        check=False,
        on_event=on_event,
        launcher=launcher,
    )
    group._supervisor.begin_reading()  # each worker from its start on
    group.limit(timeout)
    async with group:
        await group.finish()
    result = await group.wait()
    group._supervisor.forget()
    if check:
        result.raise_for_failures()
    return result
