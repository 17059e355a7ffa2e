"""One run from the command line: the group, the signals, the summary, the exit status."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from ..events import Event, SinkTrouble
from ..launch import dismiss_guardian
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.results import GroupResult, Result
from ..model.text import printable, shown
from ..processes.proc_files import caught_signals
from ..supervisor.group import Group
from ..watch import Signals
from ._exit_status import Facts, of_run
from ._module_entry import FIELD
from ._print import put

STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FROM_KEYS = (signal.SIGINT, signal.SIGQUIT)  # a terminal sends them to all; a shell that waits leaves them to others
GONE = {os.strerror(one) for one in (errno.EPIPE, errno.ECONNRESET)}
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


def run(spec: GroupSpec, timeout: float | None, fixed_signal: bool, require_clean: bool, on_uvloop: bool) -> int:
    """Run the group to its end, print the summary on stderr, return the exit status.

    Args:
        fixed_signal: workers are stopped by the spec's own signal; else by the one that we got.
        require_clean: what they left behind is a failure.
        on_uvloop: where it is installed.

    Raises:
        SpecError: the module of `-m` has no such function.
    """
    with asyncio.Runner(loop_factory=_loop_factory(on_uvloop)) as runner:
        return runner.run(_run_group(spec, timeout, fixed_signal, require_clean))


def _loop_factory(wanted: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if wanted:
        try:
            import uvloop

            return uvloop.new_event_loop
        except ImportError:
            pass  # no wheel for this platform: the stock loop does the same, a little slower
    return None


async def _run_group(spec: GroupSpec, timeout: float | None, fixed_signal: bool, require_clean: bool) -> int:
    troubles: dict[str, SinkTrouble] = {}

    loop = asyncio.get_running_loop()
    gone: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, SinkTrouble):
            troubles[event.sink] = event
            if event.sink in ("stdout", "stderr") and event.problem in GONE:
                gone.append(event.sink)
                loop.call_soon(group.begin_stop)  # nobody reads any more: what is it still to run for?

    group = Group(spec, check=False, on_event=watch)
    stopped_by: list[int] = []

    def stop(signum: signal.Signals) -> None:
        stopped_by.append(signum)
        if len(stopped_by) > 1:
            group.hurry()
        policy = spec.stop
        if not fixed_signal:
            policy = replace(policy, signal=signum, scope="group" if signum in FROM_KEYS else policy.scope)
        group.begin_stop("stopped", policy)

    def suspend() -> None:
        for worker in group:
            # the kernel drops SIGTSTP for a session of its own like a worker's unless it is caught there
            if worker.pid is not None and signal.SIGTSTP in caught_signals(worker.pid):
                worker.signal_group(signal.SIGTSTP)
            else:
                worker.signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def resume() -> None:
        for worker in group:
            worker.signal_group(signal.SIGCONT)

    handlers: dict[signal.Signals, Callable[[], object]] = {signal.SIGTSTP: suspend, signal.SIGCONT: resume}
    handlers |= {one: partial(stop, one) for one in STOPPERS}
    handlers |= {one: partial(group.send_signal, one) for one in PASSED_ON}
    with Signals(loop, handlers):
        group.limit(timeout)
        async with group:
            await group.finish()
        result = await group.wait()
    dismiss_guardian()
    error = result.first_failure.exception if result.first_failure else None
    if error is not None and isinstance(error.exception, SpecError) and error.exception.field == FIELD:
        raise error.exception  # only a worker could find that out
    lost = _lost(result, troubles.values())
    report(result, troubles.values(), require_clean)
    return of_run(Facts(result, stopped_by, require_clean, bool(gone), sum(lost.values())))


def report(result: GroupResult, troubles: Iterable[SinkTrouble], require_clean: bool = False) -> None:
    """The summary, then the failures with the root cause last, then the stacks of the others, on stderr."""
    put(sys.stderr, printable("\n".join(_report(result, troubles, require_clean))) + "\n")


def _report(result: GroupResult, troubles: Iterable[SinkTrouble], require_clean: bool) -> list[str]:
    lines = ["", *_table(result)]
    if result.log_dir is not None:
        lines.append(f"logs: {result.log_dir}")
    lines += [f"left running by a worker, ended by us: pid {one.pid} ({one.command})" for one in result.leaked]
    if require_clean:
        lines += [f"not clean: {one}" for one in result.remains]
    else:
        lines += [f"would not die: {one}" for one in result.unkillable]
    lines += result.history()
    lost = _lost(result, troubles := list(troubles))
    for one in troubles:
        count = f" ({lost[one.sink]} bytes lost)" if lost[one.sink] else ""
        lines.append(f"trouble with {one.sink}: {one.problem}{count}")
    alone = all(one.first for one in result.failures)
    for failure in reversed(result.failures):
        lines += ["", ("root cause: " if failure.first and not alone else "") + failure.describe()]
    if result.reason == "done" and any(one.stopped for one in result):  # --on-success stop
        lines += [
            f"the others were stopped: {one.worker or f'rank {one.rank}'} had ended" for one in _ended_well(result)[:1]
        ]
    if result.reason == "timeout":
        lines.append(f"stopped: not done within {result.timeout:g} s")
    if any(one.stacks is not None for one in result):
        from ._stacks import short_form  # for start-up time: most runs have none

        lines += short_form(result)
    return lines


def _ended_well(result: GroupResult) -> list[Result]:
    """Those, the first to end first."""
    return sorted((one for one in result if one.ok), key=lambda one: one.exit.ended_ns if one.exit is not None else 0)


def _table(result: GroupResult) -> list[str]:
    head: tuple[str, ...] = ("rank", "pid", "outcome", "duration", "max RSS", "CPU time")
    rows = [head, *(_row(one) for one in result)]
    if any(one.attempt or one.earlier for one in result):
        attempts = ["attempts", *(str(one.attempt + 1) for one in result)]
        rows = [(*row[:2], count, *row[2:]) for row, count in zip(rows, attempts, strict=True)]
    if any(one.worker for one in result):
        names = ["name", *(one.worker or "-" for one in result)]
        rows = [(row[0], name, *row[1:]) for row, name in zip(rows, names, strict=True)]
    if any(one.value is not None for one in result):
        values = ["value", *(shown(one.value) for one in result)]
        rows = [(*row, value) for row, value in zip(rows, values, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(one: Result) -> tuple[str, ...]:
    usage = one.usage
    return (
        str(one.rank),
        "-" if one.pid is None else str(one.pid),
        one.outcome,
        "-" if one.exit is None else f"{one.exit.duration:.2f} s",
        "-" if usage is None else f"{'' if usage.max_rss_exact else '<= '}{usage.max_rss / 2**20:.1f} MiB",
        "-" if usage is None else f"{usage.user + usage.system:.2f} s",
    )


def _lost(result: GroupResult, troubles: Iterable[SinkTrouble]) -> dict[str, int]:
    """Bytes of output that did not arrive, by sink, in the end: an event tells how many by its own time."""
    lost = {one.sink: one.lost for one in troubles}
    for one in result:
        for stream in (one.stdout, one.stderr):
            if stream.lost:
                lost[str(stream.path)] = stream.lost
    return lost
