"""A wait that is cancelled leaves nothing behind: no future, no callback, no reader, no descriptor, no thread."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import jobs
import pytest
from helpers import QUIET, sh

from aioelastic import Function, Group, sharing
from aioelastic.events import GroupDone, Spawned
from aioelastic.testing._recorder import Recorder

TIMES = 500


def kept(loop: asyncio.AbstractEventLoop) -> dict[str, int]:
    """What a wait may leave."""
    gc.collect()
    return {
        "futures": sum(isinstance(one, asyncio.Future) for one in gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


async def cancelled(wait: Callable[[], Awaitable[Any]], times: int = TIMES) -> None:
    for _ in range(times):
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])


async def leaves_nothing(wait: Callable[[], Awaitable[Any]]) -> None:
    loop = asyncio.get_running_loop()
    await cancelled(wait, 5)
    before = kept(loop)
    await cancelled(wait)
    after = kept(loop)
    for what, count in after.items():
        assert count <= before[what] + 20, what


async def waits_of(group: Group) -> dict[str, Callable[[], Awaitable[Any]]]:
    lines, events, recorder = group.lines(), group.events(), Recorder()
    while not isinstance(await anext(events), Spawned):
        pass
    return {
        "worker.wait": group[0].wait,
        "group.wait": group.wait,
        "group.lines": lambda: anext(lines),
        "group.events": lambda: anext(events),
        "group.events anew": lambda: of(group, GroupDone),
        "as_completed": lambda: anext(group.as_completed()),
        "recorder.wait": lambda: recorder.wait(GroupDone),
    }


async def of(group: Group, kind: type[Any]) -> None:
    async for event in group.events():
        if isinstance(event, kind):
            return


WAITS = ["worker.wait", "group.wait", "group.lines", "group.events", "group.events anew", "as_completed"]


@pytest.mark.parametrize("what", [*WAITS, "recorder.wait"])
async def test_of_a_group(what: str) -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET, check=False) as group:
        wait = (await waits_of(group))[what]
        await leaves_nothing(wait)
        assert len(group._supervisor.event_bus._readers) <= 3
        assert group._supervisor.end._callbacks is None or len(group._supervisor.end._callbacks) < 10
        await group.stop()


async def test_events_that_were_waited_for_in_vain_are_all_read_later() -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET, check=False) as group:
        events = group.events()
        first = await anext(events)
        await cancelled(lambda: anext(events), 3)
        await group.stop()
        rest = [one async for one in events]
        assert [first, *rest] == [one async for one in group.events()]
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_readers_of_events_that_are_dropped_are_told_nothing() -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET, check=False) as group:
        for _ in range(50):
            group.events()
        closed = group.events()
        await closed.aclose()
        assert [one async for one in closed] == []
        gc.collect()
        assert len(group._supervisor.event_bus._readers) <= 1
        await group.stop()


async def filled(worker: Any) -> None:
    """It takes no more."""
    while True:
        sending = asyncio.ensure_future(worker.send(bytes(20_000)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if not sending.done():
            sending.cancel()
            await asyncio.wait([sending])
            return


@pytest.mark.parametrize("what", ["receive", "send", "iterate"])
async def test_of_a_function_worker(what: str) -> None:
    async with Group(Function(jobs.sleeps), logs=QUIET, check=False) as group:
        worker = group[0]
        if what == "send":
            await filled(worker)
        waits: dict[str, Callable[[], Awaitable[Any]]] = {
            "receive": worker.receive,
            "send": lambda: worker.send(bytes(20_000)),
            "iterate": lambda: anext(worker.__aiter__()),
        }
        await leaves_nothing(waits[what])
        assert worker._life.channel is not None
        assert not worker._life.channel._came
        group.hurry()
        await group.stop()


@pytest.mark.parametrize("what", ["get", "put"])
async def test_of_a_queue(what: str) -> None:
    queue = sharing.Queue(1)
    if what == "put":
        await queue.put(1)
    await leaves_nothing(queue.get if what == "get" else lambda: queue.put(2))
    assert not queue._reader._wakes
