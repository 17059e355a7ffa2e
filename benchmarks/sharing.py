"""Arrays between processes: private and shared ones, small ones, against memcpy, and a consumer that is killed.

A transfer is timed from the call that sends it to the acknowledgement of the process that has it. Ours goes between two
event loops (uvloop), which run all the time, as torch's threads do. torch's queue moves a private tensor into shared
memory in place, so it gets a new one each time. Shared arrays of all sizes take turns: whichever came first would be
the one that warms the machine up.
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import _sharing
import numpy
import psutil
from _common import Report, available, main, paired

from aioelastic import Function, Group, GroupFailed, Logs, Std, sharing
from aioelastic.launch import end_helpers

QUIET = Logs(tee=Std.NONE)
MIB = 2**20
ROOM = 8  # items in a queue
QUEUE, PIPE = "torch's Queue (file_descriptor)", "multiprocessing.Pipe"


class Ours:
    """A group of one, in an event loop that stands between two calls."""

    def __init__(self, job: Callable[..., Any], *arguments: Any) -> None:
        import uvloop

        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._group = Group(Function(job, *arguments), logs=QUIET, preload=["numpy"])
        self._runner.run(self._group.__aenter__())

    def __call__(self, value: Any) -> float:
        """Seconds until it is acknowledged."""
        return self.each(value, 1)[0]

    def each(self, value: Any, times: int) -> list[float]:
        """The same again and again."""
        return self._runner.run(self._send(value, times))

    async def _send(self, value: Any, times: int) -> list[float]:
        seen = []
        for _ in range(times):
            began = time.perf_counter()
            await self._group[0].send(value)
            await self._group[0].receive()
            seen.append(time.perf_counter() - began)
        return seen

    def many(self, value: Any, count: int) -> float:
        """Seconds for so many of it, acknowledged at the end."""
        return self._runner.run(self._many(value, count))

    async def _many(self, value: Any, count: int) -> float:
        began = time.perf_counter()
        send = self._group[0].send
        await send(count)
        for _ in range(count):
            await send(value)
        await self._group[0].receive()
        return time.perf_counter() - began

    @property
    def pid(self) -> int:
        pid = self._group[0].pid
        assert pid is not None
        return pid

    def close(self) -> None:
        try:
            self._runner.run(self._group.__aexit__(None, None, None))
        except GroupFailed:
            pass  # it was killed
        self._runner.close()


@contextmanager
def ours(job: Callable[..., Any], *arguments: Any) -> Iterator[Ours]:
    one = Ours(job, *arguments)
    try:
        yield one
    finally:
        one.close()


class Torch:
    """A process with a queue of torch's there and one back."""

    def __init__(self, answers: Callable[[Any, Any], None] = _sharing.torch_answers) -> None:
        import torch.multiprocessing

        context = torch.multiprocessing.get_context("spawn")
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        self._there, self._back = context.Queue(), context.Queue()
        self._process = context.Process(target=answers, args=(self._there, self._back))
        self._process.start()
        self(0)

    def __call__(self, value: Any) -> float:
        began = time.perf_counter()
        self._there.put(value)
        self._back.get()
        return time.perf_counter() - began

    def many(self, value: Any, count: int) -> float:
        began = time.perf_counter()
        self._there.put(count)
        for _ in range(count):
            self._there.put(value.clone())
        self._back.get()
        return time.perf_counter() - began

    def close(self) -> None:
        self._there.put(None)
        self._process.join()


class Pipe:
    """A process with a pipe."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=_sharing.pipe_answers, args=(other,))
        self._process.start()
        other.close()

    def __call__(self, value: Any) -> float:
        self._end.send_bytes(value.nbytes.to_bytes(8, "little"))
        self._end.recv_bytes()
        began = time.perf_counter()
        self._end.send_bytes(value.data)
        self._end.recv_bytes()
        return time.perf_counter() - began

    def close(self) -> None:
        self._end.send_bytes(b"\0")
        self._process.join()


class Samples:
    """Cases whose value is the median of several samples, all of which are kept."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}
        self._times: dict[str, int] = {}

    def case(self, name: str, times: int, take: Callable[[], list[float]]) -> Callable[[], float]:
        self._seen[name], self._times[name] = [], times

        def once() -> float:
            taken = take()
            self._seen[name] += taken
            return statistics.median(taken)

        return once

    def of(self, name: str, rounds: int) -> list[float]:
        """Without those of the rounds that warm up."""
        return self._seen[name][-rounds * self._times[name] :] if name in self._seen else []


def milliseconds(report: Report, seen: dict[str, list[float]], samples: Samples | None = None) -> None:
    for name, seconds in seen.items():
        kept = samples.of(name, len(seconds)) if samples else []
        report.add(name, "ms", [s * 1e3 for s in seconds], [s * 1e3 for s in kept])


def copied(to: Any, array: Any) -> float:
    """Seconds for one copy."""
    began = time.perf_counter()
    numpy.copyto(to, array)
    return time.perf_counter() - began


def rested(case: Callable[[], float]) -> Callable[[], float]:
    """After a pause, as what the case before has begun in other processes may still go on. All cases have it."""

    def begin() -> float:
        time.sleep(0.1)
        return case()

    return begin


def transfers(report: Report, sizes: dict[str, tuple[int, int, float]], torch: Any) -> None:
    with ours(_sharing.answers) as mine:
        theirs, pipe = (Torch() if torch else None), Pipe()
        try:
            for words, (size, rounds, least) in sizes.items():
                array = numpy.ones(size, "u1")
                name, peer, copy = f"ours, private {words}", f"{QUEUE}, private {words}", f"{PIPE}, {words}"
                times = max(1, min(20, 64 * MIB // size))  # small ones are short: a round is the median of some
                samples = Samples()
                cases: dict[str, Callable[[], float]] = {
                    name: samples.case(name, times, lambda array=array, times=times: mine.each(array, times))
                }
                if theirs is not None:
                    tensor = torch.from_numpy(array)
                    cases[peer] = samples.case(
                        peer, times, lambda tensor=tensor, times=times: [theirs(tensor.clone()) for _ in range(times)]
                    )
                if size == 64 * MIB:
                    cases[copy] = lambda array=array: pipe(array)
                alone, other = f"memcpy of {words}, nothing else", numpy.ones(size, "u1")
                cases[alone] = samples.case(
                    alone,
                    times,
                    lambda array=array, other=other, times=times: [copied(other, array) for _ in range(times)],
                )
                seen = paired({one: rested(case) for one, case in cases.items()}, rounds, warm=2)
                milliseconds(report, seen, samples)
                report.chart(
                    f"sharing-private-{words.replace(' ', '-')}", f"A private array of {words}, process to process",
                    cases, strip=f", private {words}", bounds=[alone],
                )  # fmt: skip
                work = f"a private array of {words}, process → process, acknowledged"
                report.ratio(work, f"≥ {least:g} × faster than {QUEUE}", least, "high", peer, name, ours=name)
                report.ratio(work, f"≥ 10 × faster than {PIPE}", 10, "high", copy, name, ours=name)
                limit = f"{words}: one memcpy by one thread takes {report.words(alone)}, ours {report.words(name)}"
                if theirs is not None:
                    limit += f", and torch's Queue {report.times(peer, alone)} as long as that memcpy"
                report.notes.append(limit)
            cases, samples = {}, Samples()
            for words, (size, _, _) in sizes.items():
                born = sharing.empty(size, "u1")
                numpy.asarray(born)[:] = 1
                # one is short: a round is the median of many
                name = f"ours, shared {words}"
                cases[name] = samples.case(name, 20, lambda born=born: mine.each(born, 20))
                if theirs is not None:
                    moved, name = torch.ones(size, dtype=torch.uint8).share_memory_(), f"{QUEUE}, shared {words}"
                    cases[name] = samples.case(name, 20, lambda moved=moved: [theirs(moved) for _ in range(20)])
            milliseconds(report, paired(cases, 10, warm=2), samples)
            report.chart(
                "sharing-shared", f"An array of {words} that is shared already, process to process",
                [name for name in cases if name.endswith(words)], strip=f", shared {words}",
            )  # fmt: skip
            for words in sizes:
                name, peer = f"ours, shared {words}", f"{QUEUE}, shared {words}"
                work = f"an array of {words} that is shared already, through two event loops, acknowledged"
                report.plain(work, "≤ 0.4 ms", 0.4, name)
                report.ratio(work, f"≥ 2 × faster than {QUEUE}", 2.0, "high", peer, name, ours=name)
            cases.clear()
            del born
            first, *_, last = [f"ours, shared {words}" for words in sizes]
            report.ratio(
                "a shared array, the largest against the smallest", "≤ 1.2 ×", 1.2, "low", last, first, ours=last
            )
        finally:
            pipe.close()
            if theirs is not None:
                theirs.close()


def small_ones(report: Report, count: int, few: int, torch: Any) -> None:
    array = numpy.arange(16, dtype="f4")
    with ours(_sharing.answers) as mine:
        processes = [psutil.Process(), psutil.Process(mine.pid)]
        mine.many(array, few)
        before = [(one.num_fds(), one.memory_info().rss) for one in processes]
        made = sharing.stats().made
        mine.many(array, count)
        after = [(one.num_fds(), one.memory_info().rss) for one in processes]
        report.add(
            "descriptors more after them",
            "descriptors",
            [float(sum(b[0] - a[0] for a, b in zip(before, after, strict=True)))],
        )
        report.add("MiB more after them", "MiB", [sum(b[1] - a[1] for a, b in zip(before, after, strict=True)) / MIB])
        report.add("segments made for them", "segments", [float(sharing.stats().made - made)])
        work = f"{count:,} sends of a small array"
        report.plain(work + ": descriptors", "0 more", 0, "descriptors more after them")
        report.plain(work + ": segments", "0 more", 0, "segments made for them")
        report.plain(work + ": memory of both processes", "≤ 4 MiB more", 4, "MiB more after them")
        name, peer = "ours, small arrays", f"{QUEUE}, small arrays"
        cases: dict[str, Callable[[], float]] = {name: lambda: few / mine.many(array, few)}
        theirs = Torch() if torch else None
        if theirs is not None:
            tensor = torch.arange(16, dtype=torch.float32)
            cases[peer] = lambda: few / theirs.many(tensor, few)
        for one, values in paired(cases, 5).items():
            report.add(one, "sends/s", values)
        report.chart("sharing-small", "Small private arrays, process to process", cases, strip=", small arrays")
        report.ratio("small private arrays, sends per second", f"≥ 2 × {QUEUE}'s", 2.0, "high", name, peer, ours=name)
        if theirs is not None:
            theirs.close()


@contextmanager
def their_queue(context: Any) -> Iterator[tuple[Callable[[Any], None], Callable[[], Any]]]:
    """`put` and `get` of two queues to a process that reads all and acknowledges."""
    there, back = context.Queue(maxsize=ROOM), context.Queue()
    process = context.Process(target=_sharing.reads_theirs, args=(there, back))
    process.start()
    yield there.put, back.get
    there.put(0)
    process.join()


@contextmanager
def our_queue() -> Iterator[tuple[Callable[[Any], None], Callable[[], Any]]]:
    there, back = sharing.Queue(maxsize=ROOM), sharing.Queue()
    with ours(_sharing.reads_ours, there, back):
        yield there.put_sync, back.get_sync
        there.put_sync(0)


def queues(report: Report, sizes: dict[str, tuple[int, int]], rounds: int, torch: Any) -> None:
    """One that puts, one that gets and reads; as many items may wait in each."""
    multi = "multiprocessing.Queue"
    with ExitStack() as stack:
        ends = {"ours": stack.enter_context(our_queue())}
        ends[multi] = stack.enter_context(their_queue(multiprocessing.get_context("spawn")))
        if torch:
            ends[QUEUE] = stack.enter_context(their_queue(torch.multiprocessing.get_context("spawn")))
        for words, (size, count) in sizes.items():
            array = numpy.ones(size, "u1")
            tensor = torch.from_numpy(array) if torch else None

            def rate(name: str, array: Any = array, tensor: Any = tensor, count: int = count) -> float:
                put, get = ends[name]
                began = time.perf_counter()
                put(count)
                for _ in range(count):
                    put(tensor.clone() if name == QUEUE else array)
                get()
                return count / (time.perf_counter() - began)

            cases = {name: partial(rate, name) for name in ends}
            what = f", queue of {words}"
            for name, values in paired(cases, rounds).items():
                report.add(name + what, "arrays/s", values)
            report.chart(
                f"queue-{words.replace(' ', '-')}", f"Arrays of {words} through a queue, and read",
                [name + what for name in cases], strip=what,
            )  # fmt: skip


def copies(report: Report, size: int, rounds: int) -> None:
    from aioelastic.child.wire import datagrams, messages

    array, other = numpy.ones(size, "u1"), numpy.ones(size, "u1")

    def message() -> float:
        began = time.perf_counter()
        _, fds = messages.encode(messages.OBJECT, (array,))
        took = time.perf_counter() - began
        datagrams.close(fds)
        return size / took / 1e9

    def memcpy() -> float:
        return size / copied(other, array) / 1e9

    words = f"{size // MIB} MiB"
    mine, peer = f"ours, a private array of {words} into a message", f"memcpy of {words}"
    for name, values in paired({mine: message, peer: memcpy}, rounds, warm=3).items():
        report.add(name, "GB/s", values)
    report.ratio("a private array into a message, warm", "≥ 0.8 × memcpy", 0.8, "high", mine, peer, ours=mine)


def killed(report: Report, size: int, rounds: int) -> None:
    name = f"a consumer of {size // MIB} MiB"

    def once() -> float:
        born = sharing.empty(size, "u1")
        with ours(_sharing.touches) as mine:
            mine(born)
            assert sharing.leases()
            began = time.perf_counter()
            os.kill(mine.pid, signal.SIGKILL)
            while sharing.leases():
                pass
            return (time.perf_counter() - began) * 1e3

    report.add(name, "ms", paired({name: once}, rounds)[name])
    report.plain(f"SIGKILL of {name} → its leases are back", "≤ 50 ms", 50, name)


def measure(quick: bool) -> Report:
    report = Report("sharing", 3 if quick else 15)
    torch: Any = None
    if not quick and available(report, "torch"):
        torch = importlib.import_module("torch")
    elif quick:
        report.skipped["torch"] = "not in a quick run"
    full = {"1 MiB": (MIB, 15, 4.0), "64 MiB": (64 * MIB, 15, 6.0), "1 GiB": (1024 * MIB, 5, 10.0)}
    transfers(report, {"1 MiB": (MIB, 3, 4.0), "2 MiB": (2 * MIB, 3, 4.0)} if quick else full, torch)
    sharing.trim()
    small_ones(report, 2000 if quick else 100_000, 500 if quick else 5000, torch)
    many = {"1 KiB": (1024, 2000), "64 KiB": (65536, 1000), "1 MiB": (MIB, 200), "64 MiB": (64 * MIB, 6)}
    queues(report, {"1 KiB": (1024, 50)} if quick else many, 2 if quick else 5, torch)
    sharing.trim()
    copies(report, (2 if quick else 512) * MIB, 3 if quick else 10)
    sharing.trim()
    killed(report, (2 if quick else 2048) * MIB, 2 if quick else 5)
    end_helpers()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # multiprocessing would leave it until the end
    return report


if __name__ == "__main__":
    main("sharing", measure)
