"""The tee: workers' lines, prefixed, on the caller's own stdout and stderr, without ever blocking the loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TextIO

from ..system import forked_copies
from ._console_target import Target
from ._writers import Closed, room, words, writer_for

if TYPE_CHECKING:
    from ..system.deadlines import Deadline
    from ._pump import Pump

HIGH = 1_048_576  # bytes the console may be behind before its policy acts
ROOM = HIGH // 8  # made at once when the oldest are dropped
HURRIED = 0.5  # seconds for its last bytes when we are in a hurry
GATHER = 0.1  # seconds from the first byte that is lost until that is told, with the number by then
DROPPED = "is too slow: its oldest output is dropped"

Parts = Sequence[bytes | memoryview]
Trouble = Callable[[str, str, int], None]
Policy = Literal["block", "drop"]


class Console:
    """What one group writes to one of the caller's streams. Where that goes is a `Target`, which others may share.

    Policy (`when_full`), once it is 1 MiB behind: `block` holds the pumps, `drop` forgets the oldest pieces.

    What is lost is counted, and told soon; if it has become more, once again at the end. To be left with `leave`.

    Attributes:
        name: "stdout" or "stderr".
        tty: it is a terminal.
        lost: bytes that did not arrive, by now.
        context: that of its group, for stand-ins that ask whose output it is.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stream: TextIO | None,
        name: str,
        when_full: Policy,
        on_trouble: Trouble,
    ) -> None:
        self.name = name
        self.tty = False
        self.context = contextvars.copy_context()
        # the accounts of our bytes, guarded by the lock of the target
        self.taken = 0  # given to us, ever
        self.given = 0  # ... of these: written, or lost
        self.queued = 0  # ... of the others: in the queue of the target, and not in the hands of its thread
        self.lost = 0
        self.gone = False  # nobody waits for the rest any more
        self.gaps: dict[int, bool] = {}  # sources of which something was lost; True: the beginning of their next line
        self.loop = loop
        self._when_full = when_full
        self._on_trouble = on_trouble
        self._target: Target | None = None
        self._lock = threading.Lock()  # the target's, if there is one
        self._pumps: set[Pump] = set()
        self._waiting: Callable[[], None] | None = None
        self._asked = False  # the loop will look
        self._problems: list[str] = []  # ever met
        self._untold: list[str] = []
        self._told = 0  # lost bytes, by then
        self._urgent = False
        self._timer: asyncio.TimerHandle | None = None
        try:
            key, self.tty, make = writer_for(stream)
            self._target = Target.of(key, make, name, loop)
        except Closed as exc:
            self._trouble(str(exc))
        except OSError as exc:  # out of descriptors
            self._trouble(words(exc))
        else:
            self._lock = self._target.lock
            self._flush(self._target, stream)
        forked_copies.register(self)

    def disown(self) -> list[int]:
        """See `forked_copies`: what it has not written yet, the original will."""
        self._target, self._lock, self.gone = None, threading.Lock(), True
        self._on_trouble = lambda *_: None
        self._pumps.clear()
        return []

    async def leave(self, deadline: Deadline, bound: float) -> None:
        """See to it that all that was given so far is written, then let go.

        Waits as long as there is progress every `bound` seconds, to the deadline of a stop, or half a second in all in
        a hurry. What is not written then is counted as lost and told.
        """
        self._waiting = deadline.notice
        before = -1
        while not self._reached() and not deadline.hurried and not deadline.is_over() and self.given > before:
            before = self.given
            await deadline.until(partial(self._reached, before), bound)
        if not self._reached() and deadline.hurried:
            await deadline.until(self._reached, HURRIED, grace=False, late=deadline.SWEPT)
        self._waiting = None
        target, self._target = self._target, None
        if target is not None and (missing := target.give_up(self)):
            self._trouble(f"did not take its last {missing} bytes")
        self._release()
        self._tell(last=True)
        ended: asyncio.Future[None] = self.loop.create_future()
        ended.add_done_callback(lambda _: deadline.notice())
        if target is not None and target.leave(self.loop, lambda thread: self._call(_join, thread, ended)):
            # if its thread hangs in a write, that is left behind
            await deadline.until(ended.done, HURRIED, grace=False, late=deadline.SWEPT)

    def write(
        self, parts: Parts, pump: Pump | None, source: int = 0, prefix: bytes = b"", continued: bool = False
    ) -> None:
        """Whole lines, or the beginning of one.

        Args:
            source: who writes; 0: one of those who write whole lines only.
            prefix: stands before the first line, unless that is the unfinished one of `source` and still at the end.
            continued: it may be; just for the accounts.
        """
        size = sum(map(len, parts))
        if not continued:
            size += len(prefix)
        self.taken += size
        target = self._target
        if target is None:
            self.lose(size)
        else:
            target.write(self, source, prefix, parts, size)
            if self.queued > HIGH:
                self._overflow(target, pump)

    def end(self, source: int) -> None:
        """The unfinished line of `source`, if it still stands at the end, is over."""
        if self._target is not None:
            self._target.write(self, source, b"", (), 0)

    # --- what its target calls, with its lock held, in any thread ---

    def lose(self, size: int, problem: str | None = None, final: bool = False) -> None:
        """So many bytes do not arrive. `problem`: why; `final`: and no others will."""
        if self.gone:
            return  # they are counted
        self.lost += size
        self.given += size
        if problem is not None:
            self._trouble(problem)
            self._urgent |= final
        if self._untold or self._waiting is not None or self._pumps:
            self._ask()

    def wake(self, here: asyncio.AbstractEventLoop | None = None) -> None:
        """Some of it was written (`here`): does somebody wait for that?"""
        if self._waiting is not None or (self.queued < HIGH // 2 and self._pumps):
            if here is self.loop and not self._asked:
                self._asked = True
                here.call_soon(self._look)
            else:
                self._ask()

    # --- its own ---

    def _trouble(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)
            self._untold.append(problem)

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._call(self._look)

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to tell
            self.loop.call_soon_threadsafe(callback, *args)

    def _look(self) -> None:
        """On the loop: let held pumps go on, tell troubles and who waits."""
        self._asked = False
        if self.queued < HIGH // 2:
            self._release()
        if self._urgent:
            self._urgent = False
            self._tell()
        elif self._untold and self._timer is None:
            self._timer = self.loop.call_later(GATHER, self._tell)
        if self._waiting is not None:
            self._waiting()

    def _tell(self, last: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            told, self._untold = self._untold, []
            if last and not told and self.lost > self._told:
                told = self._problems[-1:]
            self._told = self.lost
        for problem in told:
            self._on_trouble(self.name, problem, self._told)

    def _flush(self, target: Target, stream: TextIO | None) -> None:
        """What was printed before us comes before us."""
        if stream is None or target.writer.foreign:  # what we write there goes through its buffer
            return
        if room(target.writer.fd):
            with contextlib.suppress(OSError):  # the program's own bytes, and its own trouble
                stream.flush()
        else:
            target.do(self, stream.flush)

    def _overflow(self, target: Target, pump: Pump | None) -> None:
        with target.lock:
            if self._when_full == "drop":
                target.drop_oldest(self, HIGH - ROOM, DROPPED)
                return
            if pump is None or self.queued <= HIGH:
                return
            self._pumps.add(pump)
        pump.hold(self)

    def _reached(self, before: int | None = None) -> bool:
        return self._target is None or self.given >= self.taken or (before is not None and self.given > before)

    def _release(self) -> None:
        pumps, self._pumps = self._pumps, set()
        for pump in pumps:
            pump.release(self)


def _join(thread: threading.Thread, over: asyncio.Future[None]) -> None:
    thread.join()  # it has nothing left to do but return
    if not over.done():
        over.set_result(None)
