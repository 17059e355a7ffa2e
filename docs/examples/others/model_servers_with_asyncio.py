"""The same as ../model_servers.py with the standard library's subprocesses."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

SERVERS = 2


class Server:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pid: int | None = None
        self.state = "planned"
        self.restarts = 0
        self.ready = asyncio.Event()

    async def run(self) -> None:
        for self.restarts in range(4):
            process = await asyncio.create_subprocess_exec(
                *sys.argv[1:],
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                limit=2**20,
                env={**os.environ, "RANK": str(self.rank), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            self.pid, self.state = process.pid, "running"
            reader = asyncio.create_task(self.read(process))
            try:
                await process.wait()
            finally:
                await stop(process)
                await reader
                self.state = f"ended with {process.returncode}"
                print(f"server {self.rank}", self.state)
            if process.returncode == 0:
                return

    async def read(self, process: Process) -> None:
        async for line in process.stdout:
            print(f"[worker{self.rank}]: {line.decode()}", end="", flush=True)
            if b"ready" in line:
                self.ready.set()


async def stop(process: Process) -> None:
    # a child in a session of its own stays, and all stay when this program is killed
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 10)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, list[Server]]]:
    servers = [Server(rank) for rank in range(SERVERS)]
    tasks = [asyncio.create_task(one.run()) for one in servers]
    try:
        for one in servers:  # of one that fails four times nobody hears earlier
            await asyncio.wait_for(one.ready.wait(), 60)
        yield {"servers": servers}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def models(request: Request) -> JSONResponse:
    return JSONResponse(
        [
            {"pid": one.pid, "state": one.state, "restarts": one.restarts}
            for one in request.state.servers
        ]
    )


app = Starlette(lifespan=lifespan, routes=[Route("/models", models)])

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
