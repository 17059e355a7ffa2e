"""A line to one worker and back, again and again: through pipes, and through a terminal (pty(7)).

The worker is cat(1), which answers each line at once; its terminal echoes nothing (termios(3)). The peers are asyncio's
own subprocess, and a terminal by hand: `os.write` and `add_reader`. What the machine itself costs is the same with
reads and writes that block. All of it is on one CPU: else it is told on which of them the kernel has put the worker,
which changes from run to run by more than all that is compared.
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import termios
import time
from collections.abc import Awaitable, Callable

from _common import Report, main, on_loop, paired

from aioelastic import Command, Group, Logs, Std

LINE = b"x" * 80 + b"\n"
TEXT = LINE.decode().strip()
PIPES, TERMINAL = " (pipes)", " (terminal)"
GOAL = 1.3


async def trips(count: int, trip: Callable[[], Awaitable[bytes | str]]) -> float:
    """Microseconds that one takes, the median of `count`."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        got = await trip()
        took.append((time.perf_counter() - began) * 1e6)
        assert len(got) in (len(LINE), len(TEXT))
    return statistics.median(took)


async def by_dialogue(count: int, command: Command) -> float:
    async with Group(command, logs=Logs(tee=Std.NONE)) as group, group[0].dialogue() as talk:

        async def trip() -> str:
            await talk.send_line(TEXT)
            return await talk.read_line()

        return await trips(count, trip)


async def by_lines(count: int) -> float:
    async with Group(Command("cat", stdin="pipe"), logs=Logs(tee=Std.NONE)) as group:
        stdin, lines = group[0].stdin, group.lines()

        async def trip() -> bytes:
            await stdin.send(LINE)
            return (await anext(lines)).data

        return await trips(count, trip)


async def asyncio_subprocess(count: int) -> float:
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    async def trip() -> bytes:
        stdin.write(LINE)
        await stdin.drain()
        return await stdout.readline()

    took = await trips(count, trip)
    stdin.close()
    await process.wait()
    return took


async def terminal_by_hand(count: int) -> float:
    loop = asyncio.get_running_loop()
    master, process = on_terminal()
    os.set_blocking(master, False)
    came = bytearray()
    waiter: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        came.extend(os.read(master, 65536))
        if not waiter.done():
            waiter.set_result(None)

    loop.add_reader(master, readable)

    async def trip() -> bytes:
        nonlocal waiter
        os.write(master, LINE)
        while (end := came.find(b"\n") + 1) == 0:
            waiter = loop.create_future()
            await waiter
        line = bytes(came[:end])
        del came[:end]
        return line

    took = await trips(count, trip)
    loop.remove_reader(master)
    hang_up(master, process)
    return took


def blocking(count: int, write: int, read: int) -> float:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        os.write(write, LINE)
        got = b""
        while not got.endswith(b"\n"):
            got += os.read(read, 65536)
        took.append((time.perf_counter() - began) * 1e6)
    return statistics.median(took)


def blocking_pipes(count: int) -> float:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        took = blocking(count, process.stdin.fileno(), process.stdout.fileno())
        process.stdin.close()
    return took


def blocking_terminal(count: int) -> float:
    master, process = on_terminal()
    took = blocking(count, master, master)
    hang_up(master, process)
    return took


def on_terminal() -> tuple[int, subprocess.Popen[bytes]]:
    """Our end of a terminal like that of `Command(tty=True)`, and who has the other."""
    master, slave = os.openpty()
    mode = termios.tcgetattr(slave)
    mode[1] &= ~termios.ONLCR
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    process = subprocess.Popen(["cat"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    return master, process


def hang_up(master: int, process: subprocess.Popen[bytes]) -> None:
    os.write(master, b"\x04")  # the end of its input, at the beginning of a line (termios(3))
    process.wait()
    os.close(master)


def measure(quick: bool) -> Report:
    count, rounds = (20, 2) if quick else (2000, 15)
    report = Report("round_trip", rounds)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # workers inherit it
    pipes, terminal = Command("cat", stdin="pipe"), Command("cat", tty=True)
    cases: dict[str, Callable[[], float]] = {
        f"ours{PIPES}": lambda: on_loop(lambda: by_dialogue(count, pipes)),
        f"ours, stdin and lines(){PIPES}": lambda: on_loop(lambda: by_lines(count)),
        f"asyncio{PIPES}": lambda: on_loop(lambda: asyncio_subprocess(count)),
        f"ours (uvloop){PIPES}": lambda: on_loop(lambda: by_dialogue(count, pipes), "uvloop"),
        f"uvloop{PIPES}": lambda: on_loop(lambda: asyncio_subprocess(count), "uvloop"),
        f"blocking{PIPES}": lambda: blocking_pipes(count),
        f"ours{TERMINAL}": lambda: on_loop(lambda: by_dialogue(count, terminal)),
        f"asyncio, by hand{TERMINAL}": lambda: on_loop(lambda: terminal_by_hand(count)),
        f"blocking{TERMINAL}": lambda: blocking_terminal(count),
    }
    for name, values in paired(cases, rounds).items():
        report.add(name, "µs", values)
    for file, way, words in (("round-trip-pipes", PIPES, "pipes"), ("round-trip-terminal", TERMINAL, "a terminal")):
        names = [name for name in cases if name.endswith(way)]
        report.chart(file, f"A line to a worker and back, through {words}", names, strip=way, bounds=["blocking"])
    for work, ours, peer in (
        ("a line to a worker and back, through pipes", f"ours{PIPES}", f"asyncio{PIPES}"),
        ("the same by `worker.stdin` and `group.lines()`", f"ours, stdin and lines(){PIPES}", f"asyncio{PIPES}"),
        ("the same on uvloop", f"ours (uvloop){PIPES}", f"uvloop{PIPES}"),
        ("a line to a worker and back, through a terminal", f"ours{TERMINAL}", f"asyncio, by hand{TERMINAL}"),
    ):
        report.ratio(work, f"≤ {GOAL} × {peer.partition(' (')[0]}", GOAL, "low", ours, peer, ours=ours)
    return report


if __name__ == "__main__":
    main("round_trip", measure)
