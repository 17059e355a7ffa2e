"""What goes wrong with a GPU is told to who asked, is not remembered when it passes, and hides nothing else."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import theirs
from helpers import needs, travelled
from test_gpu import on_gpu, python, settle

from aioelastic import SpecError, gpu, sharing

MIB = 1 << 20
FULL = 2  # CUDA_ERROR_OUT_OF_MEMORY

# --- threads that cannot be had ---


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of those that speak to a driver."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name.lower().startswith("aioelastic-gpu"):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)


CALLS: dict[str, Callable[[], Any]] = {
    "empty": lambda: sharing.empty(3, device="cuda:0"),
    "copy": lambda: sharing.copy(np.ones(3), device="cuda:0"),
    "event": lambda: gpu.GpuEvent("cuda:0"),
    "devices": gpu.devices,
}


@pytest.mark.parametrize("what", CALLS)
def test_a_thread_that_cannot_be_started_is_told(fake: Any, no_threads: None, monkeypatch: Any, what: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(gpu._driver, "_seen", None)
        gpu.end()
        with pytest.raises(sharing.ShareLimit, match=r"can't start new thread; raise `ulimit -u`"):
            CALLS[what]()
    monkeypatch.undo()
    assert what == "devices" or CALLS[what]() is not None


async def test_and_to_who_waits_for_an_event(fake: Any, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    event = gpu.GpuEvent()
    gpu.end()
    request.getfixturevalue("no_threads")
    for use in (event.synchronize, event.record, event.query):
        with pytest.raises(sharing.ShareLimit, match="can't start new thread"):
            use()
    with pytest.raises(sharing.ShareLimit, match="can't start new thread"):
        await event
    monkeypatch.undo()
    await event


def test_and_to_who_sends(fake: Any, no_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = on_gpu(np.ones(10))
    gpu.end()
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start")))
    with pytest.raises(sharing.ShareLimit, match="can't start"):
        travelled(x)
    sharing.trim()  # there is nothing to wait for
    assert start is not threading.Thread.start
    monkeypatch.undo()
    assert travelled(x)[0].address == x.address


def test_what_was_dropped_meanwhile_is_given_back_later(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, event = sharing.empty(2 * MIB, "u1", device="cuda:0"), gpu.GpuEvent()
    gpu.end()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start")))
        del x, event
        sharing.trim()
        assert gpu.stats().total == 2 * MIB
    sharing.trim()
    assert gpu.stats().total == 0
    assert "events" not in fake.live()


# --- a context that cannot be had, for now ---


def test_a_gpu_that_is_full_for_a_moment(fake: Any) -> None:
    gpu.end()
    fake.fail("cuDevicePrimaryCtxRetain", FULL, times=3)
    seen = []
    for _ in range(3):
        with pytest.raises(sharing.ShareLimit, match="cuDevicePrimaryCtxRetain") as caught:
            gpu.GpuEvent()
        seen.append(caught.value)
    assert len(set(map(id, seen))) == 3
    assert len({len(traceback.extract_tb(one.__traceback__)) for one in seen}) == 1  # and none of them grows
    assert gpu.GpuEvent().query()


@pytest.mark.parametrize("step", ["cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAlloc", "cuStreamCreate"])
async def test_who_waits_for_an_event_is_told_that_there_is_no_context(fake: Any, step: str) -> None:
    event = gpu.GpuEvent()
    gpu.end()
    fake.fail(step, FULL, times=2)
    with pytest.raises(sharing.ShareLimit, match=step):
        event.synchronize()
    with pytest.raises(sharing.ShareLimit, match=step):
        await event
    await event


async def test_and_who_sends(fake: Any) -> None:
    x = on_gpu(np.ones(10))
    gpu.end()
    fake.fail("cuDevicePrimaryCtxRetain", FULL)
    queue = sharing.Queue()
    with pytest.raises(sharing.ShareLimit, match="cuDevicePrimaryCtxRetain"):
        await queue.put(x)
    await queue.put(x)
    assert (await queue.get()).address == x.address


def test_what_is_dropped_while_there_is_no_context(fake: Any) -> None:
    x = sharing.empty(2 * MIB, "u1", device="cuda:0")
    gpu.end()
    fake.fail("cuDevicePrimaryCtxRetain", FULL, times=100)
    del x
    sharing.trim()
    assert gpu.stats().total == 2 * MIB
    fake.mend()
    settle()
    assert sharing.trim() == 2 * MIB


def test_the_end_of_the_threads_waits_for_who_waits(fake: Any) -> None:
    event = gpu.GpuEvent()
    fake.hold()
    event.record()
    waiter = threading.Thread(target=event.synchronize)
    waiter.start()
    while "cuLaunchHostFunc" not in fake.names():
        pass
    ender = threading.Thread(target=gpu.end)
    ender.start()
    fake.go()
    waiter.join()
    ender.join()
    assert gpu._driver.device("cuda:0").pending == []


# --- which device ---

WHERE = """
import fake_gpu, numpy
fake = fake_gpu.fake()
fake_gpu.install()
from aioelastic import gpu, sharing
from helpers import travelled
with fake_gpu.context(1) as cu:
    address = int(cu.cuMemAlloc(80))
    x = fake_gpu.ndarray(address, (10,), None, "<f8", None)
    travelled(x)
    y = sharing.copy(x)
    print(y.device, fake.contexts(0), sharing.is_shared(y))
    sharing.trim()
"""


def test_finding_a_tensor_makes_no_context_elsewhere(driver: Any) -> None:
    assert python(WHERE) == "cuda:1 0 True\n"


EMPTY = """
import sys
import fake_gpu
fake_gpu.fake()
fake_gpu.install()
from aioelastic import sharing
from helpers import travelled
fake_gpu.ndarray.__dlpack_device__ = lambda self: (2, 1)  # as cupy's, it knows its device
x = fake_gpu.ndarray(0, (0, 3), None, "<f8", None)
sys.modules["cupy"].asarray = lambda x: x
(y,) = travelled(x)
print(sharing.copy(x).device, y.device, y.shape)
"""


def test_an_empty_array_of_others_keeps_its_device(driver: Any) -> None:
    assert python(EMPTY) == "cuda:1 cuda:1 (0, 3)\n"


def test_memory_that_is_not_theirs(fake: Any) -> None:
    """What another library says of an array is not believed: it is looked up."""
    fake_gpu.install()
    try:
        x = theirs("plain", np.arange(10.0))
        told = x.__cuda_array_interface__
        told["shape"] = (10_000,)
        with pytest.raises(sharing.NotShareable, match="80000 bytes reaches beyond its memory"):
            travelled(x)
        with pytest.raises(sharing.NotShareable, match="80000 bytes reaches beyond its memory"):
            sharing.copy(x)
        told["shape"], told["data"] = (10,), (told["data"][0], True)
        with pytest.raises(sharing.NotShareable, match=r"read-only.*sharing\.copy\(x\)"):
            travelled(x)
        assert np.asarray(sharing.copy(sharing.copy(x), device="cpu")).tolist() == list(range(10))
        for field, wrong in (
            ("shape", (-1,)),
            ("shape", 3),
            ("shape", ("x",)),
            ("strides", (8, 8)),
            ("data", 5),
            ("data", ("x", False)),
            ("data", (-5, False)),
        ):
            x.__cuda_array_interface__ = {**told, "data": (told["data"][0], False), field: wrong}
            with pytest.raises(sharing.NotShareable, match=f"^{field}"):
                travelled(x)
        del told["typestr"], x.dtype
        x.__cuda_array_interface__ = told
        with pytest.raises(sharing.NotShareable, match="typestr"):
            travelled(x)
    finally:
        del sys.modules["cupy"]


# --- copies of a process ---

FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of each fork with threads
import fake_gpu
fake_gpu.fake()
from aioelastic import gpu, sharing
event, x = gpu.GpuEvent(), sharing.empty(3 << 20, "u1", device="cuda:0")
{before}
pid = os.fork()
if pid == 0:
    del event, x
    import gc
    gc.collect()
    os._exit(0)
print(os.waitpid(pid, 0)[1], event.query(), x.size)
"""


@pytest.mark.parametrize("before", ["", "gpu.end()", "event.record()", "y = x.__cuda_array_interface__; del y"])
def test_what_is_dropped_in_a_forked_copy_prints_nothing(driver: Any, before: str) -> None:
    assert python(FORKED.format(before=before), quiet=True) == f"0 True {3 << 20}\n"


# --- what a probe finds ---


@pytest.mark.parametrize("step", ["cuMemCreate", "cuDevicePrimaryCtxRetain", "cuMemAddressReserve"])
def test_a_probe_of_a_gpu_that_is_full(fake: Any, step: str) -> None:
    gpu.end()
    fake.fail(step, FULL)
    found = gpu.probe(tries=True)
    assert [(one.reason, one.tried) for one in found.devices] == [(gpu.Reason.NO_ROOM, False), (None, True)]
    assert step in str(found)
    assert found.ok


def test_a_probe_of_one_that_fails_shows_the_others(fake: Any) -> None:
    fake.fail("cuDeviceGetAttribute", 46)
    found = gpu.probe()
    assert [one.reason for one in found.devices] == [gpu.Reason.REFUSED, None]
    assert "46" in str(found)


def test_a_probe_without_threads(fake: Any, no_threads: None) -> None:
    gpu.end()
    assert gpu.probe(tries=True).reason is gpu.Reason.NO_ROOM


LOST = """
import fake_gpu
fake_gpu.fake()
from aioelastic import gpu, sharing
print([one.device for one in gpu.probe().devices])
try: print(sharing.empty(3, device="cuda:0"))
except sharing.DeviceUnavailable as exc: print(exc.reason.name)
print(sharing.empty(3, device="cuda:1").device)
"""


def test_a_gpu_that_cannot_be_asked_hides_no_other(driver: Any) -> None:
    assert python(LOST, FAKE_CUDA_LOST="0").splitlines() == ["['cuda:1']", "NOT_VISIBLE", "cuda:1"]


# --- the GPUs of the machine ---


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    needs("cuda.bindings.driver")
    path = fake_gpu.compiled(tmp_path_factory.mktemp("nvml"), "libnvidia-ml")
    if path is None:
        pytest.skip("needs a C compiler (cc)")
    return str(path)


DEVICES = """
import ctypes, os
import fake_gpu
library = ctypes.CDLL(os.environ["FAKE_NVML_LIBRARY"])
if "CUDA" in os.environ: fake_gpu.fake()
from aioelastic import gpu, sharing
try:
    found = gpu.devices()
    for one in found:
        used = one.processes and [(p.pid == os.getpid() or p.pid, p.used) for p in one.processes]
        instances = [uuid[:7] for uuid in one.instances]
        print(one.index, one.uuid[:7], one.name, one.total, one.used, one.free, instances, used, one.trouble, sep="|")
    if "CUDA" in os.environ: print(found[0].uuid == sharing.empty(1, device="cuda:0").uuid)
except gpu.DeviceUnavailable as exc:
    print(exc.reason.name, exc)
print(library.fakeBegun())
"""
TOTAL = 80 << 30


def test_the_gpus_of_this_machine(nvml: str) -> None:
    first, second, left = python(DEVICES, FAKE_NVML_LIBRARY=nvml).splitlines()
    used = f"[(True, {5 << 20}), (1, None)]"
    assert first == f"0|GPU-111|Fake GPU 0|{TOTAL}|{1 << 30}|{TOTAL - (1 << 30)}|[]|{used}|"
    parts = "['MIG-a1a', 'MIG-b2b']"
    used = f"[(50, {1 << 20}), (51, {1 << 20})]"  # its instances tell what we may not see of the whole
    assert second == f"1|GPU-222|Fake GPU 1|{TOTAL}|{2 << 30}|{TOTAL - (2 << 30)}|{parts}|{used}|"
    assert left == "0"  # it was let go


@pytest.mark.parametrize(("status", "reason"), [("9", "NO_DRIVER NVML says"), ("999", "REFUSED NVML says")])
def test_a_management_library_that_refuses(nvml: str, status: str, reason: str) -> None:
    told, left = python(DEVICES, FAKE_NVML_LIBRARY=nvml, FAKE_NVML_STATUS=status).splitlines()
    assert told.startswith(reason)
    assert left == "0"


@pytest.mark.parametrize(
    "env", [{}, {"FAKE_CUDA_BACKWARDS": "1"}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "GPU-22"}]
)
def test_the_order_is_that_of_cuda(driver: Any, nvml: str, env: dict[str, str]) -> None:
    first, second, same, _ = python(DEVICES, FAKE_NVML_LIBRARY=nvml, CUDA="1", **env).splitlines()
    assert [first[0], second[0]] == (["1", "0"] if env else ["0", "1"])
    assert same == "True"


def test_a_gpu_that_is_lost_hides_no_other(nvml: str) -> None:
    first, second, left = python(DEVICES, FAKE_NVML_LIBRARY=nvml, FAKE_NVML_LOST="0").splitlines()
    assert first == "0|||None|None|None|[]|None|GPU is lost"
    assert second.startswith("1|GPU-222|Fake GPU 1|")
    assert left == "0"


def test_a_divided_gpu_whose_whole_we_may_not_see_hides_nothing(nvml: str) -> None:
    first, second, _ = python(DEVICES, FAKE_NVML_LIBRARY=nvml, FAKE_NVML_DENIED="1").splitlines()
    assert first.startswith(f"0|GPU-111|Fake GPU 0|{TOTAL}|")
    assert second == f"1|GPU-222|Fake GPU 1|None|None|None|['MIG-a1a', 'MIG-b2b']|[(50, {1 << 20}), (51, {1 << 20})]|"


def test_a_gpu_that_does_not_tell_who_uses_it(nvml: str) -> None:
    first, _, _ = python(DEVICES, FAKE_NVML_LIBRARY=nvml, FAKE_NVML_DENIED="0").splitlines()
    assert first == "0|GPU-111|Fake GPU 0|None|None|None|[]|None|"  # and not that nobody does


# --- names ---


def test_the_beginning_of_a_uuid(fake: Any) -> None:
    assert sharing.empty(3, device="GPU-22").device == "cuda:1"
    assert gpu.GpuEvent("GPU-22").uuid.startswith("GPU-22")
    gpu.stats("GPU-22")
    assert sharing.copy(np.ones(3), device="GPU-2222").device == "cuda:1"
    with pytest.raises(SpecError, match="beginning of 2 UUIDs"):
        gpu.stats("GPU-")
    assert gpu._driver.matching("GPU-1", ["GPU-11", "GPU-12", "MIG-1", "GPU-2"]) == ["GPU-11", "GPU-12"]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
