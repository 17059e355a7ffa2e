"""Waits for an item, for room or for an object: one descriptor, however many wait; first come, first served."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import share_jobs
import uvloop
from helpers import QUIET, until

from aioelastic import Function, Group, sharing
from aioelastic.child.wire import datagrams, messages, sent_objects

MANY = 1_100


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_many_tasks_that_wait_for_an_item() -> None:
    q = sharing.Queue(8)
    before = descriptors()
    tasks = [asyncio.create_task(q.get()) for _ in range(MANY)]
    await turns()
    assert descriptors() == before + 1
    for number in range(MANY):
        await q.put(number)
    assert await asyncio.gather(*tasks) == list(range(MANY))
    assert descriptors() == before


async def test_many_tasks_that_wait_for_room() -> None:
    q = sharing.Queue(1)
    await q.put(-1)
    before = descriptors()
    tasks = [asyncio.create_task(q.put(number)) for number in range(MANY)]
    await turns()
    assert descriptors() == before + 1
    assert [await q.get() for _ in range(MANY + 1)] == list(range(-1, MANY))
    await asyncio.gather(*tasks)
    assert descriptors() == before


async def test_many_tasks_of_a_worker_that_wait_for_objects() -> None:
    async with Group(Function(share_jobs.many_receive, MANY), logs=QUIET) as group:
        assert await group[0].receive() == 0  # descriptors more than before
        for number in range(MANY):
            await group[0].send(number)
        assert (await group.wait())[0].value == list(range(MANY))


async def test_many_tasks_that_wait_for_objects_of_a_worker() -> None:
    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        worker = group[0]
        await worker.send(0)
        assert await worker.receive() == 0
        before = descriptors()
        tasks = [asyncio.create_task(worker.receive()) for _ in range(MANY)]
        await turns()
        assert descriptors() == before
        for number in range(MANY):
            await worker.send(number)
        assert await asyncio.gather(*tasks) == list(range(MANY))
        await worker.send(None)


@pytest.mark.parametrize("which", [0, 1, 3], ids=["the first", "the second", "one in the midst"])
@pytest.mark.parametrize("when", [0, 1, 2, 3], ids=lambda count: f"{count} turns after an item came")
async def test_a_get_that_is_cancelled_takes_nothing_with_it(which: int, when: int) -> None:
    q = sharing.Queue(8)
    tasks = [asyncio.create_task(q.get()) for _ in range(5)]
    await turns()
    q.put_nowait(0)
    await turns(when)
    tasks[which].cancel()
    got = [] if (await asyncio.wait([tasks[which]])) and tasks[which].cancelled() else [tasks[which].result()]
    for number in range(1, 5):
        q.put_nowait(number)
    del tasks[which]
    got += await asyncio.gather(*tasks)
    rest = []
    while True:
        try:
            rest.append(q.get_nowait())
        except sharing.Empty:
            break
    assert got + rest == list(range(5))


@pytest.mark.parametrize("when", [0, 1, 2, 3], ids=lambda count: f"{count} turns after there was room")
async def test_a_put_that_is_cancelled_leaves_its_turn_and_the_room(when: int) -> None:
    q = sharing.Queue(1)
    q.put_nowait("first")
    tasks = [asyncio.create_task(q.put(number)) for number in range(3)]
    await turns()
    got = [q.get_nowait()]
    await turns(when)
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    others = [0, 1, 2] if not tasks[0].cancelled() else [1, 2]
    got += [await asyncio.wait_for(q.get(), 150) for _ in others]
    assert got == ["first", *others]
    await asyncio.gather(*tasks[1:])


async def test_a_storm_of_cancellations_loses_nothing() -> None:
    q = sharing.Queue(2)
    got: list[int] = []

    async def gets() -> None:
        while True:
            got.append(await q.get())

    tasks = [asyncio.create_task(gets()) for _ in range(20)]
    for number in range(300):
        await q.put(number)
        tasks[number % 20].cancel()
        tasks[number % 20] = asyncio.create_task(gets())
        await turns(number % 4)
    await until(lambda: len(got) == 300)
    assert got == list(range(300))
    for one in tasks:
        one.cancel()
    await asyncio.wait(tasks)


@pytest.mark.parametrize("runs", [asyncio.run, uvloop.run])
def test_several_loops_that_wait_for_items(runs: Callable[[Any], Any]) -> None:
    """Each has one descriptor, and its tasks their order."""
    q = sharing.Queue(8)
    assert q._get is not None
    socket = os.readlink(f"/proc/self/fd/{q._get.fileno()}")
    waiting = threading.Barrier(4)

    def held() -> int:
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                pass  # that of the list
        return links.count(socket)

    async def gets() -> list[int]:
        tasks = [asyncio.create_task(q.get()) for _ in range(50)]
        await turns()
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait)
        return list(await asyncio.gather(*tasks))

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(runs, gets()) for _ in range(3)]
        waiting.wait()
        assert held() == 1 + 3
        for number in range(150):
            q.put_sync(number)
        found = [one.result() for one in running]
    assert sorted(item for one in found for item in one) == list(range(150))
    for one in found:
        assert one == sorted(one)
    assert held() == 1


def test_a_loop_that_has_ended_is_not_kept() -> None:
    q = sharing.Queue(1)
    known: list[weakref.ref[Any]] = []

    async def both() -> None:
        known.append(weakref.ref(asyncio.get_running_loop()))
        gets = [asyncio.create_task(q.get()) for _ in range(3)]
        puts = [asyncio.create_task(q.put(number)) for number in range(3)]
        await asyncio.gather(*gets, *puts)

    asyncio.run(both())
    gc.collect()
    assert known[0]() is None


async def test_what_one_leaves_is_taken_by_a_thread_that_waits_already() -> None:
    """And it does not spin afterwards, though it was told of something that others had taken."""
    reader = sent_objects.Reader()
    one = sent_objects.SentObject()
    one.packet = messages.encode(messages.OBJECT, ("left",))[0]
    a, b = datagrams.pair()
    with a, b:
        a.setblocking(False)

        def receive(obj: sent_objects.SentObject) -> None:
            obj.take(a)

        waiting = asyncio.create_task(asyncio.to_thread(reader.take_sync, [], receive, a.fileno(), 60))
        await until(lambda: bool(reader._wakeup))
        reader.leave([(0, one)])
        assert await waiting == "left"
        reader._notify()  # in vain
        waiting = asyncio.create_task(asyncio.to_thread(reader.take_sync, [], receive, a.fileno(), 60))
        wakeup = reader._wakeup[0]
        await until(lambda: not is_notified(wakeup))
        datagrams.send(b, messages.encode(messages.OBJECT, ("sent",))[0])
        assert await waiting == "sent"
    await asyncio.get_running_loop().shutdown_default_executor()


def is_notified(wakeup: int) -> bool:
    return datagrams.readable(0, wakeup)
