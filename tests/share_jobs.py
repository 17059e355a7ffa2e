"""Functions that workers run in tests of sharing: they must be found by name in another process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import aioelastic
from aioelastic import sharing


def add_one(x: Any) -> Any:
    """To all elements, in place; the same array comes back."""
    np.asarray(x)[...] += 1
    return x


def total(x: Any) -> float:
    return float(np.asarray(x).sum())


def facts(*arrays: Any) -> list[tuple[str, bool, float]]:
    """Of each: its type, whether it is shared here, and its sum."""
    return [(type(x).__name__, sharing.is_shared(x), total(x)) for x in arrays]


def born_here(n: int) -> Any:
    x = sharing.empty(n, "float64")
    np.asarray(x)[:] = aioelastic.rank()
    return x


def echo() -> int:
    """Sends back what it is sent, until it gets None; returns how many."""
    count = 0
    while (value := sharing.receive()) is not None:
        sharing.send(value)
        del value
        count += 1
    return count


def receives_one(gate: Any) -> Any:
    gate.read_text()
    return sharing.receive()


async def echo_async() -> int:
    count = 0
    while (value := await sharing.receive_async()) is not None:
        sharing.send(value)
        count += 1
    return count


def holds() -> None:
    """What it is sent; says so, and waits for a word that will not come."""
    x = sharing.receive()
    sharing.send(os.getpid())
    sharing.receive()
    print(x)


def dies_with(x: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def takes(q: Any) -> list[Any]:
    return [item if not sharing.is_shared(item) else total(item) for item in q]


async def takes_async(q: Any) -> list[Any]:
    return [item async for item in q]


def puts(q: Any, items: list[Any]) -> None:
    for item in items:
        q.put_sync((aioelastic.rank(), item))


def pipes(first: Any, second: Any) -> None:
    """From one queue into the other."""
    for item in first:
        second.put_sync(item)
    second.close()


def puts_and_dies(q: Any, item: Any) -> None:
    q.put_sync(item)
    os.kill(os.getpid(), signal.SIGKILL)


def takes_half(q: Any) -> None:
    """Takes an item out of the socket and no further, as one that is killed at that moment."""
    from aioelastic.child.wire import datagrams

    while True:
        try:
            q._taken = datagrams.receive(q._get)
            break
        except BlockingIOError:
            pass
    sharing.send("has it")
    sharing.receive()


def sends(n: int) -> None:
    for i in range(n):
        sharing.send(sharing.copy(np.full(10, i)))


def sends_refused() -> None:
    import jobs

    sharing.send(jobs.Refuses())
    sharing.send("after")


def sends_when_asked() -> str:
    sharing.send("ready")
    sharing.receive()
    sharing.send(sharing.copy(np.full(100_000, 3.0)))
    sharing.send("after")
    return "done"


def makes_files(directory: str) -> Any:
    sharing.configure(strategy="file", directory=directory)
    return sharing.copy(np.full(100_000, 3.0))


def sends_and_stays() -> None:
    sharing.send(sharing.copy(np.full(100_000, 3.0)))
    sharing.send(np.full(100_000, 4.0))
    sharing.receive()


def private(n: int) -> Any:
    return np.ones(n, "u1")


def sends_round(first: Any, last: Any) -> bool:
    """Whether what comes back is the memory that was sent."""
    x = sharing.copy(np.ones(100_000))
    first.put_sync(x)
    y = last.get_sync()
    np.asarray(y)[:] += 1
    return bool(y.address == x.address and (np.asarray(x) == 2).all())


def works_until_killed(tasks: Any, done: Any) -> None:
    for number, x, private in tasks:
        array = np.asarray(x)
        assert (array == number).all()
        assert (private == number).all()
        array += 1
        done.put_sync((number, x, private + 1))
        del x, private, array


def pipes_one(first: Any, second: Any) -> None:
    second.put_sync(first.get_sync())


def order(directory: Any, x: Any) -> int:
    """How many were here before."""
    count = len(os.listdir(directory))
    (directory / str(count)).touch()
    return count


async def several_receive(n: int) -> tuple[list[Any], int]:
    """What tasks that receive at the same time get; one more of them was cancelled. And what a second loop gets."""
    waiting = [asyncio.create_task(sharing.receive_async()) for _ in range(n + 1)]
    await asyncio.sleep(0)
    waiting.pop(0).cancel()
    sharing.send("waiting")
    got = sorted(await asyncio.gather(*waiting))
    with ThreadPoolExecutor(1) as other:
        sharing.send("waiting")
        return got, await asyncio.wrap_future(other.submit(asyncio.run, sharing.receive_async()))


def lock_and_array() -> Any:
    return threading.Lock(), sharing.copy(np.ones(10))


def tells_that_it_waits() -> None:
    """From now on, when it is about to."""
    from aioelastic.child.wire import datagrams

    real = datagrams.readable

    def readable(seconds: float, *fds: int) -> bool:
        sharing.send("waits")
        return real(seconds, *fds)

    datagrams.readable = readable


def receives(timeout: Any) -> Any:
    tells_that_it_waits()
    return sharing.receive(timeout)


def receives_nothing() -> list[str]:
    told = []
    for timeout in (0, 0.001, -1):
        try:
            sharing.receive(timeout)
        except TimeoutError as exc:
            told.append(type(exc).__name__)
        except aioelastic.SpecError as exc:
            told.append(f"SpecError: {exc}".partition(";")[0])
    return told


def stopped_within(timeout: Any) -> bool:
    stop = aioelastic.stopping()
    try:
        stop.wait(-1)
    except aioelastic.SpecError as exc:
        sharing.send([stop.wait(0), str(exc).partition(" ")[0]])
    tells_that_it_waits()
    return stop.wait(timeout)


async def many_receive(count: int) -> list[Any]:
    """What so many tasks get that wait at once; how many descriptors they need is sent."""
    before = len(os.listdir("/proc/self/fd"))
    tasks = [asyncio.create_task(sharing.receive_async()) for _ in range(count)]
    for _ in range(5):
        await asyncio.sleep(0)
    sharing.send(len(os.listdir("/proc/self/fd")) - before)
    return await asyncio.gather(*tasks)


def crowd(kinds: bytes) -> None:
    """In this process the system refuses the first sends of such messages with descriptors."""
    from aioelastic.child.wire import datagrams

    real, left = datagrams.send, [3]

    def send(sock: Any, packet: bytes, fds: Any = (), flags: int = 0) -> None:
        if fds and packet[:1] in kinds and left[0]:
            left[0] -= 1
            raise datagrams.Crowded
        real(sock, packet, fds, flags)

    datagrams.send = send


def sends_crowded() -> Any:
    crowd(b"O")
    sharing.send(sharing.empty(100_000, "u1"))
    crowd(b"V")
    return sharing.empty(100_000, "u1")


def crowded_once() -> Any:
    crowd(b"D")
    return sharing.empty(100_000, "u1")


def users_of(q: Any) -> list[int]:
    return sorted(q._users)


def adds_if_it_may(x: Any) -> str:
    if x.read_only:
        return "read-only"
    np.asarray(x)[:] += 1
    return "added"
