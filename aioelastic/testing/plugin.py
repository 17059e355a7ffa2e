"""For pytest: `pytest_plugins = ["aioelastic.testing.plugin"]` in the conftest.py of the root.

Fixtures: `no_leaks`, `full_disk`. Mark: `pid_namespace`. Nothing happens to tests that do not ask. No entry point, so
that nobody who only has aioelastic installed runs any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import traceback
import unittest
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ._environment import Unavailable, pid_namespace
from ._environment import full_disk as _full_disk
from ._leak_check import Holdings, LeftBehind, leaks_since, pending_tasks
from ._process_tree import marked
from ._test_in_subprocess import Inside, is_inside

TURNS = 10  # of the loop, for tasks that were cancelled, and generators that were dropped, at the end of a test

_held = pytest.StashKey[Holdings]()  # in the config, while a test runs that has the fixture
_tasks = pytest.StashKey[list[str]]()
_errors = pytest.StashKey[list[BaseException]]()
_inside = pytest.StashKey[Inside]()


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

    Fixtures that are set up after this one are torn down before it looks; those of a wider scope are no leaks, nor is
    what they have made when they are set up. Zygotes that nobody uses are ended first. For all tests:
    `pytestmark = pytest.mark.usefixtures("no_leaks")`, or an autouse fixture of your own that asks for it.
    """
    yield from looked_after(request, Holdings.now, leaks_since)


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A directory with 16 KiB of room. Skips, naming the reason, where it cannot be mounted."""
    with contextlib.ExitStack() as stack:
        try:
            where = stack.enter_context(_full_disk())
        except Unavailable as exc:
            pytest.skip(f"no full disk: {exc}")
        yield where


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """What a fixture of a wider scope makes is its own, though a test be the first to need it."""
    stash = request.config.stash
    if fixturedef.scope == "function" or _held not in stash:
        return (yield)
    before = Holdings.now()
    value = yield
    stash[_held] = stash[_held].and_what_came(before, Holdings.now())
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Look at the tasks of an async test when its body ends: later its runner cancels them, and nobody would know."""
    if isinstance(item, pytest.Function) and _held in item.config.stash:
        if isinstance(item.instance, unittest.IsolatedAsyncioTestCase):
            item.instance.addAsyncCleanup(_look_at_tasks, item, Holdings())  # the first is done last
        elif inspect.iscoroutinefunction(item.obj):
            item.obj = _seeing_tasks(item)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test failed with: its traceback holds what was held there. And what is told of one that ran elsewhere."""
    report = yield
    if call.excinfo is not None and _held in item.config.stash:
        item.stash.setdefault(_errors, []).append(call.excinfo.value)
    inside = item.stash.get(_inside, None)
    return report if inside is None or call.excinfo is not None else inside.instead_of(report, item)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test with the mark runs in a pytest of its own, with its fixtures: here nothing of it does."""
    if item.get_closest_marker("pid_namespace") is None or item.config.stash.get(is_inside, False):
        return
    try:
        before = pid_namespace()
    except Unavailable as exc:
        pytest.skip(f"no PID namespace: {exc}")
    for name in ("setup", "runtest", "teardown"):
        setattr(item, name, lambda: None)
    item.stash[_inside] = Inside(item, before)


def looked_after(
    request: pytest.FixtureRequest,
    now: Callable[[], Holdings],
    since: Callable[[Holdings, Iterable[str]], dict[str, list[str]]],
) -> Iterator[None]:
    """What such a fixture does.

    Args:
        request: of the test that has it.
        now: what is held.
        since: what is left beyond that, and by whose names in /dev/shm it is not ours.
    """
    stash = request.config.stash
    stash[_held] = now()
    yield
    before, ignore = stash[_held], request.config.getini("no_leaks_ignore")
    del stash[_held]
    leaks = since(before, ignore)
    if leaks and request.node.stash.get(_errors, []):
        let_go(request.node)
        leaks = since(before, ignore)
    request.node.stash[_errors] = []
    if tasks := request.node.stash.get(_tasks, []):
        leaks["task"] = tasks
    if leaks:
        pytest.fail(str(LeftBehind(leaks)), pytrace=False)


def _seeing_tasks(item: pytest.Function) -> Callable[..., Coroutine[Any, Any, None]]:
    body = item.obj

    @functools.wraps(body)
    async def test(*args: Any, **kwargs: Any) -> None:
        before = Holdings(tasks=pending_tasks(), groups=item.config.stash[_held].groups)
        try:
            await body(*args, **kwargs)
        finally:
            await _look_at_tasks(item, before)

    return test


async def _look_at_tasks(item: pytest.Item, before: Holdings) -> None:
    for _ in range(TURNS):
        item.stash[_tasks] = Holdings(tasks=pending_tasks()).leaks(before).get("task", [])
        if not item.stash[_tasks]:
            break
        await asyncio.sleep(0)


def let_go(item: pytest.Item) -> None:
    """Of what only the tracebacks of a failed test hold, and the names of a doctest."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [*item.stash.get(_errors, [])]
    for one in todo:
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        for frame, _ in traceback.walk_tb(one.__traceback__):
            with contextlib.suppress(RuntimeError):  # one of pytest's, that still runs
                frame.clear()
                frame.f_locals  # noqa: B018  # before Python 3.13 it keeps a dict of them, renewed by this
        todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        match one:  # `doctest` is imported by those who have such
            case object(failures=[*failures]):
                todo += failures
            case object(exc_info=(_, BaseException() as problem, _)):
                todo.append(problem)
    if (example := getattr(item, "dtest", None)) is not None:
        example.globs.clear()
