"""Where the workers were when they were stopped, short enough for a terminal: equal stacks once, the rest by count."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..model.results import GroupResult

LINES = 20  # shown of one text
TEXTS = 5  # different texts shown
_OWN = r"0x[0-9a-f]+|\b(?:Process|Thread) \d+\b"  # what differs though the stacks are the same


def short_form(result: GroupResult) -> list[str]:
    """Lines for the end of a report; none where nobody asked."""
    alike: dict[str, list[int]] = {}
    for one in result:
        if one.stacks is not None:
            alike.setdefault(re.sub(_OWN, "", one.stacks), []).append(one.rank)
    texts = sorted(alike.values(), key=lambda ranks: (len(ranks), ranks))  # the odd one out is the news
    lines = []
    for ranks in texts[:TEXTS]:
        lines += ["", f"stacks of {_named(ranks)}, before we stopped {'it' if len(ranks) == 1 else 'them'}:"]
        text = _current_first(result[ranks[0]].stacks or "").splitlines()
        lines += [f"    {line}" for line in text[:LINES]]
        if len(text) > LINES:
            lines.append(f"    … {len(text) - LINES} more lines")
    if len(texts) > TEXTS:
        others = sorted(rank for ranks in texts[TEXTS:] for rank in ranks)
        lines += ["", f"stacks of {_named(others)}: different ones, left out here"]
    return lines


def _current_first(text: str) -> str:
    """The thread that was interrupted before the others: most often the main one, which faulthandler writes last."""
    threads = text.strip().split("\n\n")
    return "\n\n".join(sorted(threads, key=lambda one: not one.startswith("Current thread")))


def _named(ranks: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"
