"""Every async test runs on asyncio (debug) and uvloop; every test must leave nothing behind (`usefixtures` in
pyproject.toml)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvloop

pytest_plugins = ["aioelastic.testing.plugin", "pytester"]


def _debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60.0  # debug mode is for its checks; speed lives in benchmarks/
    return loop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio-debug": _debug_loop, "uvloop": uvloop.new_event_loop}
