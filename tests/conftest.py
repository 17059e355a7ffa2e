"""Asynchronous tests run on asyncio (debug) and uvloop where that differs; every test must leave nothing behind
(leaks.py, `usefixtures` in pyproject.toml)."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing.util
import os
import re
import shutil
import signal
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from helpers import needs

from aioelastic.child.worker import multiprocessing_state

pytest_plugins = ["aioelastic.testing.plugin", "leaks", "pytester", "time_limit", "selection"]

# under nohup(1) and in the background of a shell these are ignored, and so they would be in all that tests start
for _signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)


# half of the time of the tests is that of interpreters which start: they keep bytecode, as programs do elsewhere
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# a CI system may have it, and prefixes would be coloured then
os.environ.pop("FORCE_COLOR", None)

# what some tests import for themselves would have the workers of all others get the tracker of multiprocessing's
multiprocessing_state.TRACKED, TRACKED = (), multiprocessing_state.TRACKED

# temporary files of its own: what a killed program leaves stays until the next one comes, and would be told as a leak
# by tests that run beside these
_before = tempfile.gettempdir()
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-of-aioelastic-")


def pytest_unconfigure() -> None:
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]  # it removes a directory there, at the end of the interpreter
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = _before


@pytest.fixture(autouse=True, scope="module")
def light() -> None:
    """What was imported is not looked through by each collection before and after a test (torch: 0.1 s each)."""
    gc.collect()
    gc.freeze()


def _debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60.0  # debug mode is for its checks; speed lives in benchmarks/
    return loop


# what these do is the same whatever loop runs: each of their test functions runs on one, half of them on either
ONE_LOOP = ("child", "config", "diagnosis", "executor", "gpu", "model", "planning", "processes", "testing")
LOOPS = {"asyncio-debug": _debug_loop, "uvloop": uvloop.new_event_loop}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    wanted = config.getoption("--loop")
    if wanted is None and (item.path.parent.name in ONE_LOOP or item.get_closest_marker("one_loop")):
        wanted = [*LOOPS][zlib.crc32(item.nodeid.encode()) % len(LOOPS)]
    return LOOPS if wanted is None else {wanted: LOOPS[wanted]}


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: half of the time a test waits for processes of its own."""
    return 2 * len(os.sched_getaffinity(0))


# --- what was skipped, and what would have it run ---


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line an extra. A file that cannot be read without it counts as one."""
    skipped: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        extra = re.search(r"\(the extra ([\w-]+)\)", reason)
        skipped[f"for the extra {extra[1]}" if extra else f"without an extra: {reason}"] += 1
    terminalreporter.section("skipped")
    terminalreporter.line("\n".join(f"{count} {what}" for what, count in sorted(skipped.items())) or "nothing")
    if not terminalreporter.config.getoption("--long"):
        terminalreporter.line("left out: those marked `long`, which `--long` runs, too")


# --- a fake GPU: skipped by name where there is no cuda-python, or no C compiler ---


@pytest.fixture(scope="session")
def driver(tmp_path_factory: Any) -> Iterator[Any]:
    """The fake driver, loaded in this process for good."""
    needs("cuda.bindings.driver")
    import fake_gpu

    path = fake_gpu.compiled(tmp_path_factory.mktemp("fake"))
    if path is None:
        pytest.skip("needs a C compiler (cc)")
    if any("libcuda.so" in line and str(path) not in line for line in Path("/proc/self/maps").read_text().splitlines()):
        pytest.skip("the real driver is loaded in this process already")
    os.environ.update({fake_gpu.PATH: str(path), fake_gpu.NAME: str(os.getpid())})
    yield fake_gpu.fake()
    del os.environ[fake_gpu.PATH], os.environ[fake_gpu.NAME]


@pytest.fixture
def fake(driver: Any) -> Iterator[Any]:
    """The fake driver; nothing of it may be left when the test has ended."""
    from aioelastic import gpu, sharing

    driver.calls()
    yield driver
    driver.mend()
    for one in threading.enumerate():  # they have told what came of it, and hold it until they end, just after that
        if one.name in ("aioelastic-pack", "aioelastic-unpickle", "aioelastic-copy"):
            one.join()
    gc.collect()
    sharing.trim()
    gpu.end()
    assert driver.live() == {}
    assert sharing.leases() == []


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the search path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path
