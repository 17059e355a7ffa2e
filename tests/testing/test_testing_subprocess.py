"""What becomes of a test in a PID namespace of its own is told as of any other: outcome, words, output, options."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from aioelastic.testing._environment import Unavailable, pid_namespace


@pytest.fixture(autouse=True)
def namespaces() -> None:
    try:
        pid_namespace()
    except Unavailable as exc:
        pytest.skip(f"no PID namespace: {exc}")


CONFTEST = """
import pytest

pytest_plugins = ["aioelastic.testing.plugin"]

def pytest_addoption(parser):
    parser.addoption("--mine", default="unset")

@pytest.fixture(scope="module", autouse=True)
def module(request):
    with open(request.config.rootpath / "log", "a", buffering=1) as log:
        log.write("set up\\n")
        yield
        log.write("torn down\\n")
"""

OUTCOMES = """
import os, unittest, warnings
import pytest

pytestmark = pytest.mark.pid_namespace

def test_passing():
    print("of the test")
    assert os.getpid() == 1

def test_failing():
    print("of the test")
    mine = [1, 2, 3]
    assert mine == [1, 2, os.getpid() + 3]

def test_skipping():
    pytest.skip("not here")

@pytest.mark.skipif("os.getpid()", reason="never")
def test_skipped():
    assert False

@pytest.mark.xfail(reason="is known", strict=True)
def test_expected():
    assert False

@pytest.mark.xfail(reason="is thought", strict=False)
def test_unexpected():
    assert os.getpid() == 1

@pytest.mark.xfail(reason="is thought", strict=True)
def test_unexpected_strictly():
    assert os.getpid() == 1

@pytest.fixture
def broken():
    raise ZeroDivisionError("while it is set up")

def test_set_up(broken):
    pass

@pytest.fixture
def breaks():
    yield
    raise ZeroDivisionError("while it is torn down")

def test_torn_down(breaks):
    pass

def test_torn_down_and_failing(breaks):
    assert os.getpid() == 2

@pytest.mark.usefixtures("no_leaks")
def test_leaking():
    os.dup(0)

@pytest.mark.parametrize("word", ["a::b", "[c]", "d e"])
def test_parameters(word, tmp_path, record_property):
    record_property("told", lambda: word)
    assert (os.getpid(), os.listdir(tmp_path)) == (1, [])

class TestUnit(unittest.TestCase):
    def test_unit(self):
        self.assertEqual(os.getpid(), 1)

    def test_unit_failing(self):
        self.assertEqual(os.getpid(), 2)

    @unittest.expectedFailure
    def test_unit_expected(self):
        self.fail()

SUBTESTS
def test_ending():
    os._exit(7)

def test_warning():
    warnings.warn("of the test")
"""

SUBTESTS = """
def test_subtests(subtests):
    for number in range(3):
        with subtests.test(number=number):
            assert number != os.getpid()
"""
HAS_THEM = hasattr(pytest, "Subtests")  # from pytest 9 on

TELLS = """
test_passing PASSED
test_failing FAILED
test_skipping SKIPPED (not here)
test_skipped SKIPPED (never)
test_expected XFAIL (is known)
test_unexpected XPASS (is thought)
test_unexpected_strictly FAILED
test_set_up ERROR
test_torn_down PASSED
test_torn_down ERROR
test_torn_down_and_failing FAILED
test_torn_down_and_failing ERROR
test_leaking PASSED
test_leaking ERROR
test_parameters[a::b] PASSED
test_parameters[[c]] PASSED
test_parameters[d e] PASSED
TestUnit::test_unit PASSED
TestUnit::test_unit_expected XFAIL
TestUnit::test_unit_failing FAILED
test_subtests SUBPASSED(number='0')
test_subtests SUBFAILED(number='1')
test_subtests SUBPASSED(number='2')
test_subtests FAILED
test_ending FAILED
test_warning PASSED
"""


@pytest.fixture
def result(pytester: pytest.Pytester) -> Iterator[pytest.RunResult]:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=OUTCOMES.replace("SUBTESTS", SUBTESTS if HAS_THEM else ""))
    return pytester.runpytest_subprocess("-v", "-p", "no:cacheprovider", "--mine=set")


@pytest.mark.long
def test_each_outcome_is_carried_back(result: pytest.RunResult, pytester: pytest.Pytester) -> None:
    told = [re.fullmatch(r"test_it\.py::(.*?) +\[ *\d+%\]", one) for one in result.outlines]
    tells = [one for one in TELLS.split("\n")[1:-1] if HAS_THEM or "test_subtests" not in one]
    assert [one[1] for one in told if one is not None] == tells
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_leaking*",
            "left behind: file descriptor: *",
            "  file descriptor: *",
            "*_ test_failing _*",
            "E *assert [[]1, 2, 3[]] == [[]1, 2, 4[]]",
            "*At index 2 diff: 3 != 4",
            "test_it.py:*: AssertionError",
            "*Captured stdout call*",
            "of the test",
            "*_ test_ending _*",
            "its pytest, behind 'unshare', ended with 7 before this was over, and said:",
            "*warnings summary*",
            "test_it.py::test_warning",
            "*UserWarning: of the test",
        ]
    )
    # each has its own, and here there is none
    log = (pytester.path / "log").read_text().splitlines()
    assert (log.count("set up"), log.count("torn down")) == (18 + HAS_THEM, 17 + HAS_THEM)


def test_options_hold_there(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        test_it="""
import os, pathlib, sys, warnings
import pytest
pytestmark = pytest.mark.pid_namespace

def test_mine(request):
    config = request.config
    assert config.getoption("mine") == "set"
    assert config.getini("xfail_strict")
    assert not config.pluginmanager.has_plugin("nose") and not config.pluginmanager.has_plugin("stepwise")
    assert pathlib.Path.cwd() == config.invocation_params.dir == config.rootpath / "below"
    assert sys.flags.dev_mode and sys.flags.utf8_mode == 1

def test_of_warnings():
    with pytest.raises(UserWarning):
        warnings.warn("is an error")

def test_temporary(tmp_path, request):
    assert str(tmp_path).startswith(str(request.config.rootpath / "temporary"))

@pytest.mark.xfail
def test_of_xfail():
    raise ValueError
"""
    )
    (pytester.path / "below").mkdir()
    options = [
        "--mine=set",
        "-o",
        "xfail_strict=true",
        "-W",
        "error",
        "--runxfail",
        "-p",
        "no:stepwise",
        "-p",
        "no:asyncio",
    ]
    argv = [sys.executable, "-X", "dev", "-X", "utf8", "-m", "pytest", *options, "-p", "no:cacheprovider"]
    argv += ["--basetemp", str(pytester.path / "temporary"), "--junitxml", "it.xml", f"--rootdir={pytester.path}"]
    run = subprocess.run([*argv, ".."], cwd=pytester.path / "below", capture_output=True, text=True)
    assert "1 failed, 3 passed" in run.stdout, run.stdout + run.stderr
    assert "test_it.py:22: ValueError" in run.stdout
    assert 'tests="4"' in (pytester.path / "below" / "it.xml").read_text()


STOPS = """
import os
import pytest

def test_before():
    pass

@pytest.mark.pid_namespace
def test_elsewhere():
    STOP

@pytest.mark.pid_namespace
def test_after():
    assert not "this"
"""


@pytest.mark.parametrize(
    ("stop", "options", "code", "words"),
    [
        ("assert os.getpid() == 2", ["-x"], 1, "*stopping after 1 failures*"),
        ("pytest.exit('that is enough', 9)", [], 9, "*Exit: that is enough*"),
        ("raise KeyboardInterrupt", [], 2, "*KeyboardInterrupt*"),
    ],
)
def test_what_ends_the_run_ends_it(
    pytester: pytest.Pytester, stop: str, options: list[str], code: int, words: str
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(STOPS.replace("STOP", stop))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    assert result.ret == code
    result.stdout.fnmatch_lines([words])
    assert "this" not in result.stdout.str()


@pytest.mark.long
@pytest.mark.parametrize(
    ("source", "options"),
    [("    assert os.getpid() == 2", ["--pdb"]), ("    breakpoint()", ["-s"]), ("    pass", ["--trace"])],
)
def test_the_debugger_has_the_terminal(pytester: pytest.Pytester, source: str, options: list[str]) -> None:
    pytester.makeconftest(CONFTEST)
    path = pytester.makepyfile(f"import os, pytest\n@pytest.mark.pid_namespace\ndef test_it():\n{source}\n")
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(path)]
    run = subprocess.run(argv, input="p 'pid', os.getpid() + 41\nq\n", capture_output=True, text=True)
    assert "('pid', 42)" in run.stdout
    assert "Exit: Quitting debugger" in run.stdout
    assert run.returncode == 2


def test_modules_are_torn_down_in_their_order(pytester: pytest.Pytester) -> None:
    """One that runs elsewhere, at the end of its module, does not keep what that holds from being let go of."""
    pytester.makeconftest(CONFTEST)
    source = "import pytest\ndef test_here(): pass\n@pytest.mark.pid_namespace\ndef test_elsewhere(): pass\n"
    pytester.makepyfile(test_one=source, test_two=source)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=4)
    log = (pytester.path / "log").read_text().splitlines()
    assert log == [*["set up"] * 2, *["torn down"] * 2] * 2
