"""Whether the places that workers are to have can be had (`Placement`): tried before anything starts.

Capabilities and limits do not tell: in a user namespace, or under a container's seccomp filter, a process seems to have
what the kernel then refuses.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from ..child.kernel import process_setup
from ..child.kernel.bounded_reads import slurp
from ..model.errors import SpecError
from ..model.placement import LIMITS, Orders, Placement
from ..model.text import shown
from ._launch_plan import LaunchPlan

# tries what a place orders in a process that ends at once: (errno, field), or (0, "")
Try = Callable[[tuple[Orders, str]], tuple[int, str]]


def check_places(plan: LaunchPlan, attempt: Try) -> None:
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
            _check(placement, attempt)
        except SpecError as exc:
            raise SpecError(f"{exc.field} of rank {rank}", exc.value, exc.problem, exc.remedy) from None


def _check(place: Placement, attempt: Try) -> None:
    if place.cpus is not None:
        _check_cpus(set(place.cpus))
    if place.nodes is not None:
        here = _told(slurp("/proc/thread-self/status", 65536).decode(), "Mems_allowed_list")
        if here and not set(place.nodes) <= set(_numbers(here)):
            raise SpecError("Placement.nodes", place.nodes, "are not all nodes of this process", f"it has {here}")
    try:
        code, where = attempt((place.orders, ""))
    except TimeoutError as exc:
        remedy = "leave out what hangs, a control group or a node whose driver does not answer, or end what blocks it"
        raise SpecError("placement", place, f"could not be tried before anything starts: {exc}", remedy) from None
    except OSError:
        return  # the start itself will tell
    if code and where.startswith("Placement."):  # else it is about what the program itself has
        raise _refused(place, code, where.removeprefix("Placement."))


def _refused(place: Placement, code: int, where: str) -> SpecError:
    why = f"refused here ({os.strerror(code)})"
    if where == "nice":
        remedy = "give a larger number, or raise the limit with `ulimit -e` as root"
        return SpecError("Placement.nice", place.nice, f"is less than this user may have: {why}", remedy)
    if where == "oom_score_adj":
        own = int(slurp("/proc/self/oom_score_adj") or 0)
        problem = f"is less than this process has: {why}"
        remedy = f"give {own} or more, or run with CAP_SYS_RESOURCE"
        return SpecError("Placement.oom_score_adj", place.oom_score_adj, problem, remedy)
    for name, pair in place.limits.items():
        assert isinstance(pair, tuple)
        if where == process_setup.limit_name(LIMITS[name]):
            _, hard = resource.getrlimit(LIMITS[name])
            problem = f"is more than this process's hard limit: {why}"
            return SpecError(f"Placement.limits[{name!r}]", pair, problem, f"give {hard} or less, or run as root")
    value = getattr(place, where, None)
    return SpecError(f"Placement.{where}", shown(value), f"is {why}", "leave it out, or run where it is allowed")


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
