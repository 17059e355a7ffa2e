"""Sending does not hold the event loop up: large copies are made elsewhere, and all arrives in order."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import queue as queues
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import share_jobs
from helpers import QUIET

from aioelastic import Function, Group, WorkerExecutor, sharing
from aioelastic.memory import _copying

BIG = 9 << 20  # bytes: more than are copied in the thread of a loop


class Held:
    """Copies of large pieces, which wait until they may go on."""

    def __init__(self, real: Any) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self._real = real

    def __call__(self, segment: Any, offset: int, piece: Any) -> None:
        if piece.nbytes >= 1 << 20:
            assert threading.current_thread().name == "aioelastic-copy"
            self.began.set()
            assert self.go.wait(60)
        self._real(segment, offset, piece)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    one = Held(_copying.fill)
    monkeypatch.setattr(_copying, "fill", one)
    yield one
    one.go.set()


@pytest.fixture(autouse=True)
def nobody_holds_anything() -> Iterator[None]:
    yield
    gc.collect()
    assert sharing.leases() == []


async def turns(began: threading.Event) -> None:
    """Turns of the loop, until the copy has begun."""
    while not began.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_a_send_of_much_lets_the_loop_go_on_and_comes_first(held: Held) -> None:
    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        worker = group[0]
        sends = [asyncio.create_task(worker.send(one)) for one in (np.full(BIG, 7, "u1"), "after it")]
        await turns(held.began)
        assert not any(one.done() for one in sends)
        held.go.set()
        await asyncio.gather(*sends)
        first = await worker.receive()
        assert (first == 7).all()
        assert await worker.receive() == "after it"
        await worker.send(None)


async def test_a_send_that_is_cancelled_while_it_copies(held: Held) -> None:
    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        worker = group[0]
        sending = asyncio.create_task(worker.send(np.ones(BIG, "u1")))
        after = asyncio.create_task(worker.send("after it"))
        await turns(held.began)
        sending.cancel()
        await asyncio.sleep(0)
        sending.cancel()  # it waits for the copy all the same
        await asyncio.sleep(0)
        assert not sending.done()
        held.go.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await after
        assert await worker.receive() == "after it"
        await worker.send(None)
    sharing.trim()
    assert sharing.stats().total <= 1 << 20


async def test_a_copy_that_fails(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        worker = group[0]

        def fails(*_: Any) -> None:
            raise OSError("no space")

        sending = asyncio.create_task(worker.send(np.ones(BIG, "u1")))
        await turns(held.began)
        monkeypatch.setattr(held, "_real", fails)
        held.go.set()
        with pytest.raises(OSError, match="no space"):
            await sending
        monkeypatch.undo()
        await worker.send("after it")
        assert await worker.receive() == "after it"
        await worker.send(None)
    sharing.trim()
    assert sharing.stats().total <= 1 << 20


async def test_a_worker_that_ends_meanwhile(held: Held) -> None:
    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        worker = group[0]
        await worker.send(None)
        sending = asyncio.create_task(worker.send(np.ones(BIG, "u1")))
        await turns(held.began)
        await worker.wait()
        held.go.set()
        with pytest.raises(BrokenPipeError):
            await sending


async def test_a_put_of_much_lets_the_loop_go_on_and_comes_first(held: Held) -> None:
    queue = sharing.Queue(2)
    puts = [asyncio.create_task(queue.put(one)) for one in (np.full(BIG, 7, "u1"), "after it")]
    await turns(held.began)
    with pytest.raises(queues.Empty):
        queue.get_nowait()
    held.go.set()
    await asyncio.gather(*puts)
    first = await queue.get()
    assert (first == 7).all()
    assert await queue.get() == "after it"


async def test_a_put_that_is_cancelled_while_it_copies(held: Held) -> None:
    queue = sharing.Queue(1)
    putting = asyncio.create_task(queue.put(np.ones(BIG, "u1")))
    await turns(held.began)
    putting.cancel()
    await asyncio.sleep(0)
    held.go.set()
    with pytest.raises(asyncio.CancelledError):
        await putting
    await queue.put("its place is free")
    assert await queue.get() == "its place is free"


async def test_a_fork_while_a_put_is_under_way(held: Held) -> None:
    """The copy has nothing of the message: neither its lease nor its place."""
    queue = sharing.Queue(1)
    putting = asyncio.create_task(queue.put(np.ones(BIG, "u1")))
    await turns(held.began)
    (end, keep), (there, here) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(keep)
        os.write(here, b".")
        os.read(end, 1)
        os._exit(0)
    os.close(end)
    try:
        assert os.read(there, 1) == b"."
        held.go.set()
        await putting
        assert (await queue.get()).sum() == BIG
        gc.collect()
        assert sharing.leases() == []
        queue.put_nowait("its place is free")
    finally:
        for fd in (keep, there, here):
            os.close(fd)
        os.waitpid(pid, 0)


def test_a_queue_in_several_loops() -> None:
    queue = sharing.Queue(2)

    async def puts() -> None:
        await asyncio.gather(*(queue.put(one) for one in range(50)))

    threads = [threading.Thread(target=asyncio.run, args=(puts(),)) for _ in range(2)]
    for one in threads:
        one.start()
    got = [queue.get_sync() for _ in range(100)]
    for one in threads:
        one.join()
    assert sorted(got) == sorted([*range(50), *range(50)])


async def test_a_task_with_much_lets_the_loop_go_on_and_keeps_its_turn(held: Held, tmp_path: Path) -> None:
    async with WorkerExecutor(1) as executor:
        await executor.run(share_jobs.total, np.ones(3))
        futures = [executor.submit(share_jobs.order, tmp_path, one) for one in (np.ones(BIG, "u1"), 2, 3)]
        await turns(held.began)
        assert not any(one.done() for one in futures)
        held.go.set()
        assert await asyncio.gather(*map(asyncio.wrap_future, futures)) == [0, 1, 2]


async def test_a_task_that_is_cancelled_while_it_is_copied(held: Held) -> None:
    async with WorkerExecutor(1) as executor:
        running = asyncio.create_task(executor.run(share_jobs.total, np.ones(BIG, "u1")))
        after = executor.submit(share_jobs.total, np.ones(3))
        await turns(held.began)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await asyncio.wrap_future(after) == 3  # it does not wait for the copy
        held.go.set()
    assert executor.pids == []


async def test_an_executor_that_is_shut_down_while_it_copies(held: Held) -> None:
    async with WorkerExecutor(1) as executor:
        first, second = (executor.submit(share_jobs.total, np.ones(BIG, "u1")) for _ in range(2))
        await turns(held.began)
        second.cancel()
        executor.shutdown(wait=False)
        held.go.set()
        assert await asyncio.wrap_future(first) == BIG
        assert second.cancelled()

    async with WorkerExecutor(1) as executor:
        held.go.clear()
        dropped = executor.submit(share_jobs.total, np.ones(BIG, "u1"))
        executor.shutdown(wait=False, cancel_futures=True)
        assert dropped.cancelled()
        held.go.set()


async def test_a_task_whose_copy_fails(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space")

    async with WorkerExecutor(1) as executor:
        failing = executor.submit(share_jobs.total, np.ones(BIG, "u1"))
        after = executor.submit(share_jobs.total, np.ones(3))
        await turns(held.began)
        monkeypatch.setattr(held, "_real", fails)
        held.go.set()
        with pytest.raises(OSError, match="no space"):
            await asyncio.wrap_future(failing)
        monkeypatch.undo()
        assert await asyncio.wrap_future(after) == 3


def test_a_thread_without_a_loop_waits() -> None:
    queue = sharing.Queue()
    for _ in range(3):  # into new memory, and into some that was used before
        queue.put_sync([np.full(BIG, 3, "u1"), np.full(BIG + 5000, 4, "u1"), b"5" * BIG])
        first, second, third = queue.get_sync()
        assert (first == 3).all()
        assert (second == 4).all()
        assert third == b"5" * BIG
        del first, second


def test_a_copy_that_fails_in_a_thread_without_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = sharing.Queue(1)

    def fails(segment: Any, offset: int, piece: Any) -> None:
        if piece.nbytes >= 1 << 20:
            raise OSError("no space")

    monkeypatch.setattr(_copying, "fill", fails)
    with pytest.raises(OSError, match="no space"):
        queue.put_sync(np.ones(BIG, "u1"))
    monkeypatch.undo()
    queue.put_sync("its place is free")
    assert queue.get_sync() == "its place is free"


@pytest.mark.parametrize("where", ["as it waits", "as it starts a thread"])
def test_a_copy_that_is_interrupted(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What a signal's handler raises does not stop the threads that write there: nobody else gets that memory yet."""
    fill, start = _copying.fill, threading.Thread.start
    began, go = threading.Event(), threading.Event()
    main, used, numbers = threading.main_thread(), list[Any](), itertools.count(1)
    threads = min(2, len(os.sched_getaffinity(0)))  # as many as that size is worth

    def fills(segment: Any, offset: int, piece: Any) -> None:
        if threading.current_thread() is main:
            return fill(segment, offset, piece)
        used.append(segment)
        if where == "as it waits" and next(numbers) == threads:
            signal.pthread_kill(main.ident, signal.SIGINT)
        assert go.wait(60)
        return fill(segment, offset, piece)

    def starts(thread: threading.Thread) -> None:
        start(thread)
        if where == "as it starts a thread" and not began.is_set():
            began.set()
            raise KeyboardInterrupt

    sharing.trim()
    queue = sharing.Queue(1)
    with monkeypatch.context() as patch:
        patch.setattr(_copying, "fill", fills)
        patch.setattr(threading.Thread, "start", starts)
        with pytest.raises(KeyboardInterrupt):
            queue.put_sync(np.ones(BIG, "u1"))
    idle = sharing.stats().idle
    go.set()
    for one in threading.enumerate():
        if one.name == "aioelastic-copy":
            one.join()
    assert idle == 0
    assert len({id(one) for one in used}) == 1
    assert sharing.stats().idle == used[0].size
    queue.put_sync(np.full(BIG, 2, "u1"))
    assert (queue.get_sync() == 2).all()


async def test_a_system_without_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    queue = sharing.Queue(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        await queue.put(np.ones(BIG, "u1"))
    assert (await queue.get()).sum() == BIG


async def test_what_goes_by_value_beside_much(held: Held) -> None:
    held.go.set()
    async with WorkerExecutor(1) as executor:
        assert await executor.run(lambda x: x.sum(), np.ones(BIG, "u1")) == BIG
