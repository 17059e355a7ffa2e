"""Each worker estimates pi from its own random points.

It needs nothing but the standard library, and no part of it knows aioelastic.

aioelastic run -n 4 --log-dir runs -- python3 docs/examples/hello.py
"""

import os
import random
import sys

POINTS = 200_000
STEPS = 4


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    points = random.Random(
        rank
    )  # another sequence for each worker, the same in each run
    print(f"worker {rank} of {size}, pid {os.getpid()}", file=sys.stderr)
    inside = 0
    for step in range(1, STEPS + 1):
        inside += sum(
            points.random() ** 2 + points.random() ** 2 < 1 for _ in range(POINTS)
        )
        print(f"step {step}/{STEPS}: pi is about {4 * inside / (step * POINTS):.4f}")


if __name__ == "__main__":
    main()
