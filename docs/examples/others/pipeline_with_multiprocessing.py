"""The same as ../pipeline.py with multiprocessing."""

import sys
import traceback
from collections.abc import Callable
from multiprocessing import Process, Queue, SimpleQueue
from multiprocessing.connection import wait
from typing import Any


def read(path: str, lines: Queue) -> None:
    with open(path) as file:
        for line in file:
            lines.put(line)
    lines.put(None)


def parse(lines: Queue, numbers: Queue) -> None:
    for line in iter(lines.get, None):
        numbers.put(float(line))
    numbers.put(None)


def add(numbers: Queue, sums: SimpleQueue) -> None:
    sums.put(sum(iter(numbers.get, None)))


def stage(errors: SimpleQueue, function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except Exception:
        errors.put(f"{function.__name__} failed: {traceback.format_exc()}")
        sys.exit(1)


def main(path: str) -> None:
    lines, numbers, sums, errors = Queue(8), Queue(8), SimpleQueue(), SimpleQueue()
    # daemons are ended with this program, unless that is ended by a signal
    stages = [
        Process(target=stage, args=(errors, read, path, lines), daemon=True),
        Process(target=stage, args=(errors, parse, lines, numbers), daemon=True),
        Process(target=stage, args=(errors, add, numbers, sums), daemon=True),
    ]
    for one in stages:
        one.start()
    running = {one.sentinel: one for one in stages}
    while running:
        for sentinel in wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode != 0:
                died = f"{ended.name} failed: exit code {ended.exitcode}"
                sys.exit(died if errors.empty() else errors.get())
    print("sum", sums.get())


if __name__ == "__main__":
    main(sys.argv[1])
