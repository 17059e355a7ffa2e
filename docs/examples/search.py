"""Search for the best model of noisy points by several processes.

It needs `pip install numpy`.

python docs/examples/search.py

Each worker takes its share of the candidates and returns what it found; the caller
hears of each share the moment its worker has ended.
"""

import argparse
import asyncio
from typing import NamedTuple

import numpy

import aioelastic
from aioelastic import Function, Group

DEGREES = range(1, 10)
PENALTIES = (0.0, 1e-6, 1e-4, 1e-2, 1.0)
CANDIDATES = [(degree, penalty) for degree in DEGREES for penalty in PENALTIES]
PARTS = 5  # of the points; each is held out once


class Found(NamedTuple):
    error: float
    degree: int
    penalty: float


def error_of(x: numpy.ndarray, y: numpy.ndarray, degree: int, penalty: float) -> float:
    """Mean squared error on held-out points of a polynomial fitted to the others."""
    powers = numpy.vander(x, degree + 1)
    part = numpy.arange(len(x)) % PARTS
    errors = []
    for held_out in range(PARTS):
        known = part != held_out
        a = powers[known]
        weights = numpy.linalg.solve(
            a.T @ a + penalty * numpy.eye(degree + 1), a.T @ y[known]
        )
        errors.append(numpy.mean((powers[~known] @ weights - y[~known]) ** 2))
    return float(numpy.mean(errors))


def search(x: numpy.ndarray, y: numpy.ndarray) -> list[Found]:
    """What one worker does: its share of the candidates, by its rank."""
    mine = CANDIDATES[aioelastic.rank() :: aioelastic.world_size()]
    return [Found(error_of(x, y, *one), *one) for one in mine]


async def main(n: int) -> None:
    draw = numpy.random.default_rng(0)
    x = draw.uniform(-1, 1, 2_000)
    y = numpy.sin(3 * x) + draw.normal(0, 0.1, len(x))
    found: list[Found] = []
    # one thread each, and it is to be said before numpy is imported: so in the group's
    # environment
    env = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    async with Group(Function(search, x, y), n, env=env, preload=["numpy"]) as group:
        async for rank, share in group.as_completed():
            found += share
            print(
                f"worker {rank}: {len(share)} candidates, best {min(share).error:.5f}"
            )
    print(f"\n{'degree':>6} {'penalty':>8} {'error':>8}")
    for one in sorted(found)[:5]:
        print(f"{one.degree:>6} {one.penalty:>8g} {one.error:>8.5f}")


if __name__ == "__main__":  # the workers import this file to find `search`
    parser = argparse.ArgumentParser(description="A parallel search.")
    parser.add_argument("-n", type=int, default=4, help="how many workers")
    asyncio.run(main(parser.parse_args().n))
