"""The web service in docs/examples, as its users meet it: uvicorn in a process of its own, a real HTTP client.

The server is itself a worker of a group of ours, which tells when it is up, and what it leaves behind: nothing.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import httpx
import uvloop
from helpers import QUIET, alive, gone

from aioelastic import Command, Group

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def server() -> Command:
    """The service on a free port, on the same kind of loop as the test."""
    loop = "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"
    where = ["--app-dir", EXAMPLES, "--host", "127.0.0.1", "--port", "0"]
    return Command(sys.executable, "-m", "uvicorn", "service:app", *where, "--loop", loop)


@asynccontextmanager
async def service() -> AsyncIterator[tuple[httpx.AsyncClient, Group]]:
    async with Group(server(), logs=QUIET, check=False) as group:
        async with aclosing(group.lines(when_full="drop")) as lines:
            async for line in lines:
                if found := re.search(r"running on (http://\S+)", line.text):
                    break
            else:
                raise AssertionError("the server did not start")
        async with httpx.AsyncClient(base_url=found[1], timeout=None, trust_env=False) as client:
            yield client, group


async def start(client: httpx.AsyncClient, script: str, n: int = 1) -> dict:
    answer = await client.post("/groups", json={"argv": ["/bin/sh", "-c", script], "n": n})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def states(client: httpx.AsyncClient) -> dict[str, list[str]]:
    answer = await client.get("/groups")
    assert answer.status_code == 200
    return {one["id"]: [worker["state"] for worker in one["workers"]] for one in answer.json()}


async def test_start_list_tail_stop_while_the_service_keeps_answering(tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    # asked to stop, it says so and then takes as long as the test likes
    obstinate = f"trap 'echo rank $RANK was asked; read x <{fifo}; exit 0' TERM; echo rank $RANK is up; "
    obstinate += "while :; do sleep 1000 & wait $!; done"
    async with service() as (client, server):
        group = await start(client, obstinate)
        name = group["id"]
        pid = group["workers"][0]["pid"]
        assert alive(pid)
        other = (await start(client, "echo $RANK of $WORLD_SIZE; exec sleep 1000", n=2))["id"]

        async with client.stream("GET", f"/groups/{name}/lines") as tail, aclosing(tail.aiter_lines()) as lines:
            assert await anext(lines) == "[0] rank 0 is up"
            assert await states(client) == {name: ["running"], other: ["running", "running"]}

            stopping = asyncio.create_task(client.delete(f"/groups/{name}"))
            assert await anext(lines) == "[0] rank 0 was asked"
            # one request waits for the worker, one streams its output: the service answers others all the same
            assert await states(client) == {name: ["stopping"], other: ["running", "running"]}
            assert not stopping.done()
            await asyncio.to_thread(fifo.write_text, "now\n")
            stopped = (await stopping).json()
            assert (stopped["ok"], stopped["reason"]) == (True, "stopped")
            assert stopped["workers"][0]["exit"] == "stopped (SIGTERM): exit code 0"
            assert [one async for one in lines] == []  # the stream ends with the group
        assert not alive(pid)
        assert await states(client) == {other: ["running", "running"]}

        # a reader who comes late gets the lines from before; both readers get each line once
        async with client.stream("GET", f"/groups/{other}/lines") as tail, aclosing(tail.aiter_lines()) as lines:
            assert {await anext(lines), await anext(lines)} == {"[0] 0 of 2", "[1] 1 of 2"}
        assert (await client.delete(f"/groups/{other}")).json()["ok"]
        assert await states(client) == {}
        result = await server.stop()
    assert result.leaked == ()


async def test_a_failed_group_is_told_and_the_service_lives_on() -> None:
    async with service() as (client, server):
        failing = await start(client, "echo oops >&2; exit 3")
        async with client.stream("GET", f"/groups/{failing['id']}/lines") as tail:
            assert [one async for one in tail.aiter_lines()] == ["[0] oops"]
        stopped = (await client.delete(f"/groups/{failing['id']}")).json()
        assert (stopped["ok"], stopped["reason"], stopped["workers"][0]["exit"]) == (False, "failed", "exit code 3")
        next_one = await start(client, "exec sleep 1000")
        assert await states(client) == {next_one["id"]: ["running"]}
        await server.stop()


async def test_bad_requests_are_answered_and_start_nothing() -> None:
    async with service() as (client, server):
        for body, words in (
            ({"argv": ["no-such-program"]}, "was not found"),
            ({"argv": ["sh"], "n": 0}, "n=0 is less than 1"),
            ({"argv": []}, "names no program"),
            ({"n": 2}, "send an object like"),
            (["sh"], "send an object like"),
        ):
            answer = await client.post("/groups", json=body)
            assert (answer.status_code, words in answer.text) == (400, True), answer.text
        assert (await client.delete("/groups/none")).status_code == 404
        assert (await client.get("/groups/none/lines")).status_code == 404
        assert await states(client) == {}
        await server.stop()


async def test_a_service_that_ends_takes_its_groups_with_it() -> None:
    async with service() as (client, server):
        pids = [worker["pid"] for worker in (await start(client, "exec sleep 1000", n=2))["workers"]]
        assert all(map(alive, pids))
        result = await server.stop()
        for pid in pids:
            await gone(pid)
    assert result.leaked == ()
    assert "Application shutdown complete" in str(result[0].stderr)
