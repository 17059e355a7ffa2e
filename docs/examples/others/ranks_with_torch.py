"""The same as ../ranks.py with torch.multiprocessing."""

import sys
from typing import Any

import torch.multiprocessing as mp


def work(rank: int, n: int, numbers: list[int], values: Any) -> None:
    values.put((rank, sum(100 // one for one in numbers[rank::n])))


def main(n: int, numbers: list[int]) -> None:
    queue, values = mp.get_context("spawn").SimpleQueue(), {}
    context = mp.spawn(work, (n, numbers, queue), nprocs=n, join=False)
    try:
        ended = False
        while not ended:
            ended = context.join(timeout=0.1)
            while not queue.empty():  # or a rank would wait for room for ever
                rank, value = queue.get()
                values[rank] = value
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as failed:
        sys.exit(f"rank {failed.error_index} failed: {failed}")
    print([values[rank] for rank in range(n)])


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(one) for one in sys.argv[2:]])
