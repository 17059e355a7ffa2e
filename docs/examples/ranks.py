"""A function on n ranks, with arguments and values; the rank that failed is told.

python docs/examples/ranks.py 4 1 2 3 5 8 13
"""

import asyncio
import sys

from aioelastic import Function, GroupFailed, rank, supervise, world_size


def work(numbers: list[int]) -> int:
    return sum(100 // one for one in numbers[rank() :: world_size()])


async def main(n: int, numbers: list[int]) -> None:
    try:
        result = await supervise(Function(work, numbers), n)
    except GroupFailed as failed:
        sys.exit(str(failed.exceptions[0]))
    print([one.value for one in result])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), [int(one) for one in sys.argv[2:]]))
