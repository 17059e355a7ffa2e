"""Each kind of tensor is right at the other end, and in a copy; or it is refused in words that say what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import needs

torch = needs("torch")

from helpers import travelled  # noqa: E402
from test_sharing_foreign import run_alone  # noqa: E402

from aioelastic import sharing  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch's own: prototypes, storages


class Noted(torch.Tensor):  # type: ignore[misc, name-defined]
    """A subclass as torch's documentation has it."""


class Weight(torch.nn.Parameter):  # type: ignore[misc, name-defined]
    """A subclass of a parameter."""


def noted(tensor: Any) -> Any:
    tensor.note = "x"
    return tensor


def complexes() -> Any:
    return torch.tensor([1 + 2j, 3 - 4j])


NUMBERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.arange(6.0).reshape(2, 3),
    "no dimensions": lambda: torch.tensor(3.0),
    "no elements": lambda: torch.empty(0, 3),
    "requires grad": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "subclass of a parameter": lambda: Weight(torch.ones(3)),
    "buffer of a module": lambda: torch.nn.Buffer(torch.ones(3)),
    "with an attribute": lambda: noted(torch.ones(3)),
    "parameter with an attribute": lambda: noted(torch.nn.Parameter(torch.ones(3))),
    "subclass": lambda: torch.ones(3).as_subclass(Noted),
    "conjugate": lambda: complexes().conj(),
    "negative": lambda: complexes().conj().imag,
    "conjugate that requires grad": lambda: complexes().conj().requires_grad_(),
    "expanded": lambda: torch.ones(2, 1).expand(2, 4),
    "channels last": lambda: torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "of inference": lambda: torch.inference_mode()(lambda: torch.ones(3))(),
    "copied on write": lambda: torch._lazy_clone(torch.ones(3)),
    "view of another type": lambda: torch.arange(4, dtype=torch.int32).view(torch.int64),
}
REFUSED: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any] | None]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"layout.*x\.to_dense\(\)", lambda x: x.to_dense()),
    "sparse by rows": (lambda: torch.eye(3).to_sparse_csr(), r"x\.to_dense\(\)", lambda x: x.to_dense()),
    "sparse, hybrid": (lambda: torch.ones(2, 3, 2).to_sparse(1), r"x\.to_dense\(\)", lambda x: x.to_dense()),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        r"nested.*x\.values\(\), or x\.to_padded_tensor\(0\)",
        lambda x: x.to_padded_tensor(0),
    ),
    "nested, jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"nested.*x\.values\(\)",
        lambda x: x.values(),
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"quantized.*x\.int_repr\(\)",
        lambda x: x.int_repr(),
    ),
    "quantized with an attribute": (
        lambda: noted(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        r"quantized.*x\.dequantize\(\)",
        lambda x: x.dequantize(),
    ),
    "meta": (
        lambda: torch.empty(3, device="meta"),
        r"no memory.*sharing\.empty\(tuple\(x\.shape\), x\.dtype\)",
        None,
    ),
    "subclass with an attribute": (
        lambda: noted(torch.ones(3).as_subclass(Noted)),
        r"attributes.*x\.as_subclass\(torch\.Tensor\)",
        lambda x: x.as_subclass(torch.Tensor),
    ),
    "half complexes": (
        lambda: torch.ones(3, dtype=torch.complex32),
        r"\(complex32\).*x\.view\(torch\.uint8\)",
        lambda x: x.view(torch.uint8),
    ),
    "not made yet": (lambda: torch.nn.UninitializedParameter(), "uninitialized", None),
}


def assert_same(one: Any, other: Any) -> None:
    assert type(other) is type(one)
    assert isinstance(other, torch.nn.Buffer) == isinstance(one, torch.nn.Buffer)
    assert (other.dtype, other.layout, other.device) == (one.dtype, one.layout, one.device)
    assert other.requires_grad == one.requires_grad
    assert getattr(other, "note", None) == getattr(one, "note", None)
    if isinstance(one, torch.nn.UninitializedParameter) or one.device.type == "meta":
        return
    if one.is_nested:
        assert all(torch.equal(a, b) for a, b in zip(one.unbind(), other.unbind(), strict=True))
        return
    assert other.shape == one.shape
    if one.is_quantized:
        one, other = one.dequantize(), other.dequantize()
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.dtype is torch.complex32:  # which torch cannot compare
        one, other = one.view(torch.int32), other.view(torch.int32)
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*NUMBERS, *REFUSED])
def test_in_a_message(name: str) -> None:
    one = NUMBERS[name]() if name in NUMBERS else REFUSED[name][0]()
    (other,) = travelled(one)
    assert_same(one, other)


def test_in_a_queue() -> None:
    queue = sharing.Queue()
    kinds = {**NUMBERS, **{name: make for name, (make, _, _) in REFUSED.items()}}
    queue.put_nowait({name: make() for name, make in kinds.items()})
    for name, other in queue.get_nowait().items():
        assert_same(kinds[name](), other)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_copy(name: str) -> None:
    one = NUMBERS[name]()
    x = sharing.copy(one)
    assert not sharing.is_shared(one)
    assert torch.equal(torch.from_dlpack(x), one.detach())
    assert str(one.dtype) == f"torch.{x.dtype}"


@pytest.mark.parametrize("name", REFUSED)
def test_no_copy(name: str) -> None:
    make, words, instead = REFUSED[name]
    one = make()
    with pytest.raises(sharing.NotShareable, match=words):
        sharing.copy(one)
    assert not sharing.is_shared(one)
    if instead is not None:
        assert torch.equal(torch.from_dlpack(sharing.copy(instead(one))), instead(one))


@pytest.mark.parametrize(
    "kind", ["uint16", "uint32", "uint64", "bfloat16", "float8_e5m2", "float8_e8m0fnu", "complex32"]
)
def test_element_types_in_messages(kind: str) -> None:
    one = torch.ones(3).to(getattr(torch, kind))
    (other,) = travelled(one)
    assert other.dtype == one.dtype
    assert torch.equal(other.view(torch.uint8), one.view(torch.uint8))


def test_types_that_have_a_size_and_no_numbers() -> None:
    for kind in (torch.int4, torch.bits8, torch.float4_e2m1fn_x2):
        with pytest.raises(sharing.NotShareable, match=str(kind).removeprefix("torch.")):
            sharing.copy(torch.empty(3, dtype=kind))


NOWHERE = """
import warnings; warnings.simplefilter("ignore")
import torch
from helpers import travelled
from aioelastic import sharing
from torch._subclasses import FakeTensorMode

with FakeTensorMode():
    fake, weight = torch.ones(3), torch.nn.Parameter(torch.ones(3))
def look(one): batched.append(one); return one
batched = []
torch.vmap(look)(torch.ones(2, 3))
def cut(part, size, turned=False):  # as FSDP does it
    one = torch.ones(100_000)[part]
    one = one.view(-1, 2).t() if turned else one
    one.untyped_storage().resize_(size)
    return one
kinds = {
    "fake": fake,
    "fake weight": weight,
    "functional": torch._to_functional_tensor(torch.ones(3)),
    "zero": torch._efficientzerotensor(3),
    "batched": batched[0],
    "mkldnn": torch.ones(3, 4).to_mkldnn(),
    "freed": cut(slice(None), 0),
    "a part of what was freed": cut(slice(2, None), 0),
    "a weight that was freed": torch.nn.Parameter(cut(slice(2, None), 0)),
    "cut off": cut(slice(None), 8),
    "turned and cut off": cut(slice(None), 399_992, turned=True),
    "storage": torch._to_functional_tensor(torch.ones(3)).untyped_storage(),
}
for name, one in kinds.items():
    assert not sharing.is_shared(one)
    for share in (sharing.copy, travelled):
        print(name, end=": ", flush=True)
        try: print(share(one))
        except sharing.NotShareable as exc: print(exc)
"""


def test_what_has_no_memory_is_refused() -> None:
    """To torch its address is 0: who reads there is ended."""
    told = run_alone(NOWHERE).splitlines()
    assert len(told) == 24
    for line in told:
        what = line.partition(":")[0]
        assert (
            "torch.empty(" in line
            if "fake" in what
            else "x.clone()" in line or "x.to_dense()" in line or "no array" in line
        )


def test_memory_that_is_shared_stays_so() -> None:
    x = sharing.copy(np.arange(12.0))
    t = torch.from_dlpack(x)
    for one in (Weight(t), noted(t[2:]), t.as_subclass(Noted), noted(torch.nn.Parameter(t.view(3, 4)))):
        (other,) = travelled(one)
        assert_same(one, other)
        assert other.data_ptr() == one.data_ptr()
        assert sharing.is_shared(other)


def test_attributes_may_be_anything() -> None:
    one = torch.ones(3)
    one.me, one.other = one, sharing.copy(np.ones(3))
    weight = Weight(torch.ones(3))
    weight.data_of = one
    (other, heavy) = travelled(one, weight)
    assert other.me is other is heavy.data_of
    assert other.other.address == one.other.address
    one.other = (each for each in ())
    with pytest.raises(TypeError, match="generator"):
        travelled(one)


def test_a_subclass_that_is_no_leaf_is_refused_too() -> None:
    for one in (torch.ones(3, requires_grad=True).as_subclass(Noted), Weight(torch.ones(3)) * 2):
        with pytest.raises(sharing.NotShareable, match=r"not a leaf.*detach"):
            travelled(one * 2)


def test_shapes_and_element_types_by_torch() -> None:
    x = sharing.empty(torch.ones(2, 3).shape, torch.float16)
    assert (x.shape, x.dtype) == ((2, 3), "float16")
    assert sharing.empty(torch.tensor([2, 3])).shape == (2, 3)
    assert sharing.empty(torch.tensor(4)).shape == (4,)


def test_a_deep_copy_of_what_holds_one() -> None:
    x = sharing.copy(torch.ones(3))
    other = copy.deepcopy({"x": x, "t": torch.from_dlpack(x)})
    torch.from_dlpack(other["x"]).zero_()
    other["t"].zero_()
    assert np.asarray(x).tolist() == [1, 1, 1]


def test_an_exception_with_a_view_on_its_way_is_the_caller_s() -> None:
    """A view that dies meanwhile lets go of its memory, and of nothing else."""
    sharing.trim()
    for kind in ("float32", "bfloat16", "bool"):

        def made(kind: str = kind) -> Any:
            return torch.from_dlpack(sharing.empty(300_000, kind))

        with pytest.raises(IndexError, match="out of bounds"):
            made()[300_000]
        with pytest.raises(TypeError, match="must be Tensor"):
            torch.add(made(), "text")
        with pytest.raises(ZeroDivisionError):
            [made(), 1 / 0]
        with pytest.raises(TypeError, match="int"):
            int(sharing.empty(300_000, kind).__dlpack__())
    with pytest.raises((BufferError, RuntimeError), match="dtype"):
        np.from_dlpack(sharing.empty(300_000, "bfloat16"))
    stats = sharing.stats()
    assert stats.idle == stats.total


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_whatever_device_is_the_default(device: str) -> None:
    """What arrives is where it was, not where the user wants new tensors to be."""
    x = sharing.copy(np.arange(4.0))
    kinds = [torch.ones(3), torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.empty(0, 2)]
    kinds.append(torch.nn.Parameter(torch.ones(2)))
    with torch.device(device):
        for one, other in zip(kinds, travelled(*kinds), strict=True):
            assert_same(one, other)
        assert torch.from_dlpack(x).tolist() == [0, 1, 2, 3]
        assert torch.from_dlpack(x[:0]).device.type == "cpu"
        assert sharing.copy(torch.ones(3, device="cpu")).buffer.tolist() == [1, 1, 1]
