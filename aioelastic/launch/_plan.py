"""From a spec to what exactly will run: a pure function, printable, with nothing started and nothing touched."""

from __future__ import annotations

import re
import secrets
import shlex
import time
from collections.abc import Container, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .. import borrowed
from ..checks import signal_name
from ..child import _mark
from ..entry import Command, Function
from ..placement import Orders, Placement
from ..restart import Restart
from ..shown import printable, shown
from ..spec import GroupSpec, Std
from ._call import Call

# the lineage of supervisors a process descends from; how strays are told from strangers
TAG = "AIOELASTIC_LINEAGE"

# where a worker writes its error: `record` of ours, and torch's own
ERROR_FILES = ("AIOELASTIC_ERROR_FILE", "TORCHELASTIC_ERROR_FILE")
ARGS_SHOWN = 300  # how much of a function's arguments the plan shows


# what each way to begin a function worker means, as the plan tells it
START_WORDS = {
    "zygote": "forked by a zygote",
    "spawn": "in a fresh interpreter",
    "fork": "in a forked copy of the caller, where only one of its threads lives on: locks that others hold stay shut",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one start of a worker is. It is made by `of`, and nowhere else; no two starts have the same.

    Attributes:
        run_id, rank, attempt: of which start.
        owner: the three as one word.
        mark: what its descendants are known by, whatever became of their variables (`child/_mark.py`).
        lineage: what they have as `AIOELASTIC_LINEAGE`: the owners of the supervisors above, and its own.
    """

    run_id: str
    rank: int
    attempt: int
    owner: str
    mark: int
    lineage: str

    @classmethod
    def of(cls, run_id: str, rank: int, attempt: int, above: str = "") -> Identity:
        """That of one start; `above`: the lineage of who starts it."""
        owner = f"{run_id}/{rank}/{attempt}"
        return cls(run_id, rank, attempt, owner, _mark.of(owner), f"{above}:{owner}" if above else owner)


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One process to start.

    Attributes:
        identity: who it is, in one start: no other has it.
        program: the file to execute; None until `preflight` has looked it up, and for a function.
        function, start: the function it runs, and how its process begins; None for a command.
        executor: the caller's, if it runs in one (`start` is `"executor"`).
        call: the function and its arguments, pickled; None until they are, for a command, and for a forked copy.
        overlay: variables over the caller's environ; None unsets one.
        pipes: which streams are read by us; the others go to /dev/null.
        stdout_log, stderr_log, error_file, stacks_file: where they go, or None.
        stop_signal: by which it is to be stopped; 0: not known.
        placement: where it runs; None: as its launcher does.
        cgroup: its control group, once that is made; None: none of its own.
    """

    identity: Identity
    rank: int
    world_size: int
    attempt: int
    argv: tuple[str, ...]
    program: str | None
    cwd: str | None
    stdin: Literal["null", "inherit"]
    overlay: Mapping[str, str | None]
    pipes: Std
    tee: Std
    stdout_log: Path | None
    stderr_log: Path | None
    error_file: Path | None
    function: Function | None = None
    start: str | None = None
    call: Call | None = None
    executor: Executor | None = None
    stacks_file: Path | None = None
    stop_signal: int = 0
    placement: Placement | None = None
    cgroup: Path | None = None

    def __post_init__(self) -> None:
        if (self.rank, self.attempt) != (self.identity.rank, self.identity.attempt):
            raise ValueError(f"the identity {self.identity.owner} is that of another start: see as_start")

    @property
    def mark(self) -> int:
        """What its descendants are known by."""
        return self.identity.mark

    def as_start(self, rank: int) -> WorkerPlan:
        """The same for one more start, in an executor, whose workers are as many as there is work for: what says who
        it is, is its own. A control group that this one has is not the other's."""
        mine = self.identity
        above = mine.lineage.removesuffix(mine.owner).removesuffix(":")
        identity = Identity.of(mine.run_id, rank, mine.attempt, above)
        numbers = {f"{ours}{key}": str(rank) for ours in ("", "AIOELASTIC_") for key in ("RANK", "LOCAL_RANK")}
        overlay = {**self.overlay, **numbers, TAG: identity.lineage}
        return replace(self, identity=identity, rank=rank, overlay=overlay, cgroup=None)

    @property
    def place(self) -> tuple[Orders, str] | None:
        """What its process is told to take before it becomes the worker (`child/_place.py`)."""
        return None if self.placement is None else (self.placement.orders, str(self.cgroup or ""))

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """The worker's whole environment; `base` is not changed."""
        return merged(base, self.overlay)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All processes of one attempt of a group, and what surrounds them. `str()` is what `--dry-run` prints."""

    name: str
    run_id: str
    host: str
    attempt: int
    run_dir: Path | None
    master_addr: str
    master_port: int
    stop_words: str
    restart: Restart
    workers: tuple[WorkerPlan, ...]
    preload: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"group {self.name!r}: {len(self.workers)} worker(s) on {self.host}",
            f"run id: {self.run_id}",
            f"logs: {self.run_dir or 'not saved'}",
            f"rendezvous: MASTER_ADDR={self.master_addr} "
            f"MASTER_PORT={self.master_port or '(a free port, chosen at the start)'}",
            f"stop: {self.stop_words}",
            f"restart: {self.restart}",
        ]
        if self.preload:
            lines.append(f"preload: {', '.join(self.preload)}")
        for one in self.workers:
            if one.function is None:
                lines += ["", f"rank {one.rank}: {shlex.join(one.argv)}"]
            else:
                how = borrowed.where(one.executor) if one.executor is not None else START_WORDS[one.start or ""]
                lines += ["", f"rank {one.rank}: function {_called(one.function)}, {how}"]
            if one.cwd is not None:
                lines.append(f"  cwd: {one.cwd}")
            if one.placement is not None:
                lines.append(f"  placement: {one.placement}")
            kind = None if one.executor is None else borrowed.kind_of(one.executor)
            if kind is not None:
                lines += [f"  {words}" for words in kind.limits]
                if not kind.processes:
                    continue
            else:
                lines.append(f"  stdin: {one.stdin}")
                for std, log in ((Std.OUT, one.stdout_log), (Std.ERR, one.stderr_log)):
                    where = [w for w in ("tee" if std in one.tee else "", str(log) if log else "") if w]
                    lines.append(f"  std{std.name.lower() if std.name else ''}: {', '.join(where) or 'tail only'}")
            lines += [
                f"  env: {key}={shlex.quote(value)}" if value is not None else f"  env: unset {key}"
                for key, value in sorted(one.overlay.items())
            ]
        return printable("\n".join(lines))


def plan(
    spec: GroupSpec,
    *,
    run_id: str = "run",
    host: str = "localhost",
    master_port: int = 0,
    environ: Mapping[str, str] | None = None,
    error_dir: Path | None = None,
    attempt: int = 0,
    ranks: Container[int] | None = None,
) -> LaunchPlan:
    """What a group would run. Pure: same arguments, same plan; nothing is started, opened or looked up.

    Args:
        spec: the checked group (`GroupSpec.of`).
        run_id: names the run's log directory.
        master_port: 0 when it is not chosen yet.
        environ: what workers inherit; only its lineage tag matters here.
        error_dir: where workers may write `error.json` when no logs are saved.
        attempt: 0 for the first.
        ranks: only these; the others are not a part of this attempt.

    Returns:
        A `LaunchPlan` with one `WorkerPlan` per rank; `str()` of it is readable.
    """
    logs = spec.logs
    size = len(spec.entries)
    run_dir = None if logs.dir is None else Path(logs.dir) / run_id
    above = (environ or {}).get(TAG, "")
    common: dict[str, str | None] = {
        # a pipe makes Python buffer whole blocks; lines should arrive when they are printed
        "PYTHONUNBUFFERED": (environ or {}).get("PYTHONUNBUFFERED", "1"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master_port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "AIOELASTIC_RUN_ID": run_id,
        "AIOELASTIC_NAME": spec.name,
        "AIOELASTIC_ATTEMPT": str(attempt),
        "AIOELASTIC_STOP_SIGNAL": str(int(spec.stop.signum)),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),  # what scripts for torchrun ask
        "TORCHELASTIC_MAX_RESTARTS": str(spec.restart.max),
    }
    workers = []
    for rank, entry in enumerate(spec.entries):
        if ranks is not None and rank not in ranks:
            continue
        home = run_dir / f"attempt_{attempt}" / str(rank) if run_dir else None
        saved = logs.saves(rank)
        error_file = (
            home / "error.json" if home else error_dir / f"{run_id}-{rank}-{attempt}.json" if error_dir else None
        )
        identity = Identity.of(run_id, rank, attempt, above)
        overlay = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for key in ERROR_FILES:
            if error_file is not None:
                overlay[key] = str(error_file)
            elif environ and key in environ:
                overlay[key] = None  # we are a worker ourselves: that file is for our own error
        overlay.update(spec.env)
        overlay.update(entry.env)
        place = spec.places[rank] if spec.places else None
        overlay.update(place.env if place is not None else {})
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            overlay.setdefault(f"AIOELASTIC_{key}", overlay[key])
        lent = None if isinstance(spec.start, str) or isinstance(entry, Command) else spec.start
        if lent is None:  # what starts in an executor of the caller's may be meant to stay
            # ours to set: it is how a stray is known as this group's
            overlay[TAG] = identity.lineage
        else:
            overlay.pop(TAG, None)
            saved = Std.NONE
        workers.append(
            WorkerPlan(
                identity=identity,
                rank=rank,
                world_size=size,
                attempt=attempt,
                argv=entry.argv,
                program=None,
                cwd=entry.cwd,
                stdin=entry.stdin if isinstance(entry, Command) else "null",
                overlay=overlay,
                # both are always read: a failure shows their last lines
                pipes=Std.ALL if lent is None else Std.NONE,
                tee=logs.tees(rank) if lent is None else Std.NONE,
                stdout_log=home / "stdout.log" if home and Std.OUT in saved else None,
                stderr_log=home / "stderr.log" if home and Std.ERR in saved else None,
                error_file=error_file,
                function=entry if isinstance(entry, Function) else None,
                start=None if isinstance(entry, Command) else spec.start if isinstance(spec.start, str) else "executor",
                executor=lent,
                stacks_file=home / "stacks.txt" if home else None,
                stop_signal=int(spec.stop.signum),
                placement=place,
            )
        )
    stop = spec.stop
    first = "Python stacks, " if stop.dump else ""
    words = f"{first}{signal_name(stop.signum)} ({stop.scope.replace('_', ' ')}), SIGKILL after {stop.grace:g} s each"
    return LaunchPlan(
        name=spec.name,
        run_id=run_id,
        host=host,
        attempt=attempt,
        run_dir=run_dir,
        master_addr="127.0.0.1",
        master_port=master_port,
        stop_words=words,
        restart=spec.restart,
        workers=tuple(workers),
        preload=spec.preload,
    )


def _called(function: Function) -> str:
    """`module:function(1, y=2)`, in short."""
    args = [shown(one) for one in function.args] + [f"{key}={shown(one)}" for key, one in function.kwargs.items()]
    text = ", ".join(args)
    return f"{function.name}({text if len(text) <= ARGS_SHOWN else text[:ARGS_SHOWN] + '…'})"


def new_run_id(name: str) -> str:
    """Unlike any other: it names the run's directory and marks its processes."""
    word = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{word}-{secrets.token_hex(4)}"


def merged(base: Mapping[str, str], overlay: Mapping[str, str | None]) -> dict[str, str]:
    """`base` with `overlay` over it; None in the overlay unsets."""
    out = dict(base)
    for key, value in overlay.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = value
    return out
