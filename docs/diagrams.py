"""Draws the diagrams in `docs/images/`: the tables of states, and how a group stops.

`python docs/diagrams.py` writes them; a test compares what is there with `DRAWN`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aioelastic.executor import slots
from aioelastic.model import states

HERE = Path(__file__).parent
INK = "#6e7781"  # to be read on white and on black
ACROSS, DOWN, WIDE, HIGH = 150, 74, 104, 34
LINE = f'fill="none" stroke="{INK}" stroke-width="1.3"'
BAR = f'fill="{INK}" fill-opacity="0.25"'
ARROW = f"""<defs><marker id="end" markerWidth="9" markerHeight="9" refX="8" refY="4"
orient="auto"><path d="M0,0 L9,4 L0,8 z" fill="{INK}"/></marker></defs>"""

Place = tuple[int, int]  # column and row
# where a state stands; the columns are the order in which a worker comes by them
WORKER: dict[str, Place] = {
    "planned": (0, 1),
    "starting": (1, 1),
    "unstarted": (2, 3),
    "running": (2, 1),
    "stopping": (3, 2),
    "killing": (4, 3),
    "unkillable": (5, 3),
    "exited": (5, 1),
    "succeeded": (6, 0),
    "failed": (6, 1),
    "stopped": (6, 2),
}
EXECUTOR: dict[str, Place] = {
    "starting": (0, 1),
    "idle": (1, 1),
    "busy": (2, 0),
    "retiring": (2, 2),
    "aborted": (3, 0),
    "dead": (4, 1),
}


def framed(title: str, width: float, height: float, parts: list[str]) -> str:
    """A whole picture."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    font = f'font-family="sans-serif" font-size="13" fill="{INK}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">'
    return "\n".join([head, f"<title>{title}</title>", ARROW, *parts, "</svg>", ""])


def text(words: str, x: float, y: float, size: int = 13, anchor: str = "middle") -> str:
    """Words at a place."""
    where = f'x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {where}>{words}</text>"


def of_table(
    title: str, table: Mapping[tuple[Any, Any], enum.Enum], places: dict[str, Place]
) -> str:
    """The states of a table in boxes, its triggers at the arrows between them."""
    at = {
        name: (20 + WIDE / 2 + ACROSS * column, 40 + DOWN * row)
        for name, (column, row) in places.items()
    }
    parts = []
    for name, (x, y) in at.items():
        corner = f'x="{x - WIDE / 2:.0f}" y="{y - HIGH / 2:.0f}"'
        parts.append(f'<rect {LINE} {corner} width="{WIDE}" height="{HIGH}" rx="8"/>')
        parts.append(text(name, x, y + 4))
    for (source, trigger), target in table.items():
        (x0, y0), (x1, y1) = at[source.value], at[target.value]
        side = WIDE / 2 if x1 >= x0 else -WIDE / 2
        x0, x1 = x0 + side, x1 - side
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        if abs(x1 - x0) > ACROSS:  # around what is in between
            x, y = (x, y0 - 46) if y0 == y1 else (x0 + 10, y1)
        way = f"M{x0:.0f},{y0:.0f} Q{x:.0f},{y:.0f} {x1:.0f},{y1:.0f}"
        parts.append(f'<path {LINE} d="{way}" marker-end="url(#end)"/>')
        middle = (x0 + x1 + 2 * x) / 4, (y0 + y1 + 2 * y) / 4 - 4
        parts.append(text(trigger.value, *middle, size=11))
    columns, rows = (max(one) for one in zip(*places.values(), strict=True))
    return framed(title, 40 + WIDE + ACROSS * columns, 80 + DOWN * rows, parts)


def cascade() -> str:
    """Who gets which signal, and when, on an axis of time."""
    grace, more, end = 330, 470, 640
    rows = [
        ("rank 0 fails", 150, "exits"),
        ("rank 1 obeys", 230, "saves, exits"),
        ("rank 2 is deaf", more, "SIGKILL"),
        ("its child", more, "SIGKILL"),
    ]
    marks = [(150, "SIGTERM"), (grace, "grace over"), (more, "SIGKILL"), (end, "done")]
    parts = []
    for number, (name, over, how) in enumerate(rows):
        y = 56 + 40 * number
        parts.append(text(name, 108, y + 4, anchor="end"))
        size = f'width="{over - 120}" height="24" rx="4"'
        parts.append(f'<rect {BAR} x="120" y="{y - 12}" {size}/>')
        parts.append(text(how, over + 8, y + 4, 11, "start"))
    for x, words in marks:
        parts.append(text(words, x, 24, 11))
        parts.append(f'<path {LINE} stroke-dasharray="3 4" d="M{x},30 L{x},206"/>')
    axis = f"M120,210 L{end + 60},210"
    parts.append(f'<path {LINE} d="{axis}" marker-end="url(#end)"/>')
    parts.append(text("time", end + 40, 226, 11))
    return framed("How a group stops when a rank has failed", end + 80, 236, parts)


DRAWN = {
    "worker-states.svg": of_table("The states of a worker", states.TABLE, WORKER),
    "executor-states.svg": of_table(
        "The states of an executor's worker", slots.TABLE, EXECUTOR
    ),
    "cascade.svg": cascade(),
}

if __name__ == "__main__":
    for file, picture in DRAWN.items():
        (HERE / "images" / file).write_text(picture)
