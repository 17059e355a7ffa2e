"""Checks on a real GPU. Each is run in a process of its own: `python gpu_checks.py NAME`; see `test_gpu_real.py`.

In the order in which they tell the most: what is there, memory by descriptors, the death of a producer, leaks, memory
of other libraries, events, errors, rates.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from aioelastic import Function, Group, GroupFailed, Logs, Std, gpu, sharing, supervise

QUIET = Logs(tee=Std.NONE)
MIB = 1 << 20
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
    return gpu.devices()[0].used


# --- jobs ---


def add_one(x: Any) -> float:
    """Read, and write back, by a copy each way."""
    from aioelastic.gpu._driver import call, device

    values = back(x)
    more = sharing.copy(values + 1, device=x.device)
    device(x.uuid).run(lambda: call("cuMemcpy", x.address, more.address, x.nbytes))
    device(x.uuid).run(lambda: call("cuStreamSynchronize", 0))
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


def waits_for_event() -> bool:
    event = sharing.receive()
    sharing.send("has it")
    event.synchronize()
    event.record()
    return bool(event.query() or True)


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
    try:
        async with Group(Function(born_and_stays), n=2, logs=QUIET) as group:
            first, second = await group[0].receive(), await group[1].receive()
            assert back(first).sum() == 3_000_000
            for rank in (0, 1):
                os.kill(group[rank].pid, signal.SIGKILL)  # type: ignore[arg-type]
                await group[rank].wait()
            assert (back(first) == 3).all()
            assert (back(second) == 3).all()
    except GroupFailed:
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
    before = used()
    try:
        async with Group(Function(holds), logs=QUIET) as group:
            await group[0].send(x)
            pid, address = await group[0].receive()
            assert address
            assert [one.holder for one in sharing.leases()] == [pid]
            os.kill(pid, signal.SIGKILL)
            await group[0].wait()
            assert sharing.leases() == []
    except GroupFailed:
        pass
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
    from aioelastic.gpu import _legacy

    kind, start, size = gpu_device().run(lambda: _legacy.range_of(int(buffer.handle), int(buffer.handle) + 8000))
    assert (kind, start) == ("pool", int(buffer.handle)), (kind, start, size)
    told, fds = gpu_device().run(lambda: _legacy.export(kind, start, size))
    assert len(told["handle"]) == 64
    for fd in fds:
        os.close(fd)


def gpu_device() -> Any:
    from aioelastic.gpu import _driver

    return _driver.device("cuda:0")


async def events() -> None:
    """7. Made here, waited for there, recorded again there."""
    event = gpu.GpuEvent("cuda:0")
    async with Group(Function(waits_for_event), logs=QUIET) as group:
        await group[0].send(event)
        assert await group[0].receive() == "has it"
        event.record()
        assert (await group.wait())[0].value is True
        await event


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
    from aioelastic.gpu import _legacy
    from aioelastic.gpu._driver import call

    device = gpu_device()
    address = int(device.run(lambda: call("cuMemAllocManaged", 4096, 1)))
    words = ""
    try:
        device.run(lambda: _legacy.range_of(address, address + 4096))
    except sharing.NotShareable as exc:
        words = str(exc)
    finally:
        device.run(lambda: call("cuMemFree", address))
    assert "sharing.copy(x)" in words


async def inventory() -> None:
    """9. The management library shows this process, or says that it cannot."""
    sharing.empty(1, device="cuda:0")
    (first, *_) = gpu.devices()
    assert 0 < first.used <= first.total
    print(first)


async def many_sends() -> None:
    """10. 10,000 small sends with constant memory."""
    async with Group(Function(echo), logs=QUIET) as group:

        async def some(count: int) -> None:
            for _ in range(count):
                await group[0].send(sharing.empty(16, "f4", device="cuda:0"))
                await group[0].receive()

        await some(1000)
        sharing.trim()
        before = used(), len(os.listdir("/proc/self/fd"))
        await some(10_000)
        sharing.trim()
        assert (used() - before[0] < 16 * MIB, len(os.listdir("/proc/self/fd")) - before[1] <= 4) == (True, True)
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
        refusals,
        managed,
        inventory,
        many_sends,
    )
}

if __name__ == "__main__":
    asyncio.run(CHECKS[sys.argv[1]]())
