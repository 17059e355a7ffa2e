"""Arrays and events on GPUs between processes, against a fake driver: they arrive, go on, and outlive who should."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import psutil
import pytest
from fake_gpu import memory_of, seen, theirs
from helpers import QUIET, gone

from aioelastic import Function, Group, GroupFailed, Restart, WorkerExecutor, gpu, sharing, supervise

pytestmark = pytest.mark.long

MIB = 1 << 20


def on_gpu(values: Any) -> Any:
    return sharing.copy(np.asarray(values), device="cuda:0")


@pytest.fixture
def jobs(fake: Any) -> Any:
    import gpu_jobs

    return gpu_jobs


@pytest.fixture
def cupy(fake: Any) -> Iterator[None]:
    fake_gpu.install()
    yield

    del sys.modules["cupy"]


def in_all_processes() -> set[str]:
    """The fake GPUs' memory of these tests that any process keeps."""
    found = set()
    for one in psutil.pids():
        with contextlib.suppress(OSError):
            found |= memory_of(one)
    return found


# --- functions ---


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_arguments_and_results(jobs: Any, start: Any) -> None:
    x = on_gpu(np.zeros((10, 10)))
    result = await supervise(Function(jobs.add_one, x), n=1, start=start, logs=QUIET)
    assert (seen(x) == 1).all()
    assert result[0].value.address == x.address


async def test_an_argument_keeps_its_views(jobs: Any) -> None:
    x = on_gpu(np.ones((10, 10)))
    result = await supervise(Function(jobs.facts, x, x[0], x[:, 1]), n=1, logs=QUIET)
    kind = "DeviceArray"
    assert result[0].value == [(kind, True, 100.0), (kind, True, 10.0), (kind, True, 10.0)]


async def test_a_result_outlives_its_owner(jobs: Any) -> None:
    result = await supervise(Function(jobs.born_here, 100_000), n=2, logs=QUIET)
    for rank in (0, 1):
        assert (seen(result[rank].value) == 7).all()
    assert gpu.stats().borrowed == 2
    again = await supervise(Function(jobs.add_one, result[1].value), n=1, logs=QUIET)
    assert again[0].value.address == result[1].value.address
    assert (seen(result[1].value) == 8).all()
    del result, again
    await asyncio.sleep(0)  # the loop still holds what woke us
    gc.collect()
    sharing.trim()
    assert gpu.stats().borrowed == 0
    assert in_all_processes() == set()


async def test_an_executor(jobs: Any) -> None:
    async with WorkerExecutor(2) as executor:
        arrays = [on_gpu(np.full(1000, float(i))) for i in range(6)]
        back = [await executor.run(jobs.add_one, x) for x in arrays]
        assert [x.address for x in back] == [x.address for x in arrays]
        assert [seen(x)[0] for x in arrays] == [1, 2, 3, 4, 5, 6]
        totals = await asyncio.to_thread(lambda: list(executor.map(jobs.total, arrays)))
        assert totals == [1000.0 * i for i in range(1, 7)]


@pytest.mark.parametrize("kind", ["plain", "pool"])
async def test_a_result_that_would_die_with_its_worker(jobs: Any, kind: str) -> None:
    with pytest.raises(GroupFailed) as caught:
        await supervise(Function(jobs.theirs_as_result, kind), n=1, logs=QUIET)
    assert "return sharing.copy(x)" in str(caught.value.exceptions[0])


async def test_a_result_that_does_not_die_with_its_worker(jobs: Any, cupy: Any) -> None:
    result = await supervise(Function(jobs.theirs_as_result, "expandable"), n=1, logs=QUIET)
    assert seen(result[0].value).tolist() == [1.0] * 100


# --- objects and queues ---


@pytest.mark.parametrize("job", ["adds", "adds_async"])
async def test_there_and_back_again(jobs: Any, job: str) -> None:
    async with Group(Function(getattr(jobs, job)), logs=QUIET) as group:
        x = on_gpu(np.zeros(1000))
        for number in range(1, 20):
            await group[0].send(x)
            y = await group[0].receive()
            assert y.address == x.address
            assert (seen(x) == number).all()
        await group[0].send(None)
        result = await group.wait()
        assert result[0].value == ({} if job == "adds" else 19)  # nothing is left in the worker


async def test_who_only_sends_it_on_needs_no_gpu(jobs: Any, fake: Any) -> None:
    """The supervisor of those who use a GPU calls no driver."""
    gpu.end()
    fake.calls()
    there = sharing.Queue()
    async with Group([Function(jobs.sends_and_stays), Function(jobs.takes, there)], logs=QUIET) as group:
        x = await group[0].receive()
        assert x.uuid == "GPU-11111111-1111-1111-1111-111111111111"
        await there.put(x[10:20])
        there.close()
        assert (await group[1].wait()) is not None
        await group[0].send(None)
        result = await group.wait()
        assert result[1].value == [30.0]
    assert fake.names() == []
    assert memory_of() != set()  # it holds it all the same
    del x
    gc.collect()
    assert memory_of() == set()


async def test_around_a_ring_it_is_the_same_memory(jobs: Any) -> None:
    a, b, c = (sharing.Queue(1) for _ in range(3))
    ring = [Function(jobs.sends_round, a, c), Function(jobs.pipes_one, a, b), Function(jobs.pipes_one, b, c)]
    result = await supervise(ring, logs=QUIET)
    assert result[0].value is True


async def test_on_another_gpu(jobs: Any) -> None:
    x = sharing.copy(np.ones(10), device="cuda:1")
    assert (await supervise(Function(jobs.looks, x), n=1, logs=QUIET))[0].value == ("", "cuda:1")
    # where it is the only one, it has another number
    only = {"CUDA_VISIBLE_DEVICES": x.uuid}
    assert (await supervise(Function(jobs.looks, x), n=1, env=only, logs=QUIET))[0].value == ("", "cuda:0")
    assert (await supervise(Function(jobs.total, x), n=1, env=only, logs=QUIET))[0].value == 10.0


async def test_where_its_gpu_cannot_be_seen(jobs: Any) -> None:
    x = sharing.copy(np.ones(10), device="cuda:1")
    hidden = {"CUDA_VISIBLE_DEVICES": "0"}
    told = (await supervise(Function(jobs.looks, x), n=1, env=hidden, logs=QUIET))[0].value
    assert told[0] == "DeviceUnavailable"
    assert x.uuid in told[1]
    assert "CUDA_VISIBLE_DEVICES" in told[1]


async def test_many_small_sends(jobs: Any) -> None:
    async with Group(Function(jobs.echo), logs=QUIET) as group:
        x = sharing.empty(100, "f4", device="cuda")

        async def some(count: int) -> tuple[int, int, int, set[str]]:
            """So many; and the descriptors of both, and the memory of all, behind them."""
            for _ in range(count):
                await group[0].send(x)
                assert (await group[0].receive()).address == x.address
            await group[0].send("how many")
            there = await group[0].receive()
            sharing.trim()
            return there, psutil.Process().num_fds(), gpu.stats().total, in_all_processes()

        few, many = await some(50), await some(500)
        assert many[2:] == few[2:]
        assert all(abs(one - other) <= 1 for one, other in zip(few[:2], many[:2], strict=True))  # of 500
        await group[0].send(None)
        assert (await group.wait())[0].value == {}


# --- memory of other libraries ---


@pytest.mark.parametrize("kind", ["plain", "pool", "expandable"])
async def test_memory_of_others(jobs: Any, cupy: Any, fake: Any, kind: str) -> None:
    x = theirs(kind, np.zeros(400_000))  # some pieces of 2 MiB
    async with Group(Function(jobs.with_cupy), logs=QUIET) as group:
        for number in range(1, 4):
            await group[0].send(x)
            back = await group[0].receive()
            assert type(back) is fake_gpu.ndarray
            assert back.__cuda_array_interface__["data"] == x.__cuda_array_interface__["data"]
            assert (seen(x) == number).all()
            await group[0].send(x.part(5, 10))
            part = await group[0].receive()
            seen(part)[:] -= 1
            assert (seen(x) == number).all()
        await group[0].send(None)
        assert (await group.wait())[0].value == {}
    del x, back, part
    gc.collect()
    sharing.trim()
    assert "memory" not in fake.live()


async def test_memory_of_others_is_held_for_who_has_it(jobs: Any, cupy: Any, fake: Any) -> None:
    """Its library would use it again: that is what torch's own counter file is for."""
    async with Group(Function(jobs.with_cupy), logs=QUIET) as group:
        x = theirs("plain", np.zeros(1000))
        await group[0].send(x)
        del x
        gc.collect()
        sharing.trim()
        back = await group[0].receive()
        assert (seen(back) == 1).all()  # and not 0xDD: it was not freed
        del back
        await group[0].send(None)
        await group.wait()
        sharing.trim()
        assert "memory" not in fake.live()


@pytest.mark.parametrize("kind", ["plain", "pool"])
async def test_memory_of_others_that_died(jobs: Any, cupy: Any, kind: str) -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await lose(jobs, kind)


async def lose(jobs: Any, kind: str) -> None:

    cupy = sys.modules.pop("cupy")  # it arrives as an array of ours
    try:
        async with Group(Function(jobs.lends, kind), logs=QUIET) as group:
            x = await group[0].receive()
            y = x[5:10]
            assert seen(x).sum() == 499_500
            assert group[0].pid is not None
            os.kill(group[0].pid, signal.SIGKILL)
            await gone(group[0].pid)
            for attempt in (lambda: x.address, lambda: y.__cuda_array_interface__, lambda: sharing.copy(x)):
                with pytest.raises(sharing.ShareLost, match=r"has ended.*sharing\.copy"):
                    attempt()
            with pytest.raises(sharing.ShareLost):
                await sharing.Queue().put(x)
    finally:
        sys.modules["cupy"] = cupy


# --- events ---


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
async def test_an_event_between_processes(jobs: Any, fake: Any, device: str) -> None:
    event = gpu.GpuEvent(device)
    fake.hold()
    event.record()
    async with Group(Function(jobs.waits_for_event), logs=QUIET) as group:
        await group[0].send(event)
        assert await group[0].receive() == "looked"
        fake.go()
        result = await group.wait()
        assert result[0].value == (False, True, {})
    await event  # recorded again, over there
    assert event.query()


async def test_an_event_whose_process_died(jobs: Any) -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await lose_event(jobs)


async def lose_event(jobs: Any) -> None:
    async with Group(Function(jobs.sends_event_and_stays), logs=QUIET) as group:
        event = await group[0].receive()
        assert event.query()
        assert group[0].pid is not None
        os.kill(group[0].pid, signal.SIGKILL)
        await gone(group[0].pid)
        with pytest.raises(sharing.ShareLost):
            event.query()
        with pytest.raises(sharing.ShareLost):
            await event


async def test_an_event_is_kept_for_who_has_it(jobs: Any, fake: Any) -> None:
    async with Group(Function(jobs.holds), logs=QUIET) as group:
        event = gpu.GpuEvent()
        await group[0].send(event)
        await group[0].receive()
        del event
        gc.collect()
        sharing.trim()
        assert fake.live()["events"] == 1  # destroying it now would be undefined behaviour there
        await group[0].send(None)
        await group.wait()
    sharing.trim()
    gpu.end()
    assert "events" not in fake.live()


# --- deaths ---


async def test_who_is_killed_holds_nothing(jobs: Any) -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await kill_a_holder(jobs)


async def kill_a_holder(jobs: Any) -> None:
    x = sharing.empty(4 * MIB, "u1", device="cuda")
    async with Group(Function(jobs.holds), logs=QUIET) as group:
        await group[0].send(x)
        pid, address = await group[0].receive()
        assert address
        assert [one.holder for one in sharing.leases()] == [pid]
        assert [one.unexplained for one in sharing.audit()] == [()]
        where = x.address
        del x
        assert sharing.empty(4 * MIB, "u1", device="cuda").address != where
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        assert sharing.leases() == []
        sharing.trim()
        assert in_all_processes() == set()


async def test_a_producer_that_is_killed_loses_nothing(jobs: Any) -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await kill_a_producer(jobs)
    gc.collect()
    sharing.trim()
    assert in_all_processes() == set()


async def kill_a_producer(jobs: Any) -> None:
    async with Group(Function(jobs.sends_and_stays), logs=QUIET) as group:
        x = await group[0].receive()
        pid = group[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        assert (seen(x) == 3).all()  # mapped only now
        again = await supervise(Function(jobs.total, x), n=1, logs=QUIET)
        assert again[0].value == 300_000


@pytest.mark.parametrize("seed", range(2))
async def test_workers_die_at_any_moment(jobs: Any, seed: int) -> None:
    chance = random.Random(seed)
    tasks, done = sharing.Queue(4), sharing.Queue(4)
    made, right = 24, 0
    restart = Restart.on_failure(max=100)
    async with Group(Function(jobs.works_until_killed, tasks, done), n=3, restart=restart, logs=QUIET) as group:

        async def feed() -> None:
            for number in range(made):
                x = sharing.empty(20_000, "float64", device="cuda")
                seen(x)[:] = number
                await tasks.put((number, x))
                if number % 6 == 5:
                    pids = [pid for pid in group.pids.values() if pid is not None]
                    if pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(chance.choice(pids), signal.SIGKILL)
            tasks.close()

        feeding = asyncio.create_task(feed())
        waiting = asyncio.create_task(group.wait())
        waiting.add_done_callback(lambda _: done.close())
        async for number, x in done:
            assert (seen(x) == number + 1).all()
            right += 1
            del x
        await feeding
        await waiting
    assert made - 3 * (made // 6) <= right <= made
    sharing.trim()
    assert in_all_processes() == set()


# --- imports that fail ---


STEPS = ["cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]


@pytest.mark.parametrize("step", STEPS)
async def test_an_import_that_fails_leaves_nothing(jobs: Any, step: str) -> None:
    x = on_gpu(np.ones(1000))
    words, left, total = (await supervise(Function(jobs.import_fails, step, x), n=1, logs=QUIET))[0].value
    assert words.startswith(f"CudaError: {step}: ")
    assert left == {}
    assert total == 1000


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("plain", "cuIpcOpenMemHandle"),
        ("pool", "cuMemPoolImportFromShareableHandle"),
        ("pool", "cuMemPoolImportPointer"),
        ("expandable", "cuMemMap"),
    ],
)
async def test_an_import_of_others_that_fails(jobs: Any, cupy: Any, kind: str, step: str) -> None:
    x = theirs(kind, np.ones(1000))
    words, left, total = (await supervise(Function(jobs.import_fails, step, x), n=1, logs=QUIET))[0].value
    assert words.startswith(f"CudaError: {step}: ")
    assert left == {}
    assert total == 1000


# --- programs that nobody here has started, or that die ---


def environ() -> dict[str, str]:
    here = os.pathsep.join(map(str, [Path(sharing.__file__).parents[2], *Path(__file__).parents[:2]]))
    return {**os.environ, "PYTHONPATH": here}


async def test_a_program_that_attaches(jobs: Any, tmp_path: Path) -> None:
    x = on_gpu(np.ones(1000))
    code = f"""
import gpu_jobs
from aioelastic import sharing
with sharing.attach({str(tmp_path / "socket")!r}) as offered:
    print(gpu_jobs.total(gpu_jobs.add_one(offered["x"])))
"""
    async with sharing.Endpoint(tmp_path / "socket", {"x": x}):
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env=environ()
        )
        out, _ = await program.communicate()
    assert out == b"2000.0\n"
    assert (seen(x) == 2).all()
    assert sharing.leases() == []


async def test_a_supervisor_that_is_killed_leaves_nothing(jobs: Any) -> None:
    code = """
import asyncio, os, signal, psutil
import gpu_jobs
from aioelastic import Function, Group, sharing
async def main():
    x = sharing.empty(4 << 20, "u1", device="cuda:0")
    async with Group(Function(gpu_jobs.holds)) as group:
        await group[0].send(x)
        await group[0].receive()
        family = psutil.Process().children(recursive=True)
        print(len(gpu_jobs.fake_gpu.memory_of()), *[one.pid for one in family], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env=environ()
    )
    assert program.stdout is not None
    held, *family = (await program.stdout.readline()).split()
    assert await program.wait() == -signal.SIGKILL
    assert held == b"1"
    for pid in family:
        await gone(int(pid))
    assert in_all_processes() == set()
