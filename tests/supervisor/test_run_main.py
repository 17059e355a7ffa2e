"""Programs that run by `aioelastic.run(main)`: what signals do to them, and how they end."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest
import uvloop

import aioelastic
from aioelastic import SpecError
from aioelastic.testing import Program

# two groups side by side; their workers say what they get, and those that are stubborn go on
SOURCE = """
import asyncio, aioelastic
from aioelastic import Command, Logs, Std, Stop, supervise

POLITE = "trap 'echo bye; exit 0' TERM; echo up $$; while :; do sleep 0.01; done"
STUBBORN = "trap 'echo no' TERM; echo up $$; while :; do sleep 0.01; done"

async def main():
    try:
        async with asyncio.TaskGroup() as tasks:
            for script in SCRIPTS:
                tasks.create_task(
                    supervise(Command("sh", "-c", script), stop=Stop(grace=600), logs=Logs(prefix="")))
    finally:
        print("left", flush=True)
    return "never"

print(RUN)
"""


def program(scripts: str = "[POLITE, POLITE]", run: str = "aioelastic.run(main)", **more: Any) -> Program:
    return Program(SOURCE.replace("SCRIPTS", scripts).replace("RUN", run), **more)


def up(one: Program, count: int = 2) -> None:
    for _ in range(count):
        one.line("up")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_signal_gives_the_workers_their_grace(signum: signal.Signals, code: int) -> None:
    with program() as one:
        up(one)
        one.send_signal(signum)
        for _ in range(2):
            one.line("bye")
        one.line("left")
        one.wait()
    assert one.code == code
    assert "never" not in one.output


def test_one_more_skips_the_grace() -> None:
    with program("[STUBBORN, STUBBORN]") as one:
        up(one)
        one.send_signal(signal.SIGTERM)
        for _ in range(2):
            one.line("no")
        one.send_signal(signal.SIGTERM)
        one.line("left")
        one.wait()
    assert one.code == 143


BEHIND = """
import asyncio, aioelastic
from aioelastic import Command, Logs, Stop, supervise

async def behind():
    try:
        script = "trap 'echo no' TERM; echo up $$; while :; do sleep 0.01; done"
        await supervise(Command("sh", "-c", script), stop=Stop(grace=600), logs=Logs(prefix=""))
    finally:
        print("left", flush=True)

async def main():
    asyncio.current_task().behind = asyncio.create_task(behind())
    await asyncio.sleep(WAITS)
    return "done"

print(aioelastic.run(main))
"""


@pytest.mark.parametrize("waits", ["3600", "0.5"])
def test_what_main_has_left_is_waited_for_through_signals(waits: str) -> None:
    """A group in another task, which `asyncio.run` cancels after the end of the first one."""
    with Program(BEHIND.replace("WAITS", waits)) as one:
        up(one, 1)
        if waits == "3600":
            one.send_signal(signal.SIGTERM)
        one.line("no")
        if waits != "3600":
            one.send_signal(signal.SIGHUP)  # its group is being stopped already
        one.send_signal(signal.SIGTERM)
        one.line("left")
        one.wait()
    assert one.code == (143 if waits == "3600" else 0)


def test_what_was_ignored_stays_ignored() -> None:
    with program(before=["nohup"]) as one:
        up(one)
        one.send_signal(signal.SIGHUP)
        one.send_signal(signal.SIGTERM)
        for _ in range(2):
            one.line("bye")
        one.wait()
    assert one.code == 143


def test_on_uvloop() -> None:
    with program(run="__import__('aioelastic').run(main, loop_factory=__import__('uvloop').new_event_loop)") as one:
        up(one)
        one.send_signal(signal.SIGTERM)
        for _ in range(2):
            one.line("bye")
        one.wait()
    assert one.code == 143


@pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop])
def test_what_main_returns_and_raises(loop_factory: Any) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    async def returns() -> int:
        return 5

    async def raises() -> None:
        raise ValueError("no")

    async def ends_itself() -> None:
        raise asyncio.CancelledError

    async def returns_all_the_same() -> str:
        signal.raise_signal(signal.SIGTERM)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            return "done"
        return "never"

    assert aioelastic.run(returns, loop_factory=loop_factory) == 5
    assert aioelastic.run(returns(), loop_factory=loop_factory) == 5
    with pytest.raises(ValueError, match="no"):
        aioelastic.run(raises, loop_factory=loop_factory)
    with pytest.raises(asyncio.CancelledError):
        aioelastic.run(ends_itself, loop_factory=loop_factory)
    assert aioelastic.run(returns_all_the_same, loop_factory=loop_factory) == "done"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("main", [5, lambda: 5, print])
def test_what_is_no_coroutine(main: Any) -> None:
    with pytest.raises(SpecError, match="main"):
        aioelastic.run(main)


def test_another_thread_is_refused() -> None:
    found: list[BaseException] = []

    async def main() -> None: ...

    def call() -> None:
        try:
            aioelastic.run(main)
        except RuntimeError as exc:
            found.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "only the main thread" in str(found[0])


async def test_a_running_loop_is_refused() -> None:
    async def main() -> None: ...

    with pytest.raises(RuntimeError, match="await what is to run"):
        aioelastic.run(main)
