"""One dataset, read by several workers, in memory once; it needs `pip install numpy`.

python docs/examples/dataset.py -n 4 --mib 256

Linux counts a page that n processes map as 1/n in each (PSS): the sum over all shows how often the data is there.
"""

import argparse
import asyncio
from typing import Any

import numpy

import aioelastic
from aioelastic import Function, Logs, Std, sharing


def pss() -> int:
    """What this process uses of shared memory, in KiB, each page divided by how many processes map it."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss_Shmem:"))


def work(data: Any) -> float:
    """Reads all of it, and says what it costs while the others have it too."""
    array = numpy.asarray(data)
    total = float(array.sum())
    sharing.send("read")
    sharing.receive()  # until all have
    sharing.send(pss())
    sharing.receive()
    return total + aioelastic.rank()


async def main(n: int, mib: int) -> None:
    data = sharing.empty(mib * 2**20 // 8, "float64")
    numpy.asarray(data)[:] = 1
    async with aioelastic.Group(Function(work, data), n=n, preload=["numpy"], logs=Logs(tee=Std.NONE)) as group:
        for rank in range(n):
            await group[rank].receive()
        costs = []
        for rank in range(n):
            await group[rank].send("all have read")
        for rank in range(n):
            costs.append(await group[rank].receive() / 1024)
        mine = pss() / 1024
        for rank in range(n):
            await group[rank].send("done")
        result = await group.wait()
    print(f"the dataset: {mib} MiB; read by {n} workers, total {result[0].value:.0f}")
    for rank, cost in enumerate(costs):
        print(f"worker {rank}: {cost:.0f} MiB")
    print(f"here: {mine:.0f} MiB; all together: {sum(costs) + mine:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=4, help="workers")
    parser.add_argument("--mib", type=int, default=256, help="size of the dataset")
    args = parser.parse_args()
    asyncio.run(main(args.n, args.mib))
