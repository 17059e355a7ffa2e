"""From `Logs` to the taps on each worker's streams: which files, whose prefix, which console."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..model.errors import SpecError
from ..model.logs import STREAM, Std
from ..model.validation import prefix_fields
from ..system import shared_memory_names
from ..system.waiting import completed
from ._console import Console
from ._files import FileSink, FileTap, FileThread
from ._lines import CallbackTap
from ._matched_lines import MatchTap
from ._pump import Tap
from ._tee import ConsoleTap, JsonTap, iso_time

if TYPE_CHECKING:
    from ..model.logs import Logs
    from ..planning import LaunchPlan, WorkerPlan
    from ..system.deadlines import Deadline


class Source(Protocol):
    """Whose output it is: a worker."""

    @property
    def rank(self) -> int: ...

    @property
    def attempt(self) -> int: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def plan(self) -> WorkerPlan: ...


COLOURS = (36, 33, 32, 35, 34, 31)  # of prefixes on a terminal, by rank


class Sinks:
    """All sinks of one group. `open` before the first worker, `close` after the last."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        logs: Logs,
        files: FileThread,
        on_trouble: Callable[[str, str, int], None],
    ) -> None:
        self._loop = loop
        self._logs = logs
        self._matches = logs.matches
        self._thread = files
        self._on_trouble = on_trouble
        self._files: dict[tuple[int, Std], FileSink] = {}
        # merged files by attempt, and how many ranks are at it: one rank may be several attempts ahead of another
        self._matched: dict[int, list[FileSink]] = {}
        self._at: Counter[int] = Counter()
        self._consoles: dict[Std, Console] = {}
        self._name = ""
        self._host = ""
        fields = prefix_fields(logs.prefix)
        self._constant = "time" not in fields and not logs.timestamps

    async def open(self, plan: LaunchPlan) -> None:
        """Make directories and files, attach to the console.

        Raises:
            SpecError: the log directory cannot be used. Nothing is left of it then.
        """
        self._name, self._host = plan.name, plan.host
        if plan.run_dir is not None:
            await completed(self._thread.submit(lambda: self._make_files(plan)))
        wanted = Std.NONE
        for worker in plan.workers:
            wanted |= worker.tee
        for std, stream in ((Std.OUT, sys.stdout), (Std.ERR, sys.stderr)):
            if std in wanted:
                self._consoles[std] = Console(self._loop, stream, STREAM[std], self._logs.when_full, self._on_trouble)

    def again(self, plan: LaunchPlan) -> asyncio.Future[None] | None:
        """Begin to make the files of a later attempt, for whose ranks the one before is over: its files are closed.

        Trouble is told and costs log files, never the attempt. None: there are no files to make.
        """
        if plan.run_dir is None:
            return None
        attempt, home = plan.attempt, plan.run_dir / f"attempt_{plan.attempt}"
        fresh: list[FileSink] = []
        for worker in plan.workers:
            for std, path in ((Std.OUT, worker.stdout_log), (Std.ERR, worker.stderr_log)):
                old = self._files.pop((worker.rank, std), None)
                if old is not None:
                    old.close()
                if path is not None:
                    fresh.append(FileSink(self._thread, path, self._logs.rotate, self._on_trouble))
                    self._files[worker.rank, std] = fresh[-1]
        self._at[attempt] += len(plan.workers)
        self._at[attempt - 1] -= len(plan.workers)
        if not self._at[attempt - 1]:
            for sink in self._matched.pop(attempt - 1, ()):
                sink.close()
        merged: list[FileSink] = []
        if attempt not in self._matched:
            paths = (home / match.file for match in self._matches)
            merged = [FileSink(self._thread, path, self._logs.rotate, self._on_trouble) for path in paths]
            self._matched[attempt] = merged

        def make() -> None:
            for worker in plan.workers:
                with contextlib.suppress(OSError):  # opening what belongs there will tell
                    (home / str(worker.rank)).mkdir(parents=True, exist_ok=True)
            for sink in merged:
                sink.try_open(append=True)  # a rank that came here earlier has written to it
            for sink in fresh:
                sink.try_open()

        return self._thread.submit(make)

    def taps(self, worker: Source, std: Std) -> list[Tap]:
        """What one stream feeds, besides its tail."""
        logs, plan = self._logs, worker.plan
        taps: list[Tap] = []
        sink = self._files.get((worker.rank, std))
        if sink is not None:
            taps.append(FileTap(sink))
        if std in plan.tee:
            console = self._consoles[std]
            if logs.json:
                taps.append(JsonTap(console, self._name, plan.name, worker.rank, STREAM[std]))
            else:
                prefix = self._prefix(worker, std, _coloured(logs.color, console.tty))
                taps.append(ConsoleTap(self._loop, console, prefix, self._constant))
        for match, merged in zip(self._matches, self._matched.get(worker.attempt, ()), strict=False):
            if std in match.std:
                taps.append(MatchTap(match, self._prefix(worker, std, False), merged))
        if logs.callback is not None:
            taps.append(CallbackTap(worker.rank, STREAM[std], logs.callback))
        return taps

    def file(self, rank: int, std: Std) -> FileSink | None:
        """The log file of one stream, or None."""
        return self._files.get((rank, std))

    async def close(self, deadline: Deadline, bound: float) -> None:
        """Write out what is queued and let go. What cannot be written within `bound` is counted and told."""
        while self._consoles:
            _, console = self._consoles.popitem()
            await console.leave(deadline, bound)
        if self._logs.dir is not None:
            self._thread.flush()
            self._thread.put(self._shut)  # of those, too, that are still being made

    def _shut(self) -> None:
        for sinks in (self._files.values(), *self._matched.values()):
            for sink in sinks:
                sink.shut()

    def _prefix(self, worker: Source, std: Std, colour: bool) -> Callable[[float], bytes]:
        fields: dict[str, Any] = {
            "worker": worker.plan.name or f"{self._name}{worker.rank}",
            "name": self._name,
            "rank": worker.rank,
            "local_rank": worker.rank,
            "host": self._host,
            "pid": worker.pid,
            "attempt": worker.attempt,
            "stream": STREAM[std],
        }
        template = ("{time} " if self._logs.timestamps else "") + self._logs.prefix
        on, off = "", ""
        if colour:
            on, off = f"\x1b[{COLOURS[worker.rank % len(COLOURS)]}m", "\x1b[0m"

        def prefix(at: float) -> bytes:
            return f"{on}{template.format(time=iso_time(at), **fields)}{off}".encode(errors="backslashreplace")

        return prefix

    def _make_files(self, plan: LaunchPlan) -> None:
        assert plan.run_dir is not None
        root = plan.run_dir.parent
        made: list[Path] = []  # outermost first
        try:
            for home in (*reversed(plan.run_dir.parents), plan.run_dir):
                if not home.is_dir():
                    home.mkdir(exist_ok=home != plan.run_dir)
                    made.append(home)
            self._probe(plan.run_dir)
            home = plan.run_dir / f"attempt_{plan.attempt}"
            home.mkdir()
            self._at[plan.attempt] = len(plan.workers)
            merged = self._matched[plan.attempt] = []
            for match in self._matches:
                merged.append(self._new(home / match.file))
            for worker in plan.workers:
                (home / str(worker.rank)).mkdir()
                for std, path in ((Std.OUT, worker.stdout_log), (Std.ERR, worker.stderr_log)):
                    if path is not None:
                        self._files[worker.rank, std] = self._new(path)
        except OSError as exc:
            shared_memory_names.remove(str(plan.run_dir))
            with contextlib.suppress(OSError):  # somebody else uses it meanwhile
                for home in reversed(made):
                    if home != plan.run_dir:
                        home.rmdir()
            raise _unusable(root, exc) from exc

    def _new(self, path: Path) -> FileSink:
        sink = FileSink(self._thread, path, self._logs.rotate, self._on_trouble)
        sink.open()
        return sink

    def _probe(self, home: Path) -> None:
        """A full disk lets files be made but not filled: find out now."""
        probe = home / ".probe"
        with open(probe, "wb", buffering=0) as file:
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
        probe.unlink()


def _coloured(wanted: Literal["auto", "always", "never"], tty: bool) -> bool:
    """Whether what goes to a console is: as https://no-color.org and https://force-color.org say, where nobody does."""
    if wanted != "auto" or os.environ.get("NO_COLOR"):
        return wanted == "always"
    return bool(os.environ.get("FORCE_COLOR")) or (tty and os.environ.get("TERM") != "dumb")


def _unusable(root: Path, exc: OSError) -> SpecError:
    words = {
        errno.ENOTDIR: ("is a file, or lies below one", "name a directory"),
        errno.EEXIST: ("is a file", "name a directory"),
        errno.EACCES: ("may not be written by this user", "check its permissions, or name another"),
        errno.EPERM: ("may not be written by this user", "check its permissions, or name another"),
        errno.EROFS: ("is on a read-only file system", "name another"),
        errno.ENOSPC: ("is on a full disk", "make room, or name another"),
        errno.EDQUOT: ("is over this user's disk quota", "make room, or name another"),
        errno.EFBIG: ("cannot be filled: RLIMIT_FSIZE forbids it", "raise the limit with `ulimit -f`"),
        errno.EMFILE: (
            "needs more open files than allowed",
            "raise the limit with `ulimit -n`, or save less",
        ),
    }
    problem, remedy = words.get(exc.errno or 0, (f"cannot be used: {exc.strerror or exc}", "name another directory"))
    return SpecError("Logs.dir", str(root), problem, remedy)
