"""Pipe → chunks → lines → sinks. In: the read ends of workers' pipes. Out: files, the console, lines, a tail.
The write end of a worker's standard input is here, too.

A `Pump` reads one pipe and hands each chunk to its taps. A tap that cannot keep up holds the pump, and in the end
the worker waits: that is the `block` policy. Never here: processes, and blocking writes on the event loop.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..model.lines import LINE_LIMIT, Line
from ._console import Console
from ._files import FileSink, FileTap, FileThread
from ._line_feeds import Feeds
from ._line_search import LineSearch
from ._lines import CallbackTap, LineFeed, LineTap, PartialLineTap
from ._matched_lines import MatchTap
from ._pump import Pump, Tap
from ._routing import Sinks
from ._tail import Tail
from ._tee import ConsoleTap, JsonTap, iso_time

if TYPE_CHECKING:
    from ._dialogue import Dialogue, DialogueTap
    from ._standard_input import StandardInput

__all__ = [
    "Feeds",
    "LINE_LIMIT",
    "CallbackTap",
    "Console",
    "ConsoleTap",
    "Dialogue",
    "DialogueTap",
    "FileSink",
    "FileTap",
    "FileThread",
    "JsonTap",
    "Line",
    "LineFeed",
    "LineSearch",
    "LineTap",
    "MatchTap",
    "PartialLineTap",
    "Pump",
    "Sinks",
    "StandardInput",
    "Tail",
    "Tap",
    "iso_time",
]


_NAMES = {"Dialogue": "_dialogue", "DialogueTap": "_dialogue", "StandardInput": "_standard_input"}


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # for start-up time: see `supervisor/worker_input.py`
    value = globals()[name] = getattr(import_module(f".{_NAMES[name]}", __name__), name)
    return value
