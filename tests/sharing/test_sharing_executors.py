"""Shared arrays as arguments and results of functions in executors that the caller lends."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import resource_tracker

import numpy as np
import pytest
import share_jobs
from helpers import QUIET, needs

from aioelastic import Function, GroupFailed, SpecError, WorkerExecutor, sharing, supervise
from aioelastic.child.wire import datagrams
from aioelastic.child.worker import lent_run
from aioelastic.launch import _descriptor_exchange


def pool_of(method: str) -> Callable[[int], Executor]:
    return lambda n: ProcessPoolExecutor(n, mp_context=multiprocessing.get_context(method))


MAKERS: dict[str, Callable[[int], Executor]] = {
    "fork": pool_of("fork"),
    "spawn": pool_of("spawn"),
    "forkserver": pool_of("forkserver"),
    "workers": lambda n: WorkerExecutor(n, logs=QUIET),
    "threads": ThreadPoolExecutor,
}


def no_leases() -> bool:
    gc.collect()
    return sharing.leases() == []


@pytest.fixture(params=MAKERS)
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with MAKERS[request.param](2) as executor:
        executor.submit(int).result()  # a process that is forked later inherits what is in use, and holds it
        yield executor
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
    assert no_leases()


@pytest.fixture
def processes() -> Iterator[Executor]:
    with MAKERS["fork"](2) as executor:
        executor.submit(int).result()  # from Python 3.12 on all of them are forked now
        yield executor
    assert no_leases()


async def test_arguments_and_results(pool: Executor) -> None:
    x = sharing.copy(np.zeros(100_000))
    result = await supervise(Function(share_jobs.add_one, x), n=1, start=pool, logs=QUIET)
    assert (np.asarray(x) == 1).all()
    assert result[0].value.address == x.address
    again = await supervise(Function(share_jobs.total, x), n=3, start=pool, logs=QUIET)
    assert [one.value for one in again] == [100_000] * 3
    del result, again, x
    await asyncio.sleep(0)
    assert no_leases()  # the pool is still open


async def test_what_is_born_there(pool: Executor) -> None:
    result = await supervise(Function(share_jobs.born_here, 100_000), n=2, start=pool, logs=QUIET)
    assert [float(np.asarray(one.value)[-1]) for one in result] == [0, 1]
    pool.shutdown()
    assert [float(np.asarray(one.value)[-1]) for one in result] == [0, 1]  # it outlives its owner


@pytest.mark.long
async def test_private_ones_are_copied_for_each(pool: Executor) -> None:
    if isinstance(pool, ThreadPoolExecutor):
        return  # a thread has the objects themselves
    for size in (10, 5000, 1_000_000):
        y = np.zeros(size)
        result = await supervise(Function(share_jobs.add_one, y), n=2, start=pool, logs=QUIET)
        assert (y == 0).all()
        for one in result:
            assert (one.value == 1).all()


async def test_views_stay_views(pool: Executor) -> None:
    x = sharing.copy(np.ones((10, 10)))
    result = await supervise(Function(share_jobs.facts, x, x[0], x[:, 1]), start=pool, logs=QUIET)
    kind = "SharedArray"
    assert result[0].value == [(kind, True, 100.0), (kind, True, 10.0), (kind, True, 10.0)]


async def test_a_queue(pool: Executor) -> None:
    queue = sharing.Queue(4)
    x = sharing.copy(np.ones(100_000))
    running = asyncio.create_task(supervise(Function(share_jobs.takes, queue), start=pool, logs=QUIET))
    await queue.put(x)
    await queue.put("end")
    queue.close()
    assert (await running)[0].value == [100_000.0, "end"]


async def test_a_process_that_dies_with_it(processes: Executor) -> None:
    x = sharing.empty(1 << 20, "u1")
    where = x.address
    with pytest.raises(GroupFailed):
        await supervise(Function(share_jobs.dies_with, x), n=1, start=processes, logs=QUIET)
    del x
    gc.collect()
    assert where in [sharing.empty(1 << 20, "u1").address for _ in range(2)]


async def test_what_cannot_be_pickled_is_said_before_anything_starts(processes: Executor) -> None:
    torch = needs("torch")
    with pytest.raises(SpecError, match="not a leaf"):
        await supervise(
            Function(share_jobs.total, torch.ones(2, requires_grad=True) * 2), n=1, start=processes, logs=QUIET
        )


async def test_a_result_that_cannot_be_sent(processes: Executor) -> None:
    with pytest.raises(GroupFailed) as caught:
        await supervise(Function(share_jobs.lock_and_array), n=1, start=processes, logs=QUIET)
    assert "its result could not be pickled" in str(caught.value.exceptions[0])


# --- the exchange itself ---


@pytest.fixture
def exchange() -> Iterator[_descriptor_exchange.Exchange]:
    one = _descriptor_exchange.Exchange()
    yield one
    one.close()


def test_who_talks_nonsense_is_no_trouble(exchange: _descriptor_exchange.Exchange) -> None:
    place = exchange.place()
    for words in (b"x", b"", b"x" * 100):
        with place._connected() as sock:
            if words:
                datagrams.send(sock, words)
    with place._connected():
        pass  # it says nothing
    place.leave(b"Onwards", [])
    assert exchange.take(place.number) == (b"Onwards", [])


def test_who_says_nothing_is_not_waited_for(
    exchange: _descriptor_exchange.Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends on the event loop."""
    monkeypatch.setattr(_descriptor_exchange, "PATIENCE", 1_000_000)
    with exchange.place()._connected():
        while exchange._peer is None:
            os.sched_yield()
        exchange.close()


def test_what_nobody_takes_is_closed() -> None:
    exchange = _descriptor_exchange.Exchange()
    place = exchange.place()
    inner, outer = os.pipe()
    place.leave(b"O", [inner])
    os.close(inner)
    packet, fds = exchange.take(place.number)
    place.leave(packet, fds)
    datagrams.close(fds)
    # by the time another has been served, it has come
    other = exchange.place((b"C", []))
    with other._connected() as sock:
        datagrams.send(sock, lent_run.HEAD.pack(other.number))
        assert datagrams.receive(sock) == (b"C", [])
    exchange.close()
    with pytest.raises(BrokenPipeError):
        os.write(outer, b"!")
    os.close(outer)
    with pytest.raises(TimeoutError):
        exchange.take(place.number)
    with pytest.raises(ConnectionRefusedError):
        place.leave(b"O", [])


def test_another_process_at_that_name_gets_nothing(exchange: _descriptor_exchange.Exchange) -> None:
    place = exchange.place()._replace(pid=1)
    with pytest.raises(ConnectionRefusedError, match="has ended"):
        place.leave(b"O", [])


def test_other_users_are_not_served(exchange: _descriptor_exchange.Exchange) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    place = exchange.place((b"C", []))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            with place._connected() as sock:
                datagrams.send(sock, lent_run.HEAD.pack(place.number))
                code = 0 if not datagrams.receive(sock)[0] else 2
        except ConnectionError:
            code = 0
        finally:
            os.kill(os.getpid(), signal.SIGKILL) if code else os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_copy_by_fork_holds_nothing_of_it() -> None:
    one = _descriptor_exchange.Exchange()
    inner, outer = os.pipe()
    one.place((b"C", [inner]))
    (go, wait), (told, tell) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(wait)
        os.close(outer)
        os.write(tell, b"!")
        os.read(go, 1)
        os._exit(0)
    assert os.read(told, 1) == b"!"
    one.close()
    with pytest.raises(BrokenPipeError):
        os.write(outer, b"!")
    for fd in (outer, wait, go, told, tell):
        os.close(fd)
    os.waitpid(pid, 0)
