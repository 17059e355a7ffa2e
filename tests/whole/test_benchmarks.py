"""The benchmarks still run, end to end and small; what they measure is not judged here."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import child_process, needs

HOME = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(HOME))

import _common  # noqa: E402  # it lies beside the benchmarks, which are scripts
import plot  # noqa: E402
import run_all  # noqa: E402
import survival  # noqa: E402

CHEAP = ("start_reap", "cascade", "idle", "lag", "scale", "throughput", "functions", "executor", "sharing", "survival")
CHEAP += ("guardian", "chaos", "chaos_tasks", "gpu", "round_trip")

SVG = "{http://www.w3.org/2000/svg}"
MARK = f"mark of {os.getpid()}"  # of these tests alone: others may run beside them


@pytest.mark.long
@pytest.mark.parametrize("name", CHEAP)
def test_a_benchmark_runs_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    argv = [sys.executable, str(HOME / f"{name}.py"), "--quick", "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    (report,) = data["benchmarks"].values()
    assert report["left behind"] == []
    assert report["figures"] or report["skipped"]
    for one in report["series"].values():
        assert one["unit"]
        assert one["n"] >= 1
    # what comes of it can be written up, and drawn
    made = plot.files(data)
    for figure in report["figures"]:
        assert figure["goal"] in made["RESULTS.md"].replace("\\|", "|")
    for chart in report["charts"]:
        drawn = ElementTree.fromstring(made[f"plots/{chart['file']}.svg"])
        assert set(chart["parties"]) <= {"".join(one.itertext()) for one in drawn.iter()}
        assert min(float(one.get("width", "0").removesuffix("%")) for one in drawn.iter(f"{SVG}rect")) >= 0


def test_every_benchmark_is_in_run_all() -> None:
    files = {path.stem for path in HOME.glob("[!_]*.py")}
    assert files == {*run_all.ALL, "run_all", "plot"}


def test_results_and_pictures_are_what_is_made_of_the_data() -> None:
    made = plot.files(json.loads((HOME / "results.json").read_text()))
    assert made == {name: (HOME / name).read_text() for name in made}
    pictures = {f"plots/{path.name}" for path in (HOME / "plots").iterdir()}
    assert pictures == set(made) - {"RESULTS.md"}
    where = [one for one in made["RESULTS.md"].split() if one.startswith(("/home", "/tmp", "/root", "/work"))]
    assert where == []


def test_a_ratio_is_taken_within_each_round() -> None:
    report = _common.Report("demo", 3)
    report.add("ours", "ms", [10.0, 40.0, 10.0])
    report.add("peer", "ms", [20.0, 80.0, 10.0])
    report.ratio("work", "≥ 1.5 ×", 1.5, "high", "peer", "ours", ours="ours")
    report.ratio("work", "≤ 1 ×", 1.0, "low", "ours", "absent", ours="ours")
    (figure,) = report.figures
    assert (figure.value, figure.low, figure.high) == (2.0, 1.0, 2.0)
    assert figure.met
    assert figure.peer == "peer: 20 ms"


def saved(report: _common.Report, path: Path) -> dict[str, Any]:
    _common.save(report, path, load=0.0, seconds=1.0, quick=True, left=[])
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_a_missed_goal_is_called_missed(tmp_path: Path) -> None:
    report = _common.Report("demo", 2, skipped={"peer": "not installed"})
    report.add("ours", "ms", [7.0, 8.0])
    report.plain("work", "≤ 5 ms", 5.0, "ours")
    (figure,) = report.figures
    assert not figure.met
    text = plot.markdown(saved(report, tmp_path / "results.json"))
    assert "| 7.50 ms (7 ms to 8 ms) | 7.50 ms | - | **missed** |" in text
    assert "skipped: peer: not installed" in text


def test_the_short_table_has_the_strongest_peer(tmp_path: Path) -> None:
    """Not the weakest, and not what is only a bound. The p99 of a rate is at its lower end."""
    report = _common.Report("demo", 2)
    for name, values in {
        "ours": [2.0, 2.0],
        "weak": [9.0],
        "strong": [3.0],
        "bound": [1.0],
        "stuck": [_common.NEVER],
    }.items():
        report.add(f"{name}: took", "ms", values)
    names = [f"{name}: took" for name in ("ours", "weak", "strong", "bound", "stuck", "absent")]
    report.chart("took", "Work", names, strip=": took", bounds=["bound"])
    report.add("ours: rate", "MB/s", [10.0], samples=range(1, 201))
    report.add("peer: rate", "MB/s", [50.0])
    report.chart("rate", "Copying", ["ours: rate", "peer: rate"], strip=": rate")
    assert report.strongest(["weak: took", "strong: took", "absent"]) == "strong: took"
    made = plot.files(saved(report, tmp_path / "results.json"))
    short = made["RESULTS.md"].partition("## Goals")[0]
    assert "| ours: 2 ms (median of 2, p99 2 ms) | strong: 3 ms (median of 1, p99 3 ms) | 1.50 × |" in short
    assert f"ours: {100.5:.0f} MB/s (median of 200, p99 2 MB/s)" in short
    assert "stuck: took | 1 | never | never | never | never" in made["RESULTS.md"]
    assert {"RESULTS.md", "plots/took.svg", "plots/rate.svg"} == set(made)


def test_a_benchmark_takes_the_place_of_its_last_run(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for values in ([1.0], [2.0]):
        report = _common.Report("demo", 1)
        report.add("ours", "ms", values)
        data = saved(report, path)
    saved(_common.Report("other", 1), path)
    assert list(json.loads(path.read_text())["benchmarks"]) == ["demo", "other"]
    assert data["benchmarks"]["demo"]["series"]["ours"]["median"] == 2.0
    assert run_all.expected("demo", True, path) == 1.0
    assert run_all.expected("demo", False, path) == run_all.USUAL


def test_percentiles_and_rounds() -> None:
    assert _common.percentile(list(range(1, 101)), 99) == 99
    assert _common.percentile([5.0], 99) == 5.0
    order: list[str] = []
    seen = _common.paired({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, rounds=2)
    assert seen == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert order[0] != order[2]  # each round begins with another


def test_left_overs_are_found_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_common.TAG, MARK)
    with child_process(["/bin/sleep", "600"]) as process:
        assert _common.leftovers(f"another {MARK}") == []
        while not (found := _common.leftovers(MARK)):
            pass  # in the midst of its execve(2) it has no variables
        assert found == ["/bin/sleep 600"]
    assert process.returncode == -9


def test_a_table_is_written_up(tmp_path: Path) -> None:
    report = _common.Report("demo", 1, table=[["who", "how"], ["a | b", "well"]])
    text = plot.markdown(saved(report, tmp_path / "results.json"))
    assert "| who | how |\n| --- | --- |\n| a \\| b | well |" in text


def test_who_survives_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody of a family dies with a Popen loop; PR_SET_PDEATHSIG takes the worker alone. Strangers live."""
    monkeypatch.setenv(_common.TAG, MARK)
    with child_process(["/bin/sleep", "600"], env={_common.TAG: f"another {MARK}"}) as bystander:
        _, plain, _ = survival.SET_UPS["subprocess.Popen"]
        assert survival.once(plain, signal.SIGKILL, tmp_path).stays == survival.ROLES
        _, tied, _ = survival.SET_UPS["Popen + PR_SET_PDEATHSIG"]
        outcome = survival.once(tied, signal.SIGKILL, tmp_path)
        assert outcome.stays == ("grandchild", "setsid", "daemon")
        assert outcome.last > 0
        assert survival.cell([outcome]) == "stays: grandchild, setsid, daemon"
        assert list(tmp_path.iterdir()) == []
        assert bystander.poll() is None
        bystander.kill()


def test_what_a_killed_peer_left_is_cleaned_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its semaphores in /dev/shm too, which its own tracker unlinks if it is let: see the fixture `no_leaks`."""
    needs("loky")
    monkeypatch.setenv(_common.TAG, MARK)
    _, loky, _ = survival.SET_UPS["loky"]
    assert survival.once(loky, signal.SIGKILL, tmp_path).stays == survival.ROLES
    assert list(_common.marked(MARK)) == []


def test_a_supervisor_that_cannot_start_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_common.TAG, MARK)
    with pytest.raises(survival.Absent, match="is not installed"):
        survival.once(survival.line("no-such-supervisor"), signal.SIGKILL, tmp_path)
    with pytest.raises(survival.Absent, match="ended at once: sorry"):
        survival.once(survival.line("sh", "-c", "echo sorry >&2"), signal.SIGKILL, tmp_path)
