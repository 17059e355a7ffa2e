"""81-byte lines of one worker (and of 64 at once) to a file and, prefixed, to the console.

The same producer feeds all; it waits at a gate until everything is set up, so starting it is not measured. The
console is /dev/null (or, where it says so, a pipe or socket with a quick reader), files are in memory: what is measured
is the copying, not a disk or a terminal.
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _common import Gate, Report, available, main, muted, on_loop, paired, scratch
from _peers import Daemon, circusd, supervisord

from aioelastic import Command, Group, Logs, Std

LINE = b"x" * 80 + b"\n"
BLOCK = LINE * 809  # just below 64 KiB, what a pipe holds
# -S: it starts in half the time; argv: directory of the gate, number of blocks
PRODUCER = f"import os, sys\n{Gate.WORKER}block = (b'x' * 80 + b'\\n') * 809\nfor _ in range(int(sys.argv[2])):\n"
PRODUCER += "    rest = block\n    while rest:\n        rest = rest[os.write(1, rest):]\n"
FILE_ONLY = " (file only)"
PIPE, SOCKET = "ours, tee into a pipe", "ours, tee into a non-blocking socket"
# takes all, and says how much it was
READER = (
    "import os\nroom, size = bytearray(1 << 20), 0\nwhile got := os.readv(0, [room]):\n    size += got\nprint(size)"
)
PREFIX = len("[worker0]: ")
LOOK = 0.001  # seconds between two looks at the file of a daemon that does not tell of an end


def producer(gate: Gate, blocks: int) -> list[str]:
    return [sys.executable, "-S", "-c", PRODUCER, str(gate.home), str(blocks)]


async def ours(home: Path, workers: int, blocks: int, tee: Std = Std.ALL) -> float:
    """`workers` that print `blocks` blocks each; seconds from the gate to the group's end."""
    gate = Gate(home)
    logs = Logs(dir=home / "runs", tee=tee)
    with muted():
        async with Group(Command(*producer(gate, blocks)), n=workers, logs=logs) as group:
            await gate.wait_async(workers)
            began = time.perf_counter()
            gate.open()
            result = await group.wait()
            took = time.perf_counter() - began
    for one in result:
        assert one.stdout.total == blocks * len(BLOCK)
        assert one.stdout.path is not None
        assert one.stdout.path.stat().st_size == one.stdout.total
        one.stdout.path.unlink()
    return took


async def tee_into(home: Path, blocks: int, kind: str) -> float:
    """One worker's lines to the console alone: a pipe, or a socket that its other owner has made non-blocking."""
    gate = Gate(home)
    if kind == "pipe":
        read, write = os.pipe()
    else:
        read, write = (one.detach() for one in socket.socketpair())
        os.set_blocking(write, False)
    reader = subprocess.Popen([sys.executable, "-S", "-c", READER], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    before = sys.stdout
    with open(write, "w") as sys.stdout:
        try:
            async with Group(Command(*producer(gate, blocks)), n=1) as group:
                await gate.wait_async(1)
                began = time.perf_counter()
                gate.open()
                await group.wait()
                took = time.perf_counter() - began
        finally:
            sys.stdout, stream = before, sys.stdout
    stream.close()
    assert int(reader.communicate()[0]) == blocks * (len(BLOCK) + BLOCK.count(b"\n") * PREFIX)
    return took


def tee_sed(home: Path, workers: int, blocks: int) -> float:
    """`workers` times `producer | tee FILE | sed s/^/prefix/ >/dev/null`, sed in the C locale, where it is fastest."""
    gate = Gate(home)
    env = {**os.environ, "LC_ALL": "C"}
    paths = [home / f"tee-{number}.log" for number in range(workers)]
    started = []
    for path in paths:
        first = subprocess.Popen(producer(gate, blocks), stdout=subprocess.PIPE)
        tee = subprocess.Popen(["tee", path], stdin=first.stdout, stdout=subprocess.PIPE, env=env)
        sed = subprocess.Popen(["sed", "s/^/[worker0]: /"], stdin=tee.stdout, stdout=subprocess.DEVNULL, env=env)
        for one in (first, tee):
            assert one.stdout is not None
            one.stdout.close()
        started += [first, tee, sed]
    gate.wait(workers)
    began = time.perf_counter()
    gate.open()
    for one in started:
        assert one.wait() == 0
    took = time.perf_counter() - began
    for path in paths:
        assert path.stat().st_size == blocks * len(BLOCK)
        path.unlink()
    return took


def torch_tee(home: Path, blocks: int) -> float:
    """torch elastic's redirect and tee. It looks each 10 ms for the end, far more often than it does by itself."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
    from torch.distributed.elastic.multiprocessing import Std as TorchStd

    gate = Gate(home)
    argv = producer(gate, blocks)
    with tempfile.TemporaryDirectory(dir=home) as logs, muted():
        context = start_processes(
            name="worker",
            entrypoint=argv[0],
            args={0: tuple(argv[1:])},
            envs={0: {}},
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=TorchStd.ALL, tee=TorchStd.ALL),
        )
        gate.wait(1)
        began = time.perf_counter()
        gate.open()
        result = context.wait(period=0.01)
        took = time.perf_counter() - began
        assert result is not None
        assert Path(result.stdouts[0]).stat().st_size == blocks * len(BLOCK)
    return took


async def processkit_tee(home: Path, blocks: int) -> float:
    """processkit: lines to a file by `stdout_tee`, streamed lines prefixed in Python."""
    import processkit

    gate = Gate(home)
    argv = producer(gate, blocks)
    path = home / "processkit.log"
    command = processkit.Command(argv[0], argv[1:]).stdout_tee(path)
    running = await command.astart()
    await gate.wait_async(1)
    with open(os.devnull, "w") as out:
        began = time.perf_counter()
        gate.open()
        async for line in running.stdout_lines():
            out.write(f"[worker0]: {line}\n")
        await running.afinish()
        took = time.perf_counter() - began
    assert path.stat().st_size == blocks * len(BLOCK)
    path.unlink()
    return took


async def asyncio_lines(home: Path, blocks: int) -> float:
    """What people write with asyncio: `readline`, to a file and to stdout."""
    gate = Gate(home)
    path = home / "asyncio.log"
    process = await asyncio.create_subprocess_exec(*producer(gate, blocks), stdout=subprocess.PIPE)
    assert process.stdout is not None
    await gate.wait_async(1)
    with open(path, "wb") as file, open(os.devnull, "wb") as out:
        began = time.perf_counter()
        gate.open()
        while line := await process.stdout.readline():
            file.write(line)
            out.write(b"[worker0]: " + line)
        await process.wait()
        took = time.perf_counter() - began
    path.unlink()
    return took


def to_file(start: Daemon, home: Path, blocks: int) -> float:
    """A daemon that copies to a file and does no more; seconds until the file is complete, not until the exit."""
    gate = Gate(home)
    path, script = gate.home / "daemon.log", gate.home / "producer.py"
    script.write_text(PRODUCER)
    with start(home, [sys.executable, "-S", str(script), str(gate.home), str(blocks)], 1, str(path)):
        gate.wait(1)
        began = time.perf_counter()
        gate.open()
        while path.stat().st_size < blocks * len(BLOCK):
            time.sleep(LOOK)
        took = time.perf_counter() - began
    assert path.stat().st_size == blocks * len(BLOCK)
    path.unlink()
    return took


def warm(home: Path, size: int) -> None:
    """See to it that the system has memory for so many bytes. The host of a virtual machine takes back what is free for
    seconds, and getting it again would be all that is measured."""
    piece = bytes(2**20)
    with tempfile.TemporaryFile(dir=home, buffering=0) as file:
        for _ in range(size // len(piece) + 1):
            file.write(piece)


def measure(quick: bool) -> Report:
    blocks, rounds, workers = (64, 2, 8) if quick else (16384, 5, 64)
    slow = max(blocks // 256, 16)  # for peers that need a hundred times as long
    report = Report("throughput", rounds)

    def rate(run: Callable[[], float], count: int) -> Callable[[], float]:
        def one() -> float:
            warm(home, count * len(BLOCK))
            return count * len(BLOCK) / run() / 1e6

        return one

    many, many_peers = f"ours, {workers} workers at once", f"tee FILE | sed, {workers} at once"
    with scratch() as home:
        cases = {
            "ours (asyncio)": rate(lambda: on_loop(lambda: ours(home, 1, blocks)), blocks),
            "ours (uvloop)": rate(lambda: on_loop(lambda: ours(home, 1, blocks), "uvloop"), blocks),
            f"ours{FILE_ONLY}": rate(lambda: on_loop(lambda: ours(home, 1, blocks, Std.NONE)), blocks),
            many: rate(lambda: on_loop(lambda: ours(home, workers, blocks // workers)), blocks),
            PIPE: rate(lambda: on_loop(lambda: tee_into(home, blocks // 2, "pipe")), blocks // 2),
            SOCKET: rate(lambda: on_loop(lambda: tee_into(home, blocks // 2, "socket")), blocks // 2),
            "tee FILE | sed": rate(lambda: tee_sed(home, 1, blocks), blocks),
            many_peers: rate(lambda: tee_sed(home, workers, blocks // workers), blocks),
            "asyncio readline": rate(lambda: on_loop(lambda: asyncio_lines(home, slow)), slow),
        }
        if available(report, "torch.distributed.elastic.multiprocessing", "torch"):
            cases["torch elastic"] = rate(lambda: torch_tee(home, blocks // 16), blocks // 16)
        if available(report, "processkit", "processkit-py"):
            cases["processkit-py"] = rate(lambda: on_loop(lambda: processkit_tee(home, slow)), slow)
        if available(report, "supervisor.supervisord", "supervisor", apart=True):
            cases[f"supervisord{FILE_ONLY}"] = rate(lambda: to_file(supervisord, home, blocks), blocks)
        if available(report, "circus.circusd", "circus", apart=True):
            cases[f"circusd{FILE_ONLY}"] = rate(lambda: to_file(circusd, home, slow), slow)
        for name, values in paired(cases, rounds).items():
            report.add(name, "MB/s", values)
    file_only = [name for name in cases if name.endswith(FILE_ONLY)]
    at_once, others = [many, many_peers], [PIPE, SOCKET]
    report.chart(
        "log-throughput", "81-byte lines of one worker, to a file and a prefixed console",
        [name for name in cases if name not in (*file_only, *at_once, *others)],
    )  # fmt: skip
    report.chart("log-throughput-file", "81-byte lines of one worker, to a file only", file_only, strip=FILE_ONLY)
    report.chart("log-throughput-many", f"81-byte lines of {workers} workers at once, in all", at_once)
    work = "one worker's 81-byte lines → file + prefixed tee"
    mine = "ours (asyncio)"
    report.ratio(work, "≥ 1.0 × `tee FILE | sed`", 1.0, "high", mine, "tee FILE | sed", ours=mine)
    report.ratio(work, "≥ 6 × torch elastic", 6.0, "high", mine, "torch elastic", ours=mine)
    report.ratio(f"{workers} workers at once, in all", "≥ 0.85 × of one worker's", 0.85, "high", many, mine, ours=many)
    work = "tee into a non-blocking socket, fast reader"
    report.ratio(work, "≥ 0.8 × into a pipe", 0.8, "high", SOCKET, PIPE, ours=SOCKET)
    share = report.times(many_peers, "tee FILE | sed")
    report.notes.append(
        f"the machine's own: {workers} times `tee FILE | sed` at once do {share} of what one does alone, and "
        f"{report.words(many_peers)} in all, where ours does {report.words(many)}: {report.times(many, many_peers)}"
    )
    report.notes.append(
        "file only: supervisord and circusd have no prefixed tee, and do half of the work; so does ours"
    )
    return report


if __name__ == "__main__":
    main("throughput", measure)
