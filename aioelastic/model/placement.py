"""Where a worker runs, as a frozen value: CPUs, memory, GPUs, limits, a control group."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, TypeAlias

from .errors import SpecError
from .frozen import dataclass
from .validation import FrozenDict, check_items, check_path, check_whole, per_rank

CPUS, NODES = 8192, 1024  # the most that a Linux kernel can be built for (NR_CPUS, MAX_NUMNODES)
MOST = (1 << 63) - 1
LIMITS = {
    name.removeprefix("RLIMIT_"): number
    for name, number in vars(resource).items()
    # workers are known by the digits of the last one (child/kernel/process_marks.py)
    if name.startswith("RLIMIT_") and name not in ("RLIMIT_OFILE", "RLIMIT_RTTIME")
}

Orders: TypeAlias = tuple[
    tuple[int, ...], tuple[int, ...], "int | None", "int | None", tuple[tuple[int, tuple[int, int]], ...]
]


@dataclass(frozen=True)
class Placement:
    """Where a worker runs, and within which limits. All of it is in force before the worker's first instruction, and
    holds for whatever it starts.

    Args:
        cpus: numbers of the CPUs it may use (sched_setaffinity(2)).
        nodes: numbers of the NUMA nodes that its memory comes from, and from no other (set_mempolicy(2), MPOL_BIND).
        gpus: the NVIDIA GPUs that it sees, by number (in the order of nvidia-smi) or by UUID; `()` for none. They
            become its CUDA_VISIBLE_DEVICES, and `GroupResult.remains` tells what is left on them at the end.
        nice: its niceness, -20 to 19 (setpriority(2)).
        oom_score_adj: how readily the kernel kills it when memory is out, -1000 (never) to 1000 (proc(5)).
        limits: resource limits by name (getrlimit(2)), in the kernel's units, each one number for both or
            `(soft, hard)`; `resource.RLIM_INFINITY` for none: `{"NOFILE": 4096, "CORE": 0}`.
        cgroup: run it in a control group (cgroups(7), version 2) of its own: `True` makes that below the one this
            process is in, a path below that one. SIGKILL then reaches all of the worker's processes at the same
            moment, whatever they do to escape, and the kernel says when none is left. The directory must be ours to
            write: as root, or where systemd was told `Delegate=yes`.

    Raises:
        SpecError: a field is not usable.

    Example::

        await supervise(Command("./bench"), n=2, placement=lambda rank: Placement(cpus=[rank]))
    """

    cpus: Iterable[int] | None = None
    nodes: Iterable[int] | None = None
    gpus: Iterable[int | str] | None = None
    nice: int | None = None
    oom_score_adj: int | None = None
    limits: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    cgroup: bool | str | os.PathLike[str] = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "cpus", _numbers("Placement.cpus", self.cpus, CPUS - 1))
        put(self, "nodes", _numbers("Placement.nodes", self.nodes, NODES - 1))
        put(self, "gpus", _gpus(self.gpus))
        for name, least, most in (("nice", -20, 19), ("oom_score_adj", -1000, 1000)):
            if (value := getattr(self, name)) is not None:
                check_whole(f"Placement.{name}", value, least, most)
        put(self, "limits", _limits(self.limits))
        if not isinstance(self.cgroup, bool):
            put(self, "cgroup", check_path("Placement.cgroup", self.cgroup))
            if not self.cgroup:
                raise SpecError("Placement.cgroup", self.cgroup, "is empty", "give True, or the path of a cgroup")

    @property
    def orders(self) -> Orders:
        """What the worker's process is told to take; see `child/kernel/process_setup.py`."""
        limits = tuple((LIMITS[name], pair) for name, pair in self.limits.items() if isinstance(pair, tuple))
        return tuple(self.cpus or ()), tuple(self.nodes or ()), self.nice, self.oom_score_adj, limits

    @property
    def env(self) -> dict[str, str]:
        """Variables that say which GPUs it sees."""
        if self.gpus is None:
            return {}
        gpus = tuple(self.gpus)
        # by number CUDA means another order, fastest first, unless it is told
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if gpus and isinstance(gpus[0], int) else {}
        return {**order, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}

    def __str__(self) -> str:
        numbered = (("CPUs", self.cpus), ("memory of nodes", self.nodes))
        said = [f"{name} {_ranges(tuple(numbers))}" for name, numbers in numbered if numbers]
        said += [f"GPUs {','.join(map(str, self.gpus)) or 'none'}"] if self.gpus is not None else []
        said += [f"nice {self.nice}"] if self.nice is not None else []
        said += [f"oom_score_adj {self.oom_score_adj}"] if self.oom_score_adj is not None else []
        for name, pair in self.limits.items():
            assert isinstance(pair, tuple)
            words = ["unlimited" if one == resource.RLIM_INFINITY else str(one) for one in dict.fromkeys(pair)]
            said.append(f"{name} {'/'.join(words)}")
        said += ["a control group of its own"] if self.cgroup else []
        return ", ".join(said)


Places: TypeAlias = "Placement | Callable[[int], Placement | None] | Sequence[Placement | None]"


def resolve_places(given: Any, n: int) -> tuple[Placement | None, ...]:
    """One for each rank, from one for all, a builder `rank -> Placement`, or a list (`Places`, or None).

    Raises:
        SpecError: says which is wrong.
    """
    return per_rank("placement", given, n, _placement)


def _placement(field: str, value: object) -> Placement | None:
    if value is not None and not isinstance(value, Placement):
        remedy = "give Placement(cpus=[0]), a list with one for each rank, or rank -> one"
        raise SpecError(field, value, f"is {type(value).__name__}, not a Placement", remedy)
    return value


def _numbers(field: str, given: Any, most: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    numbers = check_items(field, given, "a collection of numbers", "give [0, 1] or range(4)", CPUS)
    for one in numbers:
        check_whole(field, one, 0, most)
    if not numbers:
        raise SpecError(field, given, "is empty", "name at least one, or leave it out")
    return tuple(sorted(set(numbers)))


def _gpus(given: Any) -> tuple[int | str, ...] | None:
    if given is None:
        return None
    gpus = check_items("Placement.gpus", given, "a collection of GPUs", 'give [0, 1] or ["GPU-…"]', CPUS)
    for one in gpus:
        if isinstance(one, str):
            if not one.startswith(("GPU-", "MIG-")) or "," in one or not one.isprintable():
                raise SpecError("Placement.gpus", one, "is not the UUID of a GPU", "take it from `nvidia-smi -L`")
        else:
            check_whole("Placement.gpus", one, 0)
    if len({type(one) for one in gpus}) > 1:
        raise SpecError("Placement.gpus", gpus, "mixes numbers and UUIDs", "give all of them in one way")
    if len(set(gpus)) < len(gpus):
        raise SpecError("Placement.gpus", gpus, "names one twice", "name each once")
    return gpus


def _limits(given: Any) -> FrozenDict[str, tuple[int, int]]:
    if not isinstance(given, Mapping):
        raise SpecError("Placement.limits", given, "is not a mapping", 'give a dict like {"NOFILE": 4096}')
    out = {}
    for name, value in given.items():
        key = name.upper().removeprefix("RLIMIT_") if isinstance(name, str) else name
        if key == "RTTIME":
            raise SpecError("Placement.limits", name, "is what workers are known by", "leave it out")
        if key not in LIMITS:
            raise SpecError("Placement.limits", name, "is no limit of this system", f"known are {', '.join(LIMITS)}")
        pair = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
        for one in pair:
            if not isinstance(one, int) or one != resource.RLIM_INFINITY:
                check_whole(f"Placement.limits[{name!r}]", one, 0, MOST)
        soft, hard = (MOST if one == resource.RLIM_INFINITY else one for one in pair)
        if soft > hard:
            raise SpecError(f"Placement.limits[{name!r}]", value, "has more soft than hard", "give (soft, hard)")
        out[key] = pair
    return FrozenDict(out)


def _ranges(numbers: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` → `"0-2,5"`, as the kernel writes it."""
    parts: list[list[int]] = []
    for one in numbers:
        if parts and parts[-1][-1] == one - 1:
            parts[-1][1:] = [one]
        else:
            parts.append([one])
    return ",".join("-".join(map(str, part)) for part in parts)
