"""One run from the command line: the group, the signals, the summary, the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from ..events import Event, Restarting, SinkTrouble
from ..launch import dismiss_guardian
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.results import GroupResult
from ..model.text import printable
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
        if isinstance(event, Restarting):
            say(f"{event.reason}: restarting, attempt {event.next_attempt + 1}")
        elif isinstance(event, SinkTrouble):
            troubles[event.sink] = event
            if event.sink in ("stdout", "stderr") and event.problem in GONE:
                gone.append(event.sink)
                loop.call_soon(group.begin_stop)  # nobody reads any more: what is it still to run for?

    group = Group(spec, check=False, on_event=watch)
    stopped_by: list[int] = []
    is_watched = not spec.logs.json and sys.stderr is not None and sys.stderr.isatty()

    def say(words: str) -> None:
        """To a person at a terminal, which may hold it (Ctrl-S), and then holds no worker."""
        if is_watched:
            with contextlib.suppress(RuntimeError):  # no thread can be started: it does without
                loop.run_in_executor(None, put, sys.stderr, f"aioelastic: {printable(words)}\n")

    def stop(signum: signal.Signals) -> None:
        stopped_by.append(signum)
        if len(stopped_by) > 1:
            group.hurry()
        elif left := sum(one.exit is None for one in group):
            who = "1 worker" if left == 1 else f"{left} workers"
            say(f"stopping ({signum.name}): {who}, up to {spec.stop.grace:g} s; Ctrl-C again kills them")
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
    if spec.logs.json:
        from ._json_report import lines  # for start-up time: as below

        put(sys.stderr, "".join(f"{one}\n" for one in lines(result, {k: v.problem for k, v in troubles.items()}, lost)))
    else:
        report(result, troubles.values(), require_clean)
    return of_run(Facts(result, stopped_by, require_clean, bool(gone), sum(lost.values())))


def report(result: GroupResult, troubles: Iterable[SinkTrouble], require_clean: bool = False) -> None:
    """The summary, then the failures with the root cause last, then the stacks of the others, on stderr."""
    put(sys.stderr, printable(_report(result, troubles, require_clean)) + "\n")


def _report(result: GroupResult, troubles: Iterable[SinkTrouble], require_clean: bool) -> str:
    also = [f"not clean: {one}" for one in result.remains] if require_clean else []
    lost = _lost(result, troubles := list(troubles))
    for one in troubles:
        count = f" ({lost[one.sink]} bytes lost)" if lost[one.sink] else ""
        also.append(f"trouble with {one.sink}: {one.problem}{count}")
    lines = ["", result.describe(also)]
    if any(one.stacks is not None for one in result):
        from ._stacks import short_form  # for start-up time: most runs have none

        lines += short_form(result)
    return "\n".join(lines)


def _lost(result: GroupResult, troubles: Iterable[SinkTrouble]) -> dict[str, int]:
    """Bytes of output that did not arrive, by sink, in the end: an event tells how many by its own time."""
    lost = {one.sink: one.lost for one in troubles}
    for one in result:
        for stream in (one.stdout, one.stderr):
            if stream.lost:
                lost[str(stream.path)] = stream.lost
    return lost
