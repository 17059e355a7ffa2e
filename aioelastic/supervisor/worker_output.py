"""The two output streams of one worker: pipes, tails, lines, log files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ..model.exits import Output
from ..model.logs import STREAM, Std
from ..planning import WorkerPlan
from ..streams import FileSink, LineSearch, LineTap, PartialLineTap, Pump, Tail, Tap
from ..watch import Poller

if TYPE_CHECKING:
    from ..streams import DialogueTap


class OutputOwner(Protocol):
    """Says where the output of a worker goes."""

    poller: Poller

    def tap_trouble(self, tap: object, exc: BaseException) -> None: ...


class WorkerOutput:
    """From the start of a worker on: each stream with the end of what came (`Tail`), and its pipe, if it has one.

    Attributes:
        holders: who still had a stream open when the wait for its end was given up.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self.holders: dict[Std, tuple[int, ...]] = {}
        self._plan = plan
        self._pumps: dict[Std, Pump] = {}
        self._line_taps: dict[tuple[Std, float | None], LineTap] = {}
        self._searches: dict[tuple[Std, LineSearch], LineTap] = {}
        self._tails: dict[Std, Tail] = {}
        self._sinks: dict[Std, FileSink | None] = {}

    def open(self, fds: dict[Std, int | None], owner: OutputOwner, on_end: Callable[[], None]) -> None:
        """It was started; `on_end` is called at the end of each stream."""
        for std, fd in fds.items():
            self._tails[std] = Tail()
            if fd is not None:
                self._pumps[std] = Pump(owner.poller, fd, [self._tails[std]], on_end, owner.tap_trouble)

    def connect(self, file: Callable[[Std], FileSink | None], taps: Callable[[Std], list[Tap]]) -> None:
        """Where what comes goes to."""
        for std, pump in self._pumps.items():
            self._sinks[std] = file(std)
            pump.taps += taps(std)

    def start(self) -> None:
        """Read from now on."""
        for pump in self._pumps.values():
            pump.start()

    def finish(self) -> None:
        """Its worker has ended: read what is there."""
        for pump in self._pumps.values():
            pump.finish()

    def close(self) -> None:
        """Read no further."""
        for pump in self._pumps.values():
            pump.close()

    @property
    def over(self) -> bool:
        """Whether both streams are at their end."""
        return all(pump.over for pump in self._pumps.values())

    def give_up(self, pipes: dict[Std, int], held: Mapping[int, tuple[int, ...]]) -> None:
        """Read no further. `held`: who has these pipes open; those that have ended meanwhile nobody has."""
        self.holders = {std: held.get(fd, ()) for std, fd in pipes.items() if not self._pumps[std].over}
        self.close()

    def still_open(self) -> dict[Std, int]:
        """The pipes whose end has not come, after what is there was read once more."""
        return {std: pump.fd for std, pump in self._pumps.items() if not pump.finish()}

    def split_lines(self, seconds: float | None, deliver: Callable[..., None]) -> None:
        """Hand each line from now on to `deliver(rank, stream, lines, time, pump, continued)`; one that is unfinished
        now comes whole. `seconds`: see `PartialLineTap`."""
        for std, pump in self._pumps.items():
            if not pump.over and (std, seconds) not in self._line_taps:
                to = partial(deliver, self._plan.rank, STREAM[std])
                tap = LineTap(to) if seconds is None else PartialLineTap(to, seconds)
                tap.begin(self._tails[std].unfinished())
                self._line_taps[std, seconds] = tap
                pump.taps = [*pump.taps, tap]

    def stop_splitting(self, seconds: float | None) -> None:
        """Undo that."""
        for std, pump in self._pumps.items():
            tap = self._line_taps.pop((std, seconds), None)
            pump.taps = [one for one in pump.taps if one is not tap]
            if isinstance(tap, PartialLineTap):
                tap.stop()

    def search(self, search: LineSearch) -> None:
        """Look for a line in both streams, from where the last one was found."""
        for std, pump in self._pumps.items():
            tap = search.tap(self._tails[std])
            if pump.over:
                tap.eof()
            else:
                self._searches[std, search] = tap
                pump.taps = [*pump.taps, tap]

    def stop_searching(self, search: LineSearch) -> None:
        """Undo that."""
        for std, pump in self._pumps.items():
            tap = self._searches.pop((std, search), None)
            pump.taps = [one for one in pump.taps if one is not tap]

    def converse(self, std: Std) -> tuple[DialogueTap, Callable[[], None]]:
        """Hand on all that one stream says, from where a line was found last; and the call that undoes it."""
        from ..streams import DialogueTap  # for start-up time: see `worker_input.py`

        pump, tap = self._pumps[std], DialogueTap(self._tails[std])
        if pump.over:
            tap.eof()
        else:
            pump.taps = [*pump.taps, tap]

        def leave() -> None:
            pump.taps = [one for one in pump.taps if one is not tap]

        return tap, leave

    def of(self, std: Std) -> Output:
        """What has come of one stream so far."""
        tail, sink = self._tails.get(std), self._sinks.get(std)
        path = self._plan.stdout_log if std is Std.OUT else self._plan.stderr_log
        if tail is None:
            return Output(path)
        return Output(path, tail.last(), tail.total, sink.lost if sink else 0, self.holders.get(std, ()))

    def disown(self) -> list[int]:
        """See `system/forked_copies.py`."""
        return [fd for pump in self._pumps.values() for fd in pump.disown()]
