"""The same as ../orchestrator.py with the standard library."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process

status: dict[int, str] = {}


def tell(rank: int, words: str) -> None:
    status[rank] = words
    print(status, flush=True)


async def copy(rank: int, source: asyncio.StreamReader, target: int) -> None:
    async for line in source:
        os.write(target, f"[worker{rank}]: ".encode() + line)


async def stop(process: Process) -> None:
    # a child in a session of its own stays, and all stay when this program is killed
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 10)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def work(rank: int) -> None:
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            *sys.argv[1:],
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            limit=2**20,
            env={**os.environ, "RANK": str(rank), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        tell(rank, f"runs as {process.pid}")
        copies = asyncio.gather(
            copy(rank, process.stdout, 1), copy(rank, process.stderr, 2)
        )
        try:
            await process.wait()
        finally:
            await stop(process)
            await copies
            how = f"exit code {process.returncode}"
            tell(rank, how)
        if process.returncode == 0:
            return
        tell(rank, f"restarts after {how}")
    raise RuntimeError(f"rank {rank} failed: {how}")


async def main() -> None:
    task = asyncio.current_task()
    assert task
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    async with asyncio.TaskGroup() as tasks:
        for rank in range(3):
            tasks.create_task(work(rank))


try:
    asyncio.run(main())
except asyncio.CancelledError:
    sys.exit(143)
