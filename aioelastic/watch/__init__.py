"""Exits, data in pipes, and signals, as events. In: a child or a pipe. Out: one call on the loop.

Never here: polling, SIGCHLD, `waitpid(-1)`. Exits come by one contract (`Watch`), from whichever mechanism there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ._poller import Poller
from ._signals import Signals
from ._thread import ThreadWatch

__all__ = [
    "Poller",
    "Signals",
    "ThreadWatch",
    "Watch",
]


class Watch(Protocol):
    """Children's exits, each told once, in the order in which they ended.

    A child is named by its pidfd to a `Poller`, by its pid to a `ThreadWatch`. `add_exit`: call on the loop's thread
    when the kernel says that the child has ended; it is not reaped yet, so its pid is still ours. `remove`: it was
    told, or shall not be; before the pidfd is closed.
    """

    def add_exit(self, child: int, callback: Callable[[], None]) -> None: ...

    def remove(self, child: int) -> None: ...
