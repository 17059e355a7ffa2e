"""What our own tests leave behind is found (leaks.py): after the test, or after its file, with the name of the test."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import gone
from test_testing_plugin import told

# how names in /dev/shm begin here, and patterns of all others, but for those of temporary directories that are ours
MINE = f"aioelastic-leak-{os.getpid()}-"
OTHERS = [f"{MINE[:at]}[!{letter}{'s' if at == 11 else ''}]*" for at, letter in enumerate(MINE)]

AT_ONCE = """
import asyncio, contextlib, os, subprocess, threading
import pytest
from aioelastic import Command, Function, Logs, Std, supervise

QUIET = Logs(tee=Std.NONE)
back = contextlib.ExitStack()

@pytest.fixture(autouse=True, scope="module")
def taken_back():
    yield
    back.close()

def end(child):
    child.kill()
    child.wait()

def test_thread():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    back.callback(thread.join)
    back.callback(stop.set)

def test_descriptor():
    back.callback(os.close, os.open("/dev/null", os.O_RDONLY))

def test_child():
    back.callback(end, subprocess.Popen(["sleep", "1000"]))

def test_zombie():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    back.callback(child.wait)

async def test_task():
    asyncio.create_task(asyncio.Event().wait())

def test_failure():
    kept = open(os.devnull)
    assert kept is None

def test_garbage():
    kept = [os.fdopen(os.dup(0))]
    kept.append(kept)
    kept[0].close()

@pytest.mark.parametrize("number", range(3))
async def test_helpers(number):
    await supervise([Command("true"), Function(os.getpid)], logs=QUIET)
"""

BY_FILE = """
import os, subprocess, tempfile
import pytest

def test_clean():
    pass

def test_shared_memory():
    os.close(tempfile.mkstemp(dir="/dev/shm", prefix="MINE")[0])

def test_directory():
    tempfile.mkdtemp(prefix="aioelastic-shares-")

def test_detached():
    script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", script], stdout=-1, check=True).stdout)
    open(f"detached-{pid}", "w").close()
    while open(f"/proc/{pid}/comm").read() != "sleep\\n":
        pass  # it is a copy of the shell still

@pytest.mark.parametrize("number", range(4))
def test_more(number):
    pass
""".replace("MINE", MINE)

OTHER_FILE = """
import pytest

@pytest.mark.parametrize("number", range(8))
def test_other(number):
    pass
"""

WARM = """
import asyncio, os
import pytest
from aioelastic import Function, Logs, Std, supervise

zygotes = []

@pytest.fixture(params=["", "again", pytest.param("fresh", marks=pytest.mark.fresh)])
def asked(request):
    return request.param

async def test_zygote(asked):
    result = await supervise(Function(os.getppid), logs=Logs(tee=Std.NONE))
    zygotes.append(result[0].value)

def test_count():
    first, second, third = zygotes
    assert first == second != third
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(third, 0)
"""


@pytest.fixture
def tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.Pytester]:
    """A place for test files of which these are looked after. What they leave is removed."""
    lines = ["[pytest]", "addopts = -p no:cacheprovider", "asyncio_mode = auto", "usefixtures = nothing_left"]
    lines.append("asyncio_default_fixture_loop_scope = function")
    lines += [f"pythonpath = {Path(__file__).parents[1]}", "no_leaks_ignore =", *(f"  {one}" for one in OTHERS)]
    pytester.makeini("\n".join(lines))
    pytester.makeconftest('pytest_plugins = ["aioelastic.testing.plugin", "leaks"]')
    (pytester.path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(pytester.path / "tmp"))
    yield pytester
    for path in Path("/dev/shm").glob(f"{MINE}*"):
        path.unlink()


@pytest.fixture
async def detached(tests: pytest.Pytester) -> Iterator[None]:
    yield
    for path in tests.path.glob("detached-*"):
        pid = int(path.name.partition("-")[2])
        os.kill(pid, signal.SIGKILL)
        await gone(pid)


def test_what_is_had_at_once_is_told_of_the_test(tests: pytest.Pytester) -> None:
    tests.makepyfile(AT_ONCE)
    result = tests.runpytest_subprocess("-q")
    assert told(result) == {
        "test_thread": ["thread"],
        "test_descriptor": ["file descriptor"],
        "test_child": ["process"],
        "test_zombie": ["zombie"],
        "test_task": ["task"],
    }
    result.assert_outcomes(passed=9, failed=1, errors=5)


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "worksteal")], ids=["alone", "xdist"])
def test_the_rest_is_told_of_the_file_with_its_culprits(
    tests: pytest.Pytester, detached: None, options: tuple[str, ...]
) -> None:
    tests.makepyfile(test_first=BY_FILE, test_second=OTHER_FILE)
    result = tests.runpytest_subprocess("-q", *options)
    output = result.stdout.str()
    counts = result.parseoutcomes()
    assert counts["passed"] == 16
    assert counts["errors"] == len(re.findall(r"^test_\w+\.py (by .* )?left behind: ", output, re.MULTILINE))
    told = dict(re.findall(r"^  test_first.py::(\w+) - Failed: left behind: ([a-z ]+):", output, re.MULTILINE))
    assert told.keys() >= {"test_shared_memory", "test_directory", "test_detached"}
    if not options:  # else what one runner leaves in /dev/shm may be told of another's test, too
        assert counts["errors"] == 1
        assert [*told.values()] == ["shared memory", "temporary file", "stray"]


def test_one_that_ran_alone_is_not_run_again(tests: pytest.Pytester, detached: None) -> None:
    tests.makepyfile(test_first=BY_FILE, test_second=OTHER_FILE)
    result = tests.runpytest_subprocess("-q", "-k", "detached or other")
    result.assert_outcomes(passed=9, errors=1)
    result.stdout.fnmatch_lines(["test_first.py by test_detached left behind: stray: *sleep 1000, a child of *"])
    assert len([*tests.path.glob("detached-*")]) == 1


def test_whoever_asks_begins_without_helpers(tests: pytest.Pytester) -> None:
    tests.makepyfile(WARM)
    tests.runpytest_subprocess("-q").assert_outcomes(passed=4)
