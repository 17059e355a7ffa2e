"""Peers of function workers, each in a process of its own that is told by `functions.py` what to do.

So each has a main module that imports next to nothing (multiprocessing imports it in every worker), a fork server of
its own (multiprocessing has one per process), and no torch that it did not ask for.

python _function_peers.py NAME     then one JSON list of arguments per line; one line with the answer to each
"""

from __future__ import annotations

import sys
import time
from functools import partial

import _functions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


PRELOADED = ", torch preloaded"


def send(pipe: Any, fn: Callable[[int], Any], number: int) -> None:
    pipe.send(fn(number))
    pipe.close()


def put(number: int, queue: Any) -> None:
    queue.put(_functions.with_torch(number))


def hold(number: int, home: str) -> None:
    _functions.with_torch_at_gate(home)


def multiprocessing(method: str, fn: Callable[[int], Any], preload: list[str]) -> Callable[[int], float]:
    """n processes, each with a pipe for its result; the server of `"forkserver"` stays warm."""
    import multiprocessing

    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(preload)

    def run(n: int) -> float:
        began = time.perf_counter()
        started = []
        for number in range(n):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=send, args=(theirs, fn, number))
            process.start()
            theirs.close()
            started.append((process, ours))
        values = [pipe.recv() for _, pipe in started]
        for process, pipe in started:
            process.join()
            pipe.close()
        took = time.perf_counter() - began
        assert values == [fn(number) for number in range(n)] or fn is not _functions.square
        return took

    return run


def torch(method: str, preload: list[str]) -> Callable[[int], float]:
    """As `multiprocessing`, by torch's own `start_processes`."""
    import torch.multiprocessing as torch_mp

    context = torch_mp.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(preload)

    def run(n: int) -> float:
        began = time.perf_counter()
        queue = context.SimpleQueue()
        torch_mp.start_processes(put, args=(queue,), nprocs=n, start_method=method)
        values = sorted(queue.get() for _ in range(n))
        took = time.perf_counter() - began
        assert values == [8.0 * number for number in range(n)]
        return took

    return run


def torch_at_gate(method: str, preload: list[str]) -> Callable[..., list[int]]:
    """Starts n and tells their pids, and that of the fork server; called without arguments, waits for their end."""
    from multiprocessing import forkserver

    import torch.multiprocessing as torch_mp

    context: Any = None
    if method == "forkserver":
        torch_mp.get_context(method).set_forkserver_preload(preload)

    def run(n: int = 0, home: str = "") -> list[int]:
        nonlocal context
        if not n:
            while not context.join():
                pass
            return []
        context = torch_mp.start_processes(hold, args=(home,), nprocs=n, join=False, start_method=method)
        server: Any = forkserver._forkserver
        return [*context.pids(), *([server._forkserver_pid] if method == "forkserver" else [])]

    return run


def pool() -> Callable[[int], list[float]]:
    """A warm `ProcessPoolExecutor` that returns an array: seconds of the whole, and from its return to having it."""
    from concurrent.futures import ProcessPoolExecutor

    executor = ProcessPoolExecutor(max_workers=1)

    def run(size: int) -> list[float]:
        began = time.perf_counter()
        made, returned = executor.submit(_functions.array, size).result()
        assert _functions.read(made) == -(-size // 4096)
        now = time.perf_counter()
        return [now - began, now - returned]

    return run


def ours() -> Callable[[int], float]:
    """Not a peer: what our own work costs a loop in another process."""
    import asyncio

    from aioelastic import Function, Logs, Std, supervise

    def run(n: int) -> float:
        began = time.perf_counter()
        asyncio.run(supervise(Function(_functions.square, 3), n, logs=Logs(tee=Std.NONE)))
        return time.perf_counter() - began

    return run


def with_torch(method: str, preload: list[str]) -> Callable[[int], float]:
    """A function that needs torch, by multiprocessing."""
    return multiprocessing(method, _functions.with_torch, preload)


PEERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "spawn": lambda: multiprocessing("spawn", _functions.square, []),
    "forkserver": lambda: multiprocessing("forkserver", _functions.square, []),
    "fork": lambda: multiprocessing("fork", _functions.square, []),
    **{
        f"{kind}, {method}{words}": partial(peer, method, preload)
        for kind, peer in (
            ("multiprocessing", with_torch),
            ("torch.multiprocessing", torch),
            ("at a gate", torch_at_gate),
        )
        for method, words, preload in (("spawn", "", []), ("forkserver", "", []), ("forkserver", PRELOADED, ["torch"]))
    },
    "ProcessPoolExecutor": pool,
    "ours": ours,
}


def main() -> None:
    import json

    run = PEERS[sys.argv[1]]()
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
