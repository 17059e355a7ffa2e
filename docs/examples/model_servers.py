"""A web service that owns model servers.

It starts them, begins to serve when all are ready, restarts one that has crashed,
tells their states, and stops them when it ends itself.

pip install aioelastic starlette uvicorn
python docs/examples/model_servers.py python serve.py
curl localhost:8000/models
"""

import contextlib
import os
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from aioelastic import Command, Group, Restart, Stop

SERVERS = 2


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Group]]:
    async with Group(
        Command(*sys.argv[1:]),
        SERVERS,
        restart=Restart.on_failure(max=3),
        on_failure="continue",
        stop=Stop(grace=10),
    ) as group:
        for rank in range(SERVERS):
            await group.line("ready", ranks=[rank], timeout=60)
        yield {"group": group}


async def models(request: Request) -> JSONResponse:
    return JSONResponse(
        [
            {"pid": one.pid, "state": one.state.value, "restarts": one.attempt}
            for one in request.state.group
        ]
    )


app = Starlette(lifespan=lifespan, routes=[Route("/models", models)])

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
