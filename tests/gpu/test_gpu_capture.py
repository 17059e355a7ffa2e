"""Memory of a GPU is used again when it is known that nobody uses it; and nothing of ours breaks a capture."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fake_gpu
import numpy as np
import pytest
from fake_gpu import seen, theirs

from aioelastic import gpu, memory, sharing
from aioelastic.child.wire import datagrams, messages

MIB = 1 << 20
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
BLOCKING, NON_BLOCKING = 0, 1


def on_gpu(values: Any) -> Any:
    return sharing.copy(np.asarray(values), device="cuda:0")


def settle() -> None:
    """What nobody uses any more is looked at in the device's thread."""
    for one in memory.arenas:
        one.settle()


def block() -> Any:
    return sharing.empty(2 * MIB, "u1", device="cuda:0")


async def until_it_waits(fake: Any) -> None:
    """For the driver to call back."""
    while "cuLaunchHostFunc" not in fake.names():  # noqa: ASYNC110  # it has no word for us
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was refused for a passing reason is tried again soon."""
    monkeypatch.setattr(gpu._driver, "WATCH", 0.01)


@pytest.fixture
def cupy(fake: Any) -> Iterator[Any]:
    fake_gpu.install()
    yield sys.modules["cupy"]
    del sys.modules["cupy"]


@pytest.fixture
def cu(fake: Any) -> Iterator[Any]:
    """The driver, for the user's own calls in this thread."""
    with fake_gpu.context() as driver:
        yield driver


@pytest.fixture
def stream(fake: Any, cu: Any) -> Iterator[Callable[[int], int]]:
    made: list[int] = []

    def create(flags: int) -> int:
        made.append(int(cu.cuStreamCreate(flags)))
        return made[-1]

    yield create
    fake.mend()
    for one in made:
        cu.cuStreamDestroy(one)


class CupyStream:
    """Its end calls the driver, as that of the real one does."""

    ended: ClassVar[list[int]] = []  # in which threads

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __del__(self) -> None:
        self.ended.append(threading.get_ident())


class Capture:
    """A capture of a graph, of this thread."""

    def __init__(self, cu: Any, stream: int, mode: int) -> None:
        self.cu, self.stream = cu, stream
        cu.cuStreamBeginCapture(stream, cu.raw.CUstreamCaptureMode(mode))

    def end(self) -> int:
        """0, or why it has come to nothing."""
        return int(self.cu.raw.cuStreamEndCapture(self.stream)[0])


# --- when memory is used again ---


def test_not_before_the_work_on_it_is_done(fake: Any) -> None:
    x = block()
    where = x.address
    fake.hold()
    del x
    assert block().address != where
    fake.go()
    settle()
    assert gpu.stats().idle == 4 * MIB


STEPS = ["cuStreamIsCapturing", "cuEventCreate", "cuMemsetD32Async", "cuEventRecord", "cuEventQuery"]
PASSING = [900, 901, 906, 907, 2, 999]


@pytest.mark.parametrize("status", PASSING)
@pytest.mark.parametrize("step", STEPS)
def test_not_while_the_driver_refuses_to_say_so(
    fake: Any, stream: Any, monkeypatch: Any, step: str, status: int
) -> None:
    x = block()
    view_on(stream(NON_BLOCKING), x, monkeypatch)
    where = x.address
    fake.fail(step, status, times=10_000)
    del x
    settle()
    assert gpu.stats().idle == 0
    assert block().address != where
    fake.mend()
    settle()
    assert gpu.stats().idle == 4 * MIB


@pytest.mark.parametrize("step", ["cuCtxSynchronize", "cuStreamSynchronize", "cuStreamQuery"])
def test_nothing_that_waits_for_more_than_an_event_is_asked(fake: Any, step: str) -> None:
    x = block()
    where = x.address
    fake.calls()
    fake.fail(step, 900, times=10_000)
    del x
    settle()
    assert step not in fake.names()
    assert block().address == where


@pytest.mark.parametrize("status", [700, 702, 710, 714, 715, 716, 717, 718, 719])
def test_a_context_that_is_broken_gives_memory_back(fake: Any, status: int) -> None:
    """Nothing runs in it any more, for good."""
    x = block()
    fake.fail("cuEventQuery", status)
    del x
    settle()
    assert gpu.stats().idle == 2 * MIB


def test_work_that_breaks_the_context_meanwhile(fake: Any) -> None:
    """The driver does not ring then."""
    x = block()
    fake.hold()
    del x
    gpu._driver.device("cuda:0").run(lambda: None)
    fake.fail("cuEventQuery", 719)
    settle()
    assert gpu.stats().idle == 2 * MIB


def test_a_proof_is_of_one_use(fake: Any, stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes home, is used again and dropped again is not free because its first use is over."""
    side = stream(NON_BLOCKING)
    x = block()
    packet, fds = messages.encode(messages.TASK, (x,))
    device = gpu._driver.device("cuda:0")
    fake.hold()
    del x
    device.run(lambda: None)
    (again,) = messages.decode(packet, fds)
    datagrams.close(fds)
    view_on(side, again, monkeypatch)
    fake.hold(side)
    del again
    assert device.run(lambda: len(device.pending)) == 2
    fake.go()
    while device.run(lambda: len(device.pending)) == 2:
        pass
    device.run(lambda: None)
    assert gpu.stats().idle == 0
    fake.go(side)
    settle()
    assert gpu.stats().idle == 2 * MIB


def view_on(stream: int, x: Any, monkeypatch: pytest.MonkeyPatch, stream_id: int = 3) -> None:
    """torch makes a view of it while it works on that stream."""
    with monkeypatch.context() as torch:
        current = types.SimpleNamespace(cuda_stream=stream, stream_id=stream_id)
        torch.setattr(gpu._streams, "_torch_current", lambda ordinal: current)
        x.__cuda_array_interface__  # noqa: B018


@pytest.fixture
def numba(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded: it may use what it sees on any of its streams, which heed the default one."""
    name = "numba.cuda.cudadrv.devicearray"
    for one in ("numba", name):  # what is loaded is noticed by how many there are: cupy, of other tests, is one
        monkeypatch.setitem(sys.modules, one, types.ModuleType(one))
    sys.modules[name].DeviceNDArray = type("DeviceNDArray", (), {})  # type: ignore[attr-defined]


def test_streams_that_nobody_tells_us_of(fake: Any, stream: Any, numba: None) -> None:
    side = stream(BLOCKING)
    x = block()
    where = x.__cuda_array_interface__["data"][0]
    fake.hold(side)
    del x
    assert block().address != where
    fake.go(side)
    settle()
    assert gpu.stats().idle == 4 * MIB


@pytest.mark.parametrize("flags", [BLOCKING, NON_BLOCKING])
def test_streams_on_which_cupy_has_taken_views(fake: Any, cupy: Any, stream: Any, flags: int) -> None:
    """They live as long as the memory may be used on them."""
    x, side = block(), stream(flags)
    where, current = x.address, [CupyStream(ptr=side)]
    held = weakref.ref(current[0])
    cupy.cuda.get_current_stream = lambda device_id=-1: current[0]
    x.__cuda_array_interface__  # noqa: B018
    current[0] = CupyStream(ptr=0)
    fake.hold(side)
    del x
    assert block().address != where
    assert held() is not None
    CupyStream.ended.clear()
    fake.go(side)
    settle()
    assert gpu.stats().idle == 4 * MIB
    assert held() is None
    # not in the driver's own, which must not call it
    assert CupyStream.ended == [gpu._driver.device("cuda:0").run(threading.get_ident)]


def test_not_all_streams_are_kept(fake: Any, cupy: Any, stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes each view on a new stream has few of them kept; those that heed the default one are waited for."""
    monkeypatch.setattr(gpu._block, "STREAMS", 2)
    x = block()
    streams = [stream(BLOCKING) for _ in range(9)]
    for side in streams:
        cupy.cuda.get_current_stream = lambda device_id=-1, side=side: CupyStream(ptr=side)
        x.__cuda_array_interface__  # noqa: B018
    assert len(x._loan.block.streams) <= 3
    where = x.address
    fake.hold(streams[0])
    del x
    assert block().address != where
    fake.go(streams[0])
    settle()
    assert gpu.stats().idle == 4 * MIB


@pytest.mark.parametrize("asks", ["cuda array interface", "dlpack"])
def test_streams_on_which_torch_has_taken_views(fake: Any, stream: Any, monkeypatch: Any, asks: str) -> None:
    side = stream(NON_BLOCKING)
    x = block()
    where = x.address
    if asks == "dlpack":
        monkeypatch.setattr(type(x), "__cuda_array_interface__", property(lambda self: self.__dlpack__()))
    view_on(side, x, monkeypatch)
    fake.hold(side)
    del x
    assert block().address != where
    fake.go(side)
    settle()
    assert gpu.stats().idle == 4 * MIB


@pytest.mark.parametrize("whose", ["torch", "cupy"])
def test_a_stream_whose_owner_is_another_may_be_gone_by_then(
    fake: Any, cupy: Any, cu: Any, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """It is not touched any more; what it was given is waited for, if it heeds the default one."""
    side = int(cu.cuStreamCreate(BLOCKING))
    x = block()
    where = x.address
    if whose == "torch":
        view_on(side, x, monkeypatch, stream_id=side)
    else:
        cupy.cuda.ExternalStream = CupyStream
        cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=side)
        x.__cuda_array_interface__  # noqa: B018
        cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=0)
    fake.hold(side)
    fake.calls()
    del x
    assert block().address != where
    fake.go(side)
    settle()
    assert fake.names().count("cuStreamIsCapturing") == 1  # of all that heed the default one
    assert gpu.stats().idle == 4 * MIB
    cu.cuStreamDestroy(side)


# --- captures ---


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
@pytest.mark.parametrize("flags", [BLOCKING, NON_BLOCKING])
def test_a_capture_is_not_disturbed(fake: Any, cu: Any, stream: Any, flags: int, mode: int) -> None:
    x, y, event = block(), on_gpu(np.ones(1000)), gpu.GpuEvent()
    where = x.address
    capture = Capture(cu, stream(flags), mode)
    del x
    assert block().address == where
    assert np.asarray(sharing.copy(on_gpu(np.arange(5)), device="cpu")).tolist() == [0, 1, 2, 3, 4]
    assert seen(sharing.empty(3 * MIB, "u1", device="cuda:0")).nbytes == 3 * MIB
    assert gpu.probe(tries=True).ok
    assert event.query()
    event.synchronize()
    queue = sharing.Queue()
    queue.put_sync(y)
    assert queue.get_sync().address == y.address
    sharing.trim()
    gpu.end()
    assert capture.end() == 0


def test_a_capture_that_begins_at_any_moment(fake: Any, cu: Any, stream: Any) -> None:
    """Whatever of ours is under way, in another thread."""
    side, ends, rounds = stream(BLOCKING), [], [0]
    done = threading.Event()

    def works() -> None:
        queue = sharing.Queue()
        while not done.is_set():
            queue.put_sync(on_gpu(np.ones(1000)))
            sharing.copy(queue.get_sync(), device="cpu")
            rounds[0] += 1

    thread = threading.Thread(target=works)
    thread.start()
    for mode in range(60):
        before = rounds[0]
        capture = Capture(cu, side, mode % 3)
        while rounds[0] < before + mode % 2 and thread.is_alive():
            pass
        ends.append(capture.end())
    assert thread.is_alive()
    done.set()
    thread.join()
    assert set(ends) == {0}


def test_a_capture_of_the_stream_itself_that_begins_meanwhile(
    fake: Any, cu: Any, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at it and the event: which is a part of the capture then, and not asked about."""
    side = stream(NON_BLOCKING)
    x = block()
    view_on(side, x, monkeypatch)
    record, captures = gpu._driver.Device.record, []

    def begin_first(self: Any, stream: int) -> Any:
        if stream == side and not captures:
            captures.append(Capture(cu, side, RELAXED))
        return record(self, stream)

    monkeypatch.setattr(gpu._driver.Device, "record", begin_first)
    with fake_gpu.context():
        del x
        settle()
        assert gpu.stats().idle == 0
        assert captures[0].end() == 0
        settle()
        assert gpu.stats().idle == 2 * MIB


def test_memory_comes_back_after_a_capture(fake: Any, cu: Any, stream: Any, numba: None) -> None:
    """Where it cannot be asked about meanwhile."""
    x = block()
    x.__cuda_array_interface__  # noqa: B018
    capture = Capture(cu, stream(BLOCKING), RELAXED)
    del x
    sharing.trim()  # which does not wait for the capture's end
    assert gpu.stats().total == 2 * MIB
    assert capture.end() == 0
    assert sharing.trim() == 2 * MIB
    assert gpu.stats().total == 0


async def test_a_send_goes_when_the_capture_of_another_is_over(fake: Any, cu: Any, stream: Any, numba: None) -> None:
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    x.__cuda_array_interface__  # noqa: B018
    capture = Capture(cu, stream(BLOCKING), GLOBAL)
    fake.calls()
    sending = asyncio.create_task(queue.put(x))
    names: list[str] = []
    while names.count("cuStreamIsCapturing") < 3:
        await asyncio.sleep(0)
        names += fake.names()
    assert not sending.done()
    assert capture.end() == 0
    await sending
    assert (await queue.get()).address == x.address


async def test_a_send_does_not_wait_for_ever_for_a_capture(
    fake: Any, cu: Any, stream: Any, numba: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu._completion, "CAPTURE", 0.02)
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    x.__cuda_array_interface__  # noqa: B018
    capture = Capture(cu, stream(BLOCKING), RELAXED)
    with pytest.raises(gpu.CudaError, match=r"\(906\).*when the capture of the graph has ended") as caught:
        await queue.put(x)
    assert caught.value.status == 906
    assert capture.end() == 0
    assert sharing.leases() == []


@pytest.mark.parametrize("flags", [BLOCKING, NON_BLOCKING])
async def test_what_is_sent_while_its_own_stream_is_captured(
    fake: Any, cu: Any, stream: Any, cupy: Any, flags: int
) -> None:
    """Nothing was done on it yet: who sends is told so at once."""
    queue = sharing.Queue()
    side = stream(flags)
    x = theirs("plain", np.ones(1000))
    cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=side)
    capture = Capture(cu, side, RELAXED)
    with pytest.raises(gpu.CudaError, match=r"\(900\).*when the capture of the graph has ended"):
        await queue.put(x)
    assert capture.end() == 0
    await queue.put(x)
    assert (seen(await queue.get()) == 1).all()
    del x


def test_events_of_the_user_are_the_users(fake: Any, cu: Any, stream: Any) -> None:
    """One that was recorded in a capture cannot be asked: the driver says so, and nobody waits."""
    side = stream(NON_BLOCKING)
    event = gpu.GpuEvent()
    capture = Capture(cu, side, RELAXED)
    event.record(side)
    for use in (event.query, event.synchronize):
        with pytest.raises(gpu.CudaError, match="907"):
            use()
    assert capture.end() == 901  # as by cuEventQuery of the user's own


def test_an_event_on_the_default_stream_breaks_no_capture(fake: Any, cu: Any, stream: Any) -> None:
    event = gpu.GpuEvent()
    capture = Capture(cu, stream(BLOCKING), RELAXED)
    for use in (event.record, event.wait):
        for default in (None, 0, 1):
            with pytest.raises(gpu.CudaError, match=r"\(906\).*when the capture of the graph has ended"):
                use(default)
    assert capture.end() == 0
    event.record()


def test_copies_are_made_on_a_stream_of_our_own(fake: Any) -> None:
    """A copy that waits for the default stream breaks captures, and waits for whatever is in it."""
    fake.hold()
    x = on_gpu(np.arange(24.0).reshape(2, 3, 4))
    assert seen(x)[1, 2, 3] == 23
    assert not {"cuMemcpy", "cuMemcpy2D"} & set(fake.names())
    fake.go()


# --- whose streams they are ---


def test_the_stream_of_a_thread_is_asked_in_that_thread(fake: Any, cupy: Any) -> None:
    """Handle 2 is another stream in each thread."""
    cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=2)
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000))
    stream: list[int] = []
    told: list[BaseException] = []

    def send() -> None:
        with fake_gpu.context():
            stream.append(fake.mine())
            fake.hold(stream[0])
            try:
                queue.put_sync(x)
            except BaseException as exc:
                told.append(exc)

    fake.calls()
    sender = threading.Thread(target=send)
    sender.start()
    names: list[str] = []
    while "cuLaunchHostFunc" not in names and sender.is_alive():
        names += fake.names()
    assert sender.is_alive()
    fake.go(stream[0])
    sender.join()
    assert told == []
    assert queue.get_sync().address == x.address


@pytest.mark.parametrize("kind", ["ours", "plain"])
async def test_the_stream_of_the_thread_of_a_loop(fake: Any, cupy: Any, cu: Any, kind: str) -> None:
    cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=2)
    queue = sharing.Queue()
    x = on_gpu(np.ones(1000)) if kind == "ours" else theirs(kind, np.ones(1000))
    fake.hold(2)
    fake.calls()
    sending = asyncio.create_task(queue.put(x))
    await until_it_waits(fake)
    assert not sending.done()
    fake.go(2)
    await sending
    assert (seen(await queue.get()) == 1).all()
    del x


def test_who_works_on_a_stream_of_its_own_thread_and_sends_something_else(fake: Any, cupy: Any) -> None:
    """No context is made for it."""
    cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=2)
    x = on_gpu(np.ones(10))
    queue = sharing.Queue()
    asyncio.run(queue.put(x))
    assert queue.get_sync().address == x.address
    assert fake.contexts(1) == 0


def test_the_stream_of_a_thread_that_is_captured(fake: Any, cupy: Any, cu: Any) -> None:
    cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=2)
    x = on_gpu(np.ones(10))
    capture = Capture(cu, 2, GLOBAL)
    with pytest.raises(gpu.CudaError, match="900"):
        sharing.Queue().put_sync(x)
    assert capture.end() == 0


def test_events_on_the_stream_of_a_thread(fake: Any) -> None:
    event = gpu.GpuEvent()
    with fake_gpu.context():
        fake.hold(2)
        event.record(2)
        assert not event.query()
        event.wait(2)
        fake.go(2)
        event.synchronize()
        assert event.query()
        fake.idle()


async def test_cupy_is_asked_for_the_stream_of_the_right_device(
    fake: Any, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpu.context(1) as cu:
        side = int(cu.cuStreamCreate(NON_BLOCKING))
    cupy.cuda.get_current_stream = lambda device_id=-1: CupyStream(ptr=side if device_id == 1 else 0)
    queue = sharing.Queue()
    x = sharing.copy(np.ones(1000), device="cuda:1")
    fake.hold(side)
    fake.calls()
    sending = asyncio.create_task(queue.put(x))
    await until_it_waits(fake)
    assert not sending.done()
    fake.go(side)
    await sending
    assert (await queue.get()).address == x.address
    with fake_gpu.context(1) as cu:
        cu.cuStreamDestroy(side)
