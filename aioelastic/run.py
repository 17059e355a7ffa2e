"""`supervise()`: a group from its beginning to its end, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .entry import Entry
from .events import Event
from .group import Group
from .launch import By, Launcher
from .outcome import GroupResult
from .placement import Places
from .restart import Restart
from .spec import Logs, Start, Stop, check_timeout


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
    timeout: float | None = None,
    check: bool = True,
    on_event: Callable[[Event], object] | None = None,
    launcher: Launcher | By = "guardian",
) -> GroupResult:
    """Run a group of workers to its end.

    It ends when all workers have ended, or one has failed and is not to begin again (the others are then stopped), or
    the time is over, or the calling task is cancelled; whichever it is, nothing of the group is left when this
    returns or raises.

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
        timeout: seconds after which the group is stopped.
        check: raise when a worker failed or the time was over; else look at the result.
        on_event: called on the loop with each event (`aioelastic.events`); must be quick.
        launcher: who starts commands and fresh interpreters: `"guardian"`, a small process that outlives this one for
            as long as it takes to end them, or `"direct"`, this process itself; or an implementation of `Launcher`.

    Returns:
        A `GroupResult`: a sequence of one `Result` per rank.

    Raises:
        SpecError: an argument is wrong; nothing was started.
        GroupFailed: `check`, and at least one worker failed by itself (or could not start).
        GroupTimeout: `check`, and the time was over.

    Example::

        result = await supervise(Command("python", "train.py"), n=4, logs=Logs(dir="runs", tee=Std.ALL))
        print(result[2].exit.code, result[2].usage.max_rss)
    """
    check_timeout(timeout)
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
        check=False,
        on_event=on_event,
        launcher=launcher,
    )
    group.begin_reading()  # each worker from its start on
    async with group:
        await group.finish(timeout)
    result = await group.wait()
    group.forget()
    if check:
        result.raise_for_failures()
    return result
