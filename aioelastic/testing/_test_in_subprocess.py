"""One test in a pytest of its own, behind other words such as unshare(1), and its reports carried back whole.

In: an item of the pytest that was asked for it. Out: what the other one reported of it. Never here: a test that runs in
the process of the first one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pytest

# which tests are chosen, where it is told, and what would be taken from the first one
CHOSEN = {"collectonly", "deselect", "failedfirst", "file_or_dir", "ignore", "ignore_glob", "keyword", "lf", "markexpr"}
TOLD = {"basetemp", "cov_source", "htmlpath", "log_file", "pastebin", "plugins", "report_log", "xmlpath"}
NOT_GIVEN = CHOSEN | TOLD | {"newfirst", "stepwise", "stepwise_skip"}
AT_WHICH = "inside"  # the name of its directory for temporary files

is_inside = pytest.StashKey[bool]()  # in the config
_count = pytest.StashKey[int]()


class Inside:
    """What came of it.

    Attributes:
        reports: of its set-up, its call, each of its subtests, and its tear-down.
        trouble: why they are not all, in words; else "".
    """

    def __init__(self, item: pytest.Item, before: Sequence[str]) -> None:
        self.reports: list[pytest.TestReport] = []
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as given:
            pickle.dump(_given(item), given)
            given.flush()
            run = _run(item.config, before, given, told)
            told.seek(0)
            with contextlib.suppress(EOFError, pickle.UnpicklingError):  # it may have been killed while it wrote
                while True:
                    self._hear(item.config, *pickle.load(told))
        whole = self.reports and self.reports[-1].when == "teardown"
        words = f"its pytest, behind {before[0]!r}, {_ended(run.returncode)} before this was over, and said:"
        self.trouble = "" if whole else f"{words}\n{run.stdout or ''}"

    def _hear(self, config: pytest.Config, kind: str, data: Any) -> None:
        if kind == "report":
            self.reports.append(config.hook.pytest_report_from_serializable(config=config, data=data))
        elif kind == "warning":
            config.hook.pytest_warning_recorded.call_historic(kwargs=data)
        elif kind == "KeyboardInterrupt":
            raise KeyboardInterrupt
        else:
            pytest.exit(*data)

    def instead_of(self, report: pytest.TestReport, item: pytest.Item) -> pytest.TestReport:
        """What is to be told of a phase; that of subtests, which come before it, is."""
        found = [one for one in self.reports if one.when == report.when]
        for one in found[:-1]:
            item.ihook.pytest_runtest_logreport(report=one)
        if found:
            return found[-1]
        if self.trouble:
            report.outcome, report.longrepr, self.trouble = "failed", self.trouble, ""
        return report


def main(given: int, told: int) -> None:
    """In there. The numbers are of the descriptors of what it is given, and of what it tells."""
    with open(given, "rb") as file:
        options, args = pickle.load(file)
    os.set_inheritable(told, False)
    known = {}
    for name, value in options.items():
        with contextlib.suppress(Exception):  # of a class that is not to be found here, or not yet
            known[name] = pickle.loads(value)
    config = pytest.Config.fromdictargs(known, args)
    config.stash[is_inside] = True
    config.pluginmanager.register(_Teller(config, told))
    sys.exit(config.hook.pytest_cmdline_main(config=config))


class _Teller:
    """A plugin."""

    def __init__(self, config: pytest.Config, told: int) -> None:
        self._config = config
        self._told = told

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        try:
            self._tell("report", data)
        except Exception:  # a property of the test's that cannot travel
            data["user_properties"] = [(name, str(value)) for name, value in data["user_properties"]]
            self._tell("report", data)

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str, location: Any) -> None:
        data = {"warning_message": warning_message, "when": when, "nodeid": nodeid, "location": location}
        if when == "runtest":  # of the others the first pytest has its own
            with contextlib.suppress(Exception):  # of a class that cannot travel
                self._tell("warning", data)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        stop = excinfo.value
        self._tell(type(stop).__name__, (getattr(stop, "msg", ""), getattr(stop, "returncode", None)))

    def _tell(self, kind: str, data: object) -> None:
        os.write(self._told, pickle.dumps((kind, data)))


def _given(item: pytest.Item) -> tuple[dict[str, bytes], list[str]]:
    """Options and arguments: all that the first one has, but for what is its own."""
    config = item.config
    options = {name: value for name, value in vars(config.option).items() if name not in NOT_GIVEN}
    options["rootdir"] = str(config.rootpath)
    if config.inipath is not None:
        options["inifilename"] = str(config.inipath)
    if (factory := getattr(config, "_tmp_path_factory", None)) is not None:
        config.stash[_count] = config.stash.get(_count, 0) + 1
        options["basetemp"] = str(factory.getbasetemp() / f"{AT_WHICH}{config.stash[_count]}")
    packed = {}
    for name, value in options.items():
        with contextlib.suppress(Exception):  # a plugin's own, which cannot travel
            packed[name] = pickle.dumps(value)
    args = [word for name in config.getoption("plugins") for word in ("-p", name)]
    return packed, [*args, f"{item.path}::{item.nodeid.partition('::')[2]}"]


def _run(
    config: pytest.Config, before: Sequence[str], given: IO[bytes], told: IO[bytes]
) -> subprocess.CompletedProcess[str]:
    fds = given.fileno(), told.fileno()
    os.lseek(given.fileno(), 0, os.SEEK_SET)
    code = f"import sys; sys.path[:] = {sys.path!r}\nfrom aioelastic.testing._test_in_subprocess import main; main{fds}"
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    argv = [*before, sys.executable, *flags, "-c", code]
    with _by_hand(config) as by_hand:
        stdin, stdout, stderr = (None,) * 3 if by_hand else (subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT)
        return subprocess.run(
            argv,
            cwd=config.invocation_params.dir,
            pass_fds=fds,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
            check=False,
        )


@contextlib.contextmanager
def _by_hand(config: pytest.Config) -> Iterator[bool]:
    """Whether somebody looks on, or debugs: it gets the terminal itself in this block."""
    debugs = config.getoption("usepdb", False) or config.getoption("trace", False)
    if not debugs and config.getoption("capture", "no") != "no":
        yield False
        return
    capturing = config.pluginmanager.getplugin("capturemanager")
    if capturing is None:
        yield True
        return
    capturing.suspend(in_=True)
    try:
        yield True
    finally:
        capturing.resume()


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    return f"was ended by {signal.Signals(-code).name}"
