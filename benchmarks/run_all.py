"""Run the benchmarks one after the other, and make RESULTS.md and the pictures of what they saw.

python benchmarks/run_all.py                            all that has peers, within 20 minutes on two cores
python benchmarks/run_all.py --only chaos chaos_tasks   the two that look for what is left, with 500 rounds each
python benchmarks/run_all.py --quick --out DIR          does everything work? The figures mean nothing

The peers come with `pip install -e '.[benchmarks]'`; one that is not installed is left out by name. What a benchmark
saw stays in results.json until it runs again, with its version and date.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import plot

HERE = Path(__file__).parent
# by how much the figures are asked for: what the time is too short for comes last
SPEED = (
    "startup",
    "start_reap",
    "exit_latency",
    "functions",
    "executor",
    "sharing",
    "throughput",
    "round_trip",
    "cascade",
    "survival",
    "lag",
    "guardian",
    "scale",
    "idle",
    "gpu",
)
ALL = (*SPEED, "chaos", "chaos_tasks")
USUAL = 180.0  # seconds, the most that one takes: of those that have not run before


def expected(name: str, quick: bool, path: Path) -> float:
    """Seconds that it took the last time."""
    seen = json.loads(path.read_text())["benchmarks"].get(name) if path.exists() else None
    return float(seen["seconds"]) if seen and seen["quick"] == quick and seen.get("seconds") else USUAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small runs")
    parser.add_argument("--only", nargs="+", choices=ALL, default=SPEED, help="only these")
    parser.add_argument("--minutes", type=float, default=20, help="begin none that would end later (default: 20)")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json is kept (default: beside this file)")
    args = parser.parse_args()
    if args.quick and args.out == HERE:
        parser.error("--quick needs --out: its figures are not to be kept")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    began, troubles = time.monotonic(), []
    for number, name in enumerate(args.only, 1):
        now, due = time.monotonic() - began, expected(name, args.quick, path)
        print(f"\n== {number} of {len(args.only)}: {name}, after {now:.0f} s; about {due:.0f} s", flush=True)
        if now + due > args.minutes * 60:
            troubles.append(f"{name} left out: it would end after {args.minutes:g} minutes")
            continue
        argv = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path), *(["--quick"] if args.quick else [])]
        if code := subprocess.run(argv, check=False).returncode:
            troubles.append(f"{name} failed: exit code {code}")
    plot.write(args.out)
    print(f"\n== all done after {time.monotonic() - began:.0f} s", *troubles, sep="\n")
    sys.exit(bool(troubles))


if __name__ == "__main__":
    main()
