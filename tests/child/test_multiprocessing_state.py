"""What `multiprocessing` keeps for the program: its tracker of resources and its key are its function workers', too."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import managers, resource_tracker, shared_memory
from typing import Any

import conftest
import pytest
from helpers import QUIET

from aioelastic import Function, WorkerExecutor, supervise
from aioelastic.child.worker import multiprocessing_state

pytestmark = pytest.mark.fresh
STARTS = ("zygote", "spawn", "fork")


@pytest.fixture(autouse=True)
def as_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """For other tests what this file imports does not count."""
    monkeypatch.setattr(multiprocessing_state, "TRACKED", conftest.TRACKED)


def tracker() -> tuple[int, int]:
    """Which pipe leads to it."""
    about = os.fstat(resource_tracker.getfd())  # type: ignore[attr-defined]
    return about.st_dev, about.st_ino


def reads(name: str) -> tuple[bytes, tuple[int, int]]:
    """As who attaches by a name, and ends without a further word."""
    memory = shared_memory.SharedMemory(name)
    try:
        return bytes(memory.buf[:5]), tracker()
    finally:
        memory.close()


def makes() -> tuple[str, tuple[int, int]]:
    memory = shared_memory.SharedMemory(create=True, size=5)
    memory.buf[:5] = b"given"
    memory.close()
    return memory.name, tracker()


def puts(proxy: Any) -> tuple[int, int]:
    proxy["rank"] = os.environ["RANK"]
    return tracker()


@pytest.fixture
def memory() -> Iterator[shared_memory.SharedMemory]:
    made = shared_memory.SharedMemory(create=True, size=5)
    made.buf[:5] = b"whole"
    yield made
    made.close()
    made.unlink()


@pytest.mark.parametrize("start", STARTS)
async def test_a_worker_that_attaches_to_shared_memory_leaves_it(start: Any, memory: Any) -> None:
    result = await supervise(Function(reads, memory.name), n=2, start=start, logs=QUIET)
    assert [one.value for one in result] == [(b"whole", tracker())] * 2  # a tracker of its own would destroy it
    again = shared_memory.SharedMemory(memory.name)
    assert bytes(again.buf[:5]) == b"whole"
    again.close()


@pytest.mark.parametrize("start", STARTS)
async def test_what_a_worker_has_made_is_there_after_its_end(start: Any) -> None:
    ((name, its),) = [one.value for one in await supervise(Function(makes), start=start, logs=QUIET)]
    assert its == tracker()
    made = shared_memory.SharedMemory(name)
    assert bytes(made.buf[:5]) == b"given"
    made.close()
    made.unlink()


@pytest.mark.parametrize("start", STARTS)
async def test_a_proxy_of_a_manager_works(start: Any) -> None:
    with multiprocessing.Manager() as manager:
        assert isinstance(manager, managers.SyncManager)
        proxy = manager.dict()
        await supervise(Function(puts, proxy), start=start, logs=QUIET)
        assert dict(proxy) == {"rank": "0"}


@pytest.mark.parametrize("start", STARTS)
async def test_tasks_of_an_executor_have_both(start: Any, memory: Any) -> None:
    with multiprocessing.Manager() as manager:
        proxy = manager.dict()
        async with WorkerExecutor(1, start=start) as executor:
            assert await executor.run(reads, memory.name) == (b"whole", tracker())
            assert await executor.run(puts, proxy) == tracker()
        assert dict(proxy) == {"rank": "0"}
    shared_memory.SharedMemory(memory.name).close()
