"""Checks on a real GPU. Each is run in a process of its own, see `test_gpu_real.py`:
`PYTHONPATH=tests python tests/gpu/gpu_checks.py NAME`.

In the order in which they tell the most: what is there, memory by descriptors, the death of a producer, leaks, memory
of other libraries, events and their order, captures, errors, rates. Each fails where the GPU or its driver does not do
what is checked: `test_gpu_checks.py` sees to that, with a fake driver that does wrong.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import fake_gpu
import numpy as np

from aioelastic import Function, Group, GroupFailed, Logs, Std, gpu, sharing, supervise
from aioelastic.gpu._driver import device
from aioelastic.gpu._driver_calls import NON_BLOCKING, call

if fake_gpu.PATH in os.environ:  # in workers, too
    fake_gpu.fake()
    ctypes.CDLL(os.environ["FAKE_NVML_LIBRARY"])

QUIET = Logs(tee=Std.NONE)
MIB = 1 << 20
SENDS = 10_000
SKIP = 77  # the exit status of a check that this machine cannot make; its last line says why


def skip(why: str) -> None:
    """This machine cannot make the check."""
    print(why)
    sys.exit(SKIP)


def torch_with_cuda() -> Any:
    try:
        import torch
    except ImportError:
        skip("needs torch")
    if not torch.cuda.is_available():
        skip("needs a torch that sees the GPU")
    return torch


def back(x: Any) -> Any:
    return np.asarray(sharing.copy(x, device="cpu"))


def used() -> int:
    """Bytes of the first GPU that are in use, by anybody."""
    free, total = on_device(lambda: call("cuMemGetInfo"))
    return int(total) - int(free)


def on_device(work: Callable[[], Any]) -> Any:
    return device("cuda:0").run(work)


def latch() -> Any:
    """A number on the GPU for which streams can wait."""
    return sharing.copy(np.zeros(1, "uint32"), device="cuda:0")


def stream_behind(closed: Any, value: int) -> Any:
    """A new stream, whose work does not go on before the latch has that value."""

    def make() -> Any:
        stream = call("cuStreamCreate", NON_BLOCKING)
        try:
            call("cuStreamWaitValue32", stream, closed.address, value, 0)
        except gpu.CudaError as exc:
            if exc.name == "CUDA_ERROR_NOT_SUPPORTED":
                skip(f"needs streams that wait for memory: {exc}")
            raise
        return stream

    return on_device(make)


def let(closed: Any, value: int) -> None:
    """It has that value now."""
    own = device("cuda:0")
    own.run(lambda: call("cuStreamWriteValue32", own.stream, closed.address, value, 0))


# --- jobs ---


def add_one(x: Any) -> float:
    """Read, and write back, by a copy each way."""
    values = back(x)
    more = sharing.copy(values + 1, device=x.device)
    on_device(lambda: call("cuMemcpyAsync", x.address, more.address, x.nbytes, 0))
    on_device(lambda: call("cuStreamSynchronize", 0))
    return float(values.sum())


def echo() -> None:
    while (value := sharing.receive()) is not None:
        sharing.send(value)
        del value


def born_and_stays() -> None:
    sharing.send(sharing.copy(np.full(1_000_000, 3.0), device="cuda:0"))
    sharing.receive()


def holds() -> None:
    x = sharing.receive()
    sharing.send((os.getpid(), x.address))
    sharing.receive()


def torch_adds() -> None:
    import torch

    while (value := sharing.receive()) is not None:
        value += 1
        torch.cuda.synchronize()
        sharing.send(tuple(value.shape))
        del value


def waits_for_event() -> tuple[bool, bool]:
    event = sharing.receive()
    before = event.query()
    sharing.send("has it")
    event.synchronize()
    after = event.query()
    event.record()
    return before, after


def sees_in_order() -> float:
    """What is copied here behind an event of the other process; then an event behind work of ours."""
    event, x, closed = sharing.receive()
    y, copied, stream = sharing.empty(x.size, "f8", device=x.device), gpu.GpuEvent(), stream_behind(closed, 0)
    event.wait(stream)
    on_device(lambda: call("cuMemcpyAsync", y.address, x.address, x.nbytes, stream))
    copied.record(stream)
    sharing.send((event.query(), copied.query()))
    copied.synchronize()
    event.record(stream_behind(closed, 2))
    sharing.send(event.query())
    sharing.receive()
    return float(back(y).sum())


def says_device(x: Any) -> str:
    try:
        return f"{x.address != 0}"
    except sharing.DeviceUnavailable as exc:
        return exc.reason.name


# --- checks ---


async def probe() -> None:
    """1. What is there."""
    found = gpu.probe(tries=True)
    print(found)
    assert found.ok, found
    assert found.devices[0].tried
    assert {one.uuid for one in found.devices} <= {one.uuid for one in gpu.devices()}


async def memory_by_descriptor() -> None:
    """2. Made here, mapped there, written back."""
    x = sharing.copy(np.arange(500_000.0), device="cuda:0")
    result = await supervise(Function(add_one, x), n=1, logs=QUIET)
    assert result[0].value == np.arange(500_000.0).sum()
    assert back(x)[7] == 8


async def producer_dies() -> None:
    """3. SIGKILL of who made the memory, while we have it mapped, and before we map it."""
    seen = False
    try:
        async with Group(Function(born_and_stays), n=2, logs=QUIET) as group:
            first, second = await group[0].receive(), await group[1].receive()
            assert back(first).sum() == 3_000_000
            for rank in (0, 1):
                os.kill(group[rank].pid, signal.SIGKILL)  # type: ignore[arg-type]
                await group[rank].wait()
            assert (back(first) == 3).all()
            assert (back(second) == 3).all()
            seen = True
    except GroupFailed:
        if not seen:
            raise
        return
    raise AssertionError("they were not killed")


async def memory_returns() -> None:
    """4. 64 times 64 MiB made and given back."""
    sharing.empty(1, device="cuda:0")
    sharing.trim()
    before = used()
    for _ in range(64):
        x = sharing.empty(64 * MIB, "u1", device="cuda:0")
        del x
        sharing.trim()
    assert used() - before < 64 * MIB, (before, used())


async def consumer_dies() -> None:
    """Leases and memory come back."""
    x = sharing.empty(256 * MIB, "u1", device="cuda:0")
    before, seen = used(), False
    try:
        async with Group(Function(holds), logs=QUIET) as group:
            await group[0].send(x)
            pid, address = await group[0].receive()
            assert address
            assert [one.holder for one in sharing.leases()] == [pid]
            os.kill(pid, signal.SIGKILL)
            await group[0].wait()
            assert sharing.leases() == []
            seen = True
    except GroupFailed:
        if not seen:
            raise
    del x
    sharing.trim()
    assert used() <= before - 200 * MIB


async def torch_tensors() -> None:
    """5. torch's own memory: block and offset, two types from one block, dropped while it is lent."""
    torch = torch_with_cuda()
    small = [torch.zeros(10, device="cuda"), torch.zeros(10, device="cuda", dtype=torch.int16)]
    big = torch.zeros(1000, 1000, device="cuda")
    parameter = torch.nn.Parameter(torch.zeros(5, device="cuda"))
    async with Group(Function(torch_adds), logs=QUIET) as group:
        for one in (*small, big, big[3:5, ::2]):
            await group[0].send(one)
            assert await group[0].receive() == tuple(one.shape)
        assert [one.sum().item() for one in small] == [10, 10]
        assert big.sum().item() == 1_000_000 + 1000
        await group[0].send(parameter.detach())
        await group[0].receive()
        assert parameter.sum().item() == 5
        dropped = torch.zeros(300, 300, device="cuda")
        await group[0].send(dropped)
        del dropped
        others = [torch.full((300, 300), 9.0, device="cuda") for _ in range(4)]
        await group[0].receive()
        assert all((one == 9).all().item() for one in others)  # none of them was given that memory
        x = torch.utils.dlpack.from_dlpack(sharing.empty((4, 4), "float32", device="cuda:0"))
        x.zero_()
        assert sharing.is_shared(x[1:])
        await group[0].send(x)
        await group[0].receive()
        assert (x == 1).all().item()
        await group[0].send(None)
        await group.wait()


async def torch_echo() -> None:
    """What goes there and comes back is the same tensor's memory, type and all."""
    torch = torch_with_cuda()
    async with Group(Function(echo), logs=QUIET, preload=["torch"]) as group:
        cases = [
            torch.nn.Parameter(torch.ones(3, device="cuda")),
            torch.ones(3, device="cuda", requires_grad=True),
            torch.empty(0, 3, device="cuda"),
            torch.nn.Parameter(torch.ones(3, device="cuda", dtype=torch.int64), requires_grad=False),
            torch.ones(3, 4, device="cuda", dtype=torch.bfloat16).t(),
        ]
        for one in cases:
            await group[0].send(one)
            again = await group[0].receive()
            assert (type(again), again.dtype, again.shape) == (type(one), one.dtype, one.shape)
            assert again.requires_grad == one.requires_grad
            assert again.data_ptr() == one.data_ptr()
        await group[0].send(None)
        await group.wait()


async def pool() -> None:
    """6. A pool that can be shared, by cuda.core."""
    try:
        from cuda.core import Device, DeviceMemoryResource, DeviceMemoryResourceOptions
    except ImportError:
        skip("needs cuda-core")
    device = Device(0)
    device.set_current()
    resource = DeviceMemoryResource(device, options=DeviceMemoryResourceOptions(ipc_enabled=True, max_size=64 * MIB))
    stream = device.create_stream()
    buffer = resource.allocate(8000, stream=stream)
    stream.sync()
    from aioelastic.gpu import _foreign_memory

    kind, start, size = on_device(lambda: _foreign_memory.range_of(int(buffer.handle), int(buffer.handle) + 8000))
    assert (kind, start) == ("pool", int(buffer.handle)), (kind, start, size)
    told, fds = on_device(lambda: _foreign_memory.export(kind, start, size))
    assert len(told["handle"]) == 64
    for fd in fds:
        os.close(fd)


async def events() -> None:
    """7. Made here, waited for there, recorded again there."""
    event, closed = gpu.GpuEvent("cuda:0"), latch()
    event.record(stream_behind(closed, 1))
    async with Group(Function(waits_for_event), logs=QUIET) as group:
        await group[0].send(event)
        assert await group[0].receive() == "has it"
        assert not event.query()
        let(closed, 1)
        assert (await group.wait())[0].value == (False, True)
        await event
        assert event.query()


async def order() -> None:
    """An event comes behind the work that was given before it, and before that which waits for it, in two processes."""
    event, x, closed = gpu.GpuEvent("cuda:0"), sharing.copy(np.zeros(1000), device="cuda:0"), latch()
    ones = sharing.copy(np.ones(1000), device="cuda:0")
    async with Group(Function(sees_in_order), logs=QUIET) as group:
        stream = stream_behind(closed, 1)
        on_device(lambda: call("cuMemcpyAsync", x.address, ones.address, x.nbytes, stream))
        event.record(stream)
        assert not event.query()
        await group[0].send((event, x, closed))
        assert await group[0].receive() == (False, False)
        assert not event.query()
        let(closed, 1)
        assert await group[0].receive() is False  # it was recorded again, behind work that waits
        assert not event.query()
        let(closed, 2)
        await event
        assert event.query()
        assert back(x).sum() == 1000
        await group[0].send("well")
        assert (await group.wait())[0].value == 1000


async def given_back() -> None:
    """Memory is used again, and sent, when the default stream has done with it, though nothing is put into that."""
    closed, x = latch(), sharing.empty(4 * MIB, "u1", device="cuda:0")
    queue = sharing.Queue()
    on_device(lambda: call("cuStreamWaitValue32", 0, closed.address, 1, 0))
    where = x.address
    sending = asyncio.create_task(queue.put(x))
    await asyncio.to_thread(on_device, lambda: None)
    assert not sending.done()
    let(closed, 1)
    await sending
    assert (await queue.get()).address == where
    on_device(lambda: call("cuStreamWaitValue32", 0, closed.address, 2, 0))
    del x
    other = sharing.empty(4 * MIB, "u1", device="cuda:0")
    assert other.address != where
    let(closed, 2)
    del other
    sharing.trim()
    assert gpu.stats().idle == 0
    assert gpu.stats().total <= 2 * MIB


def captures() -> None:
    """Nothing of ours breaks the capture of a graph by another thread, of whatever kind it is."""
    sharing.copy(np.ones(10), device="cuda:0")
    for flags in (0, NON_BLOCKING):
        for mode in range(3):
            began, end = threading.Event(), threading.Event()
            told: list[Any] = []

            def capture(flags: int = flags, mode: int = mode, news: Any = (began, end, told)) -> None:
                with fake_gpu.context() as cu:
                    stream = cu.cuStreamCreate(flags)
                    cu.cuStreamBeginCapture(stream, cu.raw.CUstreamCaptureMode(mode))
                    news[0].set()
                    news[1].wait()
                    news[2].append(int(cu.raw.cuStreamEndCapture(stream)[0]))
                    cu.cuStreamDestroy(stream)

            thread = threading.Thread(target=capture)
            thread.start()
            began.wait()
            try:
                x = sharing.copy(np.arange(24.0).reshape(4, 6), device="cuda:0")
                del x
                sharing.empty(3 * MIB, "u1", device="cuda:0")
                sharing.trim()
                event = gpu.GpuEvent()
                event.query()
                event.synchronize()
                assert gpu.probe(tries=True).ok
            finally:
                end.set()
                thread.join()
            assert told == [0], (flags, mode, told)


async def refusals() -> None:
    """8. After a fork; where the GPU cannot be seen."""
    x = sharing.copy(np.ones(10), device="cuda:0")
    pid = os.fork()
    if pid == 0:
        try:
            sharing.empty(3, device="cuda:0")
        except sharing.ForkedCudaError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    hidden = await supervise(Function(says_device, x), n=1, env={"CUDA_VISIBLE_DEVICES": ""}, logs=QUIET)
    assert hidden[0].value == "NO_GPU"


async def managed() -> None:
    """Memory that cannot be shared is refused."""
    from aioelastic.gpu import _foreign_memory

    address = int(on_device(lambda: call("cuMemAllocManaged", 4096, 1)))
    words = ""
    try:
        on_device(lambda: _foreign_memory.range_of(address, address + 4096))
    except sharing.NotShareable as exc:
        words = str(exc)
    finally:
        on_device(lambda: call("cuMemFree", address))
    assert "sharing.copy(x)" in words


async def inventory() -> None:
    """9. The management library shows this process on the GPU that is cuda:0, or says that it cannot."""
    x: Any = sharing.empty(1, device="cuda:0")
    (first, *_) = gpu.devices()
    print(first)
    assert x.uuid in (first.uuid, *first.instances)
    assert not first.trouble
    assert first.used is None or first.total is None or 0 < first.used <= first.total
    pids = None if first.processes is None else [one.pid for one in first.processes]
    assert pids is None or gpu.why_unproven() or os.getpid() in pids, pids


async def many_sends() -> None:
    """10. Many small sends with constant memory."""
    async with Group(Function(echo), logs=QUIET) as group:

        async def some(count: int) -> None:
            for _ in range(count):
                await group[0].send(sharing.empty(4096, "f4", device="cuda:0"))
                await group[0].receive()

        def held() -> tuple[int, int]:
            sharing.trim()
            return gpu.stats().total, len(os.listdir("/proc/self/fd"))

        await some(SENDS // 10)
        before = used(), held()
        await some(SENDS)
        assert held() == before[1]
        assert used() - before[0] < 16 * MIB
        await group[0].send(None)
        await group.wait()


CHECKS: dict[str, Callable[[], Any]] = {
    one.__name__: one
    for one in (
        probe,
        memory_by_descriptor,
        producer_dies,
        memory_returns,
        consumer_dies,
        torch_tensors,
        torch_echo,
        pool,
        events,
        order,
        given_back,
        captures,
        refusals,
        managed,
        inventory,
        many_sends,
    )
}


def run(name: str) -> None:
    check = CHECKS[name]()
    if check is not None:
        asyncio.run(check)


if __name__ == "__main__":
    run(sys.argv[1])
