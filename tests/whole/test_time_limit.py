"""A test that hangs ends the run, wherever it hangs, and the stacks say where; under xdist it fails alone."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
import time_limit
from helpers import alive

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


def ran(
    pytester: pytest.Pytester, source: str, *args: str, stdin: bytes = b"", seconds: float = time_limit.LONGEST
) -> pytest.RunResult:
    pytester.makeconftest(f'pytest_plugins = ["time_limit"]\nimport time_limit\ntime_limit.LONGEST = {seconds}')
    pytester.makepyfile(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(time_limit.__file__).parent))
        return pytester.run(
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", *args, stdin=stdin
        )


@pytest.mark.parametrize("source", PLACES.values(), ids=PLACES)
def test_it_ends_wherever_it_hangs(pytester: pytest.Pytester, source: str) -> None:
    result = ran(pytester, HANG + source)
    assert result.ret == -time_limit.SIGNAL
    assert "in hang" in result.stderr.str()


def test_it_is_killed_where_no_signal_comes_through(pytester: pytest.Pytester) -> None:
    source = "def test_it():\n    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n    hang()"
    assert ran(pytester, HANG + source.replace("hang()", "over('last')\n    hang()")).ret == -signal.SIGKILL


ALONE = """
import asyncio, ctypes
from subprocess import Popen
import pytest, uvloop

class Lock(ctypes.Structure):
    _fields_ = [("space", ctypes.c_char * 64)]

def python():
    while True: pass

def c_code_with_the_lock():
    ctypes.PyDLL(None).sleep(1000)

def a_lock_in_c():
    libc, lock = ctypes.CDLL(None), Lock()
    libc.pthread_mutex_lock(ctypes.byref(lock))
    libc.pthread_mutex_lock(ctypes.byref(lock))

async def forever():
    await asyncio.Event().wait()

def asyncio_loop():
    asyncio.run(forever())

def uvloop_loop():
    uvloop.run(forever())

def the_end_of_a_popen():
    with Popen(["sleep", "1000"]) as sleeps:
        print(sleeps.pid, flush=True)
        raise ValueError

HANGS = [python, c_code_with_the_lock, a_lock_in_c, asyncio_loop, uvloop_loop, the_end_of_a_popen]

@pytest.mark.parametrize("hang", HANGS, ids=lambda one: one.__name__)
def test_it(hang): hang()
def test_others(): pass
"""


@pytest.mark.long
def test_under_xdist_it_fails_alone(pytester: pytest.Pytester) -> None:
    """With the stacks of its threads, and with the names of what it had started, which is ended."""
    result = ran(pytester, ALONE, "-n", "3", seconds=3.0)
    result.assert_outcomes(passed=1, failed=6)
    told = result.stdout.str()
    for name in ("python", "c_code_with_the_lock", "a_lock_in_c", "asyncio_loop", "uvloop_loop", "the_end_of_a_popen"):
        assert f" in {name}\n" in told
    (sleeps,) = set(re.findall(r"^(\d+) sleep 1000 $", told, re.MULTILINE))  # pytest may tell it again at the end
    assert not alive(int(sleeps))


AGAIN = """
@pytest.mark.parametrize("number", range(3))
def test_it(number):
    assert time_limit.limit.polite.left() > time_limit.LONGEST - 50
    time_limit.limit.polite.start(100)
"""


def test_each_test_has_its_own_time(pytester: pytest.Pytester) -> None:
    ran(pytester, HANG + AGAIN).assert_outcomes(passed=3)


def test_who_debugs_has_all_the_time(pytester: pytest.Pytester) -> None:
    result = ran(
        pytester, HANG + "def test_it():\n    assert False\n", "--pdb", stdin=b"p time_limit.limit.polite.left()\nq\n"
    )
    result.stdout.fnmatch_lines(["(Pdb) 0.0"])
