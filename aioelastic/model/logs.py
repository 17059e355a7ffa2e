"""Where the workers' output goes, as a frozen value, checked when it is made."""

from __future__ import annotations

import enum
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .errors import SpecError
from .frozen import dataclass
from .lines import Line
from .validation import (
    FrozenDict,
    check_bool,
    check_choice,
    check_items,
    check_line_pattern,
    check_path,
    check_prefix,
    check_seconds,
    check_whole,
)


class Std(enum.IntFlag):
    """Which of a worker's two output streams.

    Attributes:
        NONE: neither.
        OUT: its standard output.
        ERR: its standard error.
        ALL: both.
    """

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = 3


STREAM = {Std.OUT: "stdout", Std.ERR: "stderr"}


PATTERNS = 10_000  # of them, and of modules: more is a mistake


@dataclass(frozen=True)
class Rotate:
    """Start a new log file when one is full; keep the last few. `stdout.log` is the newest, then `.1`, `.2`, …

    Files are cut at a line's end wherever one line is not longer than `size`. The names are ours: a file that somebody
    has moved, deleted or replaced is made anew; a name that a directory holds is left out.

    Args:
        size: bytes a file may hold.
        keep: how many full files are kept beside the current one; 0: it is emptied when it is full.

    Raises:
        SpecError: a field is not usable.

    Example::

        Logs(dir="runs", rotate=Rotate(size=10 * 2**20, keep=3))
    """

    size: int = 50 * 2**20
    keep: int = 10

    def __post_init__(self) -> None:
        check_whole("Rotate.size", self.size, 1)
        check_whole("Rotate.keep", self.keep, 0)


Pattern: TypeAlias = str | re.Pattern[str] | re.Pattern[bytes]


@dataclass(frozen=True)
class Match:
    r"""A merged copy of the lines that matter, from all ranks, in `<run>/attempt_<n>/<file>`, each with its prefix.

    A line is copied when it has any of `include` (all lines when empty) and none of `exclude`.
    A `str` is looked for as it stands; a compiled `re` is searched. A line longer than `LINE_LIMIT` is looked at in
    parts, and each part that matches is copied as a line: what begins in one and ends in the next is not found.

    Args:
        include: what a line must have one of: a pattern, or several; when empty, each line is copied.
        exclude: what a line must not have: a pattern, or several.
        std: of which streams.
        file: the name of the copy; each `Match` of a `Logs` has another.

    Raises:
        SpecError: a field is not usable.

    Example::

        Logs(dir="runs", match=Match(re.compile(r"loss=\d"), file="loss.log"))
    """

    include: Sequence[Pattern] | Pattern = ()
    exclude: Sequence[Pattern] | Pattern = ()
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
                check_line_pattern(f"Match.{name}", re.compile(re.escape(one)) if isinstance(one, str) else one)
        object.__setattr__(self, "std", _one_std("Match.std", self.std))
        bad = not isinstance(self.file, str) or self.file in ("", ".", "..") or {"/", "\0"} & set(self.file)
        if bad:
            raise SpecError("Match.file", self.file, "is not a file name", 'give a plain name like "loss.log"')


@dataclass(frozen=True)
class Logs:
    r"""Where the workers' output goes.

    Args:
        dir: a directory for log files: `<dir>/<run id>/attempt_<n>/<rank>/{stdout.log,stderr.log,error.json}`.
            Each run makes its own run id, so no log is ever overwritten.
        tee: which streams also go to the caller's own stdout and stderr, with a prefix per line
            (one `Std`, or one per rank as a dict; ranks left out: none).
        save: which streams go to files; all when `dir` is given. Files hold the worker's bytes unchanged.
        prefix: template of the tee's prefix; fields: worker (its own name, or else the group's and its rank), name (the
            group's) rank local_rank host pid attempt stream time.
        ranks: only these ranks are tee'd; files are not affected.
        match: merged copies of chosen lines: `Match` values, or bare patterns, which share `matched.log`.
        color: whether prefixes are coloured, each rank's in its own: `"auto"` (on a terminal, unless `TERM=dumb`; the
            variables NO_COLOR and FORCE_COLOR, where they are not empty, decide otherwise, the first before the
            second), `"always"` or `"never"`. JSON and files never are.
        timestamps: each tee'd line starts with the time it was read (ISO 8601, UTC).
        rotate: size and count limit per log file, those of `match` too.
        json: the tee writes one JSON object per line instead of prefixed text. Keys: time, name, rank, stream, line;
            worker, only where it has a name of its own; raw, only where bytes are not UTF-8: all of them in base64
            (`line` shows these as ``\xNN``); continued, true, for a part of a line longer than `LINE_LIMIT` that goes
            on in the next object of this rank and stream.
        callback: called on the event loop with each `Line` of every rank and stream; must be quick.
        when_full: what the tee does when the terminal or pipe behind it is slow: `"block"` (lossless: in the end
            the worker waits) or `"drop"` (oldest first, counted and reported). Files always block: they are
            lossless.
        drain: seconds to wait, after a worker's exit, for the end of output that some other process holds open.

    Raises:
        SpecError: a field is not usable.

    Example::

        Logs(dir="runs", tee={0: Std.ALL}, match="loss=")  # rank 0 on the console, all ranks in files
    """

    dir: str | os.PathLike[str] | None = None
    tee: Std | Mapping[int, Std] = Std.ALL
    save: Std | Mapping[int, Std] | None = None
    prefix: str = "[{worker}]: "
    ranks: Iterable[int] | None = None
    match: Sequence[Match | Pattern] | Match | Pattern = ()
    timestamps: bool = False
    rotate: Rotate | None = None
    json: bool = False
    callback: Callable[[Line], object] | None = None
    when_full: Literal["block", "drop"] = "block"
    drain: float = 2.0
    color: Literal["auto", "always", "never"] = "auto"

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
        check_choice("Logs.when_full", self.when_full, ("block", "drop"))
        check_seconds("Logs.drain", self.drain)
        check_choice("Logs.color", self.color, ("auto", "always", "never"))

    def tees(self, rank: int) -> Std:
        """Which streams of this rank are tee'd.

        Args:
            rank: its rank.
        """
        return Std.NONE if self.ranks is not None and rank not in self.ranks else _of(self.tee, rank)

    @property
    def matches(self) -> tuple[Match, ...]:
        """`match`, with the bare patterns made into one `Match`."""
        return _matches(self.match)

    def saves(self, rank: int) -> Std:
        """Which streams of this rank go to files.

        Args:
            rank: its rank.
        """
        return _of(self.save or Std.NONE, rank)


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
