"""A program that forks while a group of two workers runs, for test_forked.py: LOOP KIND LOGS."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from aioelastic import Command, Function, Group, Logs, Std, sharing, supervise
from aioelastic.events import Event, SinkTrouble
from aioelastic.streams import LineFeed

QUIET = Logs(tee=Std.NONE)
WORDS = "this is a forked copy of the program that started group 'w': it owns nothing of it"
# how each copy ends → its exit code
HOWS = {"return": 0, "exception": 1, "sys.exit": 3, "os._exit": 4, "exec": 5, "calls": 6, "afresh": 7, "daemon": 8}
ECHO = """
import signal
count = 0
def say(*_):
    global count
    count += 1
    print("line", count, flush=True)
signal.signal(signal.SIGUSR1, say)
print("up", flush=True)
while True:
    signal.pause()
"""


def echo() -> None:
    print("up", flush=True)
    while True:
        print("line", sharing.receive(), flush=True)


def entry(kind: str) -> dict[str, Any]:
    if kind in ("command", "direct"):
        launcher = "direct" if kind == "direct" else "guardian"
        return {"entry": Command(sys.executable, "-c", ECHO), "launcher": launcher}
    return {"entry": Function(echo), "start": kind}


async def ask(group: Group, number: int, kind: str) -> None:
    """Each worker prints that number."""
    if kind in ("command", "direct"):
        group.send_signal(signal.SIGUSR1)
    else:
        for worker in group:
            await worker.send(number)


async def in_the_copy(how: str, group: Group, lines: LineFeed) -> int:
    if how == "exception":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        raise ValueError
    if how == "sys.exit":
        sys.exit(3)
    if how == "exec":
        os.execv("/bin/sh", ["sh", "-c", "exit 5"])
    if how == "calls":
        worker = group[0]
        told(lambda: group.pids)
        told(group.events)
        told(group.lines)
        told(group.hurry)
        for send in (group.send_signal, worker.send_signal, worker.signal_group):
            told(lambda send=send: send(signal.SIGTERM))
        for call in (group.stop, group.wait, group.dump_stacks, worker.stop, worker.wait, worker.receive):
            await told_async(call())
        await told_async(worker.send(1))
        await told_async(lines.__anext__())
    if how == "afresh":
        asyncio.run(afresh())
        uvloop.run(afresh())
    if how == "daemon":
        if os.fork():
            os._exit(8)
        os.setsid()
    if how in ("os._exit", "calls", "afresh"):
        os._exit(HOWS[how])
    return 0


def told(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=f"^{WORDS}$"):
        call()


async def told_async(call: Awaitable[object]) -> None:
    with pytest.raises(RuntimeError, match=f"^{WORDS}$"):
        await call


async def afresh() -> None:
    result = await supervise(Command("echo", "afresh"), logs=QUIET)
    assert str(result[0].stdout) == "afresh\n", result
    assert result.clean, result.remains
    result = await supervise(Function(os.getppid), logs=QUIET)
    assert result[0].value != os.getpid()


async def main(kind: str, where: str) -> int:
    events: list[Event] = []
    logs = Logs(dir=where, tee=Std.ALL)
    async with Group(**entry(kind), n=2, name="w", logs=logs, on_event=events.append) as group:
        lines = group.lines()
        for _ in range(2):
            assert (await anext(lines)).text == "up"
        pids = dict(group.pids)
        over, held = os.pipe()  # which each copy has while it lives
        for number, (how, status) in enumerate(HOWS.items(), 1):
            pid = os.fork()
            if pid == 0:
                return await in_the_copy(how, group, lines)
            # by a thread of the loop's own executor, for whose end the copy's asyncio.run() waits, too
            _, got = await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(got) == status, (how, got)
            assert group.pids == pids, (how, group.pids)
            await ask(group, number, kind)
            said = sorted([(await anext(lines))[:3] for _ in range(2)])
            assert said == [(rank, "stdout", b"line %d" % number) for rank in range(2)], (how, said)
        os.close(held)
        assert await asyncio.to_thread(os.read, over, 1) == b""
        result = await group.stop()
    assert {one.exit.stopped_by for one in result if one.exit is not None} == {signal.SIGTERM}, result
    assert result.clean or kind in ("direct", "fork"), result.remains
    assert not any(isinstance(one, SinkTrouble) for one in events)
    text = "up\n" + "".join(f"line {number}\n" for number in range(1, len(HOWS) + 1))
    for rank in range(2):
        (log,) = Path(where).glob(f"*/attempt_0/{rank}/stdout.log")
        assert log.read_text() == text, log.read_text()
    return 0


if __name__ == "__main__":
    me = os.getpid()
    code = (asyncio if sys.argv[1] == "asyncio" else uvloop).run(main(*sys.argv[2:]))
    if os.getpid() != me:
        sys.exit(code)
    print("original", flush=True)
