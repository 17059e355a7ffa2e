"""The command line. In: words. Out: an exit status. Never here: anything that the Python interface cannot do."""

from __future__ import annotations

import gc

_collects = gc.isenabled()
gc.disable()  # for start-up time: what is imported stays
from ._main import main, program  # noqa: E402

if _collects:
    gc.enable()

__all__ = ["main", "program"]
