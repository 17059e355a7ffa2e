"""Every async test runs on asyncio (debug) and uvloop; every test must leave nothing behind (`usefixtures` in
pyproject.toml)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest
import uvloop

pytest_plugins = ["aioelastic.testing.plugin", "pytester"]


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
