"""What runs in other processes for `gpu.py`: ours, and each peer's."""

from __future__ import annotations

from typing import Any

from aioelastic import sharing


async def answers() -> None:
    """An acknowledgement for each array, when it is mapped here."""
    while (value := await sharing.receive_async()) is not None:
        _touch(value)
        del value
        sharing.send(True)


def keeps() -> None:
    """Keeps an array, mapped, until it is killed."""
    kept = sharing.receive()
    _touch(kept)
    sharing.send(True)
    sharing.receive()


def _touch(value: Any) -> int:
    """Where it is in this process: to know that, it is mapped."""
    address: int = value.address if isinstance(value, sharing.SharedArray) else value.data_ptr()
    return address


def torch_answers(there: Any, back: Any) -> None:
    """As `answers`, by torch's queues."""
    while (value := there.get()) is not None:
        if not isinstance(value, int):
            value.data_ptr()
        del value
        back.put(True)
