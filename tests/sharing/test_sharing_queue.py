"""A queue between processes: bounded, closed for all at once, and no death of a process takes a place with it."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import resource
import signal
import threading
from typing import Any

import numpy as np
import pytest
import share_jobs
from helpers import QUIET, event_of, no_descriptors_left

from aioelastic import Function, Group, GroupFailed, SpecError, memory, sharing, supervise
from aioelastic.events import Exited
from aioelastic.sharing import _items


def in_it(q: sharing.Queue) -> int:
    """How many items it takes no more, for now."""
    count = 0
    while True:
        try:
            q.put_nowait("filler")
        except queue.Full:
            return q.maxsize - count
        count += 1


def fill(q: sharing.Queue, items: list[Any]) -> bool:
    """Put these into it. False: this user may not have so many descriptors under way; those that went in are right."""
    why = ""
    try:
        for one in items:
            q.put_nowait(one)
    except sharing.Full as exc:
        why = str(exc)
    else:
        return True
    assert "descriptors under way" in why
    assert os.geteuid() != 0
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 3 * len(items)
    while True:
        try:
            q.get_nowait()
        except sharing.Empty:
            return False


@pytest.mark.parametrize("maxsize", [0, -1, 129, 1.5, "8", True])
def test_a_wrong_size(maxsize: Any) -> None:
    with pytest.raises(SpecError, match="maxsize"):
        sharing.Queue(maxsize)


@pytest.mark.parametrize("maxsize", [1, 2, 128])
@pytest.mark.parametrize("item", [None, b"x" * 440, b"x" * 40_000])
def test_it_holds_so_many_items(maxsize: int, item: Any) -> None:
    q = sharing.Queue(maxsize)
    if not fill(q, [item] * maxsize):
        return
    with pytest.raises(queue.Full):
        q.put_nowait(item)
    with pytest.raises(queue.Full):
        q.put_sync(item, timeout=0)
    for _ in range(maxsize):
        assert q.get_nowait() == item
    with pytest.raises(queue.Empty):
        q.get_sync(timeout=0)


@pytest.mark.parametrize("maxsize", [1, 2, 8, 12, 13, 16, 31, 64, 100, 128])
def test_what_fits_into_its_socket_needs_no_memory_of_its_own(maxsize: int) -> None:
    """And all of that fits, however large each may be, with its place and other descriptors."""
    q = sharing.Queue(maxsize)
    x = sharing.empty(100_000, "u1")
    items = [(x, bytes(q._inline - 400)) if number % 2 else bytes(q._inline - 40) for number in range(maxsize)]
    if not fill(q, items):
        return
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert "/memfd:aioelastic (deleted)" not in links
    with pytest.raises(sharing.Full, match="the queue is full"):
        q.put_nowait(1)
    for one in items:
        got = q.get_nowait()
        assert got == one if isinstance(one, bytes) else got[1] == one[1]
    q.put_nowait(bytes(q._inline))  # and this one needs it
    assert q.get_nowait() == bytes(q._inline)


def test_items_come_in_order_and_wrap_around() -> None:
    q = sharing.Queue(3)
    for i in range(50):
        q.put_sync(i)
        q.put_sync(-i)
        assert (q.get_sync(), q.get_sync()) == (i, -i)


def test_what_cannot_be_pickled_takes_no_place() -> None:
    q = sharing.Queue(1)
    with pytest.raises(TypeError):
        q.put_nowait(threading.Lock())
    q.put_nowait(1)
    assert q.get_nowait() == 1


def test_an_item_that_cannot_be_unpickled_gives_its_place_back() -> None:
    import jobs

    q = sharing.Queue(1)
    q.put_nowait(jobs.Refuses())
    real = os.getpid
    try:
        os.getpid = lambda: -1  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="not in this process"):
            q.get_nowait()
    finally:
        os.getpid = real
    q.put_nowait(2)
    assert q.get_nowait() == 2


async def test_an_item_whose_descriptors_cannot_be_taken_gives_its_place_back() -> None:
    q = sharing.Queue(1)
    await q.put(np.ones(100_000))
    putting = asyncio.create_task(q.put("next"))
    await asyncio.sleep(0)
    assert not putting.done()
    with no_descriptors_left(), pytest.raises(ValueError, match="too many open"):
        q.get_nowait()
    await asyncio.wait_for(putting, 150)
    assert await q.get() == "next"


async def test_a_put_without_descriptors_leaves_the_room_to_others() -> None:
    q = sharing.Queue(1)
    await q.put(1)
    putting = asyncio.create_task(q.put(2))
    await asyncio.sleep(0)
    assert await q.get() == 1
    with no_descriptors_left(), pytest.raises(OSError, match="Too many open files"):
        q.put_sync("no")  # it comes first, and fails
    await asyncio.wait_for(putting, 150)
    assert await q.get() == 2


async def test_a_bell_that_was_rung_for_each_dead_process_makes_nobody_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    q = sharing.Queue(1)
    await q.put(1)
    for _ in range(1000):
        memory.peer_gone()
    looks, real = [], _items.Putting.finds_room
    monkeypatch.setattr(_items.Putting, "finds_room", lambda one: looks.append(1) or real(one))
    with pytest.raises(queue.Full):
        q.put_sync(2, timeout=0.05)
    putting = [asyncio.create_task(q.put(number)) for number in (2, 3)]
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(looks) < 10
    for number in (1, 2, 3):
        assert await q.get() == number
    await asyncio.gather(*putting)


def test_all_who_wait_are_woken_when_several_places_become_free() -> None:
    q = sharing.Queue(3)
    for number in range(3):
        q.put_sync(number)
    threads = [threading.Thread(target=q.put_sync, args=(number,)) for number in range(3, 6)]
    for one in threads:
        one.start()
    assert [q.get_sync(10) for _ in range(6)][:3] == [0, 1, 2]
    for one in threads:
        one.join(60)
        assert not one.is_alive()


@pytest.mark.parametrize("packet", [b"X", b"I", b"I\0no pickle"])
def test_what_is_no_item_is_told_and_taken_out(packet: bytes) -> None:
    """Whoever has a queue may write anything to it."""
    q = sharing.Queue(2)
    assert q._put is not None
    q._put.send(packet)
    q.put_nowait("item")
    with pytest.raises(ValueError, match="no item"):
        q.get_nowait()
    assert q.get_nowait() == "item"


async def test_waiting_and_closing() -> None:
    q = sharing.Queue(1)
    getters = [asyncio.create_task(q.get()) for _ in range(3)]
    await asyncio.sleep(0)
    for i in range(3):
        await q.put(i)
    assert sorted(await asyncio.gather(*getters)) == [0, 1, 2]
    await q.put("last")
    putter = asyncio.create_task(q.put("more"))
    await asyncio.sleep(0)
    q.close()
    with pytest.raises(sharing.QueueClosed):
        await putter
    assert await q.get() == "last"
    with pytest.raises(sharing.QueueClosed):
        await q.get()
    q.close()
    assert [item async for item in q] == []


async def test_a_cancelled_wait_loses_nothing() -> None:
    q = sharing.Queue(1)
    waiting = asyncio.create_task(q.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await q.put(1)
    waiting = asyncio.create_task(q.put(2))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await q.get() == 1
    with pytest.raises(queue.Empty):
        q.get_nowait()


@pytest.mark.parametrize("job", [share_jobs.takes, share_jobs.takes_async])
async def test_many_producers_and_consumers(job: Any) -> None:
    q = sharing.Queue(2)
    consumers = asyncio.create_task(supervise(Function(job, q), n=2, logs=QUIET))
    await supervise(Function(share_jobs.puts, q, list(range(40))), n=3, logs=QUIET)
    q.close()
    result = await consumers
    got = [item for one in result for item in one.value]
    assert sorted(got) == sorted((rank, i) for rank in range(3) for i in range(40))
    for one in result:  # each producer's in its order
        for rank in range(3):
            mine = [i for who, i in one.value if who == rank]
            assert mine == sorted(mine)


async def test_arrays_through_two_queues() -> None:
    first, second = sharing.Queue(2), sharing.Queue(2)
    arrays = [sharing.copy(np.full(20_000, i)) for i in range(5)]
    async with Group(Function(share_jobs.pipes, first, second), logs=QUIET):
        back = []
        for x in arrays:
            await first.put(x)
            back.append(await second.get())
        first.close()
        with pytest.raises(sharing.QueueClosed):
            await second.get()
    assert [x.address for x in back] == [x.address for x in arrays]


async def test_a_queue_in_a_queue_comes_home_as_itself() -> None:
    q, other = sharing.Queue(1), sharing.Queue(1)
    await q.put({"reply to": other})
    assert (await q.get())["reply to"] is other


async def test_what_a_dead_producer_put_is_there() -> None:
    q = sharing.Queue(4)
    for _ in range(2):
        job = Function(share_jobs.puts_and_dies, q, np.arange(100_000))
        assert not (await supervise(job, n=1, logs=QUIET, check=False)).ok
    assert (await q.get()).sum() == (await q.get()).sum() == sum(range(100_000))
    assert in_it(q) == 0


async def test_an_item_lost_with_its_consumer_gives_its_place_back() -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await kill_a_consumer()


async def kill_a_consumer() -> None:
    q = sharing.Queue(1)
    async with Group(Function(share_jobs.takes_half, q), logs=QUIET) as group:
        await q.put("lost")
        assert await group[0].receive() == "has it"
        putter = asyncio.create_task(q.put("next"))
        pid = group[0].pid
        assert pid is not None
        await asyncio.sleep(0)
        assert not putter.done()
        os.kill(pid, signal.SIGKILL)
        await putter
        assert await q.get() == "next"
        await event_of(group, Exited)


async def test_a_queue_that_nobody_reads_leaves_nothing() -> None:
    x = sharing.empty(1 << 20, "u1")
    where = x.address
    q = sharing.Queue(4)
    for _ in range(4):
        await q.put(x)
    del x
    assert sharing.empty(1 << 20, "u1").address != where
    del q
    gc.collect()
    fresh = [sharing.empty(1 << 20, "u1") for _ in range(2)]
    assert where in [one.address for one in fresh]


async def test_a_fork_does_not_take_it_along() -> None:
    q = sharing.Queue()
    result = await supervise(Function(share_jobs.puts, q, [1]), n=1, start="fork", logs=QUIET, check=False)
    assert "belongs to the process that this one was forked from" in str(result.first_failure)
    await q.put(1)  # and ours still works
    assert await q.get() == 1


async def test_wrong_places_for_objects() -> None:
    with pytest.raises(RuntimeError, match="has a supervisor"):
        sharing.receive()
    from aioelastic import WorkerExecutor

    async with WorkerExecutor(1) as executor:
        with pytest.raises(RuntimeError, match="has a supervisor"):
            await executor.run(sharing.send, 1)


async def test_objects_that_nobody_receives_hold_the_worker_up_and_are_dropped_with_the_group() -> None:
    async with Group(Function(share_jobs.sends, 500), logs=QUIET) as group:
        got = [await group[0].receive() for _ in range(200)]
        assert [int(np.asarray(x)[0]) for x in got] == list(range(200))
        del got
    del group  # until now they can be received
    gc.collect()
    assert sharing.leases() == []


async def test_an_object_that_cannot_be_unpickled() -> None:
    async with Group(Function(share_jobs.sends_refused), logs=QUIET) as group:
        with pytest.raises(RuntimeError, match="not in this process"):
            await group[0].receive()
        assert await group[0].receive() == "after"
        assert [item async for item in group[0]] == []


async def test_an_object_whose_descriptors_cannot_be_taken() -> None:
    """It is lost, and that is told; its worker has done nothing wrong."""
    async with Group(Function(share_jobs.sends_when_asked), logs=QUIET) as group:
        assert await group[0].receive() == "ready"  # what its start has opened here is closed
        with no_descriptors_left():
            await group[0].send(1)
            with pytest.raises(ValueError, match="too many open"):
                await group[0].receive()
        assert await group[0].receive() == "after"
        result = await group.wait()
        assert result[0].value == "done"


async def test_several_tasks_receive_at_once_and_in_several_loops() -> None:
    async with Group(Function(share_jobs.several_receive, 5), logs=QUIET) as group:
        assert await group[0].receive() == "waiting"
        for i in range(5):
            await group[0].send(i)
        assert await group[0].receive() == "waiting"
        await group[0].send("the other loop")
        result = await group.wait()
        assert result[0].value == ([0, 1, 2, 3, 4], "the other loop")
