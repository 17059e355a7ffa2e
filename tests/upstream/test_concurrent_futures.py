"""CPython's own tests of executors, run with ours: what ProcessPoolExecutor promises is the least that holds here.

They are those of the Python that runs this, where it ships them (`test.test_concurrent_futures`, in a package of its
own in some distributions). What is otherwise here on purpose is in `OTHERWISE`, with the reason.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import unittest
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Any
from unittest import mock

import pytest

from aioelastic import WorkerExecutor, WorkerFailed

PACKAGE = "test.test_concurrent_futures"
if importlib.util.find_spec("test") is None or importlib.util.find_spec(PACKAGE) is None:
    pytest.skip("this Python ships no tests of its own executors", allow_module_level=True)

STARTS = ("zygote", "spawn", "fork")
# where each is since 3.12; in 3.11 all are in one module
PLACES = {
    "WaitTests": "test_wait",
    "AsCompletedTests": "test_as_completed",
    "ExecutorShutdownTest": "test_shutdown",
    "ExecutorDeadlockTest": "test_deadlock",
    "InitializerMixin": "test_init",
    "ProcessPoolExecutorTest": "test_process_pool",  # with those of every executor (`ExecutorTest`)
    "ExecutorMixin": "util",
}
CLASSES = tuple(PLACES)[:-1]
SLOW = ("WaitTests", "AsCompletedTests", "ExecutorShutdownTest", "ExecutorDeadlockTest")  # they sleep, or run programs
FAILED = BrokenExecutor, WorkerFailed  # where ProcessPoolExecutor breaks, ours fails the one task
PROGRAM = """import multiprocessing
            from aioelastic import WorkerExecutor
            def Adapted(number=None, mp_context=None, max_workers=None):
                return WorkerExecutor(number or max_workers, start={start!r})
"""

_INSIDE = "looks at parts of ProcessPoolExecutor that have no counterpart"
_EXIT = "a SystemExit is told as RemoteError: raised again it would end who waits for the result"
_MULTIPROCESSING = "passes locks of multiprocessing's, which a worker that is no child of multiprocessing's cannot have"
OTHERWISE = {
    "test_max_workers_negative": "the error names the field, the value and the remedy (SpecError, a ValueError)",
    "test_killed_child": "a worker that is killed fails its one task, and is replaced",
    "test_traceback": "the remote traceback is that of RemoteError",
    "test_ressources_gced_in_workers": _MULTIPROCESSING,
    "test_saturation": _MULTIPROCESSING,
    "test_max_tasks_per_child_defaults_to_spawn_context": _INSIDE,
    "test_python_finalization_error": _INSIDE,
    "test_error_at_task_unpickle": "the future has that error itself, and the worker goes on",
    "test_error_during_result_unpickle_in_result_handler": "the same",
    "test_exit_at_task_unpickle": _EXIT,
    "test_exit_during_func_exec_on_worker": _EXIT,
    "test_exit_during_result_pickle_on_worker": _EXIT,
    "test_exit_during_result_unpickle_in_result_handler": "the same: it is that worker's failure, in words",
    "test_cancel_futures": "what no worker has begun is cancelled, be it all of them; there is no queue in between",
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": _INSIDE,
    "test_shutdown_deadlock_pickle": _INSIDE,
}


def _upstream(name: str) -> Any:
    package = importlib.import_module(PACKAGE)
    if hasattr(package, name):
        return package, getattr(package, name)
    module = importlib.import_module(f"{PACKAGE}.{PLACES[name]}")
    return module, getattr(module, name)


class Adapted(WorkerExecutor):
    """With the names by which those tests know what they use."""

    def __init__(self, max_workers: int | None = None, mp_context: Any = None, **how: Any) -> None:
        if "max_tasks_per_child" in how:
            how["tasks_per_worker"] = how.pop("max_tasks_per_child")
        super().__init__(max_workers, start=mp_context.start, **how)

    @property
    def _max_workers(self) -> int:
        return self.max_workers

    @property
    def _processes(self) -> list[int]:
        while len(pids := self.pids) > self.max_workers:
            time.sleep(0)  # one that has done its last task ends while the next begins
        return pids


class Context:
    """In the place of one of multiprocessing's."""

    def __init__(self, start: str) -> None:
        self.start = start

    def get_start_method(self, allow_none: bool = False) -> str:
        return "spawn"  # what those tests leave out for "fork" holds for ours


class Ours:
    """What a class of tests gets from a mixin there, beside what makes its executor."""

    start = ""
    ctx = "spawn"
    executor_type = Adapted
    module: Any

    def setUp(self) -> None:
        case: Any = self
        if (reason := OTHERWISE.get(case._testMethodName)) is not None:
            case.skipTest(f"otherwise here: {reason}")
        for name, value in (("BrokenProcessPool", FAILED), ("assert_python_ok", self.run_program)):
            if hasattr(self.module, name):
                patch = mock.patch.object(self.module, name, value)
                patch.start()
                case.addCleanup(patch.stop)
        super().setUp()  # type: ignore[misc]

    def get_context(self) -> Context:
        return Context(self.start)

    def run_program(self, flag: str, code: str) -> tuple[int, bytes, bytes]:
        """With our executor under the name that it imports."""
        lines = code.replace("from concurrent.futures import Adapted", PROGRAM.format(start=self.start))
        done = subprocess.run([sys.executable, flag, lines], capture_output=True, check=True)
        return done.returncode, done.stdout, done.stderr


def _classes() -> Iterator[type]:
    for name in CLASSES:
        for start in STARTS[:1] if name in SLOW else STARTS:
            module, theirs = _upstream(name)
            mixin = _upstream("ExecutorMixin")[1]
            members = {"__module__": __name__, "start": start, "module": module}
            yield type(f"{name}By{start.title()}", (theirs, Ours, mixin, unittest.TestCase), members)


globals().update({one.__name__: one for one in _classes()})


def test_all_of_those_are_there() -> None:
    """None of the names by which tests are left out is out of date."""
    known = {name for one in _classes() for name in dir(one) if name.startswith("test_")}
    assert len(known) > 50
    assert set(OTHERWISE) <= known
