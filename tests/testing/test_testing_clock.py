"""A loop that skips the time in which nobody does anything, and no other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from helpers import QUIET, py, sh

from aioelastic import Function, Group, Stop, supervise
from aioelastic.events import Event, Exited, Killed, Spawned, Stopping
from aioelastic.testing._clock import VirtualLoop
from aioelastic.testing._misbehaving_workers import stubborn
from aioelastic.testing._recorder import Recorder

T = TypeVar("T")

HOUR = 3600.0


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


def real() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def test_timers_end_in_their_order() -> None:
    ended: list[int] = []

    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for hours in (3, 1, 2):
            loop.call_later(hours * HOUR, ended.append, hours)
        await asyncio.sleep(4 * HOUR)
        return loop.time() - began

    began = real()
    passed = virtually(main())
    took = real() - began
    assert 4 * HOUR <= passed <= 4 * HOUR + took
    assert took < HOUR
    assert ended == [1, 2, 3]


def test_a_cascade_of_thirty_seconds() -> None:
    """On real processes: SIGTERM, which they ignore, the whole grace, its group's, SIGKILL."""
    at: dict[tuple[type[Event], int | None], float] = {}

    def note(event: Event) -> None:
        at[type(event), event.rank] = asyncio.get_running_loop().time()

    recorder = Recorder(note)

    async def main() -> None:
        async with Group(stubborn(), n=2, logs=QUIET, stop=Stop(grace=30), on_event=recorder, check=False) as group:
            up = 0
            async for _ in group.lines():
                up += 1
                if up == 2:
                    break

    began = real()
    virtually(main())
    took = real() - began
    assert took < 30
    for rank in (0, 1):
        assert 30 <= at[Killed, rank] - at[Stopping, rank] <= 30 + took
        assert recorder.of(Exited, rank=rank)[0].exit.stopped_by == signal.SIGKILL
    recorder.in_order("rank 1 stopping", "rank 0 stopping", "killed", "exited", "group done")


def test_a_timeout_of_an_hour() -> None:
    async def main() -> str:
        result = await supervise(sh("exec sleep 1000"), logs=QUIET, timeout=HOUR, check=False)
        return result.reason

    assert virtually(main()) == "timeout"


def test_no_time_is_skipped_while_a_worker_computes() -> None:
    """It says that it is done long before an hour is over, whatever it does until then."""
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint('done')"

    async def main() -> str:
        return str((await supervise(py(busy), n=2, logs=QUIET, timeout=HOUR))[1].stdout)

    assert virtually(main()) == "done\n"


def test_nor_while_a_chain_of_processes_hands_something_on() -> None:
    """Each of them sleeps in its turn, but one always runs."""
    ping = """
import os
a, b = os.pipe(), os.pipe()
if os.fork() == 0:
    for _ in range(200): os.write(b[1], os.read(a[0], 1))
    os._exit(0)
for _ in range(200):
    os.write(a[1], b"x")
    os.read(b[0], 1)
os.wait()
"""

    async def main() -> None:
        await supervise(py(ping), logs=QUIET, timeout=HOUR)

    virtually(main())


def test_nor_while_a_thread_of_ours_does_something() -> None:
    async def main() -> int:
        async with asyncio.timeout(HOUR):
            return await asyncio.to_thread(lambda: sum(range(3_000_000)))

    assert virtually(main()) == sum(range(3_000_000))


def test_nor_while_a_part_of_a_group_that_left_us_runs() -> None:
    """A daemon's output comes from a process that does not descend from us."""
    far = "import os, sys, time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint('far')"

    async def main() -> str:
        daemon = sh(f'setsid python3 -S -c "{far}" & exit 0')
        result = await supervise(daemon, logs=QUIET, stop=Stop(scope="leader"), timeout=HOUR)
        return str(result[0].stdout)

    assert virtually(main()) == "far\n"


def test_functions_too() -> None:
    async def main() -> Any:
        return (await supervise(Function(pow, 2, 10), n=2, logs=QUIET, timeout=HOUR))[1].value

    assert virtually(main()) == 1024


def test_a_timer_is_never_late_when_somebody_always_runs() -> None:
    """Then time passes as it does for all."""
    child = subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"])

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        began = real()
        await asyncio.sleep(0.2)
        return loop.jumped, real() - began

    try:
        jumped, took = virtually(main())
    finally:
        child.kill()
        child.wait()
    assert jumped == 0
    assert took >= 0.199


def test_what_is_ready_comes_before_what_is_due() -> None:
    reader, writer = os.pipe()
    told: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        loop.add_reader(reader, lambda: (told.append("data"), loop.remove_reader(reader)))
        loop.call_later(HOUR, lambda: (told.append("timer"), over.set_result(None)))
        threading.Thread(target=os.write, args=(writer, b"x")).start()
        await over

    virtually(main())
    os.close(reader)
    os.close(writer)
    assert told == ["data", "timer"]


def test_without_timers_it_waits_as_any_other() -> None:
    async def main() -> None:
        await supervise(sh("exec sleep 0.05"), logs=QUIET)

    virtually(main())


def test_it_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that jumps without looking breaks the promises above: the tests can fail."""
    from aioelastic.testing import _clock

    busy = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"

    def jump(event: Event) -> None:
        if isinstance(event, Spawned):  # before that it would jump over the time for the look at the command
            monkeypatch.setattr(_clock._Quiet, "look", lambda self: {})

    async def main() -> str:
        return (await supervise(py(busy), logs=QUIET, timeout=HOUR, check=False, on_event=jump)).reason

    assert virtually(main()) == "timeout"
