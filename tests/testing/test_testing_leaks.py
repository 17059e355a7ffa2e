"""`no_leaks` sees each kind of thing that can be left behind, and names it; and nothing that is a stranger's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, gone, sh

from aioelastic import Stop, supervise
from aioelastic.planning import TAG
from aioelastic.testing import _leak_check
from aioelastic.testing._leak_check import Holdings, LeftBehind, no_leaks
from aioelastic.testing._misbehaving_workers import made, setsid_escape

pytestmark = pytest.mark.fresh

# how names in /dev/shm begin here, and patterns of all others: another copy of this suite may run beside this one
MINE = f"aioelastic-leak-{os.getpid()}-"
OTHERS = [f"{'?' * at}[!{letter}]*" for at, letter in enumerate(MINE)]

LEAKY = '''
"""Each leaves something behind; at the end of the module it is taken back."""
import asyncio, contextlib, mmap, os, subprocess, threading
from multiprocessing import resource_tracker, shared_memory
import pytest

back = contextlib.ExitStack()

@pytest.fixture(autouse=True, scope="module")
def taken_back():
    yield
    back.close()

def end(child):
    child.kill()
    child.wait()

def test_process():
    back.callback(end, subprocess.Popen(["sleep", "1001"]))

def test_grandchild():
    child = subprocess.Popen(["sh", "-c", "sleep 1002 & wait"])
    back.callback(end, child)
    back.callback(subprocess.run, ["pkill", "-P", str(child.pid)])
    while subprocess.run(["pgrep", "-x", "-P", str(child.pid), "sleep"], stdout=-3).returncode != 0:
        pass

def test_zombie():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    back.callback(child.wait)

def test_stray():
    script = "setsid sleep 1003 >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", script], stdout=-1, check=True).stdout)
    back.callback(os.kill, pid, 9)
    while open(f"/proc/{pid}/comm").read() != "sleep\\n":
        pass  # it is a copy of the shell still

def test_thread():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="the-thread")
    thread.start()
    back.callback(thread.join)
    back.callback(stop.set)

def test_descriptor():
    back.callback(os.close, os.open("/dev/null", os.O_RDONLY))

def test_shared_memory():
    # the tracker would be a leak of its own
    real, resource_tracker.register = resource_tracker.register, lambda *_: None
    shm = shared_memory.SharedMemory(name="MINEleft-behind", create=True, size=10)
    resource_tracker.register = real
    shm.close()
    back.callback(os.unlink, "/dev/shm/MINEleft-behind")

def test_memfd():
    fd = os.memfd_create("the-memfd")
    os.truncate(fd, 4096)
    back.callback(mmap.mmap(fd, 4096).close)
    os.close(fd)

async def test_task():
    asyncio.create_task(asyncio.sleep(1000), name="the-task")

async def test_two():
    asyncio.create_task(asyncio.Event().wait(), name="first")
    back.callback(os.close, os.open("/dev/zero", os.O_RDONLY))

def test_clean():
    pass

async def test_clean_task():
    asyncio.create_task(asyncio.sleep(0))
    asyncio.create_task(asyncio.sleep(1000)).cancel()

def test_somebody_elses():
    open("/dev/shm/MINEof-somebody-else", "w").close()
    back.callback(os.unlink, "/dev/shm/MINEof-somebody-else")

@pytest.fixture
async def running():
    task = asyncio.create_task(asyncio.Event().wait())
    yield
    task.cancel()

async def test_a_task_of_a_fixture(running):
    pass

def test_its_own_failure_and_a_leak():
    back.callback(os.close, os.open("/dev/null", os.O_RDONLY))
    assert 1 == 2
'''.replace("MINE", MINE)


def run(pytester: pytest.Pytester, source: str) -> pytest.RunResult:
    ignored = "\n  ".join(["*-of-somebody-else", *OTHERS])
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\naddopts = -p no:cacheprovider\n"
        f"usefixtures = no_leaks\nno_leaks_ignore =\n  {ignored}"
    )
    pytester.makeconftest('pytest_plugins = ["aioelastic.testing.plugin"]')
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("-q", "-W", "ignore")


def test_each_kind_is_seen_and_named(pytester: pytest.Pytester) -> None:
    result = run(pytester, LEAKY)
    result.assert_outcomes(passed=14, failed=1, errors=11)
    reports = {
        part.split()[0]: re.findall("^  (.*)$", part.partition("left behind:")[2], re.MULTILINE)
        for part in result.stdout.str().partition("= FAILURES =")[0].split("ERROR at teardown of ")[1:]
    }
    expected = {
        "test_process": ["process: * sleep 1001, a child of *"],
        "test_grandchild": ["process: * sh -c sleep 1002 & wait, a child of *", "process: * sleep 1002, a child of *"],
        "test_zombie": ["zombie: * (true), a child of *"],
        "test_stray": ["stray: * sleep 1003, a child of *"],
        "test_thread": ["thread: the-thread (*)"],
        "test_descriptor": ["file descriptor: * -> /dev/null"],
        "test_shared_memory": ["shared memory: /dev/shm/*-left-behind"],
        "test_memfd": ["file descriptor: * -> /memfd:the-memfd (deleted)", "memfd map: /memfd:the-memfd (deleted)"],
        "test_task": ["task: the-task: sleep"],
        "test_two": ["file descriptor: * -> /dev/zero", "task: first: Event.wait"],
        "test_its_own_failure_and_a_leak": ["file descriptor: * -> /dev/null"],
    }
    assert reports.keys() == expected.keys()
    for name, patterns in expected.items():
        fits = [fnmatch(one, pattern) for one, pattern in zip(reports[name], patterns, strict=True)]
        assert all(fits), (name, reports[name])


def test_a_test_that_does_not_ask_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["aioelastic.testing.plugin"]')
    pytester.makepyfile("import os\ndef test_leaky(): os.open('/dev/null', os.O_RDONLY)")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


# --- the block, without pytest ---


async def test_a_block_sees_a_task_of_its_loop() -> None:
    task = None
    with pytest.raises(LeftBehind) as caught, no_leaks(OTHERS):
        task = asyncio.create_task(asyncio.Event().wait(), name="mine")
    assert caught.value.leaks == {"task": ("mine: Event.wait",)}
    task.cancel()


async def test_a_group_leaves_nothing() -> None:
    with no_leaks(OTHERS):
        await supervise(sh("sleep 1000 & exit 0"), n=3, logs=QUIET)


def test_an_exception_of_the_block_goes_first() -> None:
    def fails() -> None:
        with no_leaks(OTHERS):
            fds.append(os.open("/dev/null", os.O_RDONLY))
            raise ZeroDivisionError

    fds: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fails()
    os.close(fds[0])


def test_a_block_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "19700101-000000-outer-00000000/0/0"):
        monkeypatch.delenv(TAG, raising=False)
        if before:
            monkeypatch.setenv(TAG, before)
        with no_leaks():
            assert os.environ[TAG].split(":") == [*([before] if before else []), f"tests-{os.getpid()}"]
        assert os.environ.get(TAG) == before


async def test_a_worker_that_is_gone_from_us_is_a_stray() -> None:
    with pytest.raises(LeftBehind) as caught, no_leaks(OTHERS):
        result = await supervise(setsid_escape(), logs=QUIET, stop=Stop(scope="leader"))
    (pid,) = made(result[0].stdout)
    (words,) = caught.value.leaks["stray"]
    assert re.match(rf"{pid} (setsid )?sleep 1000, a child of ", words)  # perhaps it has not come to its exec yet
    os.kill(pid, signal.SIGKILL)
    await gone(pid)


async def test_a_temporary_file_of_ours_is_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = Holdings.now()
    (tmp_path / "aioelastic-shares-1").mkdir()
    (tmp_path / "of somebody else's").mkdir()
    found = Holdings.now().leaks(before).get("temporary file")
    (tmp_path / "aioelastic-shares-1").rmdir()
    assert found == [f"{tmp_path}/aioelastic-shares-1"]


# --- shared memory of others ---

HOLDS = """
import mmap, os, sys
fd = os.open(f"/dev/shm/{sys.argv[1]}", os.O_CREAT | os.O_RDWR)
os.truncate(fd, 4096)
if sys.argv[2] == "mapped":
    kept = mmap.mmap(fd, 4096)
    os.close(fd)
print("up", flush=True)
sys.stdin.read()
os.unlink(f"/dev/shm/{sys.argv[1]}")
"""


@contextlib.contextmanager
def stranger(name: str, how: str) -> Iterator[None]:
    """Somebody who does not descend from us holds shared memory of this name."""
    reader, writer = os.pipe()
    out, theirs = os.pipe()
    env = {key: value for key, value in os.environ.items() if key != TAG}
    argv = ["/bin/sh", "-c", 'exec 3<&0; "$@" <&3 3<&- &', "sh", sys.executable, "-c", HOLDS, name, how]
    subprocess.run(argv, env=env, stdin=reader, stdout=theirs, check=True)
    os.close(reader)
    os.close(theirs)
    with open(out) as lines:
        assert lines.readline() == "up\n"
        yield
        os.close(writer)
        assert lines.read() == ""  # it has ended


@pytest.mark.parametrize("how", ["mapped", "open"])
def test_shared_memory_that_a_stranger_holds_is_no_leak(how: str) -> None:
    name = f"{MINE}stranger-{how}"
    before = Holdings.now()
    with stranger(name, how):
        now = Holdings.now()
    assert any(one.startswith(f"/dev/shm/{name}") for one in now.shm)
    with stranger(name, how):
        leaks = Holdings.now().leaks(before)
    assert name not in str(leaks.get("shared memory"))


def test_shared_memory_that_nobody_holds_is_ours_unless_it_is_to_be_ignored() -> None:
    before = Holdings.now()
    path = Path(f"/dev/shm/{MINE}nobody")
    path.touch()
    try:
        now = Holdings.now()
        assert now.leaks(before, OTHERS) == {"shared memory": [str(path)]}
        assert now.leaks(before, [*OTHERS, "*-nobody"]) == {}
    finally:
        path.unlink()
    assert now.leaks(before, OTHERS) == {}  # it was just going


def test_a_descriptor_that_is_another_file_now() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    before = Holdings.now()
    os.close(fd)
    assert os.open("/dev/zero", os.O_RDONLY) == fd
    try:
        assert Holdings.now().leaks(before) == {"file descriptor": [f"{fd} -> /dev/zero"]}
    finally:
        os.close(fd)


OUTLIVED = """
import asyncio, os, signal, psutil
from aioelastic import *
asyncio.run(supervise(Command("true"), logs=Logs(tee=Std.NONE)))
names = ("aio-guardian", "aio-keeper")
pids = [one.pid for one in psutil.Process().children(recursive=True) if one.name() in names]
for pid in pids:
    os.kill(pid, signal.SIGSTOP)
print(*pids, flush=True)
os._exit(0)
"""


TRACKED = """
import os, signal
from multiprocessing import resource_tracker

out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
resource_tracker.ensure_running()
pid = resource_tracker._resource_tracker._pid
os.kill(pid, signal.SIGSTOP)
os.write(out, b"%d" % pid)
os._exit(0)
"""


@pytest.mark.parametrize(("program", "count"), [(OUTLIVED, 2), (TRACKED, 1)], ids=["guardian", "resource tracker"])
def test_what_ends_just_after_its_program_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, program: str, count: int
) -> None:
    real, asked = _leak_check.see_off, []

    def see_off(*args: Any) -> None:
        asked.append(args)
        for pid in pids:  # now it gets the time that it needs, if it has not ended: the system continues the keeper
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        real(*args)

    monkeypatch.setattr(_leak_check, "see_off", see_off)
    with no_leaks():
        ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
        pids = [int(one) for one in ran.stdout.split()]
        assert len(pids) == count
    assert len(asked) == 1
