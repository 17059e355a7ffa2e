"""torch's tensors keep what they are; each of torch's own tests of sharing on the CPU has its counterpart here.

docs/reference/sharing-parity.md lists them, by torch's names.
"""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import QUIET, needs

torch = needs("torch")

import share_jobs_torch as jobs  # noqa: E402  # it imports torch
from helpers import travelled  # noqa: E402

from aioelastic import Function, Group, WorkerExecutor, sharing, supervise  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(params=["memfd", "file"], autouse=True)
def strategy(request: Any, tmp_path: Any) -> Any:
    if request.param == "file":
        sharing.configure(strategy="file", directory=tmp_path)
    yield request.param
    gc.collect()
    sharing.configure(strategy="memfd")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: prototypes, storages
        yield


def shared(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.from_dlpack(sharing.empty(shape, dtype)).zero_()


async def test_sharing() -> None:
    """A worker sees what we write, and we what it writes."""
    x = shared(5, 5)
    async with Group(Function(jobs.fill), n=1, logs=QUIET) as group:
        await group[0].send([x, x[:, 1]])
        assert await group[0].receive() == (True, True)
        assert (x == 4).all()
        x[0, 1] = 7
        await group[0].send("look")
        assert await group[0].receive() == 7


async def test_preserve_sharing() -> None:
    """Storage, base and views are one memory again, shared or not."""
    for x in (shared(5, 5), torch.zeros(5, 5)):
        storage, whole, row, column = travelled(x.storage(), x, x[2], x[:, 1])
        whole.fill_(3)
        assert row.tolist() == column.tolist() == [3] * 5
        assert storage[24] == 3
        assert whole.data_ptr() == storage.data_ptr()
        assert column.stride() == (5,)
        assert {one.untyped_storage()._cdata for one in (whole, row, column)} == {storage._cdata}
        assert (row.storage_offset(), column.storage_offset()) == (10, 1)
        assert storage.nbytes() == 100
        same = x.data_ptr() == whole.data_ptr()
        assert same == sharing.is_shared(x) == sharing.is_shared(row)


async def test_pool(strategy: Any) -> None:
    """What workers write into arguments is seen here; what they return arrives, and is made as they were told."""
    arguments = [shared(2, 2) for _ in range(8)]
    async with WorkerExecutor(2, preload=["torch"]) as executor:
        calls = executor.map_unordered(jobs.fills_and_returns, arguments, range(8), [strategy] * 8)
        results = [x async for x in calls]
    assert all((x == 4).all() for x in arguments)
    assert sorted(int(x[0, 0]) for x in results) == list(range(8))
    assert [sharing.is_shared(x) for x in results].count(True) == 4
    assert ("/dev/shm/aioelastic-shares-" in Path("/proc/self/maps").read_text()) == (strategy == "file")


def test_is_shared() -> None:
    x = shared(5, 5)
    assert sharing.is_shared(x)
    assert sharing.is_shared(x[1:].t())
    assert sharing.is_shared(x.numpy())
    assert not sharing.is_shared(torch.zeros(3))
    assert not sharing.is_shared(x.clone())


def test_empty_shared() -> None:
    assert tuple(torch.from_dlpack(sharing.empty((0, 3))).shape) == (0, 3)
    (x,) = travelled(torch.empty(0, 3, dtype=torch.int16))
    assert (x.dtype, tuple(x.shape)) == (torch.int16, (0, 3))


@pytest.mark.parametrize("start", ["fork", "zygote", "spawn"])
async def test_inherit_tensor(start: Any) -> None:
    """An argument is the same memory in the worker, however it is started."""
    x = shared(5, 5)
    preload = ["torch"] if start == "zygote" else ()
    await supervise(Function(jobs.add, x, 4), n=1, start=start, preload=preload, logs=QUIET)
    assert (x == 4).all()


@pytest.mark.parametrize("value", [torch.empty(0), torch.empty(0, 1), torch.zeros(2, 0)])
def test_empty_tensor_sharing(value: Any) -> None:
    x, plain, typed = travelled(value, value.untyped_storage(), value.storage())
    assert x.shape == value.shape
    assert (plain.nbytes(), typed.nbytes(), typed.dtype) == (0, 0, value.dtype)


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_meta(shape: Any) -> None:
    (x,) = travelled(torch.empty(shape, device="meta", dtype=torch.int8))
    assert (x.device.type, x.dtype, tuple(x.shape)) == ("meta", torch.int8, shape)
    if shape[0]:
        with pytest.raises(sharing.NotShareable, match="send a meta tensor"):
            travelled(torch.empty(shape, device="meta").untyped_storage())


@pytest.mark.parametrize("grad", [True, False])
async def test_variable_sharing(grad: bool) -> None:
    """A leaf keeps `requires_grad`; what is written there is seen here; gradients stay behind."""
    x = shared(5, 5).requires_grad_(grad)
    if grad:
        (x * 2).sum().backward()
        assert x.grad is not None
    async with Group(Function(jobs.leaf), n=1, logs=QUIET) as group:
        await group[0].send(x)
        told = await group[0].receive()
    assert told == (grad, True, False, "Tensor")
    assert (x == 1).all()


def test_hooks_stay_behind() -> None:
    """As torch does it: that is said, and not an error."""
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: grad)
    for one in (x, torch.nn.Parameter(x.detach())):
        if one is not x:
            one.register_hook(lambda grad: grad)
        with pytest.warns(UserWarning, match="backward hook "):
            (y,) = travelled(one)
        assert torch.equal(one, y)


def test_non_leaf() -> None:
    with pytest.raises(sharing.NotShareable, match=r"not a leaf.*detach"):
        travelled(torch.ones(3, requires_grad=True) * 2)


@pytest.mark.parametrize(("kind", "grad"), [(torch.float32, True), (torch.float32, False), (torch.int64, False)])
async def test_parameter(kind: Any, grad: bool) -> None:
    x = torch.nn.Parameter(shared(5, 5, dtype=kind), requires_grad=grad)
    async with Group(Function(jobs.leaf), n=1, logs=QUIET) as group:
        await group[0].send(x)
        assert await group[0].receive() == (grad, True, False, "Parameter")
    assert (x == 1).all()


def test_a_module() -> None:
    (x,) = travelled(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
    assert x(torch.ones(2, 3)).shape == (2, 4)


async def test_no_thread_and_no_fork_hazard() -> None:
    """Autograd works in a worker though its threads run here."""
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    result = await supervise(Function(jobs.backward), n=2, preload=["torch"], logs=QUIET)
    assert [one.value for one in result] == [[2, 2, 2]] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.eye(3).to_sparse_csc(),
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        lambda: torch.eye(4).to_sparse_bsc((2, 2)),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
    ids=["coo", "csr", "csc", "bsr", "bsc", "nested", "jagged"],
)
def test_by_component(make: Any) -> None:
    x = make()
    (y,) = travelled(x)
    assert y.layout == x.layout
    if x.is_nested:
        assert all(torch.equal(a, b) for a, b in zip(x.unbind(), y.unbind(), strict=True))
    else:
        assert torch.equal(x.to_dense(), y.to_dense())


@pytest.mark.parametrize(
    "kind",
    ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float16", "bool", "complex64"],
)
def test_element_types(kind: str) -> None:
    dtype = getattr(torch, kind)
    x = sharing.empty((2, 3), kind)
    assert sharing.empty(1, dtype).dtype == x.dtype == kind
    t = torch.from_dlpack(x)
    assert t.dtype == dtype
    t.view(torch.uint8 if kind != "bool" else torch.bool).fill_(1)
    shared_one, private = travelled(t, t.clone())
    assert shared_one.dtype == private.dtype == dtype
    assert shared_one.data_ptr() == x.address
    assert sharing.copy(t).buffer.tobytes() == x.buffer.tobytes()


def test_views_that_are_odd() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    odd = [base.mT, base[:, ::2], base[1, 2, 3], base.permute(2, 0, 1), torch.ones(1).expand(7)]
    odd += [torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj().imag]
    arrived = travelled(*odd)
    for one, other in zip(odd, arrived, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [shared, torch.zeros], ids=["shared", "private"])
def test_views_of_one_storage_have_one(make: Any) -> None:
    """As long as their memory is sent together: what lies between private views is not copied."""
    base = make(10, 1000)
    left, right, one, mixed = travelled(base[2, 5:], base[2, :10], base[2, 7], base.view(torch.float64)[2, 3:4])
    assert len({x.untyped_storage()._cdata for x in (left, right, one)}) == 1
    right.fill_(7)
    one.fill_(8)
    assert left.tolist() == [7, 7, 8, 7, 7, *[0] * 990]
    assert mixed.view(torch.float32).tolist() == [7, 8]
    assert len({x.untyped_storage()._cdata for x in travelled(*base.split(3))}) == 1
    far = travelled(base[0], base[9])
    assert (far[0].untyped_storage()._cdata == far[1].untyped_storage()._cdata) == sharing.is_shared(base)
    assert travelled(base[3])[0].untyped_storage().nbytes() == 4000


def test_a_view_that_does_not_fit_into_the_items_of_others() -> None:
    base = torch.zeros(16, dtype=torch.uint8)
    x, y = travelled(base[4:], base.view(torch.float64)[1:])
    y.fill_(1)
    assert x.tolist() == [0, 0, 0, 0, *[0] * 6, 240, 63]
    assert y.tolist() == [1]


def test_numpy_and_torch_see_one_another() -> None:
    a = np.zeros(100)
    b, t = travelled(a, torch.from_numpy(a)[10:20])
    t.fill_(5)
    assert b[9:21].tolist() == [0, *[5] * 10, 0]


def test_a_tensor_keeps_its_memory() -> None:
    t = torch.from_dlpack(sharing.empty(1 << 20, "uint8"))[5:]
    where = t.data_ptr() - 5
    gc.collect()
    assert sharing.empty(1 << 20, "uint8").address != where
    del t
    assert where in [one.address for one in [sharing.empty(1 << 20, "uint8") for _ in range(2)]]


def test_tensors_that_cannot_be_copied_say_why() -> None:
    bad = [torch.eye(3).to_sparse(), torch.empty(3, device="meta")]
    for x in [*bad, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]:
        with pytest.raises(sharing.NotShareable, match=r"share x\.|make sharing\."):
            sharing.copy(x)
        assert not sharing.is_shared(x)


def test_what_runs_backwards_is_refused() -> None:
    """torch aborts the process otherwise."""
    x = sharing.copy(np.arange(12).reshape(3, 4))
    for one in (x[::-1], x[:, ::-2]):
        with pytest.raises(BufferError, match="negative stride"):
            torch.from_dlpack(one)
        assert np.asarray(one).strides == one.strides
        assert (np.asarray(sharing.copy(one)) == np.asarray(one)).all()
    assert tuple(torch.from_dlpack(x[::2]).shape) == (2, 4)


def test_a_capsule_that_nobody_takes() -> None:
    before = sharing.stats().idle
    x = sharing.empty(1 << 20, "uint8")
    capsule = x.__dlpack__()
    del x
    assert sharing.stats().idle == before
    del capsule
    assert sharing.stats().idle == before + (1 << 20)
    assert not sharing.is_shared(torch.from_dlpack(torch.zeros(2)))


async def test_many_sends_hold_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    q = sharing.Queue(4)
    for i in range(1000):
        q.put_nowait(torch.full((4,), i))
        assert q.get_nowait()[0] == i
    assert len(os.listdir("/proc/self/fd")) == before + 4
