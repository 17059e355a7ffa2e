"""From a spec to what exactly will run: a pure function, printable, with nothing started and nothing touched."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..child.kernel import process_marks
from ..model import lent_executors
from ..model.entries import Command, Function, Input, input_words
from ..model.frozen import dataclass
from ..model.group_spec import GroupSpec, OnFailure, OnSuccess
from ..model.logs import Std
from ..model.placement import Orders, Placement
from ..model.restart_policy import Restart
from ..model.secrets import Secrets, inherited
from ..model.signal_names import signal_name
from ..model.text import masked, printable, shown

if TYPE_CHECKING:
    from ._calls import Call

# the lineage of supervisors a process descends from; how strays are told from strangers
TAG = "AIOELASTIC_LINEAGE"

# where a worker writes its error: `record` of ours, and torch's own
ERROR_FILES = ("AIOELASTIC_ERROR_FILE", "TORCHELASTIC_ERROR_FILE")
# by which a worker of torchrun speaks to its own agent, where we are one
OUTER = ("TORCHELASTIC_TIMER_FILE",)
# what differs between the starts of an executor's workers
_RANKS = ("RANK", "LOCAL_RANK", "AIOELASTIC_RANK", "AIOELASTIC_LOCAL_RANK", "ROLE_RANK")
_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "AIOELASTIC_WORLD_SIZE", "AIOELASTIC_LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")
_ATTEMPTS = ("AIOELASTIC_ATTEMPT", "TORCHELASTIC_RESTART_COUNT")
ARGS_SHOWN = 300  # how much of a function's arguments the plan shows


# umask, supplementary groups, group and user
Who: TypeAlias = "tuple[int | None, tuple[int, ...] | None, int | None, int | None]"

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
        run_id: of which run.
        rank: of which rank.
        attempt: of which attempt.
        owner: the three as one word.
        mark: what its descendants are known by, whatever became of their variables (`child/kernel/process_marks.py`).
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
        return cls(run_id, rank, attempt, owner, process_marks.of(owner), f"{above}:{owner}" if above else owner)


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One process to start.

    Attributes:
        identity: who it is, in one start: no other has it.
        rank: 0 to `world_size - 1`.
        world_size: how many workers the group has.
        attempt: 0 for the first start of its rank.
        argv: its command; of a function, its module and name.
        cwd: the directory it starts in; None: that of this program.
        name: what it is called (`Command.name`); empty: it has no name of its own.
        program: the file to execute; None until `preflight` has looked it up, and for a function.
        function: the function it runs; None for a command.
        start: how a function's process begins; None for a command.
        executor: the caller's, if it runs in one (`start` is `"executor"`).
        call: the function and its arguments, pickled; None until they are, for a command, and for a forked copy.
        overlay: variables over the caller's environ; None unsets one.
        stdin: as in `Command`.
        input: as in `Command`.
        stderr: as in `Command`.
        tty: rows and columns of the terminal that all three are; None: none.
        pipes: which streams are read by us; the others go to /dev/null.
        tee: which of them go to the console.
        stdout_log: where its standard output is saved; None: it is not.
        stderr_log: the same of its standard error.
        error_file: where it writes what it raises; None: nowhere.
        stacks_file: where its Python stacks are saved; None: nowhere.
        stop_signal: by which it is to be stopped; 0: not known.
        placement: where it runs; None: as its launcher does.
        on_failure: what becomes of the others when it has failed for good.
        pass_fds: further descriptors: the number there, and ours.
        user: as in `Command`.
        group: as in `Command`.
        extra_groups: as in `Command`.
        umask: as in `Command`.
        secrets: as in `Command`.
        who: umask, supplementary groups, group and user, in numbers, each None as this program has it; None for all,
            and until `preflight` has looked them up.
        cgroup: its control group, once that is made; None: none of its own.
    """

    identity: Identity
    rank: int
    world_size: int
    attempt: int
    argv: tuple[str, ...]
    program: str | None
    cwd: str | None
    stdin: Literal["null", "inherit", "pipe"]
    overlay: Mapping[str, str | None] = field(repr=False)
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
    input: Input | None = field(default=None, repr=False)
    stderr: Literal["pipe", "stdout"] = "pipe"
    tty: tuple[int, int] | None = None
    name: str = ""
    on_failure: OnFailure = "stop"
    pass_fds: tuple[tuple[int, int], ...] = ()
    user: str | int | None = None
    group: str | int | None = None
    extra_groups: tuple[str | int, ...] | None = None
    umask: int | None = None
    who: Who | None = None
    secrets: Secrets = field(default_factory=partial(Secrets, {}), repr=False)

    def __post_init__(self) -> None:
        if (self.rank, self.attempt) != (self.identity.rank, self.identity.attempt):
            raise ValueError(f"the identity {self.identity.owner} is that of another start: see as_start")

    @property
    def mark(self) -> int:
        """What its descendants are known by."""
        return self.identity.mark

    @property
    def words(self) -> str:
        """It, in words."""
        return self.name or f"rank {self.rank}"

    def as_start(self, rank: int, attempt: int, world_size: int) -> WorkerPlan:
        """The same for one more start, in an executor, whose workers are as many as there is work for: what says who
        it is, is its own. A control group that this one has is not the other's."""
        mine = self.identity
        above = mine.lineage.removesuffix(mine.owner).removesuffix(":")
        identity = Identity.of(mine.run_id, rank, attempt, above)
        overlay = {**self.overlay, TAG: identity.lineage}
        for keys, was, now in (
            (_RANKS, self.rank, rank),
            (_SIZES, self.world_size, world_size),
            (_ATTEMPTS, self.attempt, attempt),
        ):
            overlay.update({key: str(now) for key in keys if overlay.get(key) == str(was)})  # else it is the caller's
        cgroup = self.cgroup if identity == mine else None
        numbers: dict[str, Any] = {"rank": rank, "attempt": attempt, "world_size": world_size}
        return replace(self, identity=identity, **numbers, overlay=overlay, cgroup=cgroup)

    def placed(self, place: Placement | None) -> WorkerPlan:
        """The same in another place. A control group that this one has is not the other's."""
        own = {} if self.placement is None else self.placement.env
        overlay = {key: value for key, value in self.overlay.items() if key not in own}
        overlay.update({} if place is None else place.env)
        return replace(self, overlay=overlay, placement=place, cgroup=None)

    def run_as(self, who: Who | None) -> WorkerPlan:
        """The same as that user. Another one may not write where its error file would be, and is not asked to."""
        made = replace(self, who=who)
        return made if who is None or who[-1] in (None, 0, os.geteuid()) else made.without_error_file()

    def without_error_file(self) -> WorkerPlan:
        """The same for one that tells its errors itself."""
        return replace(self, overlay={**self.overlay, **dict.fromkeys(ERROR_FILES)}, error_file=None)

    @property
    def secret_numbers(self) -> dict[str, int]:
        """Which descriptor there has which of its secrets."""
        return self.secrets.numbers(tuple(number for number, _ in self.pass_fds))

    @property
    def numbers(self) -> list[int]:
        """Of what it has there beside its streams (its secrets, and what is passed to it)."""
        return [*self.secret_numbers.values(), *(number for number, _ in self.pass_fds)]

    @property
    def place(self) -> tuple[Orders, str] | None:
        """What its process is told to take before it becomes the worker (`child/kernel/process_setup.py`)."""
        return None if self.placement is None else (self.placement.orders, str(self.cgroup or ""))

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """The worker's whole environment; `base` is not changed.

        Args:
            base: what it inherits.
        """
        return merged(base, self.overlay)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All processes of one attempt of a group, and what surrounds them. `str()` is what `--dry-run` prints.

    Attributes:
        name: that of the group.
        run_id: names the run, its directory of logs, and its processes.
        host: the name of this machine.
        attempt: 0 for the first.
        run_dir: the directory of the run's logs; None: nothing is saved.
        master_addr: where rank 0 listens, as workers find it in `MASTER_ADDR`.
        master_port: at which TCP port; 0: not chosen yet.
        stop_words: how workers are stopped, in words.
        restart: which failures are answered by a new attempt.
        workers: one for each process to start, by rank.
        preload: modules that the zygote imports once.
        on_success: `"continue"` when one has succeeded, or `"stop"` the others.
    """

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
    on_success: OnSuccess = "continue"

    def __str__(self) -> str:
        lines = [
            f"group {self.name!r}: {len(self.workers)} worker(s) on {self.host}",
            f"run id: {self.run_id}",
            f"logs: {self.run_dir or 'not saved'}",
            (
                f"rendezvous: MASTER_ADDR={self.master_addr} "
                f"MASTER_PORT={self.master_port or '(a free port, chosen at the start)'}"
            ),
            f"stop: {self.stop_words}",
            f"restart: {self.restart}",
            f"when one fails for good: {self._on_failure()}",
        ]
        if self.on_success == "stop":
            lines.append("when one succeeds: the others are stopped")
        if self.preload:
            lines.append(f"preload: {', '.join(self.preload)}")
        for one in self.workers:
            if one.function is None:
                named = f" ({one.name})" if one.name else ""
                lines += ["", f"rank {one.rank}{named}: {shlex.join(one.argv)}"]
            else:
                how = lent_executors.where(one.executor) if one.executor is not None else START_WORDS[one.start or ""]
                lines += ["", f"rank {one.rank}: function {_called(one.function)}, {how}"]
            if one.cwd is not None:
                lines.append(f"  cwd: {one.cwd}")
            if one.placement is not None:
                lines.append(f"  placement: {one.placement}")
            kind = None if one.executor is None else lent_executors.kind_of(one.executor)
            if kind is not None:
                lines += [f"  {words}" for words in kind.limits]
                if not kind.processes:
                    continue
            else:
                if one.tty is not None:
                    lines.append(f"  terminal: {one.tty[0]} rows, {one.tty[1]} columns")
                lines += _given(one)
                lines.append(f"  stdin: {input_words(one.input) or one.stdin}")
                for std, log in ((Std.OUT, one.stdout_log), (Std.ERR, one.stderr_log)):
                    where = [w for w in ("tee" if std in one.tee else "", str(log) if log else "") if w]
                    lines.append(f"  std{std.name.lower() if std.name else ''}: {', '.join(where) or 'tail only'}")
            lines += [
                f"  env: {key}={shlex.quote(masked(key, value))}" if value is not None else f"  env: unset {key}"
                for key, value in sorted(one.overlay.items())
            ]
        return printable("\n".join(lines))

    def _on_failure(self) -> str:
        go_on = [str(one.rank) for one in self.workers if one.on_failure == "continue"]
        if go_on and len(go_on) < len(self.workers):
            which = "ranks" if len(go_on) > 1 else "rank"
            return f"the others are stopped, but go on when it is {which} {', '.join(go_on)}"
        return "the others go on" if go_on else "the others are stopped"


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
        host: the name of this machine.
        master_port: 0 when it is not chosen yet.
        environ: what workers inherit; only its lineage tag matters here.
        error_dir: where workers may write `error.json` when no logs are saved.
        attempt: 0 for the first.
        ranks: only these; the others are not a part of this attempt.

    Returns:
        A `LaunchPlan` with one `WorkerPlan` per rank; `str()` of it is readable.

    Example::

        print(plan(GroupSpec.of(Command("python", "train.py"), n=4)))
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
        # what scripts for torchrun ask: one node, with one role
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": spec.name,
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.restart.max),
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 has it; torch asks for this word
    }
    ours = inherited(environ or {})
    workers = []
    for rank, (entry, name) in enumerate(zip(spec.entries, spec.names, strict=True)):
        if ranks is not None and rank not in ranks:
            continue
        home = run_dir / f"attempt_{attempt}" / str(rank) if run_dir else None
        saved = logs.saves(rank)
        error_file = (
            home / "error.json" if home else error_dir / f"{run_id}-{rank}-{attempt}.json" if error_dir else None
        )
        identity = Identity.of(run_id, rank, attempt, above)
        command = entry if isinstance(entry, Command) else None
        secrets, passed = (Secrets({}), ()) if command is None else (command.secrets, command.pass_fds)
        lent = None if isinstance(spec.start, str) or command is not None else spec.start
        strange = [key for key, number in ours.items() if number not in passed and lent is None]
        strange += [key for key in OUTER if key in (environ or {})]
        overlay = {**dict.fromkeys(strange), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
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
        for key in ("RANK", "WORLD_SIZE"):
            overlay.setdefault(f"ROLE_{key}", overlay[key])
        if lent is None:  # what starts in an executor of the caller's may be meant to stay
            # ours to set: it is how a stray is known as this group's
            overlay[TAG] = identity.lineage
        else:
            overlay.pop(TAG, None)
            saved = Std.NONE
        joined = command is not None and command.stderr == "stdout"
        own = Std.OUT if joined else Std.ALL
        overlay.update(dict.fromkeys(secrets))  # which may be in what it inherits
        overlay.update(secrets.paths(passed))
        workers.append(
            WorkerPlan(
                identity=identity,
                rank=rank,
                world_size=size,
                attempt=attempt,
                argv=entry.argv,
                program=None,
                cwd=entry.cwd,
                stdin=command.stdin if command is not None else "null",
                input=command.input if command is not None else None,
                stderr="stdout" if joined else "pipe",
                tty=command.tty if command is not None else None,
                pass_fds=tuple((fd, fd) for fd in passed),
                user=command.user if command is not None else None,
                group=command.group if command is not None else None,
                extra_groups=command.extra_groups if command is not None else None,
                umask=command.umask if command is not None else None,
                secrets=secrets,
                overlay=overlay,
                # both are always read: a failure shows their last lines
                pipes=own if lent is None else Std.NONE,
                tee=logs.tees(rank) & own if lent is None else Std.NONE,
                stdout_log=home / "stdout.log" if home and Std.OUT in saved else None,
                stderr_log=home / "stderr.log" if home and Std.ERR in saved & own else None,
                error_file=error_file,
                function=entry if isinstance(entry, Function) else None,
                start=None if isinstance(entry, Command) else spec.start if isinstance(spec.start, str) else "executor",
                executor=lent,
                stacks_file=home / "stacks.txt" if home else None,
                stop_signal=int(spec.stop.signum),
                placement=place,
                name=name,
                on_failure=spec.on_failure[rank] if spec.on_failure else "stop",
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
        on_success=spec.on_success,
    )


def _given(worker: WorkerPlan) -> list[str]:
    """What a command is given beside its streams and variables."""
    named = (("user", worker.user), ("group", worker.group))
    said = [f"{name}: {one}" for name, one in named if one is not None]
    said += [f"extra groups: {_joined(worker.extra_groups)}"] if worker.extra_groups is not None else []
    said += [f"umask: {worker.umask:03o}"] if worker.umask is not None else []
    said += [f"descriptors: {_joined(number for number, _ in worker.pass_fds)}"] if worker.pass_fds else []
    said += [f"secret: {name}, descriptor {number}" for name, number in worker.secret_numbers.items()]
    return [f"  {one}" for one in said]


def _joined(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"


def _called(function: Function) -> str:
    """`module:function(1, y=2)`, in short."""
    args = [shown(one) for one in function.args] + [
        f"{key}={masked(key, shown(one))}" for key, one in function.kwargs.items()
    ]
    text = ", ".join(args)
    return f"{function.name}({text if len(text) <= ARGS_SHOWN else text[:ARGS_SHOWN] + '…'})"


def new_run_id(name: str) -> str:
    """Unlike any other: it names the run's directory and marks its processes."""
    word = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{word}-{os.urandom(4).hex()}"


def merged(base: Mapping[str, str], overlay: Mapping[str, str | None]) -> dict[str, str]:
    """`base` with `overlay` over it; None in the overlay unsets."""
    out = dict(base)
    for key, value in overlay.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = value
    return out
