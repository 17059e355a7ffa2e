"""Arrays on GPUs, in one process, against a fake driver: what they are, how memory is made and given back."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import queue as queues
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import seen, theirs
from helpers import needs, travelled

from aioelastic import SpecError, gpu, sharing
from aioelastic.child.wire import datagrams, messages

MIB = 1 << 20


def on_gpu(values: Any) -> Any:
    return sharing.copy(np.asarray(values), device="cuda:0")


def back(x: Any) -> Any:
    return np.asarray(sharing.copy(x, device="cpu"))


@pytest.fixture
def cupy(fake: Any) -> Any:
    fake_gpu.install()
    yield
    del sys.modules["cupy"]


# --- arrays ---


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "float16", "float32", "complex64", "i8"])
def test_there_and_back(fake: Any, dtype: Any) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    x = on_gpu(values)
    assert (x.device, x.dtype, x.shape) == ("cuda:0", np.dtype(dtype).name, (2, 3, 4))
    assert np.array_equal(back(x), values)
    assert np.array_equal(seen(x), values)
    assert sharing.is_shared(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_types_that_numpy_does_not_have(fake: Any, dtype: str) -> None:
    x = sharing.empty((2, 3), dtype, device="cuda")
    (y,) = travelled(x)
    assert (y.dtype, y.nbytes) == (dtype, x.nbytes)
    assert y.__cuda_array_interface__["typestr"] in ("|V1", "|V2")


KEYS = [
    (0,),
    (slice(None), 1),
    (..., 2),
    (slice(None), slice(None), slice(0, 4, 2)),
    (1, slice(1, 3), slice(1, 3)),
    (slice(None), slice(0, 3, 2), slice(None)),
]


@pytest.mark.parametrize("key", KEYS)
def test_copies_of_parts(fake: Any, key: Any) -> None:
    values = np.arange(24.0).reshape(2, 3, 4)
    x = on_gpu(values)
    part = x[key]
    assert np.array_equal(seen(part), values[key])
    assert np.array_equal(back(part), values[key])
    again = sharing.copy(part)
    assert again.device == "cuda:0"
    assert np.array_equal(seen(again), values[key])
    assert again.address != part.address


def test_copies_of_other_orders(fake: Any, cupy: Any) -> None:
    values = np.arange(24.0).reshape(2, 3, 4)
    one = theirs("plain", values)
    told = one.__cuda_array_interface__
    for other in (values.T, values.transpose(1, 0, 2), np.broadcast_to(values[0, 0], (5, 4))):
        strides = other.strides
        view = fake_gpu.ndarray(told["data"][0], other.shape, strides, "<f8", one)
        assert np.array_equal(seen(sharing.copy(view)), other)
        assert np.array_equal(back(view), other)
    backwards = fake_gpu.ndarray(told["data"][0] + 23 * 8, (24,), (-8,), "<f8", one)
    with pytest.raises(sharing.NotShareable, match="backwards"):
        sharing.copy(backwards)


def test_from_gpu_to_gpu(fake: Any) -> None:
    x = on_gpu(np.arange(5.0))
    y = sharing.copy(x, device="cuda:1")
    assert (y.device, y.uuid) == ("cuda:1", "GPU-22222222-2222-2222-2222-222222222222")
    assert back(y).tolist() == [0, 1, 2, 3, 4]
    z = sharing.copy(y, device=x.uuid)
    assert z.device == "cuda:0"
    assert sharing.copy(y).device == "cuda:1"


def test_what_other_libraries_see(fake: Any) -> None:
    x = on_gpu(np.arange(12.0).reshape(3, 4))
    told = x[:, 1:].__cuda_array_interface__
    assert told["version"] == 3
    assert told["shape"] == (3, 3)
    assert told["strides"] == (32, 8)
    assert told["data"] == (x.address + 8, False)
    assert told["stream"] is None
    assert x.__dlpack_device__() == (2, 0)
    assert sharing.copy(x, device="cuda:1").__dlpack_device__() == (2, 1)
    from aioelastic.memory import dlpack

    place = dlpack.read(x[1:], dlpack.CUDA)
    assert (place.address, place.shape, place.strides) == (x.address + 32, (2, 4), (32, 8))
    where = x.address
    del x
    gc.collect()
    assert sharing.empty(12, device="cuda").address != where  # the capsule holds it
    with pytest.raises(BufferError, match=r"torch\.from_dlpack"):
        sharing.empty(3, device="cuda").__dlpack__(dl_device=(1, 0))


def test_what_is_not_there(fake: Any) -> None:
    x = on_gpu([1.0])
    assert not hasattr(x, "__array_interface__")
    assert not hasattr(sharing.empty(1), "__cuda_array_interface__")
    with pytest.raises(TypeError, match=r"sharing\.copy"):
        np.asarray(x)
    with pytest.raises(BufferError, match=r"sharing\.copy"):
        x.buffer  # noqa: B018
    with pytest.raises(sharing.NotShareable, match="worker"):
        pickle.dumps(x)
    assert repr(x) == "<SharedArray float64 (1,) on GPU-11111111-1111-1111-1111-111111111111>"


def test_empty_ones(fake: Any) -> None:
    x = sharing.empty((0, 3), "int16", device="cuda:1")
    (y,) = travelled(x)
    assert (y.shape, y.dtype, y.device, y.address) == ((0, 3), "int16", "cuda:1", 0)
    assert y.__cuda_array_interface__["data"] == (0, False)
    assert np.asarray(sharing.copy(x, device="cpu")).shape == (0, 3)
    assert sharing.copy(x).device == "cuda:1"
    assert gpu.stats("cuda:1").segments == 0


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "GPU", 0, None, "tpu:0"])
def test_a_wrong_device(fake: Any, name: Any) -> None:
    with pytest.raises(SpecError, match=r'device.*is no device; give "cpu", "cuda:0", or the UUID'):
        sharing.empty(3, device=name)


def test_a_device_that_is_not_here(fake: Any) -> None:
    for name in ("cuda:2", "GPU-33333333-3333-3333-3333-333333333333", "MIG-1"):
        with pytest.raises(sharing.DeviceUnavailable, match="CUDA_VISIBLE_DEVICES") as caught:
            sharing.empty(3, device=name)
        assert caught.value.reason is gpu.Reason.NOT_VISIBLE
        assert "cuda:0 is GPU-1111" in str(caught.value)
    with pytest.raises(SpecError, match="beginning of 2 UUIDs"):
        sharing.empty(3, device="GPU-")
    assert sharing.empty(3, device="GPU-22").device == "cuda:1"


def test_a_wrong_shape(fake: Any) -> None:
    with pytest.raises(SpecError, match="shape"):
        sharing.empty(2**62, device="cuda")
    with pytest.raises(SpecError, match="dtype"):
        sharing.empty(2, "object", device="cuda")


# --- messages ---


def test_it_stays_the_same_memory(fake: Any) -> None:
    x = on_gpu(np.zeros((3, 4)))
    y, column, tail = travelled(x, x[:, 1], x[1:, ::2])
    assert y.address == x.address
    seen(column)[:] = 5
    seen(tail)[...] = 7
    assert seen(x).tolist() == [[0, 5, 0, 0], [7, 5, 7, 0], [7, 5, 7, 0]]


def test_leases_and_the_audit(fake: Any) -> None:
    x = sharing.empty(3 * MIB, "u1", device="cuda")
    assert sharing.leases() == []
    (held,) = [one for one in sharing.audit() if "gpu" in one.segment]
    assert (held.size, held.mapped, held.leased, held.unexplained) == (4 * MIB, (os.getpid(),), (), ())
    with pytest.raises(ExceptionGroup, match="still held") as caught, sharing.scope(strict=True):
        _, fds = messages.encode(messages.TASK, (x,))
    (lease,) = sharing.leases()
    assert (lease.segment, lease.size, lease.holder) == (held.segment, 4 * MIB, os.getpid())
    assert "4194304 bytes" in str(caught.value.exceptions[0])
    datagrams.close(fds)
    assert sharing.leases() == []


def test_a_scope_finds_small_ones_beside_others(fake: Any) -> None:
    kept = [on_gpu(np.ones(10))]
    with pytest.raises(ExceptionGroup, match="still held"), sharing.scope(strict=True):
        kept[0] = on_gpu(np.ones(10))
    del kept[0]


def test_a_message_that_nobody_reads_and_one_that_is_read_twice(fake: Any) -> None:
    x = on_gpu(np.ones(100_000))
    packet, fds = messages.encode(messages.TASK, (x,))
    (one,), (two,) = messages.decode(packet, fds), messages.decode(packet, fds)
    assert one.address == two.address == x.address
    datagrams.close(fds)
    del one, two
    _, fds = messages.encode(messages.TASK, (x,))
    datagrams.close(fds)
    assert sharing.leases() == []


def test_memory_in_a_message_is_not_used_again(fake: Any) -> None:
    x = sharing.empty(MIB, "u1", device="cuda")
    packet, fds = messages.encode(messages.TASK, (x,))
    where = x.address
    seen(x)[:] = 3
    del x
    y = sharing.empty(MIB, "u1", device="cuda")
    assert y.address != where
    (arrived,) = messages.decode(packet, fds)
    assert (seen(arrived) == 3).all()
    del arrived
    datagrams.close(fds)
    settle()
    assert sharing.empty(MIB, "u1", device="cuda").address == where


def settle() -> None:
    """What nobody uses any more is looked at in the device's thread."""
    from aioelastic import memory

    for one in memory.arenas:
        one.settle()


def test_small_ones_share_blocks(fake: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    arrays = [sharing.empty(10, "f4", device="cuda") for _ in range(5000)]
    assert gpu.stats().segments == 1
    assert len({x.address for x in arrays}) == 5000
    assert all(x.address % 256 == 0 for x in arrays)
    assert len(os.listdir("/proc/self/fd")) - before <= 4  # ticket and memory; the fake has one besides
    (arrived,) = travelled(arrays)
    assert [x.address for x in arrived] == [x.address for x in arrays]


@pytest.mark.long
def test_ten_thousand_small_sends_hold_nothing(fake: Any) -> None:
    x = sharing.empty(100, "f4", device="cuda")
    travelled(x)
    for _ in range(8200):  # more than one block has room for
        sharing.empty(16, "f4", device="cuda")
    settle()
    held = (len(os.listdir("/proc/self/fd")), gpu.stats().total, len(fake_gpu.memory_of()))
    assert held[1:] == (4 * MIB, 2)  # that of x, and one for all others
    for _ in range(10_000):
        travelled(x, sharing.empty(16, "f4", device="cuda"))
    settle()
    assert (len(os.listdir("/proc/self/fd")), gpu.stats().total, len(fake_gpu.memory_of())) == held


def test_large_ones_are_used_again(fake: Any) -> None:
    x = sharing.empty(5 * MIB, "u1", device="cuda")
    where = x.address
    del x
    settle()
    assert gpu.stats().idle == 6 * MIB
    y = sharing.empty(6 * MIB, "u1", device="cuda")
    assert y.address == where
    assert (gpu.stats().made, gpu.stats().reused) >= (1, 1)
    del y
    assert sharing.trim() >= 6 * MIB
    assert gpu.stats().total == 0
    assert fake_gpu.memory_of() == set()


def test_what_lies_idle_is_bounded(fake: Any) -> None:
    sharing.configure(gpu_limit=4 * MIB)
    try:
        arrays = [sharing.empty(2 * MIB, "u1", device="cuda") for _ in range(5)]
        del arrays
        settle()
        assert gpu.stats().idle == 4 * MIB
        settle()
        assert len(fake_gpu.memory_of()) == 2
    finally:
        sharing.configure(gpu_limit=256 * MIB)
    with pytest.raises(SpecError, match="gpu_limit"):
        sharing.configure(gpu_limit=-1)


# --- the driver ---


def test_the_order_of_calls(fake: Any) -> None:
    x = sharing.empty(2 * MIB, "u1", device="cuda")
    names = [one for one in fake.names() if one.startswith("cuMem") and one != "cuMemAlloc"]  # a few bytes of our own
    made = [
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemRelease",
    ]
    assert names in (["cuMemGetAllocationGranularity", *made], made)
    del x
    sharing.trim()
    gpu.end()
    proof = ["cuEventCreate", "cuMemsetD32Async", "cuEventRecord", "cuEventQuery", "cuEventDestroy"]
    given_back = ["cuMemUnmap", "cuMemAddressFree"]
    ended = ["cuStreamDestroy", "cuStreamDestroy", "cuMemFree", "cuDevicePrimaryCtxRelease"]
    assert fake.names() == [*proof, *given_back, *ended]


async def test_no_call_in_the_thread_of_the_loop(fake: Any) -> None:
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    await queue.put(x)
    y = await queue.get()
    event = gpu.GpuEvent()
    event.record()
    await event
    assert y.address == x.address
    del x, y, event
    gc.collect()
    sharing.trim()
    calls = fake.calls()
    assert len(calls) > 20
    assert threading.get_native_id() not in {thread for _, thread in calls}
    makes = {thread for name, thread in calls if name.startswith(("cuMem", "cuEvent", "cuStream"))}
    assert len(makes) == 1  # one thread for a device


STEPS = ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]


@pytest.mark.parametrize(
    "step", [*STEPS, "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAlloc", "cuStreamCreate"]
)
def test_a_call_that_fails_leaves_nothing(fake: Any, step: str) -> None:
    gpu.end()
    before = len(os.listdir("/proc/self/fd"))
    fake.fail(step, 700)
    with pytest.raises(gpu.CudaError, match=f"^{step}: .*700") as caught:
        sharing.empty(3 * MIB, "u1", device="cuda")
    assert (caught.value.call, caught.value.status) == (step, 700)
    assert len(os.listdir("/proc/self/fd")) == before
    assert gpu.stats().segments == 0
    gpu.end()
    assert fake.live() == {}
    x = sharing.empty(3 * MIB, "u1", device="cuda")
    assert seen(x).nbytes == 3 * MIB


def test_a_gpu_that_is_full(fake: Any) -> None:
    fake.limit(8 * MIB)
    x = sharing.empty(4 * MIB, "u1", device="cuda")
    with pytest.raises(sharing.ShareLimit, match="no more memory: cuMemCreate"):
        sharing.empty(6 * MIB, "u1", device="cuda")
    del x
    y = sharing.empty(6 * MIB, "u1", device="cuda")  # what lay idle went for it
    assert gpu.stats().total == y.nbytes


@pytest.mark.parametrize("free", range(5))
def test_too_few_descriptors(fake: Any, free: int) -> None:
    import resource

    kept = sharing.empty(1, device="cuda")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(one) for one in os.listdir("/proc/self/fd")) + 8, hard))
    blocked = []
    while True:
        try:
            blocked.append(os.dup(0))
        except OSError:
            break
    for _ in range(free):
        os.close(blocked.pop())
    problem = None
    try:
        x = sharing.empty(4 * MIB, device="cuda")
    except sharing.SharingError as exc:
        problem = exc
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        datagrams.close(blocked)
    # one for the fake's memory, one that stands for it, and its ticket
    assert (problem is None) == (free >= 3), problem
    if problem is None:
        assert seen(x).nbytes == 32 * MIB
    assert kept.size == 1


# --- sending waits for the GPU ---


async def until_it_waits(fake: Any) -> list[str]:
    """For the driver to call back; what was called until then."""
    names: list[str] = []
    while "cuLaunchHostFunc" not in names:  # the driver is asked for it, and has no word for us
        await asyncio.sleep(0)
        names += fake.names()
    return names


async def test_a_send_waits_until_the_gpu_has_done_its_work(fake: Any) -> None:
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    fake.hold()
    fake.calls()
    sending = asyncio.create_task(queue.put(x))
    names = await until_it_waits(fake)
    assert not sending.done()
    assert "cuStreamSynchronize" not in names
    assert "cuEventSynchronize" not in names
    with pytest.raises(queues.Empty):
        queue.get_nowait()
    fake.go()
    await sending
    assert (await queue.get()).address == x.address


async def test_a_send_that_is_cancelled_holds_nothing(fake: Any) -> None:
    queue = sharing.Queue(1)
    x = on_gpu(np.ones(1000))
    fake.hold()
    sending = asyncio.create_task(queue.put(x))
    await until_it_waits(fake)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert sharing.leases() == []
    fake.go()
    await queue.put(x)  # its place is free
    assert (await queue.get()).address == x.address


def test_a_thread_that_sends_waits_too(fake: Any) -> None:
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    fake.hold()
    sender = threading.Thread(target=queue.put_sync, args=(x,))
    sender.start()
    while "cuLaunchHostFunc" not in fake.names():
        pass
    assert sender.is_alive()
    fake.go()
    sender.join()
    assert queue.get_sync().address == x.address


async def test_a_gpu_that_fails_is_told_to_who_waits(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a broken context the driver does not ring."""
    from aioelastic.gpu import _driver

    monkeypatch.setattr(_driver, "WATCH", 0.01)
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    fake.hold()
    fake.fail("cuEventQuery", 719, after=2)
    with pytest.raises(gpu.CudaError, match="719"):
        await queue.put(x)
    assert sharing.leases() == []
    fake.go()


@pytest.mark.parametrize("step", ["cuEventCreate", "cuMemsetD32Async", "cuEventRecord", "cuEventQuery"])
async def test_a_send_whose_waiting_fails(fake: Any, step: str) -> None:
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    fake.fail(step, 700)
    with pytest.raises(gpu.CudaError, match=step):
        await queue.put(x)
    await queue.put(x)
    assert (await queue.get()).address == x.address


@pytest.mark.parametrize("step", ["cuStreamCreate", "cuStreamWaitEvent", "cuLaunchHostFunc"])
async def test_a_send_that_cannot_be_called_back(fake: Any, step: str) -> None:
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    fake.hold()
    fake.fail(step, 700)
    with pytest.raises(gpu.CudaError, match=step):
        await queue.put(x)
    fake.go()
    await queue.put(x)


# --- memory of other libraries ---


@pytest.mark.parametrize("kind", ["plain", "pool", "expandable"])
def test_memory_of_others_is_lent(fake: Any, cupy: Any, kind: str) -> None:
    one = theirs(kind, np.arange(1000.0))
    assert not sharing.is_shared(one)
    packet, fds = messages.encode(messages.TASK, (one, one.part(10, 20)))
    assert messages.is_slow(packet)
    where = one.__cuda_array_interface__["data"][0]
    del one
    gc.collect()
    assert seen_at(where) == 0.0  # it was not freed: who has sent it holds it
    whole, part = messages.decode(packet, fds)
    assert type(whole) is fake_gpu.ndarray
    assert whole.__cuda_array_interface__["data"][0] == where  # home again
    assert seen(part)[0] == 10
    datagrams.close(fds)
    del whole, part
    sharing.trim()
    assert fake.live().get("memory", 0) == 0


def seen_at(address: int) -> float:
    import ctypes

    return ctypes.c_double.from_address(address).value


@pytest.mark.parametrize(("kind", "words"), [("managed", "managed memory"), ("default", "cudaMallocAsync")])
def test_memory_that_cannot_be_lent(fake: Any, cupy: Any, kind: str, words: str) -> None:
    one = theirs(kind, np.arange(10.0))
    with pytest.raises(sharing.NotShareable, match=rf"{words}.*sharing.copy\(x\)"):
        travelled(one)
    (arrived,) = travelled(sharing.copy(one))
    assert seen(arrived).tolist() == list(range(10))


@pytest.mark.parametrize(("kind", "step"), [("plain", "cuIpcGetMemHandle"), ("pool", "cuMemPoolExportPointer")])
def test_memory_that_others_have_imported(fake: Any, cupy: Any, kind: str, step: str) -> None:
    one = theirs(kind, np.arange(10.0))
    fake.fail(step, 1)
    with pytest.raises(sharing.ReshareError, match=r"imported from another process.*sharing.copy\(x\)"):
        travelled(one)
    fake.fail(step, 999)
    with pytest.raises(gpu.CudaError, match=step):
        travelled(one)
    assert issubclass(sharing.ReshareError, sharing.NotShareable)


def test_arrays_of_numba(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class DeviceNDArray(fake_gpu.ndarray):
        pass

    names = ["numba", "numba.cuda", "numba.cuda.cudadrv", "numba.cuda.cudadrv.devicearray"]
    numba: Any = {name: types.ModuleType(name) for name in names}
    numba["numba"].cuda = numba["numba.cuda"]
    numba[names[-1]].DeviceNDArray = DeviceNDArray
    numba["numba.cuda"].as_cuda_array = lambda x: DeviceNDArray(x.address, x.shape, x.strides, "<f8", x)
    for name, module in numba.items():
        monkeypatch.setitem(sys.modules, name, module)
    x = theirs("plain", np.arange(10.0))
    x.__class__ = DeviceNDArray
    (y,) = travelled(x)
    assert type(y) is DeviceNDArray
    assert np.array_equal(seen(y), np.arange(10.0))
    del sys.modules["numba"]
    monkeypatch.setitem(sys.modules, "numba", None)  # where there is none
    (z,) = travelled(x)
    assert isinstance(z, sharing.SharedArray)
    assert np.array_equal(seen(z), np.arange(10.0))


def test_a_view_of_ours_by_others_is_ours(fake: Any, cupy: Any) -> None:
    x = on_gpu(np.arange(10.0))
    view = sys.modules["cupy"].asarray(x)
    fake.calls()
    assert sharing.is_shared(view.part(2, 4))
    (arrived,) = travelled(view.part(2, 4))
    assert seen(arrived).tolist() == [2, 3]
    assert arrived.__cuda_array_interface__["data"][0] == x.address + 16
    assert "cuPointerGetAttribute" not in fake.names()


def test_types_of_others_that_have_no_name(fake: Any, cupy: Any) -> None:
    one = theirs("plain", np.zeros(3, "M8[s]").view("i8"))
    one.dtype = np.dtype("M8[s]")
    with pytest.raises(sharing.NotShareable, match=r"typestr='<i8' is not that of its dtype"):
        travelled(one)


# --- events ---


async def test_an_event(fake: Any) -> None:
    event = gpu.GpuEvent("cuda:0")
    assert event.query()
    await event
    fake.hold()
    event.record()
    assert not event.query()
    waiting = asyncio.ensure_future(wait_for(event))
    await until_it_waits(fake)
    assert not waiting.done()
    fake.go()
    await waiting
    assert event.query()
    event.synchronize()
    event.wait()
    (same,) = travelled(event)
    assert same._raw is event._raw
    assert repr(event) == f"<GpuEvent on {event.uuid}>"
    with pytest.raises(sharing.NotShareable):
        pickle.dumps(event)


async def wait_for(event: Any) -> None:
    await event


class Stream:
    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


class CoreStream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 0)


def test_streams_of_any_library(fake: Any) -> None:
    import ctypes

    event = gpu.GpuEvent()
    handle = Stream(handle=ctypes.c_void_p(None))
    for one in (None, 0, Stream(cuda_stream=0), Stream(ptr=0), handle, CoreStream()):
        event.record(one)
        event.wait(one)
    for bad in ("stream", True, object()):
        with pytest.raises(SpecError, match=r"stream.*is no stream; give one of torch"):
            event.record(bad)


def test_an_event_that_goes_while_work_waits_for_it(fake: Any) -> None:
    fake.hold()
    event = gpu.GpuEvent()
    event.record()
    event.wait()
    fake.calls()
    del event
    gpu._driver.device("cuda:0").run(lambda: None)
    assert "cuEventDestroy" in fake.names()
    fake.go()
    fake.idle()


def test_an_event_that_fails(fake: Any) -> None:
    event = gpu.GpuEvent()
    for step, use in [
        ("cuEventCreate", gpu.GpuEvent),
        ("cuEventRecord", event.record),
        ("cuStreamWaitEvent", event.wait),
        ("cuEventQuery", event.query),
        ("cuEventQuery", event.synchronize),
        ("cuIpcGetEventHandle", lambda: travelled(event)),
    ]:
        fake.fail(step, 700)
        with pytest.raises(gpu.CudaError, match=step):
            use()


# --- fork ---


def test_a_forked_process_is_told(fake: Any) -> None:
    x = on_gpu(np.ones(1000))
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        words = ["nothing was raised"]
        try:
            words = []
            for attempt in (
                lambda: sharing.empty(3, device="cuda"),
                lambda: x.address,
                lambda: gpu.GpuEvent(),
                lambda: sharing.copy(x, device="cpu"),
            ):
                try:
                    attempt()
                    words.append("nothing was raised")
                except sharing.ForkedCudaError as exc:
                    words.append(str(exc))
            words.append(str(gpu.probe()))
            (y,) = travelled(x)  # it can be sent on
            words.append(y.uuid)
            del x, y
        except BaseException as exc:
            words.append(repr(exc))
        finally:
            os.write(tell, "\n".join(words).encode())
            os._exit(0)
    os.close(tell)
    with os.fdopen(told) as file:
        lines = file.read().splitlines()
    os.waitpid(pid, 0)
    assert len(lines) == 6
    assert all("before fork" in one and 'start="zygote"' in one for one in lines[:5]), lines
    assert lines[5] == x.uuid
    assert seen(x).sum() == 1000


def test_cuda_that_another_library_had_before_the_fork(driver: Any) -> None:
    """cuInit itself says so, and nobody else does."""
    code = """
import os, sys
import fake_gpu
fake_gpu.fake()
with fake_gpu.context(): pass
if os.fork() == 0:
    from aioelastic import sharing
    try: sharing.empty(3, device="cuda")
    except sharing.ForkedCudaError as exc: print(exc, flush=True)
    os._exit(0)
os.wait()
"""
    assert "before fork(2)" in python(code)


# --- what this machine can do ---


def python(code: str, quiet: bool = False, **env: str) -> str:
    house = os.pathsep.join([str(Path(sharing.__file__).parents[2]), str(Path(__file__).parents[1])])
    environ = {**os.environ, "PYTHONPATH": house, **env}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stderr
    assert not quiet or run.stderr == ""
    return run.stdout


PROBE = """
import fake_gpu
fake_gpu.fake()
from aioelastic import gpu, sharing
found = gpu.probe()
print(found.reason and found.reason.name, found.ok)
print(found)
try: print(sharing.empty(3, device="cuda").device)
except sharing.DeviceUnavailable as exc: print(exc.reason.name, exc)
"""
CASES = [
    ({}, "None True", "cuda:0 is GPU-11111111-1111-1111-1111-111111111111 (Fake GPU 0): sharing.empty", "cuda:0"),
    ({"FAKE_CUDA_DEVICES": "0"}, "NO_GPU False", "the driver is here, and no GPU", "NO_GPU"),
    ({"CUDA_VISIBLE_DEVICES": ""}, "NO_GPU False", "no GPU", "NO_GPU"),
    ({"CUDA_VISIBLE_DEVICES": "GPU-22"}, "None True", "cuda:0 is GPU-22222222", "cuda:0"),
    ({"FAKE_CUDA_MISSING": "cuMemCreate"}, "TOO_OLD False", "it has no cuMemCreate", "TOO_OLD it has no cuMemCreate"),
    ({"FAKE_CUDA_MISSING": "cuInit"}, "TOO_OLD False", "it has no cuInit", "TOO_OLD it has no cuInit"),
    ({"FAKE_CUDA_ATTRIBUTE_102": "0"}, "None False", "no virtual memory management", "NO_VMM cuda:0"),
    ({"FAKE_CUDA_ATTRIBUTE_103": "0"}, "None False", "exported as file descriptors", "NO_POSIX_FD cuda:0"),
    ({"FAKE_CUDA_ATTRIBUTE_115": "0"}, "None True", "no memory pools", "cuda:0"),
    ({"FAKE_CUDA_ATTRIBUTE_125": "0"}, "None True", "no events between processes", "cuda:0"),
    ({"FAKE_CUDA_MIG": "1"}, "None True", "an instance of a divided GPU (MIG)", "cuda:0"),
    ({"FAKE_CUDA_VERSION": "12040"}, "None True", "a driver for CUDA 12.4", "cuda:0"),
]


@pytest.mark.parametrize(("env", "first", "words", "last"), CASES)
def test_the_probe_says_what_is_missing(driver: Any, env: dict[str, str], first: str, words: str, last: str) -> None:
    lines = python(PROBE, **env).splitlines()
    assert lines[0] == first
    assert words in "\n".join(lines[1:-1])
    assert lines[-1].startswith(last)


def test_the_probe_tries(fake: Any) -> None:
    found = gpu.probe(tries=True)
    assert [one.tried for one in found.devices] == [True, True]
    assert "(tried)" in str(found)
    fake.fail("cuMemExportToShareableHandle", 801)
    found = gpu.probe(tries=True)
    assert [one.reason for one in found.devices] == [gpu.Reason.REFUSED, None]
    assert "cannot be shared: cuMemExportToShareableHandle: CUDA_ERROR_FAKE_801 (801)" in str(found)


def test_the_probe_without_a_driver() -> None:
    needs("cuda.bindings.driver")
    code = "from aioelastic import gpu; print(gpu.probe().reason.name); print(gpu.probe())"
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a driver")
    out = python(code)
    assert out.startswith("NO_DRIVER\n")
    assert "libcuda.so.1" in out


def test_without_the_extra() -> None:
    code = """
import sys
sys.modules["cuda.bindings"] = None
from aioelastic import gpu, sharing
print(gpu.probe())
for attempt in (lambda: sharing.empty(3, device="cuda:0"), gpu.devices, gpu.GpuEvent):
    try: attempt()
    except sharing.DeviceUnavailable as exc: print(exc.reason.name, exc)
"""
    lines = python(code).splitlines()
    assert all("pip install 'aioelastic[gpu]'" in one for one in lines)
    assert [one.split()[0] for one in lines[1:]] == ["NO_EXTRA"] * 3


def test_nothing_is_imported_before_it_is_used() -> None:
    code = """
import sys
import aioelastic
from aioelastic import gpu, sharing
sharing.empty(3)
assert not {one.partition(".")[0] for one in sys.modules} & {"cuda", "torch", "cupy", "numba", "asyncio"}
print("well")
"""
    assert python(code) == "well\n"
