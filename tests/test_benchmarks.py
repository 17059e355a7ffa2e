"""The benchmarks still run, end to end and small; what they measure is not judged here."""

# ruff: noqa: RUF001  (the times sign is meant)

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import needs

HOME = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(HOME))

import _common  # noqa: E402  # it lies beside the benchmarks, which are scripts
import run_all  # noqa: E402
import survival  # noqa: E402

CHEAP = ("start_reap", "cascade", "idle", "lag", "scale", "throughput", "functions", "executor", "sharing", "survival")
CHEAP += ("guardian", "chaos", "gpu")


@pytest.mark.parametrize("name", CHEAP)
def test_a_benchmark_runs_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    argv = [sys.executable, str(HOME / f"{name}.py"), "--quick", "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["left behind"] == []
    assert report["figures"] or report["skipped"]
    for unit, values in report["series"].values():
        assert unit
        assert len(values) >= 1
    # what comes of it can be written up
    text = run_all.markdown([report])
    for figure in report["figures"]:
        assert figure["goal"] in text.replace("\\|", "|")


def test_every_benchmark_is_in_run_all() -> None:
    files = {path.stem for path in HOME.glob("[!_]*.py")}
    assert files == {*run_all.ALL, "run_all"}


def test_a_ratio_is_taken_within_each_round() -> None:
    report = _common.Report("demo", 3)
    report.add("ours", "ms", [10.0, 40.0, 10.0])
    report.add("peer", "ms", [20.0, 80.0, 10.0])
    report.ratio("work", "≥ 1.5 ×", 1.5, "high", "peer", "ours", ours="ours")
    report.ratio("work", "≤ 1 ×", 1.0, "low", "ours", "absent", ours="ours")
    (figure,) = report.figures
    assert (figure.value, figure.low, figure.high) == (2.0, 1.0, 2.0)
    assert figure.met
    assert figure.score == pytest.approx(2.0 / 1.5)
    assert figure.peer == "peer: 20 ms"


def test_a_missed_goal_is_called_missed() -> None:
    report = _common.Report("demo", 2)
    report.add("ours", "ms", [7.0, 8.0])
    report.plain("work", "≤ 5 ms", 5.0, "ours")
    (figure,) = report.figures
    assert not figure.met
    assert figure.score < 1
    whole: dict[str, object] = {
        "name": "demo",
        "rounds": 2,
        "notes": [],
        "machine": {},
        "versions": {},
        "load before": 0.0,
    }
    whole |= {"figures": [vars(figure)], "series": {"ours": ["ms", [7.0, 8.0]]}, "skipped": {"peer": "not installed"}}
    text = run_all.markdown([whole])
    assert "**missed**" in text
    assert "skipped: peer: not installed" in text


def test_percentiles_and_rounds() -> None:
    assert _common.percentile(list(range(1, 101)), 99) == 99
    assert _common.percentile([5.0], 99) == 5.0
    order: list[str] = []
    seen = _common.paired({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, rounds=2)
    assert seen == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert order[0] != order[2]  # each round begins with another


def test_left_overs_are_found_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_common.TAG, "mark-of-this-test")
    process = subprocess.Popen(["/bin/sleep", "600"])
    assert _common.leftovers("another mark") == []
    assert _common.leftovers("mark-of-this-test") == ["/bin/sleep 600"]
    assert process.wait() == -9


def test_a_table_is_written_up() -> None:
    whole: dict[str, object] = {"name": "demo", "rounds": 1, "machine": {}, "versions": {}, "load before": 0.0}
    whole |= {"figures": [], "series": {}, "skipped": {}, "notes": [], "table": [["who", "how"], ["a | b", "well"]]}
    text = run_all.markdown([whole])
    assert "| who | how |\n| --- | --- |\n| a \\| b | well |" in text


def test_who_survives_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody of a family dies with a Popen loop; PR_SET_PDEATHSIG takes the worker alone. Strangers live."""
    monkeypatch.setenv(_common.TAG, "mark-of-this-test")
    bystander = subprocess.Popen(["/bin/sleep", "600"], env={_common.TAG: "another mark"})
    try:
        _, plain, _ = survival.SET_UPS["subprocess.Popen"]
        assert survival.once(plain, signal.SIGKILL, tmp_path).stays == survival.ROLES
        _, tied, _ = survival.SET_UPS["Popen + PR_SET_PDEATHSIG"]
        outcome = survival.once(tied, signal.SIGKILL, tmp_path)
        assert outcome.stays == ("grandchild", "setsid", "daemon")
        assert outcome.last > 0
        assert survival.cell([outcome]) == "stays: grandchild, setsid, daemon"
        assert list(tmp_path.iterdir()) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_what_a_killed_peer_left_is_cleaned_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its semaphores in /dev/shm too, which its own tracker unlinks if it is let: see the fixture `no_leaks`."""
    needs("loky")
    monkeypatch.setenv(_common.TAG, "mark-of-this-test")
    _, loky, _ = survival.SET_UPS["loky"]
    assert survival.once(loky, signal.SIGKILL, tmp_path).stays == survival.ROLES
    assert list(_common.marked("mark-of-this-test")) == []


def test_a_supervisor_that_cannot_start_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_common.TAG, "mark-of-this-test")
    with pytest.raises(survival.Absent, match="is not installed"):
        survival.once(survival.line("no-such-supervisor"), signal.SIGKILL, tmp_path)
    with pytest.raises(survival.Absent, match="ended at once: sorry"):
        survival.once(survival.line("sh", "-c", "echo sorry >&2"), signal.SIGKILL, tmp_path)
