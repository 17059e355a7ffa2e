"""A pipeline of frames: one process makes them, two work on them, one shows them.

It needs `pip install numpy`.

python docs/examples/frames.py --frames 60

A frame is made in shared memory and goes through three processes without being copied.
The queues are short, so a slow stage slows the camera down, and memory is used again.
"""

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy

from aioelastic import Function, Group, Logs, Std, sharing

HEIGHT, WIDTH = 720, 1280


def camera(raw: Any, count: int) -> int:
    for number in range(count):
        frame = sharing.empty((HEIGHT, WIDTH, 3), "uint8")
        numpy.asarray(frame)[:] = number % 128
        raw.put_sync((number, frame))
    raw.close()
    return sharing.stats().made


def brighten(raw: Any, ready: Any) -> int:
    done = 0
    for number, frame in raw:
        pixels = numpy.asarray(frame)
        pixels += 100
        ready.put_sync((number, frame))
        done += 1
    return done


def pss(pids: Iterable[int]) -> float:
    """What these use of shared memory together, in MiB.

    A page that several have is counted once.
    """
    total = 0
    for pid in pids:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/smaps_rollup") as file,
        ):  # it may have done its part
            total += next(
                int(line.split()[1]) for line in file if line.startswith("Pss_Shmem:")
            )
    return total / 1024


async def main(count: int) -> None:
    raw, ready = sharing.Queue(maxsize=4), sharing.Queue(maxsize=4)
    stages = [
        Function(camera, raw, count),
        Function(brighten, raw, ready),
        Function(brighten, raw, ready),
    ]
    right, early, late = 0, 0.0, 0.0
    began = time.perf_counter()
    async with Group(stages, preload=["numpy"], logs=Logs(tee=Std.NONE)) as group:
        running = asyncio.create_task(group.wait())
        running.add_done_callback(lambda _: ready.close())
        async for number, frame in ready:
            right += bool((numpy.asarray(frame) == number % 128 + 100).all())
            if right == max(count // 5, 1):
                early = late = pss((os.getpid(), *group.pids.values()))
            elif right == count // 2:
                late = pss((os.getpid(), *group.pids.values()))
        result = await running
    took = time.perf_counter() - began
    made, *done = (one.value for one in result)
    print(f"{right} frames of {HEIGHT}x{WIDTH} came through, none was copied")
    print(f"by worker 1: {done[0]}, by worker 2: {done[1]}, segments of memory: {made}")
    rate = (
        4 * count * HEIGHT * WIDTH * 3 / took / 1e9
    )  # written, read, written and read
    print(
        f"{took:.1f} s, {rate:.1f} GB/s; "
        f"shared memory of all: {early:.0f} MiB, later {late:.0f} MiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=60, help="how many")
    asyncio.run(main(parser.parse_args().frames))
