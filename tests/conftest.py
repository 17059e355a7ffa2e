"""Every async test runs on asyncio (debug) and uvloop; every test must leave nothing behind (`usefixtures` in
pyproject.toml)."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

pytest_plugins = ["aioelastic.testing.plugin", "pytester"]

# under nohup(1) and in the background of a shell these are ignored, and so they would be in all that tests start
for _signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)


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


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio-debug": _debug_loop, "uvloop": uvloop.new_event_loop}


# --- a fake GPU: skipped by name where there is no cuda-python, or no C compiler ---


@pytest.fixture(scope="session")
def driver(tmp_path_factory: Any) -> Iterator[Any]:
    """The fake driver, loaded in this process for good."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python (the extra gpu)")
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
    gc.collect()
    sharing.trim()
    gpu.end()
    assert driver.live() == {}
    assert sharing.leases() == []
