"""The command line. In: words. Out: an exit status. Never here: anything that the Python interface cannot do."""

from __future__ import annotations

from ._main import main

__all__ = ["main"]
