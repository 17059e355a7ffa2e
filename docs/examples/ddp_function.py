"""Train a small model by several processes with torch.distributed (gloo, CPU).

It is a function instead of a script, and needs `pip install torch numpy`.

python docs/examples/ddp_function.py
python docs/examples/ddp_function.py --crash-rank 1

The workers are forked from a small process that has imported torch once; what they
return, or raise, comes back.
"""

import argparse
import asyncio
import sys

import torch
import torch.distributed as dist
from torch import nn

from aioelastic import Function, supervise

RATE = 0.2


def points(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be learnt: z = sin(x) + cos(y), at random places."""
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    return x, torch.sin(x[:, :1]) + torch.cos(x[:, 1:])


def train(steps: int, crash_rank: int | None) -> dict[str, object]:
    """What each rank does."""
    torch.set_num_threads(1)  # the workers share the CPUs
    dist.init_process_group(
        "gloo"
    )  # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model everywhere
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    loss_of = nn.MSELoss()
    x, z = points(
        seed=1 + rank, count=512
    )  # each rank learns from points of its own ...
    held_out = points(seed=0, count=512)  # ... and is judged by the same ones

    def judge() -> float:
        with torch.no_grad():
            return float(loss_of(model(held_out[0]), held_out[1]))

    first = judge()
    for step in range(steps):
        if rank == crash_rank and step == 5:
            raise RuntimeError(f"rank {rank} was told to crash at step {step}")
        loss_of(model(x), z).backward()
        with torch.no_grad():
            for weights in model.parameters():
                dist.all_reduce(weights.grad)  # the sum over all ranks
                weights -= RATE / size * weights.grad
                weights.grad.zero_()
        if step % 50 == 0:
            print(f"step {step} loss {judge():.6f}")
    last = judge()
    dist.destroy_process_group()
    # numpy arrays travel by shared memory, tensors would be pickled whole
    return {
        "first": first,
        "last": last,
        "weights": [one.detach().numpy() for one in model.parameters()],
    }


async def main(n: int, steps: int, crash_rank: int | None) -> None:
    result = await supervise(
        Function(train, steps, crash_rank), n, preload=["torch"], check=False
    )
    if result.first_failure is not None:
        sys.exit(result.first_failure.describe())
    for one in result:
        print(
            f"rank {one.rank}: first_loss={one.value['first']!r} "
            f"last_loss={one.value['last']!r}"
        )
    size = sum(weights.size for weights in result[0].value["weights"])
    print(f"a model of {size} weights, trained in {result.duration:.1f} s")


if __name__ == "__main__":  # the workers import this file to find `train`
    parser = argparse.ArgumentParser(
        description="A small model, trained by several processes."
    )
    parser.add_argument("-n", type=int, default=2, help="how many workers")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crash-rank", type=int, help="this rank raises at step 5")
    args = parser.parse_args()
    asyncio.run(main(args.n, args.steps, args.crash_rank))
