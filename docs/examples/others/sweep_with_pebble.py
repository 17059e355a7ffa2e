"""The same as ../sweep.py with pebble.

Of ProcessPoolExecutor, multiprocessing.Pool and loky's executor, a crash of one trial
takes those that run and wait with it, or is never told.
"""

import ctypes
import signal
from concurrent.futures import as_completed
from itertools import product

from pebble import ProcessExpired, ProcessPool

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
    with ProcessPool(4) as pool:
        trials = {pool.schedule(trial, one, timeout=600): one for one in TRIALS}
        for done in as_completed(trials):
            error = done.exception()
            if isinstance(error, ProcessExpired) and error.exitcode < 0:
                name = signal.Signals(-error.exitcode).name
                table[trials[done]] = f"died (pid {error.pid}): {name}"
            else:
                table[trials[done]] = repr(error or done.result())
            print(len(table), "of", len(TRIALS), "done:", *trials[done])
    for rate, power in TRIALS:
        print(f"{rate:5} {power:2} {table[rate, power]}")
