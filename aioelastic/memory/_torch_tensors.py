"""torch's tensors, where torch is loaded: where they lie, what they are made of in messages, how they are made again.

As torch.multiprocessing does it (torch/multiprocessing/reductions.py): a leaf keeps `requires_grad`, a `Parameter`
stays one, gradients and hooks stay behind (of hooks torch warns), and a tensor that is not a leaf is refused. As pickle
does it, attributes that somebody has set on a tensor travel with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import warn_if_has_hooks

from ..model.text import told
from ._errors import NotShareable
from .dtypes import DTYPES, DType, loaded
from .foreign_arrays import Foreign, bounds, contiguous
from .incoming import incoming
from .reducers import OutgoingMessage

_SPARSE = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
_NOWHERE = "give what it stands for: x.clone(), made outside of torch.func, tracing and modes, or x.to_dense()"


def _is_fake(one: Any) -> bool:
    module = loaded("torch._subclasses.fake_tensor", "FakeTensor")
    return module is not None and isinstance(one, module.FakeTensor)


# what cannot be copied: whether it is that, and what to do instead
_REFUSED: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_is_fake, "has no memory: give torch.empty(x.shape, dtype=x.dtype, device='meta'), made outside of its mode"),
    (lambda one: one.is_nested, "is nested: share x.values(), or x.to_padded_tensor(0)"),
    (
        lambda one: one.layout is not torch.strided,
        "has a layout of parts: share x.to_dense(), or send the tensor itself",
    ),
    (lambda one: one.is_quantized, "is quantized: share x.int_repr() or x.dequantize(), or send the tensor itself"),
    (lambda one: one.device.type == "meta", "has no memory: make sharing.empty(tuple(x.shape), x.dtype)"),
    (lambda one: one.device.type != "cpu", "is not in memory of the CPU: share x.cpu()"),
    (
        lambda one: type(one) not in (torch.Tensor, torch.nn.Parameter) and bool(vars(one)),
        "has attributes, which would be left behind: share x.as_subclass(torch.Tensor), and send them",
    ),
)


def place_of(one: Any) -> Foreign:
    """Where a tensor lies, on the CPU. Raises `NotShareable`."""
    try:
        words = next((words for is_that, words in _REFUSED if is_that(one)), None)
        if words is not None:
            raise NotShareable(f"{type(one).__name__} {words}")
        plain = one.detach().resolve_conj().resolve_neg()
        shape, name = tuple(plain.shape), str(plain.dtype).removeprefix("torch.")
        address, strides = _place(plain)[:2] if plain.numel() else (0, plain.stride())
    except NotShareable:
        raise
    except Exception as exc:  # of a kind of tensor that torch does not tell of
        raise NotShareable(f"torch cannot say where this {type(one).__name__} lies: {told(exc)}; {_NOWHERE}") from exc
    if name not in DTYPES:
        raise NotShareable(f"its elements ({name}) cannot be shared; share x.view(torch.uint8), or convert it")
    return Foreign(address, shape, strides, DTYPES[name], plain)


class _Place(NamedTuple):
    address: int
    strides: tuple[int, ...]  # in bytes
    low: int
    high: int
    whole: Any  # the storage


def _place(one: Any) -> _Place:
    """Where a tensor lies that has elements. Raises `NotShareable`: it has not their memory."""
    try:
        address, size, whole = one.data_ptr(), one.element_size(), one.untyped_storage()
        first, nbytes = whole.data_ptr(), whole.nbytes()
    except Exception as exc:  # of a layout that it has no words for
        raise NotShareable(f"a tensor without memory of its own: {told(exc)}; {_NOWHERE}") from exc
    strides = tuple([step * size for step in one.stride()])
    low, high = bounds(address, one.shape, strides, size)
    # torch knows address 0, and storages that were cut off under what lies in them
    if not first or low < first or high > first + nbytes:
        raise NotShareable(f"a tensor without memory of its own; {_NOWHERE}")
    return _Place(address, strides, low, high, whole)


def over(loan: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: DType) -> Any:
    """A tensor over a part of memory. Raises `BufferError`: torch has no such elements."""
    dtype = getattr(torch, kind.name, None)
    if dtype is None:
        raise BufferError(f"elements ({kind.name}) that this version of torch does not have")
    if loan is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    steps = tuple(step // kind.itemsize for step in strides)
    return torch.empty(0, dtype=dtype, device="cpu").set_(_storage(loan), offset // kind.itemsize, shape, steps)


def reducers(message: OutgoingMessage) -> dict[Any, Any]:
    """How they are reduced in this message; by a tuple of types, what is derived from them."""

    def tensor(one: Any) -> Any:
        check(one)
        reduced = parts(one)
        attributes = vars(one)
        # torch's own way keeps them
        return (*reduced, attributes, None, None, update) if attributes and len(reduced) == 2 else reduced

    def parts(one: Any) -> Any:
        if one.is_nested and one.layout is torch.strided:
            parts = (one._nested_tensor_size(), one._nested_tensor_strides(), one._nested_tensor_storage_offsets())
            return (nested, (one.requires_grad, one.detach().values(), *parts))
        if one.layout is torch.sparse_coo:
            plain = one.detach()
            entries = (plain._indices(), plain._values(), tuple(plain.shape), plain.is_coalesced())
            return (coo, (one.requires_grad, *entries))
        if one.layout in _SPARSE:
            indices = tuple(getattr(one.detach(), name)() for name in _SPARSE[one.layout])
            return (compressed, (one.requires_grad, indices, tuple(one.shape), one.layout))
        if one.layout is not torch.strided or one.device.type not in ("cpu", "meta") or one.is_quantized:
            try:
                return one.__reduce_ex__(5)
            except (RuntimeError, NotImplementedError) as exc:
                raise NotShareable(f"torch cannot pickle a tensor of {one.layout}: {told(exc)}; {_NOWHERE}") from exc
        shape, steps, kind = tuple(one.shape), one.stride(), one.dtype
        if one.device.type == "meta" or not one.numel():
            return (without_memory, (one.requires_grad, shape, steps, kind, one.device.type))
        if one.is_conj() or one.is_neg():
            one = one.detach().resolve_conj().resolve_neg().requires_grad_(one.requires_grad)
        _, strides, low, high, whole = _place(one)

        def tight() -> tuple[int, tuple[int, ...], Any]:
            copied = one.detach().contiguous()
            return copied.data_ptr(), contiguous(shape, copied.element_size()), copied

        number = message.ref(low, high, one.nbytes, one, tight, whole._cdata)
        return (strided, (one.requires_grad, number, shape, strides, kind))

    def parameter(one: Any) -> Any:
        warn_if_has_hooks(one)
        kind = () if type(one) is torch.nn.Parameter else (type(one),)
        made = (as_parameter, (one.detach().as_subclass(torch.Tensor), one.requires_grad, *kind))
        return (*made, vars(one), None, None, update) if vars(one) else made

    def derived(one: Any) -> Any:
        if _is_fake(one):
            raise NotShareable(f"FakeTensor {_REFUSED[0][1]}")
        check(one)
        # torch's own way makes a plain Parameter of it
        is_parameter = (
            isinstance(one, torch.nn.Parameter) and type(one).__reduce_ex__ is torch.nn.Parameter.__reduce_ex__
        )
        return parameter(one) if is_parameter else NotImplemented

    def storage(one: Any) -> Any:
        if one.device.type == "meta":
            raise NotShareable("a storage of the meta device has no memory; send a meta tensor")
        if one.device.type != "cpu":
            return one.__reduce_ex__(5)
        if not one.nbytes():
            return (torch.UntypedStorage, (0,))
        try:
            low = one.data_ptr()
        except RuntimeError as exc:
            raise NotShareable(f"a storage without memory of its own: {told(exc)}; {_NOWHERE}") from exc
        return (as_storage, (message.ref(low, low + one.nbytes(), one.nbytes(), one, whole=one._cdata),))

    return {
        torch.Tensor: tensor,
        torch.nn.Parameter: parameter,
        torch.UntypedStorage: storage,
        torch.storage.TypedStorage: lambda one: (as_typed, (one._untyped_storage, one.dtype)),
        (torch.Tensor,): derived,
    }


def check(one: Any) -> None:
    """Whether it stands by itself. Raises `NotShareable`."""
    if one.requires_grad and not one.is_leaf:
        raise NotShareable(
            "a tensor that requires grad and is not a leaf: what it was computed from stays in this process; "
            "send x.detach()"
        )
    warn_if_has_hooks(one)


def strided(grad: bool, number: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: Any) -> Any:
    """Over the memory of the message."""
    size = kind.itemsize
    whole, at, others = incoming().part(number, size, _storage)
    steps = tuple(step // size for step in others or strides)
    return torch.empty(0, dtype=kind, device="cpu").set_(whole, at, shape, steps).requires_grad_(grad)


def without_memory(grad: bool, shape: tuple[int, ...], steps: tuple[int, ...], kind: Any, device: str) -> Any:
    """An empty tensor, or one of the meta device."""
    return torch.empty_strided(shape, steps, dtype=kind, device=device, requires_grad=grad)


def coo(grad: bool, indices: Any, values: Any, shape: tuple[int, ...], coalesced: bool) -> Any:
    """A sparse one, by coordinates."""
    # its device is said, as the user may have set another for what is made
    how: dict[str, Any] = {"device": values.device, "is_coalesced": coalesced, "check_invariants": False}
    return torch.sparse_coo_tensor(indices, values, shape, **how).requires_grad_(grad)


def compressed(grad: bool, parts: tuple[Any, Any, Any], shape: tuple[int, ...], layout: Any) -> Any:
    """A sparse one, by compressed rows or columns."""
    how: dict[str, Any] = {"device": parts[2].device, "layout": layout, "check_invariants": False}
    return torch.sparse_compressed_tensor(*parts, shape, **how).requires_grad_(grad)


def nested(grad: bool, values: Any, sizes: Any, strides: Any, offsets: Any) -> Any:
    """A nested one, over one buffer."""
    return torch._nested_view_from_buffer(values, sizes, strides, offsets).requires_grad_(grad)


def as_parameter(data: Any, grad: bool, kind: Any = torch.nn.Parameter) -> Any:
    """A parameter over that tensor, or what is derived from that."""
    return torch.Tensor._make_subclass(kind, data, grad)


def update(made: Any, attributes: dict[str, Any]) -> None:
    """With the attributes that it had."""
    made.__dict__.update(attributes)


def as_storage(number: int) -> Any:
    """The memory itself."""
    whole, _, _ = incoming().part(number, 1, _storage)
    return whole


def _storage(memory: Any) -> Any:
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def as_typed(plain: Any, kind: Any) -> Any:
    """The memory itself, with a type."""
    return torch.storage.TypedStorage(wrap_storage=plain, dtype=kind, _internal=True)
