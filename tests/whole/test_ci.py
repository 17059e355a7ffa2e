"""What `.ci/run` does: the README's commands first, each step in spite of the others, a failed test once more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import selection

ROOT = Path(__file__).parents[2]

PROJECT = """
import pathlib, pytest

def test_passes(): pass
def test_needs(): pytest.skip("needs torch (the extra test-all)")
@pytest.mark.parametrize("number", range({unstable}))
def test_once(number):
    there = pathlib.Path(f"ran{{number}}")
    if not there.exists():
        there.touch()
        raise OSError("for the first time")
@pytest.mark.parametrize("number", range({broken}))
def test_never(number): assert number < 0
"""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, new."""
    spec = importlib.util.spec_from_file_location("steps", ROOT / ".ci" / "steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "steps", module)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a project of its own."""
    monkeypatch.setattr(steps, "HOUSE", tmp_path)
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["selection"]\n')
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\nmarkers = long: takes long\n"
    )
    made = steps.Run(tmp_path / "scratch")
    made.env["PYTHONPATH"] = str(Path(selection.__file__).parent)
    return made


def outcome_of(run: Any, where: Path, *words: str, **counts: int) -> Any:
    """What came of the tests of the project with so many of each kind."""
    (where / "test_it.py").write_text(PROJECT.format(**{"unstable": 0, "broken": 0} | counts))
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    with run.step("the tests"):
        return run.tests("the tests", [*pytest_, *words], pytest_, where)
    return None


def test_it_begins_with_the_commands_of_the_readme(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, each in a clone, before anything is installed."""
    called: list[tuple[str, ...]] = []

    def call(_: Any, *words: str, **__: Any) -> int:
        called.append(words)
        return 0

    monkeypatch.setattr(steps.Run, "call", call)
    run = steps.Run(tmp_path)
    steps.main(run)
    blocks = [text.removeprefix("sh\n").strip() for text in (ROOT / "README.md").read_text().split("```")[1::2]]
    first, second = (text for text in blocks if text.startswith("python3 -m venv"))
    assert [words[:2] for words in called[:4]] == [("git", "clone"), ("bash", "-c")] * 2
    assert [called[1][2], called[3][2]] == [first, second]
    assert ".venv/bin/mypy" in [words[0] for words in called]  # and it goes on, though there is no wheel
    assert [one.partition(":")[0] for one in run.failures] == ["FAILED the source archive, the wheel, all extras"]


def test_what_was_skipped_is_known(run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = outcome_of(run, tmp_path)
    assert outcome.skipped["test_it.py::test_needs"] == "needs torch (the extra test-all)"
    assert not outcome.failed
    assert run.close() == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("0 failures, 0 unstable tests, ")


def test_what_nobody_has_run_fails_the_run(run: Any) -> None:
    run.refuse("the tests", {"a": "needs an NVIDIA GPU: there is none", "b": "could not import 'torch'"})
    assert run.failures == ["FAILED the tests: nobody has run b: could not import 'torch'"]


@pytest.mark.parametrize("runners", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_one_that_passes_when_it_is_run_again_is_unstable(
    run: Any, tmp_path: Path, runners: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome_of(run, tmp_path, *runners, unstable=1)
    assert run.close() == 0
    told = capfd.readouterr().out.splitlines()
    assert "UNSTABLE the tests: test_it.py::test_once[0]: OSError: for the first time" in told
    kept = (tmp_path / ".ci" / "unstable.txt").read_text()
    assert kept.startswith("the tests: test_it.py::test_once[0]\n")
    assert "OSError: for the first time" in kept


def test_one_that_fails_again_fails_the_run(run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome_of(run, tmp_path, broken=1)
    with run.step("a later one"):
        run.must("true")
    assert run.close() == 1
    told = capfd.readouterr().out.splitlines()
    assert "FAILED the tests: test_it.py::test_never[0]: assert 0 < 0" in told
    assert any(line.endswith(" s  a later one") for line in told)


def test_too_many_unstable_ones_fail_the_run(run: Any, steps: ModuleType, tmp_path: Path) -> None:
    steps.UNSTABLE = 1
    outcome_of(run, tmp_path, unstable=1)
    assert not run.failures
    with run.step("more"):
        run.tests("more", *([[sys.executable, "-m", "pytest"]] * 2), tmp_path)
    assert run.close() == 0
    outcome_of(run, tmp_path, unstable=3)
    assert run.close() == 1


def test_tests_that_could_not_begin_fail_the_run(run: Any, tmp_path: Path) -> None:
    assert outcome_of(run, tmp_path, "--no-such-option") is None
    (failure,) = run.failures
    assert failure.startswith("FAILED the tests: exit status 4, and no test has failed: ")
    outcome_of(run, tmp_path, "-k", "nothing")
    assert "exit status 5" in run.failures[1]


def test_a_file_that_cannot_be_read_fails_the_run(run: Any, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("import there_is_no_such_module")
    outcome_of(run, tmp_path)
    (failure,) = run.failures
    assert failure.startswith("FAILED the tests: test_other.py: ModuleNotFoundError")


def test_a_step_that_does_not_end_is_ended(run: Any, steps: ModuleType) -> None:
    steps.STEP_SECONDS = 0.1
    with run.step("one that hangs"):
        run.must("sh", "-c", "sleep 1000; true")
    assert run.failures == ["FAILED one that hangs: no end after 0 s: sh -c sleep 1000; true"]


def test_extras_run_what_was_skipped_and_what_is_long(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["selection"]')
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\nmarkers = long: takes long")
    pytester.makepyfile(
        test_a="import pytest\ndef test_1(): pass\ndef test_2(): pass\n@pytest.mark.long\ndef test_3(): pass",
        test_b="def test_1(): pass\ndef test_2(): pass",
    )
    ids = pytester.path / "ids"
    ids.write_text("test_a.py::test_2\ntest_b.py\n")
    pytester.runpytest(f"--only={ids}").assert_outcomes(passed=3, deselected=2)
    pytester.runpytest(f"--only={ids}", "--long").assert_outcomes(passed=4, deselected=1)
    pytester.runpytest().assert_outcomes(passed=4, deselected=1)
