"""What runs in other processes for `sharing.py`: ours, and each peer's."""

from __future__ import annotations

from typing import Any

from aioelastic import sharing


async def answers() -> None:
    """An acknowledgement for each object; for a number, one after so many more."""
    while (value := await sharing.receive_async()) is not None:
        if isinstance(value, int):
            for _ in range(value):
                await sharing.receive_async()
        del value
        sharing.send(True)


def touches() -> None:
    """Writes to all pages of an array and keeps it until it is killed."""
    kept = sharing.receive()
    view = memoryview(kept.buffer).cast("B")
    for at in range(0, len(view), 4096):
        view[at] = 1
    sharing.send(True)
    sharing.receive()


def reads(get: Any, put: Any) -> None:
    """Of each that many next arrays, a byte of each of its pages; then an acknowledgement."""
    while count := get():
        for _ in range(count):
            int(get()[::4096].sum())
        put(True)


def reads_ours(there: Any, back: Any) -> None:
    reads(there.get_sync, back.put_sync)


def reads_theirs(there: Any, back: Any) -> None:
    reads(there.get, back.put)


def torch_answers(there: Any, back: Any) -> None:
    """As `answers`, by torch's queues."""
    while (value := there.get()) is not None:
        if isinstance(value, int):
            for _ in range(value):
                there.get()
        del value
        back.put(True)


def pipe_answers(pipe: Any) -> None:
    """An acknowledgement for each message, read into memory that is warm."""
    into = bytearray(1)
    while size := int.from_bytes(pipe.recv_bytes(), "little"):
        if len(into) != size:
            into = bytearray(size)
        pipe.send_bytes(b".")
        pipe.recv_bytes_into(into)
        pipe.send_bytes(b".")
