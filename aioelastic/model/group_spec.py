"""All that the caller asks for, as one frozen value. A spec never acts; it is checked whole when it is made."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import field
from typing import Any, Literal, TypeAlias, get_args

from .entries import Command, Entry, Function, check_no_secret_in, names_of, resolve
from .errors import SpecError
from .frozen import dataclass
from .lent_executors import check_lent
from .logs import PATTERNS, Logs
from .placement import Placement, Places, resolve_places
from .restart_policy import Restart
from .stop_policy import Stop
from .text import shown
from .validation import (
    check_choice,
    check_env,
    check_items,
    check_name,
    check_whole,
    per_rank,
)

# what becomes of the others when one has failed for good: for all ranks, by a builder, or one per rank
OnFailure: TypeAlias = Literal["stop", "continue"]
OnFailures: TypeAlias = OnFailure | Callable[[int], OnFailure] | Sequence[OnFailure]
OnSuccess: TypeAlias = Literal["continue", "stop"]
# how a function begins: in a process of its own, or in an executor that the caller lends
Start: TypeAlias = "Literal['zygote', 'spawn', 'fork'] | Executor"


@dataclass(frozen=True)
class GroupSpec:
    """A whole group: one entry per rank, and how to run them. Made by `GroupSpec.of`, which checks everything.

    Its fields are named as the arguments of `supervise`, where each is told.

    Attributes:
        entries: what each rank runs.
        name: of the group.
        env: variables for all workers; None unsets one.
        logs: where output goes.
        stop: how workers are stopped.
        restart: which failures are answered by a new attempt.
        start: how a `Function` gets its process.
        preload: modules that the zygote imports once.
        ports: TCP ports on which workers will listen.
        places: where each rank runs; None: as this program does.
        on_failure: of each rank: `"stop"` the others when it has failed for good, or `"continue"`.
        on_success: `"continue"` when one has succeeded, or `"stop"` the others.
    """

    entries: tuple[Command | Function, ...]
    name: str = "worker"
    env: Mapping[str, str | None] = field(default_factory=dict)
    logs: Logs = field(default_factory=Logs)
    stop: Stop = field(default_factory=Stop)
    restart: Restart = field(default_factory=Restart.never)
    start: Start = "zygote"
    preload: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    places: tuple[Placement | None, ...] = ()
    on_failure: tuple[OnFailure, ...] = ()
    on_success: OnSuccess = "continue"

    @property
    def names(self) -> tuple[str, ...]:
        """What each worker is called (`Command.name`); empty where it has no name of its own."""
        return names_of(self.entries)

    @classmethod
    def of(
        cls,
        entry: Entry,
        n: int | None = None,
        *,
        name: str = "worker",
        env: Mapping[str, str | None] | None = None,
        logs: Logs | None = None,
        stop: Stop | None = None,
        restart: Restart | None = None,
        start: Start = "zygote",
        preload: Sequence[str] = (),
        ports: Sequence[int] = (),
        placement: Places | None = None,
        on_failure: OnFailures = "stop",
        on_success: OnSuccess = "continue",
    ) -> GroupSpec:
        """Resolve the three forms of `entry` to one per rank, and check the rest.

        Args:
            entry, n, name, env, logs, stop, restart: as in `supervise`.
            start, preload, ports, placement, on_failure, on_success: as in `supervise`.

        Raises:
            SpecError: names the first field that is wrong, its value and the remedy.
        """
        check_name("name", name)
        logs = logs if logs is not None else Logs()
        stop = stop if stop is not None else Stop()
        for what, given, kind in (("logs", logs, Logs), ("stop", stop, Stop)):
            if not isinstance(given, kind):
                raise SpecError(what, given, f"is not a {kind.__name__}", f"give {kind.__name__}(...)")
        if restart is not None and not isinstance(restart, Restart):
            raise SpecError("restart", restart, "is not a Restart", "give Restart.on_failure(max=3)")
        check_choice("on_success", on_success, get_args(OnSuccess))
        entries = resolve(entry, n)
        _check_names(entries)
        answers = per_rank("on_failure", on_failure, len(entries), _on_failure)
        if "continue" in answers and restart is not None and restart.max and restart.scope == "all":
            remedy = 'use Restart.on_failure(scope="one"), or leave on_failure out'
            raise SpecError("on_failure", on_failure, "is not for a restart of all ranks", remedy)
        named: dict[str, Iterable[int]] = {"Logs.ranks": logs.ranks or ()}
        for what, stds in (("Logs.tee", logs.tee), ("Logs.save", logs.save)):
            if isinstance(stds, Mapping):
                named[what] = stds
        for what, ranks in named.items():
            for rank in sorted(ranks):
                if rank >= len(entries):
                    raise SpecError(what, rank, "is not a rank of this group", f"ranks are 0 to {len(entries) - 1}")
        _check_inputs(entries, restart)
        for match in logs.matches:
            if match.file.isdigit() and int(match.file) < len(entries):
                raise SpecError(
                    "Match.file", match.file, "is the name of a rank's directory", 'name it "loss.log", say'
                )
        preload = check_items("preload", preload, "a list of module names", 'give preload=["torch"]', PATTERNS)
        if not all(isinstance(one, str) and one for one in preload):
            raise SpecError("preload", preload, "is not a list of module names", 'give preload=["torch"]')
        if preload and not (isinstance(start, str) and start == "zygote"):
            raise SpecError(
                "preload", list(preload), f'needs start="zygote", not {shown(start)}', "leave one of them out"
            )
        if not isinstance(start, str) or start not in ("zygote", "spawn", "fork"):
            check_lent(start, entries, env)
        if stop.if_lost == "stop" and start == "fork" and any(isinstance(one, Function) for one in entries):
            problem = 'is not for start="fork": a copy of this program dies with it'
            raise SpecError("Stop.if_lost", "stop", problem, 'use start="zygote" or "spawn"')
        if isinstance(ports, (str, bytes)) or not isinstance(ports, Sequence):
            raise SpecError("ports", ports, "is not a list of port numbers", "give ports=[8000]")
        for at, port in enumerate(ports):
            check_whole(f"ports[{at}]", port, 1, 65_535)
        variables = check_env("env", env)
        _check_secrets(entries, variables, name)
        places = resolve_places(placement, len(entries))
        _check_places(places, entries, variables, start)
        restart = restart or Restart.never()
        return cls(
            entries,
            name,
            variables,
            logs,
            stop,
            restart,
            start,
            tuple(preload),
            tuple(ports),
            places,
            answers,
            on_success,
        )


def _on_failure(field: str, value: Any) -> OnFailure:
    check_choice(field, value, get_args(OnFailure))
    answer: OnFailure = value
    return answer


def _check_names(entries: Sequence[Command | Function]) -> None:
    """No two workers are called the same: a number that we give may make a name that somebody else has."""
    seen: set[str] = set()
    for name in filter(None, names_of(entries)):
        if name in seen:
            raise SpecError("name", name, "is what two workers would be called", "give one of them another name")
        seen.add(name)


def _check_inputs(entries: Sequence[Command | Function], restart: Restart | None) -> None:
    once = [one.input for one in entries if isinstance(one, Command) and isinstance(one.input, AsyncIterable)]
    for at, given in enumerate(once):
        if any(given is other for other in once[:at]) or (restart is not None and restart.max):
            words = "can be read only once, and not by several workers or attempts"
            raise SpecError("input", given, words, "give bytes, text or a file, or each worker its own by a builder")


def _check_secrets(entries: Sequence[Command | Function], env: Mapping[str, str | None], name: str) -> None:
    for one in entries:
        if isinstance(one, Command):
            check_no_secret_in(env, one)
            one.secrets.check_not_in([("name", name)])


def _check_places(
    places: Sequence[Placement | None],
    entries: Sequence[Command | Function],
    env: Mapping[str, str | None],
    start: Start,
) -> None:
    for rank, (place, entry) in enumerate(zip(places, entries, strict=True)):
        if place is None:
            continue
        if isinstance(entry, Function) and not isinstance(start, str):
            remedy = 'leave out placement, or use start="zygote"'
            raise SpecError("placement", place, "is not for functions in an executor of the caller's", remedy)
        for key in place.env:
            if key in env or key in entry.env:
                problem = f"says what {key} in env of rank {rank} says"
                raise SpecError("Placement.gpus", place.gpus, problem, "leave one of them out")
