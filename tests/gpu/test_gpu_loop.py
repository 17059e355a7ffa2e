"""The event loop waits for no GPU: neither for its work nor for the thread that calls its driver."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue as queues
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import seen, theirs
from helpers import QUIET, until

from aioelastic import Function, Group, GroupFailed, Logs, Std, WorkerExecutor, gpu, sharing, supervise


def on_gpu(values: Any) -> Any:
    return sharing.copy(np.asarray(values), device="cuda:0")


@pytest.fixture
def cupy(fake: Any) -> Iterator[None]:
    fake_gpu.install()
    yield
    del sys.modules["cupy"]


@pytest.fixture
def jobs(fake: Any) -> Any:
    import gpu_jobs

    return gpu_jobs


@pytest.fixture
def busy(fake: Any) -> Iterator[threading.Event]:
    """The thread of the GPU is at something until this is set: whoever waits for it waits."""
    go = threading.Event()
    gpu.stats()  # there is a GPU
    gpu._driver.device("cuda:0").post(lambda: go.wait(60))
    yield go
    go.set()


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("kind", ["plain", "pool", "expandable", "event"])
async def test_what_a_driver_is_asked_about(fake: Any, cupy: Any, busy: threading.Event, kind: str) -> None:
    queue = sharing.Queue(2)
    busy.set()
    x = gpu.GpuEvent() if kind == "event" else theirs(kind, np.arange(1000.0))
    busy.clear()
    gpu._driver.device("cuda:0").post(lambda: busy.wait(60))
    puts = [asyncio.create_task(queue.put(one)) for one in (x, "after it")]
    await turns()
    assert not any(one.done() for one in puts)
    busy.set()
    await asyncio.gather(*puts)
    first, second = await queue.get(), await queue.get()
    assert type(first) is type(x)
    assert second == "after it"


async def test_a_send_that_is_cancelled_while_a_driver_is_asked(fake: Any, cupy: Any, busy: threading.Event) -> None:
    queue = sharing.Queue(1)
    x = theirs("plain", np.arange(1000.0))
    putting = asyncio.create_task(queue.put(x))
    await turns()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    busy.set()
    for one in threading.enumerate():
        if one.name == "aioelastic-pack":
            await asyncio.to_thread(one.join)
    await queue.put("its place is free")
    assert await queue.get() == "its place is free"
    del x


async def test_it_waits_for_the_streams_of_the_thread_that_sends(
    fake: Any, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = threading.get_ident()
    with fake_gpu.context() as cu:
        stream = int(cu.cuStreamCreate(1))

    def current(device_id: int) -> Any:
        return types.SimpleNamespace(ptr=stream if threading.get_ident() == mine else 0)

    monkeypatch.setattr(sys.modules["cupy"].cuda, "get_current_stream", current)
    asked: list[set[int]] = []
    real = gpu._message.ready
    monkeypatch.setattr(gpu._message, "ready", lambda device, of: (asked.append(set(of)), real(device, of))[1])
    queue = sharing.Queue()
    await queue.put(theirs("plain", np.ones(10)))
    await queue.get()
    assert asked == [{0, stream}]
    with fake_gpu.context() as cu:
        cu.cuStreamDestroy(stream)


async def test_put_nowait_does_not_wait(fake: Any, cupy: Any) -> None:
    queue = sharing.Queue(1)
    for x in (on_gpu(np.ones(1000)), theirs("plain", np.ones(1000))):
        with pytest.raises(RuntimeError, match=r"await put\(\)"):
            queue.put_nowait(x)
        await asyncio.to_thread(queue.put_nowait, x)  # there is no loop
        with pytest.raises(queues.Full):
            queue.put_nowait(1)
        await queue.get()
        queue.put_nowait(np.ones(9 << 20, "u1"))
        assert (await queue.get()).sum() == 9 << 20


async def test_an_executor_does_not_wait(jobs: Any, fake: Any) -> None:
    async with WorkerExecutor(1) as executor:
        x = on_gpu(np.ones(1000))
        assert await executor.run(jobs.total, x) == 1000
        fake.hold()
        futures = [executor.submit(jobs.add_one, x), executor.submit(jobs.total, x)]
        await turns()
        assert not any(one.done() for one in futures)
        fake.go()
        _, total = await asyncio.gather(*map(asyncio.wrap_future, futures))
        assert total == 2000


async def test_an_executor_whose_task_is_cancelled_meanwhile(jobs: Any, fake: Any) -> None:
    async with WorkerExecutor(1) as executor:
        x = on_gpu(np.ones(1000))
        fake.hold()
        first, second = executor.submit(jobs.total, x), executor.submit(jobs.order)
        await until(lambda: bool(sharing.leases()))
        first.cancel()
        await until(lambda: not sharing.leases())  # but for what is just being made
        assert await asyncio.wrap_future(second) == "done"
        fake.go()


async def test_a_send_does_not_wait(jobs: Any, cupy: Any, busy: threading.Event) -> None:
    async with Group(Function(jobs.with_cupy), logs=QUIET) as group:
        x = theirs("plain", np.zeros(1000))
        sending = asyncio.create_task(group[0].send(x))
        await turns()
        assert not sending.done()
        busy.set()
        await sending
        y = await group[0].receive()
        assert (seen(y) == 1).all()
        await group[0].send(None)
        del x, y


async def held(fake: Any, socket: Path) -> asyncio.Task[Any]:
    """Somebody attaches, and has to wait, since the GPU does not go on."""
    fake.hold()
    attaching = asyncio.create_task(asyncio.to_thread(sharing.attach, socket))
    while "cuLaunchHostFunc" not in fake.names():  # noqa: ASYNC110
        await asyncio.sleep(0)
    return attaching


async def test_an_endpoint_does_not_wait(fake: Any, tmp_path: Path) -> None:
    x = on_gpu(np.ones(1000))
    async with sharing.Endpoint(tmp_path / "socket", {"x": x}):
        attaching = await held(fake, tmp_path / "socket")
        assert not attaching.done()
        fake.go()
        with await attaching as offered:
            assert offered["x"].address == x.address


async def test_an_endpoint_that_ends_meanwhile(fake: Any, tmp_path: Path) -> None:
    x = on_gpu(np.ones(1000))
    async with sharing.Endpoint(tmp_path / "socket", {"x": x}):
        attaching = await held(fake, tmp_path / "socket")
    with pytest.raises(PermissionError, match="has just ended"):
        await attaching
    assert sharing.leases() == []
    fake.go()


# --- results ---


async def test_a_result_is_not_waited_for_in_the_loop(jobs: Any, cupy: Any, busy: threading.Event) -> None:
    async with Group(Function(jobs.theirs_as_result, "expandable"), logs=QUIET) as group:
        exit = await group[0].wait()
        assert exit is not None
        assert exit.ok
        await turns()
        busy.set()
        result = await group.wait()
        assert seen(result[0].value).tolist() == [1.0] * 100
        del result


async def test_a_result_that_cannot_be_imported(jobs: Any, cupy: Any, fake: Any) -> None:
    gpu._driver.device("cuda:0").run(lambda: None)
    fake.fail("cuMemImportFromShareableHandle")
    with pytest.raises(GroupFailed) as caught:
        await supervise(Function(jobs.theirs_as_result, "expandable"), n=1, logs=QUIET)
    assert "could not be unpickled here: CudaError" in str(caught.value.exceptions[0])


async def test_a_result_that_does_not_come(jobs: Any, cupy: Any, busy: threading.Event) -> None:
    with pytest.raises(GroupFailed) as caught:
        await supervise(Function(jobs.theirs_as_result, "expandable"), n=1, logs=Logs(tee=Std.NONE, drain=0.05))
    assert "the driver of a GPU does not answer" in str(caught.value.exceptions[0])
    busy.set()
    for one in threading.enumerate():
        if one.name == "aioelastic-unpickle":
            await asyncio.to_thread(one.join)
    await turns()


async def test_one_result_does_not_hold_up_others(jobs: Any, cupy: Any, busy: threading.Event) -> None:
    async with WorkerExecutor(1) as executor:
        first, second = executor.submit(jobs.theirs_as_result, "expandable"), executor.submit(jobs.order)
        assert await asyncio.wrap_future(second) == "done"
        assert not first.done()
        busy.set()
        assert seen(await asyncio.wrap_future(first)).tolist() == [1.0] * 100
        del first


# --- getters that are cancelled meanwhile ---


async def fetched(lock: Any, q: sharing.Queue) -> asyncio.Task[Any]:
    """A task that has got the next item, which is being unpickled."""
    task = asyncio.create_task(q.get())
    await asyncio.to_thread(lock.began.wait)
    return task


async def ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_a_cancelled_task_has_got_goes_to_who_asks_next(jobs: Any, cupy: Any) -> None:
    q, lock = sharing.Queue(), jobs.Lock()
    await q.put((theirs("plain", np.ones(1)), lock, 1))
    await q.put(2)
    await ended(await fetched(lock, q))
    with pytest.raises(queues.Empty):
        q.get_nowait()
    with pytest.raises(queues.Empty):
        q.get_sync(0)
    again = asyncio.create_task(q.get())
    await turns()
    await ended(again)
    lock.go.set()
    x, *rest = await q.get()
    assert (seen(x).tolist(), *rest) == ([1.0], "opened", 1)
    assert await q.get() == 2
    del x


async def test_and_to_who_waits_already(jobs: Any, cupy: Any) -> None:
    q, lock = sharing.Queue(), jobs.Lock()
    await q.put((theirs("plain", np.ones(1)), lock))
    first = await fetched(lock, q)
    others = [asyncio.create_task(q.get()) for _ in range(2)]
    await turns()
    await ended(first)
    lock.go.set()
    await q.put("next")
    assert [one[1] for one in await asyncio.gather(*others)] == ["opened", "e"]


async def test_and_to_threads(jobs: Any, cupy: Any) -> None:
    q, locks = sharing.Queue(), [jobs.Lock(0), jobs.Lock(1)]
    for lock in locks:
        await q.put((theirs("plain", np.ones(1)), lock, lock.number))
    tasks = [await fetched(lock, q) for lock in locks]
    for task in reversed(tasks):
        await ended(task)
    for lock in locks:
        lock.go.set()
    assert [(await asyncio.to_thread(get))[2] for get in (q.get_sync, q.get_sync)] == [0, 1]


async def test_and_to_a_thread_that_waits_already(jobs: Any, cupy: Any) -> None:
    q, lock = sharing.Queue(), jobs.Lock()
    await q.put((theirs("plain", np.ones(1)), lock))
    first = await fetched(lock, q)
    waiting = asyncio.create_task(asyncio.to_thread(q.get_sync))
    await until(lambda: bool(q._reader._wakeup))
    await ended(first)
    lock.go.set()
    assert (await waiting)[1] == "opened"


async def test_who_gives_up_waiting_leaves_it_to_others(jobs: Any, cupy: Any) -> None:
    q, lock = sharing.Queue(), jobs.Lock()
    await q.put((theirs("plain", np.ones(1)), lock))
    await ended(await fetched(lock, q))
    thread = asyncio.create_task(asyncio.to_thread(q.get_sync, 0.05))
    await until(lambda: not q._reader._left)  # the thread has it
    other = asyncio.create_task(q.get())
    with pytest.raises(queues.Empty):
        await thread
    lock.go.set()
    assert (await other)[1] == "opened"


class Raises:
    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return _raise, (self.kind,)


def _raise(kind: type[BaseException]) -> None:
    raise kind("on purpose")


@pytest.mark.parametrize(
    "kind", [SystemExit, StopIteration, asyncio.CancelledError, concurrent.futures.CancelledError, TimeoutError]
)
async def test_what_raises_anything_costs_one_item(jobs: Any, cupy: Any, kind: type[BaseException]) -> None:
    q = sharing.Queue()
    await q.put((theirs("plain", np.ones(1)), Raises(kind)))
    await q.put(2)
    with pytest.raises(TimeoutError if kind is TimeoutError else RuntimeError, match="on purpose"):
        await q.get()
    assert await q.get() == 2


async def test_a_worker_forked_from_a_worker_has_its_own_objects(jobs: Any, cupy: Any) -> None:
    async with Group(Function(jobs.forks_another), logs=QUIET) as group:
        await group[0].send((theirs("plain", np.ones(1)), jobs.Lock()))
        result = await group.wait()
    assert result[0].value == ("for the inner one", "opened")


async def test_what_a_cancelled_task_of_a_worker_has_received(jobs: Any, cupy: Any) -> None:
    async with Group(Function(jobs.receives_again), logs=QUIET) as group:
        await group[0].send((theirs("plain", np.ones(1)), jobs.Lock()))
        await group[0].send(2)
        result = await group.wait()
    assert result[0].value == [True, "not yet", 1.0, "opened", 2]
