"""One pipe, read when the poller says that there is something in it, handed on chunk by chunk."""

from __future__ import annotations

import errno
import fcntl
import math
import os
from collections.abc import Callable
from typing import Protocol

from ..child.kernel.bounded_reads import turn
from ..system.descriptors import shut
from ..system.waiting import nothing, raise_soon
from ..watch import Poller

BUSY = 32_768  # bytes of one read, half of what a new pipe holds (pipe(7)), that say: its writer is faster than we
BUSY_PIPE = 524_288  # what a busy one is grown to, where the system allows
READ = BUSY_PIPE  # one read: large enough to be cheap, small enough that the loop stays its owner's
# the same where little comes, since Python takes memory for as much as it asks for; and where a tap makes a hundred
# bytes of one, and can hold the pump only when it has made them all
FEW = 65_536


class Tap(Protocol):
    """Takes chunks of one stream, in order. `feed` must not block; to slow the worker down it holds the pump."""

    def feed(self, data: bytes, pump: Pump) -> None: ...

    def eof(self) -> None: ...


class Pump:
    """Reads `fd` (non-blocking; closed by the pump at the end) into `taps`.

    Args:
        on_eof: called once when the stream is over: all its writers are gone, or `close()` gave it up.
        on_trouble: called with a tap that raised (it is taken off; the others go on), or with the pump itself when its
            descriptor cannot be read any more, which is its end.
    """

    name = "output of a worker"
    __slots__ = (
        "_busy",
        "_fd",
        "_grown",
        "_held",
        "_most",
        "_on_eof",
        "_on_trouble",
        "_poller",
        "_reading",
        "_unheld",
        "taps",
    )

    def __init__(
        self,
        poller: Poller,
        fd: int,
        taps: list[Tap],
        on_eof: Callable[[], None],
        on_trouble: Callable[[object, BaseException], None],
    ) -> None:
        self._poller = poller
        self._fd = fd
        self.taps = taps
        self._on_eof = on_eof
        self._on_trouble = on_trouble
        self._held: set[object] = set()
        self._unheld = False
        self._busy = self._grown = False
        self._most = READ
        self._reading = False

    @property
    def over(self) -> bool:
        """Whether the stream has ended."""
        return self._fd < 0

    @property
    def fd(self) -> int:
        """The read end, -1 when the stream is over."""
        return self._fd

    def start(self) -> None:
        """Read from now on."""
        if self._fd >= 0 and not self._held and not self._reading:
            self._reading = True
            self._most = FEW if any(getattr(one, "grows", False) for one in self.taps) else READ
            self._poller.add_reader(self._fd, self._readable)

    def hold(self, who: object) -> None:
        """Do not read until `who` releases; what the worker writes stays in its pipe, and in the end it waits."""
        if self._unheld:
            return
        self._held.add(who)
        self._pause()

    def release(self, who: object) -> None:
        """Undo `hold(who)`."""
        if who in self._held:
            self._held.discard(who)
            self.start()

    def finish(self) -> bool:
        """The worker is gone: read all it left in the pipe, whoever holds. True when that was the end.

        What is left is bounded by the pipe's size, so a full sink takes it into memory rather than lose it.
        """
        self._unheld = True
        self._held.clear()
        # somebody else may still be writing as fast as we read
        if self._fd >= 0:
            turn(self._readable, 2 * BUSY_PIPE, math.inf)
        self._unheld = False  # what others still write may be held again: memory stays bounded
        self.start()
        return self._fd < 0

    def close(self) -> None:
        """The stream is over for us, whether or not its writers are gone."""
        if self._fd >= 0:
            self._pause()
            fd, self._fd = self._fd, -1
            for tap in list(self.taps):
                self._guard(tap, tap.eof)
            self._on_eof()
            self._on_eof, self._on_trouble = nothing, nothing  # who has us shall not be held by us
            shut(fd)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fd, self._fd = self._fd, -1
        self.taps, self._reading = [], False
        self._on_eof, self._on_trouble = nothing, nothing
        return [fd] if fd >= 0 else []

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._poller.remove(self._fd)

    def _readable(self) -> int:
        """One read. Its size; -1 when there was nothing, or the end."""
        try:
            data = os.read(self._fd, self._most if self._busy else FEW)
        except BlockingIOError:
            return -1
        except OSError as exc:
            if exc.errno != errno.EIO or not os.isatty(self._fd):  # of a terminal that is the end
                self._on_trouble(self, exc)
            data = b""
        if not data:
            self.close()
            return -1
        self._busy = len(data) > BUSY
        if self._busy and not self._grown and self._most > FEW:
            self._grown = True
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, BUSY_PIPE)
            except OSError:
                pass  # over the user's pipe budget: works, in smaller steps
        for tap in self.taps:
            self._guard(tap, tap.feed, data, self)
        return len(data)

    def _guard(self, tap: Tap, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except (KeyboardInterrupt, SystemExit) as exc:
            raise_soon(exc)
        except BaseException as exc:  # a tap may call the user's code
            self._drop(tap, exc)

    def _drop(self, tap: Tap, exc: BaseException) -> None:
        self.taps = [one for one in self.taps if one is not tap]
        self._on_trouble(tap, exc)
