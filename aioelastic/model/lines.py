"""A line of a worker's output, as a frozen value."""

from __future__ import annotations

from typing import NamedTuple

LINE_LIMIT = 1_048_576
"""Bytes of a line that are kept together, at most; a longer one is passed on in parts, see `Line.continued`."""


class Line(NamedTuple):
    """One line of a worker's output, without its newline; or a part of one that is longer than `LINE_LIMIT`, 1 MiB.

    Attributes:
        rank: of the worker that wrote it.
        stream: `"stdout"` or `"stderr"`.
        data: the bytes, `LINE_LIMIT` at most.
        time: when it was read, seconds since the epoch.
        continued: the next one of this rank and stream goes on with the same line. All its parts but the last have
            `LINE_LIMIT` bytes, or up to three fewer, where a character of UTF-8 would be cut.
    """

    rank: int
    stream: str
    data: bytes
    time: float
    continued: bool = False

    @property
    def text(self) -> str:
        r"""`data` as text; bytes that are not UTF-8 show as ``\xNN``."""
        return self.data.decode(errors="backslashreplace")
