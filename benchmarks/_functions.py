"""What the workers of `functions.py`, `lag.py` and `chaos.py` run, ours and its peers'. It imports
little: each of them imports it anew."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False  # typing itself takes 5 ms to import
if TYPE_CHECKING:
    from typing import Any


def square(number: int) -> int:
    return number * number


def with_torch(number: int) -> float:
    import torch

    return float((torch.ones(8) * number).sum())


def array(size: int) -> tuple[Any, float]:
    """An array of that many bytes, and when it was done."""
    import numpy

    made = numpy.ones(size, dtype=numpy.uint8)
    return made, time.perf_counter()


def read(made: Any) -> int:
    """One byte of each of its pages: only now is all of it in this process."""
    return int(made[::4096].sum())


def with_torch_at_gate(home: str) -> float:
    """Stay until the gate opens (`_common.Gate`)."""
    total = with_torch(2)
    with open(os.path.join(home, "gate"), "rb") as gate:
        with open(os.path.join(home, "ready"), "wb", buffering=0) as ready:
            ready.write(b".")
        gate.read()
    return total


def fails_once() -> int:
    """Raises in its first attempt; after that tells when it ran."""
    ran = time.monotonic_ns()
    import aioelastic

    if aioelastic.attempt() == 0:
        raise RuntimeError("the first attempt fails")
    with_torch(2)
    return ran


def takes_and_sends(array: Any, queue: Any) -> None:
    """Has an array of its supervisor's, and one of its own that it sends and puts; nobody takes it."""
    import signal

    from aioelastic import sharing

    mine = sharing.copy(array)
    sharing.send((mine, array))
    queue.put_sync((array, mine))
    signal.pause()


def returns_it(array: Any) -> Any:
    return array


def leaves_floods(children: int, large: bool) -> None:
    """Ends while its children, which have its channel, send there as fast as they can."""
    import pickle
    import socket

    from aioelastic.child.worker import context

    channel = context.channel
    assert channel is not None
    channel.setblocking(True)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)  # as much as the system allows
    packet = b"O\0" + pickle.dumps((bytes(30_000 if large else 10),))
    began, begins = os.pipe()
    for _ in range(children):
        if os.fork() == 0:
            try:
                os.write(begins, b".")
                while True:
                    channel.send(packet)
            except OSError:
                os._exit(0)
    for _ in range(children):
        os.read(began, 1)
    time.sleep(0.05)  # they flood while it lives, too
    os._exit(0)


def forks_on() -> None:
    """Fork 200 times a second, each second one into a session of its own."""
    print("up", flush=True)
    while True:
        if os.fork() == 0:
            if os.getpid() % 2:
                os.setsid()
            time.sleep(1000)
            os._exit(0)
        time.sleep(0.005)
