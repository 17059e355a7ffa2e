"""For pytest: `pytest_plugins = ["aioelastic.testing.plugin"]` in the conftest.py of the root.

Fixtures: `no_leaks`, `full_disk`. Mark: `pid_namespace`. Nothing happens to tests that do not ask. No entry point, so
that nobody who only has aioelastic installed runs any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ._environment import Unavailable, pid_namespace
from ._environment import full_disk as _full_disk
from ._family import marked
from ._holdings import Holdings, LeftBehind, leaks_since, pending_tasks

INSIDE = "AIOELASTIC_TESTING_NAMESPACE"
TURNS = 10  # of the loop, for tasks that were cancelled, and generators that were dropped, at the end of a test

_tasks = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("no_leaks_ignore", "patterns of names in /dev/shm that are not the tests' own", type="linelist")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pid_namespace: run this test as a process of a PID namespace of its own")
    stack = contextlib.ExitStack()
    stack.enter_context(marked())
    config.add_cleanup(stack.close)


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test leaves no process, zombie, thread, descriptor, shared memory, temporary file or asyncio task behind.

    Fixtures that are set up after this one are torn down before it looks. Warm zygotes are ended first. For all
    tests: `pytestmark = pytest.mark.usefixtures("no_leaks")`, or an autouse fixture of your own that asks for it.
    """
    before = Holdings.now()
    yield
    leaks = leaks_since(before, request.config.getini("no_leaks_ignore"))
    if tasks := request.node.stash.get(_tasks, {}):
        leaks["task"] = [*tasks.values()]
    if leaks:
        pytest.fail(str(LeftBehind(leaks)), pytrace=False)


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A directory with 16 KiB of room. Skips, naming the reason, where it cannot be mounted."""
    with contextlib.ExitStack() as stack:
        try:
            where = stack.enter_context(_full_disk())
        except Unavailable as exc:
            pytest.skip(f"no full disk: {exc}")
        yield where


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Look at the tasks of an async test when its body ends: later its runner cancels them, and nobody would know."""
    match item:
        case pytest.Function(obj=body) if "no_leaks" in item.fixturenames and inspect.iscoroutinefunction(body):
            item.obj = _seeing_tasks(item)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """A test with the mark runs in a pytest of its own, in there."""
    if pyfuncitem.get_closest_marker("pid_namespace") is None or os.environ.get(INSIDE):
        return None
    try:
        before = pid_namespace()
    except Unavailable as exc:
        pytest.skip(f"no PID namespace: {exc}")
    config = pyfuncitem.config
    argv = [*before, sys.executable, "-m", "pytest", "-q", "--no-header", f"--rootdir={config.rootpath}"]
    if config.inipath is not None:
        argv.append(f"-c{config.inipath}")
    run = subprocess.run(
        [*argv, pyfuncitem.nodeid], cwd=config.rootpath, env={**os.environ, INSIDE: "1"}, text=True, capture_output=True
    )
    if run.returncode:
        pytest.fail(f"in its PID namespace:\n{run.stdout}{run.stderr}", pytrace=False)
    return True


def _seeing_tasks(item: pytest.Function) -> Any:
    body = item.obj

    @functools.wraps(body)
    async def test(*args: Any, **kwargs: Any) -> None:
        before = pending_tasks()
        try:
            await body(*args, **kwargs)
        finally:
            for _ in range(TURNS):
                if pending_tasks().keys() <= before.keys():
                    break
                await asyncio.sleep(0)
            item.stash[_tasks] = {one: name for one, name in pending_tasks().items() if one not in before}

    return test
