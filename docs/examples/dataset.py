"""Workers train on one dataset that is in memory once; it needs `pip install numpy`.

python docs/examples/dataset.py -n 4 --mib 256

A linear model by gradient descent: in each step each worker takes another part of the
rows, and all gradients are averaged here. Linux counts a page that n processes map as
1/n in each (PSS): the sum over all shows how often the data is there.
"""

import argparse
import asyncio
from typing import Any

import numpy

import aioelastic
from aioelastic import Function, Logs, Std, sharing

COLUMNS = 16


def pss() -> int:
    """What this process uses of shared memory, in KiB.

    Each page is divided by how many processes map it.
    """
    with open("/proc/self/smaps_rollup") as file:
        return next(
            int(line.split()[1]) for line in file if line.startswith("Pss_Shmem:")
        )


def work(table: Any) -> None:
    """One gradient for each weights that come.

    Then what it costs to have the data while the others have it too.
    """
    rank, n = aioelastic.rank(), aioelastic.world_size()
    parts = numpy.array_split(numpy.asarray(table), n)
    step = 0
    while (weights := sharing.receive()) is not None:
        rows = parts[(rank + step) % n]  # a view: nothing is copied
        features, target = rows[:, :-1], rows[:, -1]
        sharing.send(features.T @ (features @ weights - target) / len(rows))
        step += 1
    sharing.send(pss())
    sharing.receive()


async def main(n: int, mib: int, steps: int) -> None:
    table = sharing.empty((mib * 2**20 // 8 // COLUMNS, COLUMNS), "float64")
    rows, truth = numpy.asarray(table), numpy.arange(1.0, COLUMNS)
    random = numpy.random.default_rng(0)
    for block in numpy.array_split(
        rows, mib
    ):  # features, and in the last column the target
        block[:, :-1] = random.standard_normal((len(block), COLUMNS - 1))
        block[:, -1] = block[:, :-1] @ truth
    weights = numpy.zeros(COLUMNS - 1)
    async with aioelastic.Group(
        Function(work, table), n=n, preload=["numpy"], logs=Logs(tee=Std.NONE)
    ) as group:
        workers = [group[rank] for rank in range(n)]
        for _ in range(steps):
            for worker in workers:
                await worker.send(weights)
            weights = (
                weights - 0.5 * sum([await worker.receive() for worker in workers]) / n
            )
        for worker in workers:
            await worker.send(None)
        costs = [await worker.receive() / 1024 for worker in workers]
        mine = pss() / 1024
        for worker in workers:
            await worker.send("done")
        await group.wait()
    error = abs(weights - truth).max()
    print(
        f"the dataset: {mib} MiB; {n} workers trained {steps} steps on it, "
        f"the largest error is {error:.4f}"
    )
    for rank, cost in enumerate(costs):
        print(f"worker {rank}: {cost:.0f} MiB")
    print(f"here: {mine:.0f} MiB; all together: {sum(costs) + mine:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=4, help="workers")
    parser.add_argument("--mib", type=int, default=256, help="size of the dataset")
    parser.add_argument("--steps", type=int, default=20, help="of gradient descent")
    args = parser.parse_args()
    asyncio.run(main(args.n, args.mib, args.steps))
