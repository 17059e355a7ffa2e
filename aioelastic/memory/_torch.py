"""torch's tensors in messages, where torch is loaded: what they are made of, and how they are made again.

As torch.multiprocessing does it (torch/multiprocessing/reductions.py): a leaf keeps `requires_grad`, a `Parameter`
stays one, gradients and hooks stay behind (of hooks torch warns), and a tensor that is not a leaf is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import warn_if_has_hooks

from ._dlpack import contiguous
from ._errors import NotShareable
from ._message import bounds, incoming

if TYPE_CHECKING:
    from ._message import Outgoing

_SPARSE = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def reducers(message: Outgoing) -> dict[type, Any]:
    """How they are reduced in this message."""

    def tensor(one: Any) -> Any:
        if one.requires_grad and not one.is_leaf:
            raise NotShareable(
                "a tensor that requires grad and is not a leaf: what it was computed from stays in this process; "
                "send x.detach()"
            )
        warn_if_has_hooks(one)
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
            return one.__reduce_ex__(5)
        shape, steps, kind = tuple(one.shape), one.stride(), one.dtype
        if one.device.type == "meta" or not one.numel():
            return (without_memory, (one.requires_grad, shape, steps, kind, one.device.type))
        if one.is_conj() or one.is_neg():
            one = one.detach().resolve_conj().resolve_neg().requires_grad_(one.requires_grad)
            steps = one.stride()
        size = one.element_size()
        strides = tuple(step * size for step in steps)
        address = one.data_ptr()
        low, high = bounds(address, shape, strides, size)

        def tight() -> tuple[int, tuple[int, ...], Any]:
            copied = one.detach().contiguous()
            return copied.data_ptr(), contiguous(shape, size), copied

        number = message.ref(low, high, one.nbytes, one, tight, one.untyped_storage()._cdata)
        return (strided, (one.requires_grad, number, shape, strides, kind))

    def parameter(one: Any) -> Any:
        warn_if_has_hooks(one)
        return (as_parameter, (one.detach(), one.requires_grad))

    def storage(one: Any) -> Any:
        if one.device.type == "meta":
            raise NotShareable("a storage of the meta device has no memory; send a meta tensor")
        if one.device.type != "cpu":
            return one.__reduce_ex__(5)
        if not one.nbytes():
            return (torch.UntypedStorage, (0,))
        low = one.data_ptr()
        return (as_storage, (message.ref(low, low + one.nbytes(), one.nbytes(), one, whole=one._cdata),))

    return {
        torch.Tensor: tensor,
        torch.nn.Parameter: parameter,
        torch.UntypedStorage: storage,
        torch.storage.TypedStorage: lambda one: (as_typed, (one._untyped_storage, one.dtype)),
    }


def strided(grad: bool, number: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: Any) -> Any:
    """Over the memory of the message."""
    size = kind.itemsize
    whole, at, others = incoming().part(number, size, _storage)
    steps = tuple(step // size for step in others or strides)
    return torch.empty(0, dtype=kind).set_(whole, at, shape, steps).requires_grad_(grad)


def without_memory(grad: bool, shape: tuple[int, ...], steps: tuple[int, ...], kind: Any, device: str) -> Any:
    """An empty tensor, or one of the meta device."""
    return torch.empty_strided(shape, steps, dtype=kind, device=device, requires_grad=grad)


def coo(grad: bool, indices: Any, values: Any, shape: tuple[int, ...], coalesced: bool) -> Any:
    """A sparse one, by coordinates."""
    made = torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=False)
    return made.requires_grad_(grad)


def compressed(grad: bool, parts: tuple[Any, Any, Any], shape: tuple[int, ...], layout: Any) -> Any:
    """A sparse one, by compressed rows or columns."""
    made = torch.sparse_compressed_tensor(*parts, shape, layout=layout, check_invariants=False)
    return made.requires_grad_(grad)


def nested(grad: bool, values: Any, sizes: Any, strides: Any, offsets: Any) -> Any:
    """A nested one, over one buffer."""
    return torch._nested_view_from_buffer(values, sizes, strides, offsets).requires_grad_(grad)


def as_parameter(data: Any, grad: bool) -> Any:
    """A parameter over that tensor."""
    return torch.nn.Parameter(data, requires_grad=grad)


def as_storage(number: int) -> Any:
    """The memory itself."""
    whole, _, _ = incoming().part(number, 1, _storage)
    return whole


def _storage(memory: Any) -> Any:
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def as_typed(plain: Any, kind: Any) -> Any:
    """The memory itself, with a type."""
    return torch.storage.TypedStorage(wrap_storage=plain, dtype=kind, _internal=True)  # type: ignore[no-untyped-call]
