"""torch's CUDA tensors in messages: as those of the CPU, over memory of the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack

from ..memory import NotShareable
from ..memory.dtypes import DTYPES
from ..memory.foreign_arrays import bounds
from ..memory.reducers import Reducer
from . import _driver
from ._array import DeviceArray
from ._block import take

Placed = Callable[[int, int, Any], tuple[int, int, str]]


def reducers(table: dict[type, Reducer], placed: Placed) -> dict[type, Reducer]:
    """How they are reduced; what is not on a GPU, or has parts, as `table` says."""
    plain, plain_storage = table[torch.Tensor], table[torch.UntypedStorage]

    def tensor(one: Any) -> Any:
        ours = one.device.type == "cuda" and one.layout is torch.strided and not one.is_nested and not one.is_quantized
        if not ours or (one.requires_grad and not one.is_leaf):
            return plain(one)
        shape, steps, kind = tuple(one.shape), one.stride(), one.dtype
        if not one.numel():
            uuid = _driver.device(str(one.device)).uuid
            return (empty, (one.requires_grad, shape, steps, kind, uuid))
        if one.is_conj() or one.is_neg():
            one = one.detach().resolve_conj().resolve_neg().requires_grad_(one.requires_grad)
            steps = one.stride()
        # what belongs to one storage is lent as one
        whole = one.untyped_storage()
        slot, offset, _ = placed(whole.data_ptr(), whole.data_ptr() + whole.nbytes(), whole)
        low, high = bounds(
            one.data_ptr(), shape, tuple(step * one.element_size() for step in steps), one.element_size()
        )
        return (strided, (one.requires_grad, slot, offset + low - whole.data_ptr(), high - low, shape, steps, kind))

    def storage(one: Any) -> Any:
        if one.device.type == "cuda":
            raise NotShareable("a storage of a GPU by itself; send a tensor over it")
        return plain_storage(one)

    return {torch.Tensor: tensor, torch.UntypedStorage: storage}


def strided(
    grad: bool, slot: int, offset: int, nbytes: int, shape: tuple[int, ...], steps: tuple[int, ...], kind: Any
) -> Any:
    """Over the memory of the message."""
    loan = take(slot)
    raw = DeviceArray(loan, offset, (nbytes,), (1,), DTYPES["uint8"], loan.block.where)
    memory = torch.utils.dlpack.from_dlpack(raw).untyped_storage()
    made = torch.empty(0, dtype=kind, device=memory.device).set_(memory, 0, shape, steps)
    return made.requires_grad_(grad)


def empty(grad: bool, shape: tuple[int, ...], steps: tuple[int, ...], kind: Any, uuid: str) -> Any:
    """One without elements."""
    where = f"cuda:{_driver.device(uuid).ordinal}"
    return torch.empty_strided(shape, steps, dtype=kind, device=where, requires_grad=grad)
