"""What the caller asks for, as frozen values. A spec never acts; it is checked whole when it is made.

`Command` says what one worker runs; `Logs`, `Stop` say how; `GroupSpec` is all of it for n ranks.
"""

from __future__ import annotations

import enum
import inspect
import os
import re
import signal as _signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .borrowed import check_borrowed
from .checks import (
    FrozenDict,
    check_bool,
    check_choice,
    check_env,
    check_items,
    check_path,
    check_prefix,
    check_seconds,
    check_whole,
    parse_signal,
    signal_name,
)
from .entry import Command, Entry, Function, resolve
from .errors import SpecError
from .placement import Placement, Places, resolve_places
from .restart import Restart
from .shown import shown

if TYPE_CHECKING:
    from .streams import Line


class Std(enum.IntFlag):
    """Which of a worker's two output streams."""

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = 3


STREAM = {Std.OUT: "stdout", Std.ERR: "stderr"}
PATTERNS = 10_000  # of them, and of modules: more is a mistake
STACKS = _signal.SIGRTMAX - 2  # as in child/_stacks.py
NAME_MOST = 200  # bytes of a group's name: it is a part of its directory's, which may have 255 bytes


@dataclass(frozen=True)
class Rotate:
    """Start a new log file when one is full; keep the last few. `stdout.log` is the newest, then `.1`, `.2`, …

    Files are cut at a line's end wherever one line is not longer than `size`. The names are ours: a file that somebody
    has moved, deleted or replaced is made anew; a name that a directory holds is left out.

    Args:
        size: bytes a file may hold.
        keep: how many full files are kept beside the current one; 0: it is emptied when it is full.
    """

    size: int = 50 * 2**20
    keep: int = 10

    def __post_init__(self) -> None:
        check_whole("Rotate.size", self.size, 1)
        check_whole("Rotate.keep", self.keep, 0)


Pattern: TypeAlias = "str | re.Pattern[str] | re.Pattern[bytes]"


@dataclass(frozen=True)
class Match:
    """A merged copy of the lines that matter, from all ranks, in `<run>/attempt_<n>/<file>`, each with its prefix.

    A line is copied when it has any of `include` (all lines when empty) and none of `exclude`.
    A `str` is looked for as it stands; a compiled `re` is searched. A line longer than `LINE_LIMIT` is looked at in
    parts, and each part that matches is copied as a line: what begins in one and ends in the next is not found.
    """

    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    std: Std = Std.ALL
    file: str = "matched.log"

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            given = getattr(self, name)
            if isinstance(given, str | re.Pattern):
                given = (given,)
            remedy = 'give "text" or re.compile(...), or several'
            object.__setattr__(self, name, check_items(f"Match.{name}", given, "a pattern", remedy, PATTERNS))
            for one in getattr(self, name):
                if not isinstance(one, str | re.Pattern) or one == "":
                    raise SpecError(f"Match.{name}", one, "is not a pattern", "give a non-empty str or re.compile(...)")
        object.__setattr__(self, "std", _one_std("Match.std", self.std))
        bad = not isinstance(self.file, str) or self.file in ("", ".", "..") or {"/", "\0"} & set(self.file)
        if bad:
            raise SpecError("Match.file", self.file, "is not a file name", 'give a plain name like "loss.log"')


@dataclass(frozen=True)
class Logs:
    """Where the workers' output goes.

    Args:
        dir: a directory for log files: `<dir>/<run id>/attempt_<n>/<rank>/{stdout.log,stderr.log,error.json}`.
            Each run makes its own run id, so no log is ever overwritten.
        tee: which streams also go to the caller's own stdout and stderr, with a prefix per line
            (one `Std`, or one per rank as a dict; ranks left out: none).
        save: which streams go to files; all when `dir` is given. Files hold the worker's bytes unchanged.
        prefix: template of the tee's prefix; fields: name rank local_rank host pid attempt stream time.
        ranks: only these ranks are tee'd; files are not affected.
        match: merged copies of chosen lines: `Match` values, or bare patterns, which share `matched.log`.
        timestamps: each tee'd line starts with the time it was read (ISO 8601, UTC).
        rotate: size and count limit per log file, those of `match` too.
        json: the tee writes one JSON object per line instead of prefixed text. Keys: time, name, rank, stream, line;
            raw, only where bytes are not UTF-8: all of them in base64 (`line` shows these as `\\xNN`); continued, true,
            for a part of a line longer than `LINE_LIMIT` that goes on in the next object of this rank and stream.
        callback: called on the event loop with each `Line` of every rank and stream; must be quick.
        when_full: what the tee does when the terminal or pipe behind it is slow: `"block"` (lossless: in the end
            the worker waits), `"drop"` (oldest first, counted and reported), `"spill"` (to an unnamed temporary
            file; where there is no place for one, as `"drop"`). Files always block: they are lossless.
        drain: seconds to wait, after a worker's exit, for the end of output that some other process holds open.

    Raises:
        SpecError: a field is not usable.
    """

    dir: str | os.PathLike[str] | None = None
    tee: Std | Mapping[int, Std] = Std.ALL
    save: Std | Mapping[int, Std] | None = None
    prefix: str = "[{name}{rank}]: "
    ranks: Iterable[int] | None = None
    match: Sequence[Match | Pattern] | Match | Pattern = ()
    timestamps: bool = False
    rotate: Rotate | None = None
    json: bool = False
    callback: Callable[[Line], object] | None = None
    when_full: Literal["block", "drop", "spill"] = "block"
    drain: float = 2.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.dir is not None:
            if not check_path("Logs.dir", self.dir):
                raise SpecError("Logs.dir", self.dir, "is empty", 'give dir="runs", or dir="." for the current one')
            put(self, "dir", Path(self.dir))
        put(self, "tee", _std("Logs.tee", self.tee))
        default = Std.NONE if self.dir is None else Std.ALL
        put(self, "save", default if self.save is None else _std("Logs.save", self.save))
        check_prefix(self.prefix)
        check_bool("Logs.timestamps", self.timestamps)
        check_bool("Logs.json", self.json)
        if self.ranks is not None:
            ranks = check_items("Logs.ranks", self.ranks, "a collection of ranks", "give ranks=[0, 1]")
            for one in ranks:
                check_whole("Logs.ranks", one, 0)
            put(self, "ranks", frozenset(ranks))
        put(self, "match", _matches(self.match))  # also checks them
        if self.rotate is not None and not isinstance(self.rotate, Rotate):
            raise SpecError("Logs.rotate", self.rotate, "is not a Rotate", "give Rotate(size=..., keep=...)")
        if self.rotate is not None:
            files = {one.file for one in self.matches}
            for name in files:
                stem, _, number = name.rpartition(".")
                if stem in files and re.fullmatch("[1-9][0-9]{,200}", number) and int(number) <= self.rotate.keep:
                    raise SpecError("Match.file", name, f"is what {stem!r} is named when rotated", "name it otherwise")
        for name, given in (("save", self.save), ("rotate", self.rotate), ("match", self.match)):
            if given and self.dir is None:
                raise SpecError(f"Logs.{name}", given, "needs a directory", 'give dir="runs" too')
        if self.callback is not None and (not callable(self.callback) or inspect.iscoroutinefunction(self.callback)):
            raise SpecError(
                "Logs.callback",
                self.callback,
                "is not a plain function",
                "give def f(line): ..., or use `async for line in group.lines()`",
            )
        check_choice("Logs.when_full", self.when_full, ("block", "drop", "spill"))
        check_seconds("Logs.drain", self.drain)

    def tees(self, rank: int) -> Std:
        """Which streams of this rank are tee'd."""
        return Std.NONE if self.ranks is not None and rank not in self.ranks else _of(self.tee, rank)

    @property
    def matches(self) -> tuple[Match, ...]:
        """`match`, with the bare patterns made into one `Match`."""
        return _matches(self.match)

    def saves(self, rank: int) -> Std:
        """Which streams of this rank go to files."""
        return _of(self.save or Std.NONE, rank)


@dataclass(frozen=True)
class Stop:
    """How workers are stopped: a signal, a time to obey it, then SIGKILL, then a bounded wait.

    Each worker has the whole grace for itself. A worker that ends early ends its own grace. `Group.stop()` returns
    within grace + bound + 1 s (and the 2 s of a dump), whatever hangs: what is not known by then is told so.

    Args:
        signal: the polite signal, by number, member or name (`"SIGINT"`, `"INT"`, `"SIGRTMIN+3"`).
        grace: seconds a worker has to obey before SIGKILL.
        scope: who gets the signal: `"leader_then_group"` (the worker; its process group when the worker is gone
            or its grace is over, so that a trainer's loaders outlive its last save), `"group"` (all at once), or
            `"leader"` (never anybody but the worker: what it leaves running is only reported).
        bound: seconds to wait for a process to die after SIGKILL before it is reported as `Unkillable`.
        if_lost: how the guardian ends workers when this program dies without having stopped them (by SIGKILL, say):
            `"kill"` at once, or `"stop"` by `signal` and `grace`, so that a trainer can save. Nobody reads what they
            print then.
        dump: first take the Python stacks of all that still run (`Group.dump_stacks`; at most 2 seconds), so that
            `Result.stacks` shows where a worker hung when another one failed or the time was over.

    Raises:
        SpecError: unknown or uncatchable signal; negative or infinite time.
    """

    signal: int | str = _signal.SIGTERM
    grace: float = 30.0
    scope: Literal["leader_then_group", "group", "leader"] = "leader_then_group"
    bound: float = 30.0
    dump: bool = False
    if_lost: Literal["kill", "stop"] = "kill"

    def __post_init__(self) -> None:
        number = parse_signal("Stop.signal", self.signal)
        if number in (_signal.SIGKILL, _signal.SIGSTOP):
            raise SpecError(
                "Stop.signal",
                signal_name(number),
                "cannot be caught by a worker",
                "use SIGTERM with grace=0 to kill at once",
            )
        if number == STACKS:
            problem = "is the one by which a worker is asked for its stacks"
            raise SpecError("Stop.signal", signal_name(number), problem, "use another, as SIGRTMIN+3")
        object.__setattr__(self, "signal", number)
        check_seconds("Stop.grace", self.grace)
        check_seconds("Stop.bound", self.bound)
        check_bool("Stop.dump", self.dump)
        check_choice("Stop.scope", self.scope, ("leader_then_group", "group", "leader"))
        check_choice("Stop.if_lost", self.if_lost, ("kill", "stop"))

    @property
    def signum(self) -> int:
        """The signal as a member of `signal.Signals`; a plain number where it has none (real-time signals)."""
        assert isinstance(self.signal, int)  # since it was made
        return self.signal


# how a function begins: in a process of its own, or in an executor that the caller lends
Start: TypeAlias = "Literal['zygote', 'spawn', 'fork'] | Executor"


@dataclass(frozen=True)
class GroupSpec:
    """A whole group: one entry per rank, and how to run them. Made by `GroupSpec.of`, which checks everything."""

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
    ) -> GroupSpec:
        """Resolve the three forms of `entry` to one per rank, and check the rest.

        Raises:
            SpecError: names the first field that is wrong, its value and the remedy.
        """
        if not isinstance(name, str) or not name or "/" in name or "\0" in name or not name.isprintable():
            raise SpecError("name", name, "is not usable in file names", 'give a plain word like "trainer"')
        if len(name.encode()) > NAME_MOST:
            raise SpecError("name", name, f"is longer than {NAME_MOST} bytes", "give a shorter one")
        logs = logs if logs is not None else Logs()
        stop = stop if stop is not None else Stop()
        for what, given, kind in (("logs", logs, Logs), ("stop", stop, Stop)):
            if not isinstance(given, kind):
                raise SpecError(what, given, f"is not a {kind.__name__}", f"give {kind.__name__}(...)")
        if restart is not None and not isinstance(restart, Restart):
            raise SpecError("restart", restart, "is not a Restart", "give Restart.on_failure(max=3)")
        entries = resolve(entry, n)
        named: dict[str, Iterable[int]] = {"Logs.ranks": logs.ranks or ()}
        for what, stds in (("Logs.tee", logs.tee), ("Logs.save", logs.save)):
            if isinstance(stds, Mapping):
                named[what] = stds
        for what, ranks in named.items():
            for rank in sorted(ranks):
                if rank >= len(entries):
                    raise SpecError(what, rank, "is not a rank of this group", f"ranks are 0 to {len(entries) - 1}")
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
            check_borrowed(start, entries, env)
        if stop.if_lost == "stop" and start == "fork" and any(isinstance(one, Function) for one in entries):
            problem = 'is not for start="fork": a copy of this program dies with it'
            raise SpecError("Stop.if_lost", "stop", problem, 'use start="zygote" or "spawn"')
        if isinstance(ports, (str, bytes)) or not isinstance(ports, Sequence):
            raise SpecError("ports", ports, "is not a list of port numbers", "give ports=[8000]")
        for at, port in enumerate(ports):
            check_whole(f"ports[{at}]", port, 1, 65_535)
        variables = check_env("env", env)
        places = resolve_places(placement, len(entries))
        _check_places(places, entries, variables, start)
        restart = restart or Restart.never()
        return cls(entries, name, variables, logs, stop, restart, start, tuple(preload), tuple(ports), places)


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


def _std(field: str, value: Any) -> Std | FrozenDict[int, Std]:
    if not isinstance(value, Mapping):
        return _one_std(field, value)
    for rank in value:
        check_whole(f"{field} key", rank, 0)
    return FrozenDict({rank: _one_std(f"{field}[{rank}]", one) for rank, one in value.items()})


def _one_std(field: str, value: Any) -> Std:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 3:
        raise SpecError(field, value, "is not a Std", "give Std.NONE, Std.OUT, Std.ERR or Std.ALL")
    return Std(value)


def _of(value: Std | Mapping[int, Std], rank: int) -> Std:
    return value if isinstance(value, Std) else value.get(rank, Std.NONE)


def _matches(given: Any) -> tuple[Match, ...]:
    if isinstance(given, str | re.Pattern | Match):
        given = (given,)
    remedy = 'give Match(...), "text" or re.compile(...), or several'
    given = check_items("Logs.match", given, "a filter", remedy, PATTERNS)
    bare = tuple(one for one in given if not isinstance(one, Match))
    out = tuple(one for one in given if isinstance(one, Match))
    if bare:
        out = (Match(include=bare), *out)
    seen: set[str] = set()
    for one in out:
        if one.file in seen:
            raise SpecError("Match.file", one.file, "is used by two filters", "give each Match its own file")
        seen.add(one.file)
    return out


def check_timeout(value: float | None) -> None:
    """`supervise(timeout=)`: seconds above 0, or None."""
    if value is not None:
        check_seconds("timeout", value)
