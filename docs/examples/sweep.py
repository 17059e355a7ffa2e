"""A sweep over parameters: some trials fail, all others go on, a table at the end.

python docs/examples/sweep.py
"""

import ctypes
from concurrent.futures import as_completed
from itertools import product

from aioelastic import WorkerExecutor

TRIALS = list(product([0.01, 0.1, 0.5, 1.0], [2, 4, 6]))


def trial(rate: float, power: int) -> float:
    """Minimise x**power by gradient descent."""
    x = 2.0
    if (rate, power) == (0.5, 2):
        ctypes.string_at(0)  # as a library of C with a bug does
    for _ in range(100):
        x -= rate * power * x ** (power - 1)  # with large rates OverflowError
    return x**power


if __name__ == "__main__":
    table = {}
    with WorkerExecutor(4, task_timeout=600) as executor:
        trials = {executor.submit(trial, *one): one for one in TRIALS}
        for done in as_completed(trials):
            table[trials[done]] = repr(done.exception() or done.result())
            print(len(table), "of", len(TRIALS), "done:", *trials[done])
    for rate, power in TRIALS:
        print(f"{rate:5} {power:2} {table[rate, power]}")
