"""A program that is interrupted while its executor works, for `executor.py`.

python _interrupted.py ours|ProcessPoolExecutor SECONDS FIFO: twice as many tasks as workers, which say by a byte that
they have begun, and sleep.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial

from aioelastic import WorkerExecutor

WORKERS = 4
KINDS: dict[str, Callable[[int], Executor]] = {"ours": WorkerExecutor, "ProcessPoolExecutor": ProcessPoolExecutor}


def hold(seconds: float, fifo: str, _: int) -> None:
    with open(fifo, "wb", buffering=0) as ready:
        ready.write(b".")
    time.sleep(seconds)


if __name__ == "__main__":
    kind, seconds, fifo = sys.argv[1:]
    with KINDS[kind](WORKERS) as executor:
        list(executor.map(partial(hold, float(seconds), fifo), range(2 * WORKERS)))
