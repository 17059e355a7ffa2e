"""What a group told, in order: to wait for it, to look it up, and to say in plain words how it must have been."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from .. import events
from ..events import Event, GroupDone

E = TypeVar("E", bound=Event)

STEP = re.compile(r"(?:rank (?P<rank>\d+) )?(?P<kind>[a-z ]+?)(?: in attempt (?P<attempt>\d+))?")


class Recorder:
    """Keeps all events of one group; to be given as `on_event`.

    Args:
        then: called with each event after it was kept, such as what `when` returns.

    Attributes:
        events: all so far.

    Example::

        recorder = Recorder()
        async with Group(Command("serve"), n=2, on_event=recorder, check=False) as group:
            await recorder.wait(events.Spawned, rank=1)
            group[1].send_signal(signal.SIGKILL)
            await group.wait()
        recorder.in_order("rank 1 exited", "rank 0 stopping", "rank 0 exited", "group done")
        recorder.never("killed")
    """

    def __init__(self, *then: Callable[[Event], object]) -> None:
        self.events: list[Event] = []
        self._problem: Exception | None = None
        self._then = then
        self._waiters: set[asyncio.Future[None]] = set()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        for one in self._waiters:
            if not one.done():
                one.set_result(None)
        try:
            for then in self._then:
                then(event)
        except Exception as exc:
            self._problem = self._problem or exc
            raise

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def of(self, kind: type[E], *, rank: int | None = None, attempt: int | None = None) -> list[E]:
        """Those of this kind (of that rank, in that attempt) so far.

        Args:
            kind: a class of `aioelastic.events`.
            rank: of this one; None: of any.
            attempt: in this one; None: in any.
        """
        return [
            one
            for one in self.events
            if isinstance(one, kind) and rank in (None, one.rank) and attempt in (None, one.attempt)
        ]

    async def wait(self, kind: type[E], *, rank: int | None = None, attempt: int | None = None) -> E:
        """The first of them, past or to come. `asyncio.timeout` bounds it.

        Args:
            kind: a class of `aioelastic.events`.
            rank: of this one; None: of any.
            attempt: in this one; None: in any.

        Raises:
            AssertionError: the group is done, and there was none.
            Exception: what one of `then` raised.
        """
        looked = 0
        while True:
            for one in self.events[looked:]:
                if isinstance(one, kind) and rank in (None, one.rank) and attempt in (None, one.attempt):
                    return one
                if isinstance(one, GroupDone):
                    raise AssertionError(f"the group ended without {_words(kind)}\n{self}")
            looked = len(self.events)
            self._raise()
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def in_order(self, *steps: str) -> None:
        """These happened, one after the other; whatever else happened in between.

        Args:
            steps: like `"rank 1 exited"`, `"rank 1 spawned in attempt 2"`, `"leaked"` (of any rank), `"group done"`.

        Raises:
            AssertionError: one did not, or too early; it shows what happened instead.
            ValueError: there is no such event.
            Exception: what one of `then` raised; the group has told it to the loop's exception handler only.
        """
        self._raise()
        rest = iter(self.events)
        for number, step in enumerate(steps):
            fits = _parsed(step)
            if not any(fits(one) for one in rest):
                after = f" after {steps[number - 1]!r}" if number else ""
                there = " (only before it)" if any(fits(one) for one in self.events) else ""
                raise AssertionError(f"{step!r} did not happen{after}{there}\n{self}")

    def never(self, *steps: str) -> None:
        """None of these happened. Raises as `in_order`.

        Args:
            steps: as for `in_order`.
        """
        self._raise()
        for step in steps:
            fits = _parsed(step)
            if any(fits(one) for one in self.events):
                raise AssertionError(f"{step!r} did happen\n{self}")

    def _raise(self) -> None:
        if self._problem is not None:
            raise self._problem

    def __str__(self) -> str:
        """What happened, a line for each event."""
        return "\n".join(["what happened:", *(f"  {told(one)}" for one in self.events)])


def told(event: Event) -> str:
    """An event as a step."""
    rank = "" if event.rank is None else f"rank {event.rank} "
    attempt = f" in attempt {event.attempt}" if event.attempt else ""
    return f"{rank}{_words(type(event))}{attempt}"


def _words(kind: type[Event]) -> str:
    """`GaveUp` is "gave up"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()


def _parsed(step: str) -> Callable[[Event], bool]:
    kinds = {_words(one): one for one in vars(events).values() if isinstance(one, type) and issubclass(one, Event)}
    match = STEP.fullmatch(step)
    kind = kinds.get(match["kind"]) if match else None
    if match is None or kind is None or kind is Event:
        known = ", ".join(sorted(kinds.keys() - {"event"}))
        raise ValueError(f"{step!r} is no step like 'rank 0 exited' or 'exited in attempt 1', with one of: {known}")
    rank, attempt = (None if match[part] is None else int(match[part]) for part in ("rank", "attempt"))
    return lambda one: isinstance(one, kind) and rank in (None, one.rank) and attempt in (None, one.attempt)
