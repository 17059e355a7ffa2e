"""What is left of a group, as the kernel tells it: what makes `GroupResult.clean` true, or says why it is not."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from . import cgroups, shm
from .child._read import lines
from .errors import SpecError
from .outcome import Result
from .remains import Process, Remains
from .stop import Patience, sweep
from .watch import Census, Left, Stray, describe, socket_holders

if TYPE_CHECKING:
    from .gpu import Gpu
    from .spec import Stop

_LISTEN = b"0A"  # net/tcp_states.h, as proc_net_tcp(5) shows it
_SOCKETS = 1 << 28  # bytes of the kernel's table of them that are looked through: some 1.8 million


async def clear(
    census: Census,
    run_id: str,
    adopted: Callable[[], list[int]],
    patience: Patience,
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
        left = await census.left(run_id, adopted, patience.left())
        return await census.catch(left.ours, patience.left())

    if stop.scope == "leader":
        there = await find()
        for one in there:
            on_found(one.process)
            one.close(census.loop)
    else:
        there = await sweep(find, patience, stop, on_found)
    remains = [_still_runs(one.process, _rank(one.pid, one.lineage, run_id)) for one in there]
    remains += [_still_runs(describe(one.pid), _rank(one.pid, (), run_id)) for one in left.whose]
    if left.doubt:
        remains.append(Remains("unproven", f"whether other processes are left is not known: {left.doubt}"))
    return remains


def check_free(ports: Sequence[int]) -> None:
    """Whether a group's `ports` are its own to take. Raises `SpecError`, with who has it."""
    for at, port in enumerate(ports):
        if not is_free(port):
            remedy = "end that first, or use another port" if _listeners(port) else "use another port"
            raise SpecError(f"ports[{at}]", port, f"is taken{_by(holders(port))}", remedy)


def ports_left(ports: Iterable[int]) -> list[Remains]:
    """Those that are not free."""
    found = []
    for port in ports:
        if not is_free(port):
            who = holders(port)
            found.append(Remains("port", f"port {port} is taken{_by(who)}", pid=who[0].pid if who else None))
    return found


def check_gpus(wanted: Collection[int | str]) -> None:
    """Whether a group's GPUs are here, where that can be known. Raises `SpecError`."""
    if not wanted:
        return
    from . import gpu  # takes 20 ms to load, which only those wait for who have one

    try:
        found = gpu.devices()
    except gpu.DeviceUnavailable as exc:
        if exc.reason is gpu.Reason.NO_EXTRA:
            return
        raise SpecError("Placement.gpus", list(wanted), f"cannot be had: {exc}", "leave them out") from None
    for one in wanted:
        if not any(_is(one, number, device) for number, device in enumerate(found)):
            remedy = f"there are {len(found)}: {', '.join(device.uuid for device in found) or 'none'}"
            raise SpecError("Placement.gpus", one, "is not a GPU of this machine", remedy)


def gpus_left(given: Collection[int | str], pids: Collection[int]) -> list[Remains]:
    """Memory of those GPUs that these processes have, by the driver's own books."""
    if not given:
        return []
    from . import gpu

    try:
        found = gpu.devices()
    except gpu.DeviceUnavailable as exc:
        return [Remains("unproven", f"whether the workers' GPU memory is free is not known: {exc}")]
    return [
        Remains("gpu", f"{_amount(one.used)} of GPU {number} ({device.name}) is held by process {one.pid}", pid=one.pid)
        for number, device in enumerate(found)
        if any(_is(wanted, number, device) for wanted in given)
        for one in device.processes
        if one.pid in pids
    ]


def names_left() -> list[Remains]:
    """Named shared memory of processes that are gone, which could not be removed."""
    return [Remains("memory", f"shared memory {path} could not be removed") for path in shm.sweep()]


def of_worker(result: Result) -> list[Remains]:
    """What its own result tells: that it would not die, or that somebody has its streams."""
    found = []
    if result.unkillable is not None:
        found.append(Remains("process", f"would not die: {result.unkillable}", result.rank, result.unkillable.pid))
    for name, out in (("stdout", result.stdout), ("stderr", result.stderr)):
        who = [one for one in map(describe, out.holders) if one.state not in "ZX?"]  # who has ended meanwhile has not
        found += [Remains("stream", f"{name} is still open in {_words(one)}", result.rank, one.pid) for one in who]
    return found


def _is(wanted: int | str, number: int, device: Gpu) -> bool:
    return wanted in (number, device.uuid, *device.instances)


def _amount(used: int | None) -> str:
    return "memory" if used is None else f"{used / 2**20:,.0f} MiB"


def _still_runs(process: Process, rank: int | None = None) -> Remains:
    return Remains("process", f"{_words(process)} still runs", rank, process.pid)


def _rank(pid: int, lineage: tuple[str, ...], run_id: str) -> int | None:
    for one in lineage:  # which is of that process's own choice
        if (ours := re.fullmatch(rf"{re.escape(run_id)}/([0-9]{{1,9}})/[0-9]+", one)) is not None:
            return int(ours[1])
    return cgroups.rank_of(pid, run_id)


def is_free(port: int) -> bool:
    """Whether a server could take this TCP port at any address. What the kernel itself still keeps of a connection
    that was closed (TIME_WAIT) hinders nobody who sets SO_REUSEADDR, as servers do (socket(7))."""
    for family, where in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((where, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return False
            if exc.errno == errno.EACCES and _listeners(port):  # below 1024 for plain users: then by what listens
                return False
    return True


def holders(port: int) -> list[Process]:
    """The processes that listen there, as far as we may look."""
    return [describe(pid) for pid in socket_holders(_listeners(port))]


def _listeners(port: int) -> set[int]:
    """Inodes of the sockets that listen on a port, in this network namespace."""
    found = set()
    for name in ("tcp", "tcp6"):
        wanted = b":%04X" % port
        try:
            for line in lines(f"/proc/self/net/{name}", _SOCKETS):
                words = line.split()
                if words[3:4] == [_LISTEN] and words[1].endswith(wanted):
                    found.add(int(words[9]))
        except OSError:
            continue  # no IPv6
    return found


def _by(who: list[Process]) -> str:
    return f" by {', '.join(map(_words, who))}" if who else ""


def _words(process: Process) -> str:
    return f"process {process.pid} ({process.command or '?'})"
