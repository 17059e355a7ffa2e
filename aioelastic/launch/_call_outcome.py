"""What a function worker's call has come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..model.errors import RemoteError
from ..model.exits import Exit

# what was going on when an error was raised there
_PHASES = {
    "import": "its main module, or a hook for imports, could not be imported",
    "unpickle": "its function or arguments could not be unpickled there",
    "call": "",
    "result": "its result could not be pickled",
    "executor": "its executor failed",
}


class CallOutcome:
    """What a function worker's call has come to: filled in by whoever hears it.

    Attributes:
        value: what the function returned, once `has_value`.
        has_value: whether it has returned.
        error: its exception, if it raised one.
        raised_ns: when it did (monotonic), if that is known.
        invalid: what came instead of either, in words.
        whole: False while its value is being unpickled, which waits for the driver of a GPU.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.has_value = False
        self.error: RemoteError | None = None
        self.raised_ns: int | None = None
        self.invalid = ""
        self.whole = True

    def hear(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` when it says that it has set itself up."""

    def finish(self) -> None:
        """It has ended: nothing more will come."""

    def too_late(self) -> None:
        """Nobody waits any more for it to be whole."""
        if not self.whole:
            self.whole, self.has_value = True, False
            self.invalid = "its result could not be unpickled here in time: the driver of a GPU does not answer"

    def cause(self, exit: Exit) -> str:
        """Why it failed, in words; empty when it did not."""
        if self.error is not None:
            words = _PHASES.get(self.error.phase, self.error.phase)
            return f"{words}: {self.error.headline}" if words else f"raised {self.error.headline}"
        if self.invalid:
            return self.invalid if exit.code == 1 and not exit.signal else f"{self.invalid} ({exit})"
        if not exit.ok:
            return str(exit)
        return "" if self.has_value else "ended without returning (os._exit, or an execve), with exit code 0"
