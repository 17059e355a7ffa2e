"""The plug-in beside others: each way to run a test tells the same truth, and each other plug-in may be missing."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

import pytest

RUN = ("-q", "-rA", "-p", "no:cacheprovider", "-W", "ignore")


# names in /dev/shm are ignored: other suites run beside this one
def run(pytester: pytest.Pytester, source: str, *args: str, **ini: str) -> pytest.RunResult:
    lines = [f"{name} = {value}" for name, value in ini.items()]
    pytester.makeini("\n".join(["[pytest]", "usefixtures = no_leaks", "no_leaks_ignore = *", *lines]))
    pytester.makeconftest('pytest_plugins = ["aioelastic.testing.plugin"]')
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess(*RUN, *args)


def told(result: pytest.RunResult) -> dict[str, list[str]]:
    """Test → kinds of what it was told to have left behind."""
    found: dict[str, list[str]] = {}
    kinds: list[str] = []
    for line in result.outlines:
        if head := re.fullmatch(r"_+ ERROR at teardown of (?:\[doctest\] )?(?:\w+\.)?(\S+) _+", line):
            kinds = found[head[1]] = []
        elif re.match(r"[_=]{3}", line):
            kinds = []
        elif leak := re.match(r"  ([a-z ]+): ", line):
            kinds.append(leak[1])
    return found


# --- pytest-asyncio ---

LOOPS = """
import asyncio, os, signal, threading
import anyio
import pytest
from aioelastic import Command, Group, Logs, Std

back = []

@pytest.fixture(autouse=True, scope="session")
def taken_back():
    yield
    for fd in back:
        os.close(fd)

@pytest.fixture(scope="SCOPE")
async def service():
    async with Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE)) as group:
        yield group

@pytest.mark.asyncio(loop_scope="SCOPE")
class TestIt:
    async def test_threads(self):
        await asyncio.gather(*(asyncio.to_thread(threading.get_ident) for _ in range(3)))

    async def test_more_threads(self):
        barrier = threading.Barrier(5)
        await asyncio.gather(*(asyncio.to_thread(barrier.wait) for _ in range(5)))
        await anyio.to_thread.run_sync(threading.get_ident)

    async def test_service(self, service):
        service[0].send_signal(0)

    async def test_service_again(self, service):
        assert [one.exit for one in service] == [None, None]
        os.kill(service[0].pid, 0)

    async def test_task(self):
        self.task = asyncio.create_task(asyncio.Event().wait(), name="left")

    async def test_after_that(self):
        await asyncio.sleep(0)

    async def test_descriptor(self):
        back.append(os.open(os.devnull, os.O_RDONLY))

    async def test_busy_thread(self):
        ready, go = threading.Event(), threading.Event()
        task = asyncio.get_running_loop().run_in_executor(None, lambda: (ready.set(), go.wait(60)))
        assert ready.wait(60)
        asyncio.get_running_loop().call_later(0.01, go.set)
        await task
"""


@pytest.mark.long
@pytest.mark.parametrize("scope", ["function", "class", "module", "package", "session"])
def test_pytest_asyncio(pytester: pytest.Pytester, scope: str) -> None:
    source = LOOPS.replace("SCOPE", scope)
    result = run(pytester, source, asyncio_mode="auto", asyncio_default_fixture_loop_scope=scope)
    assert told(result) == {"test_task": ["task"], "test_descriptor": ["file descriptor"]}
    result.assert_outcomes(passed=8, errors=2)


# --- anyio ---

ANYIO = """
import anyio, asyncio, os, threading
import pytest

pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module", params=[("asyncio", {}), ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return request.param

@pytest.fixture(scope="SCOPE")
async def group():
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        yield group
        group.cancel_scope.cancel()

async def test_threads(group):
    async with anyio.create_task_group() as mine:
        for _ in range(3):
            mine.start_soon(anyio.to_thread.run_sync, threading.get_ident)

async def test_asyncio_threads(group):
    await asyncio.to_thread(threading.get_ident)

async def test_task(group):
    asyncio.create_task(anyio.sleep_forever(), name="left")

async def test_after_that(group):
    await anyio.sleep(0)

async def test_alone():
    await anyio.to_thread.run_sync(threading.get_ident)
"""


@pytest.mark.long
@pytest.mark.parametrize("scope", ["function", "module"])
@pytest.mark.parametrize("other", ["no:asyncio", "asyncio"])
def test_anyio(pytester: pytest.Pytester, scope: str, other: str) -> None:
    plugin = ("-p", other) if other.startswith("no:") else ()
    result = run(pytester, ANYIO.replace("SCOPE", scope), *plugin)
    assert told(result) == {"test_task[asyncio]": ["task"], "test_task[uvloop]": ["task"]}
    result.assert_outcomes(passed=10, errors=2)


# --- unittest, doctest ---

UNITTEST = """
import asyncio, os, unittest

class Sync(unittest.TestCase):
    def test_clean(self):
        os.close(os.open(os.devnull, os.O_RDONLY))

    def test_descriptor(self):
        self.addClassCleanup(os.close, os.open(os.devnull, os.O_RDONLY))

class Async(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.task = asyncio.create_task(asyncio.Event().wait(), name="of its set-up")

    async def asyncTearDown(self):
        self.task.cancel()

    async def test_clean_task(self):
        await asyncio.create_task(asyncio.sleep(0))
        await asyncio.to_thread(os.getpid)
        self.addAsyncCleanup(asyncio.sleep, 0)

    async def test_task(self):
        self.left = asyncio.create_task(asyncio.Event().wait(), name="left")

    async def test_task_and_failure(self):
        self.left = asyncio.create_task(asyncio.Event().wait(), name="left")
        self.fail()

    @unittest.skip("not now")
    async def test_skipped(self):
        pass

    def test_in_no_coroutine(self):
        pass

class SetUp(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.left = asyncio.create_task(asyncio.Event().wait(), name="left")

    async def test_task_of_its_set_up(self):
        pass
"""


def test_unittest(pytester: pytest.Pytester) -> None:
    result = run(pytester, UNITTEST)
    one = ["task"]
    assert told(result) == {
        "test_descriptor": ["file descriptor"],
        "test_task": one,
        "test_task_and_failure": one,
        "test_task_of_its_set_up": one,
    }
    result.assert_outcomes(passed=6, failed=1, skipped=1, errors=4)
    assert "of its set-up" not in result.stdout.str()


DOCTEST = '''
def clean():
    """
    >>> kept = open("/dev/null")
    """

def failing():
    """
    >>> kept = open("/dev/null")
    >>> 1
    2
    """

def raising():
    """
    >>> def holds():
    ...     kept = open("/dev/null")
    ...     raise ValueError
    >>> holds()
    """

def leaking():
    """
    >>> import os
    >>> os.dup(0) > 2
    True
    """
'''


@pytest.mark.parametrize("options", [(), ("--doctest-continue-on-failure",)])
def test_doctest(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    result = run(pytester, DOCTEST, "--doctest-modules", *options)
    assert told(result) == {"leaking": ["file descriptor"]}
    result.assert_outcomes(passed=2, failed=2, errors=1)


# --- pytest-xdist ---

MANY = """
import asyncio, mmap, os, subprocess
from multiprocessing import shared_memory
import numpy, pytest
from aioelastic import Command, Function, Logs, Std, sharing, supervise

QUIET = Logs(tee=Std.NONE)

@pytest.mark.parametrize("number", range(4))
async def test_clean(number):
    shm = shared_memory.SharedMemory(create=True, size=4096)
    x = sharing.copy(numpy.zeros(100_000))
    await supervise([Command("true"), Function(os.getpid), Command("sh", "-c", "sleep 1000 & exit 0")], logs=QUIET)
    del x
    shm.close()
    shm.unlink()

@pytest.mark.parametrize("number", range(4))
async def test_leaking(number, request):
    child = subprocess.Popen(["sleep", "1000"])
    request.session.addfinalizer(lambda: (child.kill(), child.wait()))

@pytest.mark.pid_namespace
def test_elsewhere():
    assert os.getpid() == 1
"""


@pytest.mark.long
@pytest.mark.parametrize("count", ["0", "2"])
def test_xdist(pytester: pytest.Pytester, count: str) -> None:
    """The processes and temporary files of one worker are none of another's."""
    result = run(pytester, MANY, "-n", count, asyncio_mode="auto")
    assert told(result) == {f"test_leaking[{number}]": ["process"] for number in range(4)}
    skipped = result.parseoutcomes().get("skipped", 0)  # without a PID namespace
    result.assert_outcomes(passed=9 - skipped, skipped=skipped, errors=4)


# --- without others ---

PLAIN = """
import os, pytest, unittest

def test_clean():
    pass

def test_descriptor():
    os.dup(0)

def test_failing():
    kept = open(os.devnull)
    assert kept is None

@pytest.mark.skipif("os.getpid()")
def test_skipped():
    pass

@pytest.mark.pid_namespace
def test_elsewhere():
    assert os.getpid() == 1
"""
# of which ours asks something, or that run tests as well
ASKED = ["capture", "debugging", "doctest", "skipping", "subtests", "tmpdir", "unittest", "warnings"]
OTHERS = ["assertion", "faulthandler", "logging", "monkeypatch", "recwarn", "stepwise", "threadexception"]
INSTALLED = sorted(one.name for one in entry_points(group="pytest11"))
TOGETHER = [*ASKED, *OTHERS, "unraisableexception", *INSTALLED]


@pytest.mark.long
@pytest.mark.parametrize("missing", [*([one] for one in [*ASKED, *INSTALLED]), TOGETHER], ids=lambda left: left[-1])
def test_without(pytester: pytest.Pytester, missing: list[str]) -> None:
    options = [word for one in missing for word in ("-p", f"no:{one}")]
    ini = {} if "asyncio" in missing else {"asyncio_mode": "auto"}
    result = run(pytester, PLAIN, *options, **ini)
    assert told(result) == {"test_descriptor": ["file descriptor"]}
    counts = {"passed": 3, "skipped": 1, "failed": 1, "errors": 1}
    if "skipping" in missing:
        counts = {**counts, "passed": 4, "skipped": 0}
    if "no PID namespace" in result.stdout.str():
        counts = {**counts, "passed": counts["passed"] - 1, "skipped": counts["skipped"] + 1}
    result.assert_outcomes(**counts)
