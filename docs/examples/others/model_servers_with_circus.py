"""The same as ../model_servers.py with circus."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from circus import get_arbiter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tornado.ioloop import IOLoop

SERVERS = 2


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    lines: asyncio.Queue[bytes] = asyncio.Queue()

    def said(chunk: dict[str, Any]) -> None:
        print(f"[worker {chunk['pid']}]: {chunk['data'].decode()}", end="", flush=True)
        lines.put_nowait(chunk["data"])

    watcher = {
        "name": "servers",
        "cmd": sys.argv[1],
        "args": sys.argv[2:],
        "copy_env": True,
        "numprocesses": SERVERS,  # one that fails is restarted for ever, or never
        "stdout_stream": {"stream": said},
        "stderr_stream": {"stream": said},
        "graceful_timeout": 10,
        "stop_children": True,
    }
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory() as where:
        arbiter = get_arbiter(
            [watcher],
            controller=f"ipc://{where}/controller",
            pubsub_endpoint=f"ipc://{where}/events",
            loop=IOLoop.current(),
        )
        try:
            await arbiter.start()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)  # it has taken those of uvicorn
            async with asyncio.timeout(60):
                ready = 0
                while ready < SERVERS:
                    ready += b"ready" in await lines.get()
            yield {"servers": arbiter.get_watcher("servers")}
        finally:
            await arbiter.stop()


async def models(request: Request) -> JSONResponse:
    servers = request.state.servers.processes.values()
    return JSONResponse([{"pid": one.pid, "state": one.status} for one in servers])


app = Starlette(lifespan=lifespan, routes=[Route("/models", models)])

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
