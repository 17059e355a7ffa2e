"""Pipe → chunks → lines → sinks. In: the read ends of workers' pipes. Out: files, the console, lines, a tail.

A `Pump` reads one pipe and hands each chunk to its taps. A tap that cannot keep up holds the pump, and in the end
the worker waits: that is the `block` policy. Never here: processes, and blocking writes on the event loop.
"""

from __future__ import annotations

from ._console import Console
from ._feeds import Feeds
from ._files import FileSink, FileTap, FileThread
from ._lines import LINE_LIMIT, CallbackTap, Line, LineFeed, LineTap
from ._match import MatchTap
from ._pump import Pump, Tap
from ._tail import Tail
from ._tee import ConsoleTap, JsonTap, iso_time

__all__ = [
    "Feeds",
    "LINE_LIMIT",
    "CallbackTap",
    "Console",
    "ConsoleTap",
    "FileSink",
    "FileTap",
    "FileThread",
    "JsonTap",
    "Line",
    "LineFeed",
    "LineTap",
    "MatchTap",
    "Pump",
    "Tail",
    "Tap",
    "iso_time",
]
