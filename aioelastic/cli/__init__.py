"""The command line. In: words. Out: an exit status. Never here: anything that the Python interface cannot do."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import gc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

__all__ = ["main", "program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    status: int = _loaded().main(argv)
    return status


def program() -> NoReturn:
    """The command line as the whole program, which ends with it."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        # before anything heavy is imported: a Ctrl-C ends us, and prints nothing; a group has handlers of its own
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    _loaded().program()
    raise AssertionError


def _loaded() -> ModuleType:
    collects = gc.isenabled()
    gc.disable()  # for start-up time: what is imported stays
    try:
        from . import _main  # as said in `program`
    finally:
        if collects:
            gc.enable()
    return _main
