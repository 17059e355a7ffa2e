"""A message that can only be sent later: its arrays are copied, a GPU has to finish, or its driver must be asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ...system.waiting import insist
from . import datagrams


class Packing(Future[None]):
    """Done when the message can be sent, or cannot be made. Whoever has it then calls `take`, or `cancel`.

    Args:
        what: all that there is to be waited for.
        packed: the message.
    """

    def __init__(self, what: Any, packed: datagrams.Packed | None = None) -> None:
        super().__init__()
        self._lock = threading.RLock()  # a signal's handler may cancel
        self._what = what
        self._left: list[Any] = []
        self._packed = packed
        if packed is not None:
            self._made(packed)

    def aside(self, pack: Callable[[], datagrams.Packed], adopt: Callable[[], None]) -> None:
        """Pack it in a thread of its own, which may wait for a driver; `adopt` is called there first."""

        def work() -> None:
            self._what.asks = True
            try:
                adopt()
                with self._what:
                    packed = pack()
            except BaseException as exc:  # it is the sender's
                self._end(exc)
            else:
                self._made(packed)

        threading.Thread(target=work, name="aioelastic-pack", daemon=True).start()

    def take(self) -> datagrams.Packed:
        """The message; its descriptors are the caller's to close from now on. Raises why it could not be made."""
        self.result()
        with self._lock:
            packed, self._packed = self._packed, None
        assert packed is not None
        return packed

    def cancel(self) -> bool:
        """It will not be sent: what it holds is free at once, but for a copy that is just being made."""
        super().cancel()
        self._what.dropped = True
        with self._lock:
            packed, self._packed = self._packed, None
        if packed is not None:
            datagrams.close(packed[1])
        return True

    async def wait(self) -> datagrams.Packed:
        """As `take`, when it is done. Cancelled, it ends when nobody reads the arrays any more."""
        try:
            await asyncio.wrap_future(self)
            return self.take()
        except BaseException:
            self.cancel()
            for one in self._what.copies:
                with contextlib.suppress(Exception):
                    await insist(asyncio.wrap_future(one))
            raise

    def _made(self, packed: datagrams.Packed) -> None:
        with self._lock:
            self._packed = packed
        if self.cancelled():
            self.cancel()  # there was nothing to be freed then
        self._left = [*self._what.copies, *self._what.waits]
        self._go_on()

    def _go_on(self, _: object = None) -> None:
        """In whatever thread: one after the other."""
        problem = None
        while self._left and problem is None:
            if not self._left[-1].done():
                self._left[-1].add_done_callback(self._go_on)
                return
            problem = self._left.pop().exception()
        self._end(problem)

    def _end(self, problem: BaseException | None) -> None:
        if not self.set_running_or_notify_cancel():
            return
        if problem is None:
            self._what.copies.clear()  # they hold us, and with us who waited for us
            self._what.waits.clear()
            self.set_result(None)
        else:
            self.cancel()
            self.set_exception(problem)
