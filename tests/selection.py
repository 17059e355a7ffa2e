"""A plug-in: which tests are run, and what came of each, for who runs them by parts as `.ci/run` does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aioelastic.testing._test_in_subprocess import is_inside

LOOPS = ("asyncio-debug", "uvloop")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--long", action="store_true", help="run the tests marked `long`, too")
    group.addoption("--loop", choices=LOOPS, help="run asynchronous tests on this event loop alone")
    group.addoption("--only", type=Path, help="of those not `long`, run what has its id, or its file, in this file")
    group.addoption("--results", type=Path, help="append what failed or was skipped to this file, as lines of JSON")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--results")) is not None:
        os.environ.pop("PYTEST_ADDOPTS", None)  # where it may be from: a pytest that a test starts knows no such option
        config.pluginmanager.register(_Results(path.absolute(), hasattr(config, "workerinput")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash.get(is_inside, False):  # what runs in a namespace of its own was chosen before
        return
    only: Path | None = config.getoption("--only")
    ids = set() if only is None else set(only.read_text().splitlines())

    def is_wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("long"):
            return bool(config.getoption("--long"))
        return only is None or not ids.isdisjoint((item.nodeid, item.nodeid.partition("::")[0]))

    wanted = [one for one in items if is_wanted(one)]
    config.hook.pytest_deselected(items=list({*items} - {*wanted}))
    items[:] = wanted


class _Results:
    """`{"id": ..., "outcome": "failed" or "skipped", "why": ...}`. Several processes may write into one file."""

    def __init__(self, path: Path, is_runner: bool) -> None:
        self._path = path
        self._is_runner = is_runner

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # by runners, too: xdist passes on one of several that are alike, and these may be of several files
        self._tell(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._is_runner:  # who has started the runners is told
            self._tell(report)

    def _tell(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.passed:
            return
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        else:
            why = report.longreprtext
        line = json.dumps({"id": report.nodeid, "outcome": report.outcome, "why": why}) + "\n"
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
