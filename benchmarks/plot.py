"""Make RESULTS.md and the pictures in plots/ from results.json, which the benchmarks write.

python benchmarks/plot.py
"""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import Any

from _common import NEVER, Figure, amount, is_rate

HERE = Path(__file__).parent
HEAD = """# Results

Made by `python benchmarks/plot.py` from `results.json`, which the benchmarks write; not edited by hand. The command
that measures all of it is in [contributing](../docs/contributing.md#benchmarks).

{machines}

**How it is measured.** Ours and each peer run in turn within a round, in an order that changes from round to round, so
that a machine whose speed wanders is the same for all. A peer that is not installed is named as skipped. Times of a
busy machine are worse than those of an idle one: the load before each benchmark stands with it.

**How to read it.** *n* is the number of samples, of all rounds; median, p99, least and most are of these samples.
The p99 is what 99 of 100 samples keep to (of a rate: the 1st percentile); of less than 100 samples it is the worst. A
ratio is taken within each round: its median over the rounds is told, and in brackets the lowest and the highest
round. In a picture a bar is a median and the line at its end leads to the p99; green is ours, and pale is no peer but
the least that the work can cost.
"""
SHORT = """## In short

Beside the strongest of all measured peers, by medians; what a bound is, is no peer. *× better* is how many times less
time (memory, wake-ups) ours takes, or how many times more it does; below 1 the peer is better.

| work | ours | strongest peer | × better |
| --- | --- | --- | --- |"""
GOALS = """## Goals

What was set as a goal, each for the party it names; the strongest peer may be another one.

| work | goal | seen | ours | compared with | |
| --- | --- | --- | --- | --- | --- |"""

Data = dict[str, Any]


def number(value: float | str) -> float:
    return NEVER if value == "never" else float(value)


def words(one: Data, key: str = "median") -> str:
    """`12.3 ms`; nothing where it is not known, as of what was copied from an older table."""
    return amount(number(one[key]), one["unit"]) if key in one else ""


def cells(*texts: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


# --- the text ---


def markdown(data: Data) -> str:
    history, data = data["history"], data["benchmarks"]
    charts = [(report, chart) for report in data.values() for chart in report["charts"]]
    lines = [HEAD.format(machines=machines(data)), SHORT]
    lines += [row for report, chart in charts if (row := in_short(report, chart))]
    lines += ["", GOALS]
    lines += [goal(Figure(**one)) for report in data.values() for one in report["figures"]]
    for name, report in data.items():
        lines += ["", *section(name, report)]
    if history:
        lines += ["", "## Measured by hand", "", *(f"- {one}" for one in history)]
    return "\n".join(lines) + "\n"


def machines(data: Data) -> str:
    """Each machine and its packages once, with what ran there if there are several."""
    ran: dict[str, list[str]] = {}
    for name, report in data.items():
        ran.setdefault(f"{report['machine']}. With {report['with']}.", []).append(name)
    if len(ran) == 1:
        return f"**Machine.** {next(iter(ran))}"
    return "**Machines.**\n\n" + "\n".join(f"- {', '.join(names)}: {one}" for one, names in ran.items())


def parties(report: Data, chart: Data) -> dict[str, Data]:
    """What was measured of each, by its label."""
    return {label: report["series"][name] for label, name in chart["parties"].items()}


def in_short(report: Data, chart: Data) -> str:
    """Ours by default beside the strongest peer. Nothing without peers."""
    all_of_them = parties(report, chart)
    ours = next((label for label in all_of_them if label.startswith("ours")), "")
    peers = [one for one in all_of_them if not one.startswith("ours") and one not in chart["bounds"]]
    if not ours or not peers:
        return ""
    best = max if is_rate(all_of_them[ours]["unit"]) else min
    peer = best(peers, key=lambda label: number(all_of_them[label]["median"]))
    mine, theirs = (number(all_of_them[label]["median"]) for label in (ours, peer))
    over, under = (mine, theirs) if best is max else (theirs, mine)
    times = "equal" if over == under else amount(over / under, "×") if under else "-"
    return cells(
        f"[{chart['title']}](plots/{chart['file']}.svg)", told(ours, all_of_them), told(peer, all_of_them), times
    )


def told(label: str, all_of_them: dict[str, Data]) -> str:
    one = all_of_them[label]
    p99 = f", p99 {words(one, 'p99')}" if "p99" in one else ""
    return f"{label}: {words(one)} (median of {one['n']}{p99})"


def goal(one: Figure) -> str:
    low, value, high = (amount(number(x), one.unit) for x in (one.low, one.value, one.high))
    seen = value if low == high == value else f"{value} ({low} to {high})"
    met = number(one.value) <= one.limit if one.best == "low" else number(one.value) >= one.limit
    return cells(one.work, one.goal, seen, one.ours, one.peer or "-", "met" if met else "**missed**")


def section(name: str, report: Data) -> list[str]:
    lines = [f"## {name}", "", report["about"], ""]
    origin = report.get("origin") or f"of {report['date']}, version {report['commit']}, in {report['seconds']} s"
    lines.append(f"{report['rounds']} rounds, {origin}; load average before: {report['load before']:.2f}.")
    for chart in report["charts"]:
        lines += ["", f"![{chart['title']}](plots/{chart['file']}.svg)"]
    if report["series"]:
        lines += ["", "| what | n | median | p99 | least | most |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        cells(label, str(one["n"]), *(words(one, key) for key in ("median", "p99", "min", "max")))
        for label, one in report["series"].items()
    ]
    if table := report["table"]:
        lines += ["", cells(*table[0]), cells(*["---"] * len(table[0])), *(cells(*row) for row in table[1:])]
    if report["notes"] or report["skipped"]:
        lines.append("")
    lines += [f"- {note}" for note in report["notes"]]
    return lines + [f"- skipped: {peer}: {reason}" for peer, reason in report["skipped"].items()]


# --- the pictures ---

WIDTH, RIGHT, ROW, TOP = 300, 250, 24, 66
COLOURS = """
text{font:13px sans-serif;fill:#1d2733}.title{font-size:15px;font-weight:bold}.small{font-size:11.5px;fill:#52606d}
.back{fill:#fff}.grid{stroke:#dde3ea}.ours{fill:#2a7f62}.peer{fill:#7d93b2}.bound{fill:#c9d3df}.p99{stroke:#1d2733}
@media(prefers-color-scheme:dark){text{fill:#e4e9ef}.small{fill:#a8b3bf}.back{fill:#14181d}.grid{stroke:#333c46}
.ours{fill:#43b58d}.peer{fill:#6f89ad}.bound{fill:#445160}.p99{stroke:#e4e9ef}}
"""


def axis(values: list[float]) -> tuple[float, float, bool, list[float]]:
    """From, to, whether it is logarithmic, and where its marks stand: for values that may be far apart."""
    positive = [value for value in values if value > 0]
    most = max(positive, default=1.0)
    if len(positive) == len(values) and most > 30 * min(positive):
        low, high = math.floor(math.log10(min(positive) * 0.7)), math.ceil(math.log10(most))
        return 10.0**low, 10.0**high, True, [10.0**power for power in range(low, high + 1)]
    step = 10 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if most / (step * part) <= 6)
    marks = [step * number for number in range(math.ceil(most / step) + 1)]
    return 0.0, marks[-1], False, marks


def svg(report: Data, chart: Data) -> str:
    """Medians as bars, the p99 as a line beyond them; what never came leaves the picture."""
    rows = parties(report, chart)
    unit = next(iter(rows.values()))["unit"]
    left = 24 + 7 * max(len(label) for label in rows)
    seen = [number(one[key]) for one in rows.values() for key in ("median", "p99") if key in one]
    low, high, is_log, marks = axis([value for value in seen if value != NEVER])

    def x(value: float) -> float:
        if value == NEVER:
            return left + WIDTH
        share = math.log10(max(value, low) / low) / math.log10(high / low) if is_log else value / high
        return round(left + WIDTH * max(share, 0.0), 1)

    bottom, whole = TOP + ROW * len(rows), left + WIDTH + RIGHT
    sense = "more is better" if is_rate(unit) else "less is better"
    size = f'width="{whole}" height="{bottom + 46}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {whole} {bottom + 46}">',
        f"<title>{escape(chart['title'])}</title>",
        f'<style>{COLOURS.strip()}</style><rect class="back" width="100%" height="100%"/>',
        f'<text class="title" x="16" y="26">{escape(chart["title"])}</text>',
        f'<text class="small" x="16" y="45">bar: median of n samples; line: to their p99; {sense}</text>',
    ]
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark)}" x2="{x(mark)}" y1="{TOP - 6}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x(mark)}" y="{bottom + 15}" text-anchor="middle">{mark:,g}</text>')
    name = f"{unit}{', logarithmic' if is_log else ''}"
    parts.append(f'<text class="small" x="{left + WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">{name}</text>')
    for at, (label, one) in enumerate(rows.items()):
        y, median = TOP + ROW * at, number(one["median"])
        kind = "ours" if label.startswith("ours") else "bound" if label in chart["bounds"] else "peer"
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="{kind}" x="{left}" y="{y + 1}" width="{x(median) - left:.1f}" height="16"/>')
        if "p99" in one:
            end = x(number(one["p99"]))
            parts.append(f'<path class="p99" d="M{x(median)} {y + 9}H{end}M{end} {y + 4}v10" fill="none"/>')
        p99 = f", p99 {words(one, 'p99')}" if "p99" in one else ""
        note = escape(f"{words(one)}{p99}, n = {one['n']}")
        parts.append(f'<text class="small" x="{left + WIDTH + 12}" y="{y + 13}">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def files(data: Data) -> dict[str, str]:
    """All that is made of it: path, below this directory, → content."""
    made = {"RESULTS.md": markdown(data)}
    for report in data["benchmarks"].values():
        made |= {f"plots/{chart['file']}.svg": svg(report, chart) for chart in report["charts"]}
    return made


def write(home: Path) -> None:
    """Write them beside the data file, and remove pictures that no longer are."""
    made = files(json.loads((home / "results.json").read_text()))
    (home / "plots").mkdir(exist_ok=True)
    for path in (home / "plots").glob("*.svg"):
        path.unlink()
    for name, text in made.items():
        (home / name).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, nargs="?", default=HERE, help="where results.json is (default: beside this)")
    write(parser.parse_args().home)
