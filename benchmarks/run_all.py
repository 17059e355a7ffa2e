"""Run all benchmarks and write what they saw to RESULTS.md and results.svg.

python benchmarks/run_all.py            all of it: half an hour
python benchmarks/run_all.py --quick    does everything work? (writes nothing unless --out is given)

Peers are anyio, processkit-py, torch, honcho, circus and supervisor, and for survival loky, pebble, mpire and psutil;
one that is not installed is skipped by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Figure, amount

HERE = Path(__file__).parent
ALL = (
    "start_reap",
    "exit_latency",
    "cascade",
    "throughput",
    "idle",
    "lag",
    "scale",
    "functions",
    "executor",
    "survival",
    "guardian",
    "chaos",
    "sharing",
    "gpu",
)


def run(name: str, quick: bool, where: Path) -> dict[str, Any]:
    """One benchmark in a process of its own; its report."""
    path = where / f"{name}.json"
    argv = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path), *(["--quick"] if quick else [])]
    subprocess.run(argv, check=True)
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def figures(report: dict[str, Any]) -> list[Figure]:
    return [Figure(**one) for one in report["figures"]]


def value(one: Figure) -> str:
    return f"{amount(one.value, one.unit)} ({amount(one.low, one.unit)} to {amount(one.high, one.unit)})"


def cells(*texts: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def markdown(reports: list[dict[str, Any]], note: str = "") -> str:
    first = reports[0]
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/run_all.py` from what the benchmarks saw; not edited by hand.",
        "",
        "Machine: " + ", ".join(f"{key} {text}" for key, text in first["machine"].items()) + ".",
        "With " + ", ".join(f"{name} {text}" for name, text in first["versions"].items()) + ".",
        "",
        "Ours and each peer run in turn within each round; a ratio is the median over the rounds of the ratio within "
        "one round, with its range over the rounds in brackets. A figure that is not a ratio is a median, or the named "
        "percentile, with its range over the rounds. Times of a busy machine are worse than those of an idle one: "
        "the load before each benchmark stands with its details.",
        "",
        *([note, ""] if note else []),
        "![How many times better than its goal each figure is](results.svg)",
        "",
        "| work | goal | seen | ours | compared with | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        lines += [
            cells(one.work, one.goal, value(one), one.ours, one.peer or "-", "met" if one.met else "**missed**")
            for one in figures(report)
        ]
    for report in reports:
        rounds, load = report["rounds"], report["load before"]
        lines += [
            "",
            f"## {report['name']}",
            "",
            f"{rounds} paired runs; load average before: {load:.2f}.",
            "",
            "| what | median | range |",
            "| --- | --- | --- |",
        ]
        for name, (unit, values) in report["series"].items():
            low, high = amount(min(values), unit), amount(max(values), unit)
            lines.append(
                f"| {name} | {amount(statistics.median(values), unit)} | {low} to {high} |".replace(
                    "FILE | sed", "FILE \\| sed"
                )
            )
        if table := report.get("table"):
            lines += ["", cells(*table[0]), cells(*["---"] * len(table[0])), *(cells(*row) for row in table[1:])]
        if report["notes"] or report["skipped"]:
            lines.append("")
        lines += [f"- {note}" for note in report["notes"]]
        lines += [f"- skipped: {name}: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def plot(reports: list[dict[str, Any]], path: Path) -> None:
    """One bar per figure: how many times better than its goal."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "aioelastic"  # the same runs give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a tenth of the size
    from matplotlib import pyplot

    rows = [one for report in reports for one in figures(report)][::-1]
    scores = [min(one.score, 1000.0) for one in rows]
    fig, axes = pyplot.subplots(figsize=(11, 0.42 * len(rows) + 1.4))
    axes.barh(range(len(rows)), scores, color=["#2a7f62" if one.met else "#b5483a" for one in rows], height=0.6)
    axes.axvline(1.0, color="#333333", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(min(0.3, *scores) * 0.9, max(scores) * 6)
    labels = [f"{one.work}\n{one.goal}" for one in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    for at, (one, score) in enumerate(zip(rows, scores, strict=True)):
        axes.text(max(score, 1.0) * 1.08, at, amount(one.value, one.unit), va="center", fontsize=7)
    axes.set_xlabel("times better than the goal (line: the goal itself)")
    axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small runs")
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL, help="only these")
    parser.add_argument("--reports", type=Path, help="keep the reports (JSON) in this directory")
    parser.add_argument("--again", action="store_true", help="run nothing: write from the reports in --reports")
    parser.add_argument("--note", default="", help="a sentence for the head of RESULTS.md")
    parser.add_argument("--out", type=Path, help="where RESULTS.md and results.svg go (default: beside this file)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = args.reports or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        if args.again:
            reports = [json.loads((where / f"{name}.json").read_text()) for name in args.only]
        else:
            reports = [run(name, args.quick, where) for name in args.only]
    out = args.out or (None if args.quick else HERE)
    if out is not None:
        (out / "RESULTS.md").write_text(markdown(reports, args.note))
        plot(reports, out / "results.svg")


if __name__ == "__main__":
    main()
