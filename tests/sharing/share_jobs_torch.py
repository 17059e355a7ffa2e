"""Functions that workers run in tests of sharing with torch."""

from __future__ import annotations

from typing import Any

import torch

from aioelastic import sharing


def fill() -> None:
    whole, column = sharing.receive()
    whole.fill_(4)
    sharing.send((bool((column == 4).all()), sharing.is_shared(whole)))
    sharing.receive()
    sharing.send(float(column[0]))


def add(x: Any, number: int) -> None:
    x += number


def fills_and_returns(x: Any, number: int, strategy: Any) -> Any:
    sharing.configure(strategy=strategy)
    x.fill_(4)
    y = torch.from_dlpack(sharing.empty((2, 2), "float32")) if number % 2 else torch.empty(2, 2)
    return y.fill_(number)


def leaf() -> None:
    x = sharing.receive()
    told = (x.requires_grad, x.is_leaf, x.grad is not None, type(x).__name__)
    x.data.fill_(1)
    sharing.send(told)


def backward() -> list[float]:
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad is not None
    return list(x.grad.tolist())


class Plain(torch.Tensor):
    """A subclass that adds nothing."""
