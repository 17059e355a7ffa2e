"""Train a small model by several processes with torch.distributed (gloo, CPU).

It needs `pip install torch numpy`.

aioelastic run -n 2 --log-dir runs -- python3 docs/examples/ddp.py
aioelastic run -n 2 -- python3 docs/examples/ddp.py --crash-rank 1 --crash-step 5

Nothing here is special to aioelastic but `@record`, by which the exception itself
reaches the final report.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from aioelastic import record

RATE = 0.2


def points(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be learnt: z = sin(x) + cos(y), at random places."""
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    return x, torch.sin(x[:, :1]) + torch.cos(x[:, 1:])


@record
def main() -> None:
    parser = argparse.ArgumentParser(
        description="A small model, trained by several processes."
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crash-rank", type=int, help="this rank raises ...")
    parser.add_argument("--crash-step", type=int, default=5, help="... at this step")
    args = parser.parse_args()

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
    for step in range(args.steps):
        if rank == args.crash_rank and step == args.crash_step:
            raise RuntimeError(f"rank {rank} was told to crash at step {step}")
        loss_of(model(x), z).backward()
        with torch.no_grad():
            for weights in model.parameters():
                dist.all_reduce(weights.grad)  # the sum over all ranks
                weights -= RATE / size * weights.grad
                weights.grad.zero_()
        if step % 50 == 0:
            print(f"step {step} loss {judge():.6f}")
    print(
        f"done rank={rank} pid={os.getpid()} first_loss={first!r} last_loss={judge()!r}"
    )
    # at the end only, not in a `finally`: a rank that fails must not close its
    # connections before it is gone, or the others fail of that, and perhaps end first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
