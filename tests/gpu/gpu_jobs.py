"""Functions that workers run in tests with a fake GPU: they must be found by name in another process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import Any

import fake_gpu
import numpy as np

from aioelastic import Function, Group, Logs, Std, gpu, sharing

fake_gpu.fake()  # before anything looks for the real one


def add_one(x: Any) -> Any:
    fake_gpu.seen(x)[...] += 1
    return x


def facts(*arrays: Any) -> list[tuple[str, bool, float]]:
    return [(type(x).__name__, sharing.is_shared(x), float(fake_gpu.seen(x).sum())) for x in arrays]


def born_here(n: int) -> Any:
    x = sharing.empty(n, "float64", device="cuda:0")
    fake_gpu.seen(x)[:] = 7
    return x


def theirs_as_result(kind: str) -> Any:
    fake_gpu.install()
    return fake_gpu.theirs(kind, np.ones(100))


def total(x: Any) -> float:
    return float(fake_gpu.seen(x).sum())


def echo() -> dict[str, int]:
    """Sends back what it is sent, until it gets None; returns what of the driver is left then.

    For "how many", the descriptors that it has open.
    """
    while (value := sharing.receive()) is not None:
        if isinstance(value, str):
            gpu.end()
            value = len(os.listdir("/proc/self/fd"))
        sharing.send(value)
        del value
    sharing.trim()
    gpu.end()
    return fake_gpu.fake().live()


def adds(loud: bool = False) -> dict[str, int]:
    """As `echo`, and adds one to each."""
    while (value := sharing.receive()) is not None:
        fake_gpu.seen(value)[...] += 1
        sharing.send(value)
        del value
    sharing.trim()
    gpu.end()
    return fake_gpu.fake().live()


class Lock:
    """Unpickling it waits for `go`."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.began, self.go = number, threading.Event(), threading.Event()
        locks[number] = self

    def __reduce__(self) -> Any:
        return _unlock, (self.number,)


locks: dict[int, Lock] = {}


def _unlock(number: int) -> str:
    lock = locks.get(number) or Lock(number)
    lock.began.set()
    assert lock.go.wait(60)
    return "opened"


async def cancelled_meanwhile() -> tuple[Lock, asyncio.Task[Any]]:
    """A task that was cancelled while what it has received was being unpickled."""
    fake_gpu.install()
    lock = Lock()
    first = asyncio.create_task(sharing.receive_async())
    await asyncio.to_thread(lock.began.wait)
    first.cancel()
    await asyncio.wait([first])
    return lock, first


async def receives_again() -> list[Any]:
    """What comes after a task that was receiving was cancelled."""
    lock, first = await cancelled_meanwhile()
    got: list[Any] = [first.cancelled()]
    try:
        sharing.receive(0.001)
    except TimeoutError:
        got.append("not yet")
    lock.go.set()
    x, word = sharing.receive()
    return [*got, total(x), word, await sharing.receive_async()]


async def forks_another() -> tuple[Any, str]:
    """What that one receives, while an object of ours is being unpickled; and what is in ours."""
    lock, _ = await cancelled_meanwhile()
    async with Group(Function(sharing.receive), start="fork", logs=Logs(tee=Std.NONE)) as group:
        await group[0].send("for the inner one")
        result = await group.wait()
    lock.go.set()
    return result[0].value, sharing.receive()[1]


async def adds_async() -> int:
    count = 0
    while (value := await sharing.receive_async()) is not None:
        fake_gpu.seen(value)[...] += 1
        sharing.send(value)
        count += 1
    return count


def with_cupy() -> dict[str, int]:
    """As `adds`, in a process that has cupy."""
    fake_gpu.install()
    return adds()


def holds() -> None:
    """What it is sent, mapped; says so, and waits for a word that will not come."""
    x = sharing.receive()
    sharing.send((os.getpid(), x.address if isinstance(x, sharing.SharedArray) else 0))
    sharing.receive()
    print(x)


def lends(kind: str) -> None:
    """An array of another library; waits for a word, and ends."""
    fake_gpu.install()
    sharing.send(fake_gpu.theirs(kind, np.arange(1000.0)))
    sharing.receive()


def sends_and_stays() -> None:
    x = sharing.empty(100_000, "float64", device="cuda:0")
    fake_gpu.seen(x)[:] = 3
    sharing.send(x)
    del x
    sharing.receive()


def sends_event_and_stays() -> None:
    sharing.send(gpu.GpuEvent())
    sharing.receive()


def waits_for_event() -> tuple[bool, bool, dict[str, int]]:
    event = sharing.receive()
    before = event.query()
    sharing.send("looked")
    event.synchronize()
    after = event.query()
    event.record()
    del event
    gpu.end()
    return before, after, fake_gpu.fake().live()


def import_fails(name: str, x: Any) -> tuple[str, dict[str, int], float]:
    """What an import says of which that call fails; what it leaves; and whether it works afterwards."""
    words = ""
    gpu.probe(tries=True)
    gpu.end()
    before = fake_gpu.fake().live()
    assert not before, before
    fake_gpu.fake().fail(name)
    try:
        x.address  # noqa: B018
    except sharing.SharingError as exc:
        words = f"{type(exc).__name__}: {exc}"
    gpu.end()
    left = fake_gpu.fake().live()
    fake_gpu.fake().mend()
    return words, left, total(x)


def looks(x: Any) -> tuple[str, str]:
    """What it says of where it is."""
    try:
        return "", x.device
    except sharing.SharingError as exc:
        return type(exc).__name__, str(exc)


def takes(q: Any) -> list[float]:
    return [total(x) for x in q]


def sends_round(first: Any, last: Any) -> bool:
    """Whether what comes back is the memory that was sent."""
    x = sharing.empty(100_000, "float64", device="cuda:0")
    fake_gpu.seen(x)[:] = 1
    first.put_sync(x)
    y = last.get_sync()
    fake_gpu.seen(y)[:] += 1
    return bool(y.address == x.address and (fake_gpu.seen(x) == 4).all())


def pipes_one(first: Any, second: Any) -> None:
    x = first.get_sync()
    fake_gpu.seen(x)[...] += 1
    second.put_sync(x)


def works_until_killed(tasks: Any, done: Any) -> None:
    for number, x in tasks:
        array = fake_gpu.seen(x)
        assert (array == number).all()
        array += 1
        done.put_sync((number, x))
        del x, array


def dies_with(x: Any) -> None:
    assert x.address
    os.kill(os.getpid(), signal.SIGKILL)


def order() -> str:
    return "done"
