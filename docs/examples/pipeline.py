"""A pipeline of processes with bounded queues; a stage that fails ends all, and why.

python docs/examples/pipeline.py numbers.txt
"""

import asyncio
import sys

from aioelastic import Function, GroupFailed, sharing, supervise


def read(path: str, lines: sharing.Queue) -> None:
    with open(path) as file:
        for line in file:
            lines.put_sync(line)
    lines.close()


def parse(lines: sharing.Queue, numbers: sharing.Queue) -> None:
    for line in lines:
        numbers.put_sync(float(line))
    numbers.close()


def add(numbers: sharing.Queue) -> float:
    return sum(numbers)


async def main(path: str) -> None:
    lines, numbers = sharing.Queue(maxsize=8), sharing.Queue(maxsize=8)
    stages = [
        Function(read, path, lines),
        Function(parse, lines, numbers),
        Function(add, numbers),
    ]
    try:
        result = await supervise(stages)
    except GroupFailed as failed:
        sys.exit(str(failed.exceptions[0]))
    print("sum", result[-1].value)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
