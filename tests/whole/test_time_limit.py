"""A test that hangs ends the run, wherever it hangs, and the stacks say where."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import time_limit

HANG = """
import atexit, ctypes, os, pytest, signal, threading, time, unittest
import time_limit

def over(timer="polite"):
    \"\"\"Its time is over in a moment.\"\"\"
    assert 0 < getattr(time_limit.limit, timer).left() <= time_limit.LONGEST + time_limit.DEAF
    getattr(time_limit.limit, timer).start(0.01)

def hang():
    over()
    time.sleep(1000)

"""
PLACES = {
    "a test": "def test_it(): hang()",
    "a coroutine": "@pytest.mark.asyncio\nasync def test_it(): hang()",
    "a fixture": "@pytest.fixture\ndef it(): hang()\ndef test_it(it): pass",
    "a fixture of the session": "@pytest.fixture(scope='session')\ndef it(): hang()\ndef test_it(it): pass",
    "a tear-down": "@pytest.fixture\ndef it(): yield; hang()\ndef test_it(it): pass",
    "a tear-down of the session": "@pytest.fixture(scope='session')\ndef it(): yield; hang()\ndef test_it(it): pass",
    "a unit test": "class TestIt(unittest.TestCase):\n    def tearDown(self): hang()\n    def test_it(self): pass",
    "the collection": "hang()",
    "the end of the interpreter": "atexit.register(hang)\ndef test_it(): pass",
    "a thread that is waited for at the end": (
        "def stays():\n"
        "    threading.main_thread().join()\n"
        "    hang()\n"
        "def test_it(): threading.Thread(target=stays).start()"
    ),
    "C code": "def hang(): over(); ctypes.CDLL(None).sleep(1000)\ndef test_it(): hang()",
    "C code with the lock": "def hang(): over(); ctypes.PyDLL(None).sleep(1000)\ndef test_it(): hang()",
    "Python": "def hang():\n    over()\n    while True: pass\ndef test_it(): hang()",
    "a test with an alarm": (
        "def test_it():\n"
        "    signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\n"
        "    hang()"
    ),
    "a test in whose thread all signals are blocked": (
        "def test_it():\n"
        "    thread = threading.Thread(target=hang, daemon=True)\n"
        "    thread.start()\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "    thread.join()"
    ),
}


def ran(pytester: pytest.Pytester, source: str, *args: str, stdin: bytes = b"") -> pytest.RunResult:
    pytester.makeconftest('pytest_plugins = ["time_limit"]')
    pytester.makepyfile(HANG + source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(time_limit.__file__).parent))
        return pytester.run(
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", *args, stdin=stdin
        )


@pytest.mark.parametrize("source", PLACES.values(), ids=PLACES)
def test_it_ends_wherever_it_hangs(pytester: pytest.Pytester, source: str) -> None:
    result = ran(pytester, source)
    assert result.ret == -time_limit.SIGNAL
    assert "in hang" in result.stderr.str()


def test_it_is_killed_where_no_signal_comes_through(pytester: pytest.Pytester) -> None:
    source = "def test_it():\n    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n    hang()"
    assert ran(pytester, source.replace("hang()", "over('last')\n    hang()")).ret == -signal.SIGKILL


AGAIN = """
@pytest.mark.parametrize("number", range(3))
def test_it(number):
    assert time_limit.limit.polite.left() > time_limit.LONGEST - 50
    time_limit.limit.polite.start(100)
"""


def test_each_test_has_its_own_time(pytester: pytest.Pytester) -> None:
    ran(pytester, AGAIN).assert_outcomes(passed=3)


def test_who_debugs_has_all_the_time(pytester: pytest.Pytester) -> None:
    result = ran(
        pytester, "def test_it():\n    assert False\n", "--pdb", stdin=b"p time_limit.limit.polite.left()\nq\n"
    )
    result.stdout.fnmatch_lines(["(Pdb) 0.0"])
