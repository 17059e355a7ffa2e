"""Every async test runs on asyncio (debug) and uvloop; every test must leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import uvloop

from aioelastic.launch import TAG, end_zygotes
from aioelastic.memory import trim

# whatever this test run starts descends from it, and can be told from what others run on this machine
os.environ[TAG] = ROOT = f"tests-{os.getpid()}"


def _debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60.0  # debug mode is for its checks; speed lives in benchmarks/
    return loop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio-debug": _debug_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True, scope="session")
def warm() -> None:
    """libuv keeps one signal pipe per process from its first loop on: have it before anybody counts."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def no_leaks(warm: None) -> Iterator[None]:
    """No process, zombie, thread, file descriptor or shared memory more than before the test."""
    gc.collect()
    before = _holdings()
    yield
    end_zygotes()  # they would stay warm for the next group
    gc.collect()
    trim()  # so would memory
    after = _holdings()
    assert {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind]} == {}


def _holdings() -> dict[str, set[str]]:
    me = psutil.Process()
    return {
        "processes": {f"{p.pid} {p.name()} {p.status()}" for p in me.children(recursive=True)},
        "strays": set(_tagged()),
        "threads": {f"{t.native_id} {t.name}" for t in threading.enumerate()},
        "fds": set(_fds()),
        "shared memory": {name for name in os.listdir("/dev/shm") if not name.startswith("aioelastic-bench")},
        "memfds": {
            line.split(None, 5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line
        },
    }


def _fds() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}"
        except OSError:
            pass  # the descriptor of listdir itself


def _tagged() -> Iterator[str]:
    """Processes that any group of this test run has started, wherever they are now."""
    mark = f"{TAG}={ROOT}".encode()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if mark in Path(f"/proc/{name}/environ").read_bytes():
                    yield f"{name} {Path(f'/proc/{name}/cmdline').read_bytes()!r}"
            except OSError:
                pass
