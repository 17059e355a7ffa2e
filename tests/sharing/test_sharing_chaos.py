"""Sharing at its worst moments: random deaths, forks, threads, garbage collection."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import share_jobs
from helpers import QUIET, needs, travelled

from aioelastic import Function, Group, Restart, SpecError, sharing, supervise
from aioelastic.child.wire import datagrams, messages
from aioelastic.memory import address_index, shared_segments


async def test_around_a_ring_it_is_the_same_memory() -> None:
    a, b, c = (sharing.Queue(1) for _ in range(3))
    jobs = [
        Function(share_jobs.sends_round, a, c),
        Function(share_jobs.pipes_one, a, b),
        Function(share_jobs.pipes_one, b, c),
    ]
    result = await supervise(jobs, logs=QUIET)
    assert result[0].value is True


def test_a_message_that_is_read_twice() -> None:
    x = sharing.copy(np.ones(100_000))
    packet, fds = messages.encode(messages.TASK, (x,))
    (one,), (two,) = messages.decode(packet, fds), messages.decode(packet, fds)
    assert one.address == two.address == x.address
    datagrams.close(fds)
    where = x.address
    del one, two, x
    assert sharing.leases() == []
    assert sharing.empty(100_000).address == where


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
async def test_workers_die_at_any_moment(seed: int) -> None:
    chance = random.Random(seed)
    tasks, done = sharing.Queue(4), sharing.Queue(4)
    restart = Restart.on_failure(max=100)
    made, right, killed = 30, 0, 0
    async with Group(Function(share_jobs.works_until_killed, tasks, done), n=3, restart=restart, logs=QUIET) as group:

        async def feed() -> None:
            nonlocal killed
            for number in range(made):
                x = sharing.copy(np.full(20_000, number))
                await tasks.put((number, x, np.full(20_000, number)))
                if number % 6 == 5:
                    pids = [pid for pid in group.pids.values() if pid is not None]
                    if pids:
                        with contextlib.suppress(ProcessLookupError):  # it died, and nobody knows yet
                            os.kill(chance.choice(pids), signal.SIGKILL)
                            killed += 1
            tasks.close()

        feeding = asyncio.create_task(feed())
        waiting = asyncio.create_task(group.wait())
        waiting.add_done_callback(lambda _: done.close())
        async for number, x, private in done:
            assert (np.asarray(x) == number + 1).all()
            assert (private == number + 1).all()
            right += 1
            del x, private
        await feeding
        await waiting
    assert killed
    assert made - 3 * killed <= right <= made  # each death loses what its worker had


@pytest.fixture(autouse=True)
def nobody_holds_anything() -> Iterator[None]:
    yield
    gc.collect()
    assert sharing.leases() == []


def test_a_forked_process_keeps_what_it_inherits() -> None:
    x = sharing.copy(np.full(1 << 17, 3.0))
    told, tell = os.pipe()
    go, wait = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(wait)
            os.read(go, 1)  # until the parent has let go of it, and asked for memory of that size
            (y,) = travelled(x)
            same = (np.asarray(x) == 3).all() and y.address == x.address and sharing.is_shared(x)
            fresh = sharing.empty(1 << 17)
            code = 0 if same and fresh.address != x.address else 2
        finally:
            os.write(tell, bytes([code]))
            os._exit(code)
    os.close(tell)
    trimmed = sharing.stats().trimmed
    del x
    assert sharing.stats().trimmed == trimmed + 1  # nobody can tell when the copy is done with it
    y = sharing.empty(1 << 17)
    np.asarray(y)[:] = 4
    os.close(wait)
    assert os.read(told, 1) == b"\0"
    os.waitpid(pid, 0)
    for fd in (told, go):
        os.close(fd)
    assert sharing.leases() == []


def test_many_threads() -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(150):
                size = random.choice([10, 5000, 100_000])
                x = sharing.empty(size, "i8")
                np.asarray(x)[:] = number
                y, private = travelled(x, np.full(size, i))
                assert (np.asarray(y) == number).all()
                assert (private == i).all()
        except BaseException as exc:
            problems.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert problems == []
    assert sharing.leases() == []


def test_two_threads_map_a_segment_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have it at one place, and what lies there is found."""
    segment = shared_segments.create(100_000)
    real, both = shared_segments.mapped, threading.Barrier(2)

    def mapped(*args: Any) -> Any:
        both.wait(150)
        made = real(*args)
        both.wait(150)
        return made

    monkeypatch.setattr(shared_segments, "mapped", mapped)
    loans: list[Any] = []
    threads = [threading.Thread(target=lambda: loans.append(segment.loan(0, 8))) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert {ctypes.addressof(one) for one in loans} == {segment.address}
    assert address_index.find(segment.address) is segment
    assert len([item for item in address_index._items if item[3]() is segment]) == 1


def test_the_collector_may_come_at_any_moment() -> None:
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for i in range(300):
            knot: list[Any] = [sharing.empty(100_000 if i % 2 else 10, "u1")]
            knot.append(knot)  # only the collector finds it
            travelled(knot[0], np.ones(5000))
    finally:
        gc.set_threshold(*before)
    del knot
    gc.collect()
    assert sharing.leases() == []
    assert sharing.trim()
    assert sharing.stats().segments <= 1


async def test_an_executor_that_is_lent() -> None:
    x = sharing.copy(np.zeros(10))
    with ThreadPoolExecutor(1) as threads:
        result = await supervise(Function(share_jobs.add_one, x), n=1, start=threads, logs=QUIET)
        assert result[0].value is x or result[0].value.address == x.address
    assert (np.asarray(x) == 1).all()


async def test_what_cannot_go_into_a_function() -> None:
    torch = needs("torch")
    with pytest.raises(SpecError, match="not a leaf"):
        await supervise(Function(share_jobs.total, torch.ones(2, requires_grad=True) * 2), n=1, logs=QUIET)
