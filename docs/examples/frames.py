"""A pipeline of frames: one process makes them, two work on them in place, one shows them; `pip install numpy`.

python docs/examples/frames.py --frames 60

A frame is made in shared memory and goes through three processes without being copied. The queues are short, so a slow
stage slows the camera down, and memory is used again.
"""

import argparse
import asyncio
from typing import Any

import numpy

from aioelastic import Function, Logs, Std, sharing, supervise

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


async def main(count: int) -> None:
    raw, ready = sharing.Queue(maxsize=4), sharing.Queue(maxsize=4)
    stages = [Function(camera, raw, count), Function(brighten, raw, ready), Function(brighten, raw, ready)]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(supervise(stages, preload=["numpy"], logs=Logs(tee=Std.NONE)))
        running.add_done_callback(lambda _: ready.close())
        right = 0
        async for number, frame in ready:
            right += bool((numpy.asarray(frame) == number % 128 + 100).all())
    made, *done = (one.value for one in running.result())
    print(f"{right} frames of {HEIGHT}x{WIDTH} came through, none was copied")
    print(f"by worker 1: {done[0]}, by worker 2: {done[1]}, segments of memory: {made}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=60, help="how many")
    asyncio.run(main(parser.parse_args().frames))
