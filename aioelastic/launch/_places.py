"""Whether the places that workers are to have can be had (`Placement`): asked of the system before anything starts."""

from __future__ import annotations

import os
import resource

from ..child._read import slurp
from ..errors import SpecError
from ..placement import LIMITS, Placement
from ._plan import LaunchPlan

_CAP_SYS_NICE, _CAP_SYS_RESOURCE = 23, 24  # capabilities(7)


def check_places(plan: LaunchPlan) -> None:
    """In a thread that nobody minds being moved about, and alone.

    Raises:
        SpecError: names the rank, the field and what this system has instead.
    """
    first: dict[Placement, int] = {}
    for one in plan.workers:
        if one.placement is not None:
            first.setdefault(one.placement, one.rank)
    for placement, rank in first.items():
        try:
            _check(placement)
        except SpecError as exc:
            raise SpecError(f"{exc.field} of rank {rank}", exc.value, exc.problem, exc.remedy) from None


def _check(place: Placement) -> None:
    status = slurp("/proc/thread-self/status", 65536).decode()
    if place.cpus is not None:
        _check_cpus(set(place.cpus))
    if place.nodes is not None:
        here = _told(status, "Mems_allowed_list")
        if here and not set(place.nodes) <= set(_numbers(here)):
            raise SpecError("Placement.nodes", place.nodes, "are not all nodes of this process", f"it has {here}")
    effective = int(_told(status, "CapEff") or "0", 16)
    if place.nice is not None and place.nice < os.getpriority(os.PRIO_PROCESS, 0):
        soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
        allowed = soft == resource.RLIM_INFINITY or 20 - place.nice <= soft
        if not allowed and not effective >> _CAP_SYS_NICE & 1:
            remedy = "give a larger number, or raise the limit with `ulimit -e` as root"
            raise SpecError("Placement.nice", place.nice, "is less than this user may have", remedy)
    if effective >> _CAP_SYS_RESOURCE & 1:
        return
    if place.oom_score_adj is not None and place.oom_score_adj < (own := int(slurp("/proc/self/oom_score_adj") or 0)):
        remedy = f"give {own} or more, or run with CAP_SYS_RESOURCE"
        raise SpecError("Placement.oom_score_adj", place.oom_score_adj, "is less than this process has", remedy)
    for name, pair in place.limits.items():
        assert isinstance(pair, tuple)
        _, hard = resource.getrlimit(LIMITS[name])
        if hard != resource.RLIM_INFINITY and (pair[1] == resource.RLIM_INFINITY or pair[1] > hard):
            remedy = f"give {hard} or less, or run with CAP_SYS_RESOURCE"
            raise SpecError(f"Placement.limits[{name!r}]", pair, "is more than this process's hard limit", remedy)


def _check_cpus(wanted: set[int]) -> None:
    """By taking them: only the kernel knows what is online, and in our cpuset."""
    had = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, wanted)
        got = os.sched_getaffinity(0)
    except OSError:
        got = set()
    finally:
        os.sched_setaffinity(0, had)
    if got != wanted:
        missing = sorted(wanted - got)
        problem = f"has CPUs that are not here: {', '.join(map(str, missing))}"
        raise SpecError("Placement.cpus", sorted(wanted), problem, f"this process has {sorted(had)}")


def _told(status: str, key: str) -> str:
    return next((line.partition(":")[2].strip() for line in status.splitlines() if line.startswith(f"{key}:")), "")


def _numbers(ranges: str) -> list[int]:
    """`"0-2,5"` → `[0, 1, 2, 5]`."""
    found: list[int] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found
