"""Who descends from this process, by /proc(5), and who once did, by a mark in the environment."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Container, Iterator
from pathlib import Path

from ..child.kernel.bounded_reads import slurp
from ..planning import TAG
from ..processes.census import lineage_of
from ..processes.proc_files import pids
from ..system.descriptors import shut


@contextlib.contextmanager
def marked() -> Iterator[str]:
    """Whatever is started in this block carries a mark of this process in its environment, and is found wherever it
    goes, unless it clears that. Groups in it pass it on. Nothing happens if it is there already."""
    before = os.environ.get(TAG)
    mark = f"tests-{os.getpid()}"
    if before is not None and mark in before.split(":"):
        yield mark
        return
    os.environ[TAG] = f"{before}:{mark}" if before else mark
    try:
        yield mark
    finally:
        if before is None:
            os.environ.pop(TAG, None)
        else:
            os.environ[TAG] = before


def descendants(of: int | None = None) -> dict[int, list[str]]:
    """pid → the fields of /proc/pid/stat from its name on, of all that descend from us, or from `of`; zombies too."""
    stats: dict[int, list[str]] = {}
    children: dict[int, list[int]] = {}
    for pid in pids():
        if (stat := read_stat(pid)) is not None:
            stats[pid] = stat
            children.setdefault(int(stat[2]), []).append(pid)
    found: dict[int, list[str]] = {}
    look = [os.getpid() if of is None else of]
    while look:
        for pid in children.get(look.pop(), ()):
            found[pid] = stats[pid]
            look.append(pid)
    return found


def read_stat(pid: int | str) -> list[str] | None:
    """Name, state, parent, group, session, … (proc(5)); None when it is gone. `pid` may be `"1/task/2"`."""
    text = slurp(f"/proc/{pid}/stat").decode(errors="replace")
    name, _, rest = text.partition("(")[2].rpartition(")")
    return [name, *rest.split()] if text else None


def strays(family: Container[int]) -> Iterator[tuple[str, str]]:
    """Identity and words of those with our mark that are none of `family`."""
    own = f"tests-{os.getpid()}"
    if own not in os.environ.get(TAG, "").split(":"):
        return
    for pid in pids():
        if pid in family or pid == os.getpid():
            continue
        if own in lineage_of(pid, TAG.encode()) and (stat := read_stat(pid)) and stat[1] not in "ZX":
            yield f"{pid} {stat[20]}", process(pid, stat)


def see_off(before: Container[str], seconds: float = 5.0) -> None:
    """Wait for guardians and resource trackers of multiprocessing whose program has ended: they end, and tidy up, just
    after it."""
    found = [(int(one.split()[0]), words) for one, words in strays(descendants()) if one not in before]
    there = [pid for pid, words in found if " from multiprocessing.resource_tracker import main" in words]
    there += [pid for pid, _ in found if (stat := read_stat(pid)) and stat[0] in ("aio-guardian", "aio-keeper")]
    until = time.monotonic() + seconds
    for pid in there:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            ended.poll(max(until - time.monotonic(), 0) * 1000)
            shut(pidfd)


def process(pid: int, stat: list[str]) -> str:
    """One of them in words."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        command = b""
    words = " ".join(command.decode(errors="replace").split())[:200] or f"({stat[0]})"
    return f"{pid} {words}, a child of {stat[2]}"
