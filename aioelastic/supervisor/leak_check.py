"""What is left of a group, as the kernel tells it: what makes `GroupResult.clean` true, or says why it is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from ..model.leftovers import Process, Remains
from ..model.results import Result
from ..processes import cgroups
from ..processes.census import Census, Left
from ..processes.proc_files import describe, in_words
from ..processes.strays import Stray
from ..processes.tcp_ports import holders, is_free, taken_by
from ..system import shared_memory_names
from ..system.deadlines import Deadline
from .cascade import sweep

if TYPE_CHECKING:
    from ..model.stop_policy import Stop


async def clear(
    census: Census,
    run_id: str,
    adopted: Callable[[], list[int]],
    deadline: Deadline,
    stop: Stop,
    on_found: Callable[[Process], None],
) -> list[Remains]:
    """After all workers: end the processes that they have left running, unless these shall stay (`Stop.scope`).

    Args:
        adopted: see `Census.left`.
        on_found: told once for each.

    Returns:
        those that are there all the same.
    """
    left = Left([], [])

    async def find() -> list[Stray]:
        nonlocal left
        left = await census.left(run_id, adopted, deadline.left())
        return await census.catch(left.ours, deadline.left())

    if stop.scope == "leader":
        there = await find()
        for one in there:
            on_found(one.process)
            one.close(census.loop)
    else:
        there = await sweep(find, deadline, stop, on_found)
    remains = [_still_runs(one.process, _rank(one.pid, one.lineage, run_id)) for one in there]
    remains += [_still_runs(describe(one.pid), _rank(one.pid, (), run_id)) for one in left.whose]
    if left.doubt:
        remains.append(Remains("unproven", f"whether other processes are left is not known: {left.doubt}"))
    return remains


def ports_left(ports: Iterable[int]) -> list[Remains]:
    """Those that are not free."""
    found = []
    for port in ports:
        if not is_free(port):
            who = holders(port)
            found.append(Remains("port", f"port {port} {taken_by(who)}", pid=who[0].pid if who else None))
    return found


def gpus_left(given: Collection[int | str], pids: Collection[int]) -> list[Remains]:
    """Memory of those GPUs that these processes have, by the driver's own books."""
    if not given:
        return []
    from .. import gpu  # takes 20 ms to load, which only those wait for who have one

    try:
        found = gpu.inventory()
    except (gpu.DeviceUnavailable, MemoryError) as exc:  # the latter: no thread can be had to ask
        return [_unproven(str(exc))]
    if why := gpu.why_unproven():
        return [_unproven(why)]
    left = []
    for wanted in given:
        if not any(gpu.meant(wanted, device) for device in found):
            left.append(_unproven(f"GPU {wanted} does not answer any more"))
    for device in found:
        if not any(gpu.meant(wanted, device) for wanted in given):
            continue
        if device.processes is None:
            left.append(_unproven(f"GPU {device.index} does not tell who uses it"))
        for one in device.processes or ():
            if one.pid in pids:
                words = f"{_amount(one.used)} of GPU {device.index} ({device.name}) is held by process {one.pid}"
                left.append(Remains("gpu", words, pid=one.pid))
    return left


def names_left() -> list[Remains]:
    """Named shared memory of processes that are gone, which could not be removed."""
    return [Remains("memory", f"shared memory {path} could not be removed") for path in shared_memory_names.sweep()]


def of_worker(result: Result) -> list[Remains]:
    """What its own result tells: that it would not die, or that somebody has its streams."""
    found = []
    if result.unkillable is not None:
        found.append(Remains("process", f"would not die: {result.unkillable}", result.rank, result.unkillable.pid))
    for name, out in (("stdout", result.stdout), ("stderr", result.stderr)):
        who = [one for one in map(describe, out.holders) if one.state not in "ZX?"]  # who has ended meanwhile has not
        found += [Remains("stream", f"{name} is still open in {in_words(one)}", result.rank, one.pid) for one in who]
    return found


def _unproven(why: str) -> Remains:
    return Remains("unproven", f"whether the workers' GPU memory is free is not known: {why}")


def _amount(used: int | None) -> str:
    return "memory" if used is None else f"{used / 2**20:,.0f} MiB"


def _still_runs(process: Process, rank: int | None = None) -> Remains:
    return Remains("process", f"{in_words(process)} still runs", rank, process.pid)


def _rank(pid: int, lineage: tuple[str, ...], run_id: str) -> int | None:
    for one in lineage:  # which is of that process's own choice
        if (ours := re.fullmatch(rf"{re.escape(run_id)}/([0-9]{{1,9}})/[0-9]+", one)) is not None:
            return int(ours[1])
    return cgroups.rank_of(pid, run_id)
