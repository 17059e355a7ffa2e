"""Lines that matter, from all ranks, merged into one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ._files import FileSink
from ._lines import LineTap

if TYPE_CHECKING:
    from ..model.logs import Match, Pattern
    from ._pump import Pump


class MatchTap(LineTap):
    """Copies matching lines of one stream to a shared file, each with the worker's prefix. Policy: block.

    A line longer than `LINE_LIMIT` is looked at in parts, and each part that matches is copied as a line.
    """

    def __init__(self, match: Match, prefix: Callable[[float], bytes], sink: FileSink) -> None:
        wanted = _predicate(match)
        self.name = sink.name

        def deliver(lines: list[bytes], at: float, pump: Pump | None, continued: bool) -> None:
            kept = [line for line in lines if wanted(line)]
            if kept:
                head = prefix(at)
                sink.write(b"".join(head + line + b"\n" for line in kept), pump)

        super().__init__(deliver)


def _predicate(match: Match) -> Callable[[bytes], bool]:
    # it has made tuples of them
    include = [_finder(one) for one in cast("tuple[Pattern, ...]", match.include)]
    exclude = [_finder(one) for one in cast("tuple[Pattern, ...]", match.exclude)]

    def wanted(line: bytes) -> bool:
        return (not include or any(one(line) for one in include)) and not any(one(line) for one in exclude)

    return wanted


def _finder(pattern: Pattern) -> Callable[[bytes], bool]:
    if isinstance(pattern, str):
        needle = pattern.encode()
        return lambda line: needle in line
    if isinstance(pattern.pattern, bytes):
        found = pattern.search
        return lambda line: found(line) is not None
    text = pattern.search
    return lambda line: text(line.decode(errors="backslashreplace")) is not None
