r"""A web service that owns groups of workers: start, list, tail, stop them over HTTP.

    pip install aioelastic starlette uvicorn
    python docs/examples/service.py

    curl localhost:8000/groups \
        -d '{"argv": ["sh", "-c", "while date; do sleep 1; done"], "n": 2}'
    curl localhost:8000/groups
    curl -N localhost:8000/groups/ID/lines
    curl -X DELETE localhost:8000/groups/ID

It runs what it is told to run: keep it on localhost, or let requests choose among
commands of your own.
"""

import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
import anyio.abc
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from aioelastic import Command, Group, Line, Logs, SpecError, Std, Stop

RECENT = 200  # lines kept per group, for those who come to its tail late


@dataclass
class Entry:
    """A group of this service and its last lines."""

    group: Group
    recent: deque[Line]


class Groups:
    """All groups of the service, running or ended.

    Each lives in a task of its own, all in one task group.
    """

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self._tasks = tasks
        self.entries: dict[str, Entry] = {}

    async def start(self, command: Command, n: int) -> Group:
        """Returns when all workers have been started.

        Raises `SpecError` when the request makes no sense.
        """
        group: Group = await self._tasks.start(self._live, command, n)
        return group

    async def _live(
        self, command: Command, n: int, *, task_status: anyio.abc.TaskStatus[Group]
    ) -> None:
        recent: deque[Line] = deque(maxlen=RECENT)
        logs = Logs(tee=Std.NONE, callback=recent.append)
        # check=False: a failed worker is news for the client, no error of the service
        async with Group(
            command, n, name="web", logs=logs, stop=Stop(grace=10.0), check=False
        ) as group:
            self.entries[group.run_id] = Entry(group, recent)
            task_status.started(group)
            await group.wait()


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Groups]]:
    async with anyio.create_task_group() as tasks:
        yield {"groups": Groups(tasks)}
        # ends every group; the block is left when all are gone
        tasks.cancel_scope.cancel()


async def start(request: Request) -> JSONResponse:
    """POST /groups {"argv": [...], "n": 2}"""
    try:
        wanted = json.loads(await request.body())
        group = await request.state.groups.start(
            Command(*wanted["argv"]), wanted.get("n", 1)
        )
    except SpecError as exc:
        raise HTTPException(400, str(exc)) from exc
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise HTTPException(
            400, 'send an object like {"argv": ["sh", "-c", "date"], "n": 2}'
        ) from exc
    return JSONResponse(describe(group), status_code=201)


async def list_all(request: Request) -> JSONResponse:
    """GET /groups"""
    return JSONResponse(
        [describe(entry.group) for entry in request.state.groups.entries.values()]
    )


async def tail(request: Request) -> StreamingResponse:
    """GET /groups/{id}/lines: the last lines, then new ones, until the group ends."""
    entry = find(request)

    async def lines() -> AsyncIterator[str]:
        # a client that does not read must not stop the workers: it loses the oldest
        # lines instead
        async with contextlib.aclosing(entry.group.lines(when_full="drop")) as new:
            for line in list(entry.recent):
                yield show(line)
            async for line in new:
                yield show(line)

    return StreamingResponse(lines(), media_type="text/plain")


async def stop(request: Request) -> JSONResponse:
    """DELETE /groups/{id}: stop it, and forget it when nothing of it runs any more."""
    entry = find(request)
    result = await entry.group.stop()
    request.state.groups.entries.pop(result.run_id, None)
    return JSONResponse(
        {**describe(entry.group), "reason": result.reason, "ok": result.ok}
    )


def find(request: Request) -> Entry:
    groups: Groups = request.state.groups
    try:
        return groups.entries[request.path_params["id"]]
    except KeyError:
        raise HTTPException(404, "no such group") from None


def describe(group: Group) -> dict[str, object]:
    return {
        "id": group.run_id,
        "workers": [
            {
                "rank": w.rank,
                "pid": w.pid,
                "state": w.state.value,
                "exit": str(w.exit) if w.exit else None,
            }
            for w in group
        ],
    }


def show(line: Line) -> str:
    return f"[{line.rank}] {line.text}\n"


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/groups", start, methods=["POST"]),
        Route("/groups", list_all),
        Route("/groups/{id}", stop, methods=["DELETE"]),
        Route("/groups/{id}/lines", tail),
    ],
)

if __name__ == "__main__":
    # uvicorn waits for open responses before it ends the lifespan: a tail of a running
    # group needs this bound
    uvicorn.run(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=5)
