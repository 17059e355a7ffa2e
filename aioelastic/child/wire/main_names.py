"""The two names of the caller's main module: what is pickled, or was made while it was run, says the first."""

from __future__ import annotations

import contextlib
from typing import Any

NAME, ALIAS = "__main__", "__mp_main__"


def rename(one: Any) -> None:
    """What was made while the main module was run says that it is of `__main__`: itself, or by its class."""
    kind = type(one)
    if issubclass(kind, type):
        type.__setattr__(one, "__module__", NAME)
    elif type.__getattribute__(kind, "__module__") == ALIAS:
        type.__setattr__(kind, "__module__", NAME)
    else:
        with contextlib.suppress(AttributeError, TypeError):  # not all can be told: `type X = ...`
            one.__module__ = NAME
