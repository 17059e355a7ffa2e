"""An error of an executor's task says which task that was, for how long it ran, and what its worker saw."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest

from aioelastic import RemoteError, TaskTimeout, WorkerExecutor, WorkerFailed
from aioelastic.model.text import call_text

AFTER = r"\d+\.\d\d s after its start"


def test_what_a_task_raises_names_it_and_prints_its_own_traceback() -> None:
    with WorkerExecutor(1) as executor, pytest.raises(ValueError, match="bad") as caught:
        executor.submit(jobs.fails_anywhere).result()
    told = caught.value.__cause__
    assert isinstance(told, RemoteError)
    assert told.task.startswith("fails_anywhere(), ")
    text = "".join(traceback.format_exception(caught.value))
    assert f"  task: {told.task}\n" in text
    assert "KeyError: 'the reason'" in text
    assert str(pickle.loads(pickle.dumps(told))) == str(told)


def test_a_worker_keeps_nothing_of_a_task_that_failed(tmp_path: Path) -> None:
    """Not even until the next one: its arguments may be large."""
    os.mkfifo(path := tmp_path / "fifo")
    with WorkerExecutor(1) as executor:
        future = executor.submit(jobs.has_and_fails, jobs.Opened(str(path)))
        assert path.read_bytes() == b""  # the other end was closed
        assert isinstance(future.exception(), ValueError)


def test_an_exception_that_cannot_be_rebuilt_says_why() -> None:
    with WorkerExecutor(1) as executor, pytest.raises(RemoteError, match=rf"odd\(\), {AFTER}") as caught:
        executor.submit(jobs.odd).result()
    lines = str(caught.value).splitlines()
    assert lines[0] == "jobs.Odd: 1 and 2"
    assert any("could not be rebuilt here: TypeError: " in one and "'two'" in one for one in lines)
    assert lines[-1].strip() == "jobs.Odd: 1 and 2"


def test_without_a_task_it_is_the_same_in_short() -> None:
    error = RemoteError("call", "Odd", "no", "its traceback", None, "TypeError: of two")
    assert str(error) == "Odd: no\n  could not be rebuilt here: TypeError: of two"
    assert str(RemoteError("call", "Odd", "no", "its traceback", ValueError())) == "Odd: no"


def test_a_worker_that_dies_names_its_task() -> None:
    with WorkerExecutor(1) as executor, pytest.raises(WorkerFailed, match=rf"  task: dies\(9\), {AFTER}\n"):
        executor.submit(jobs.dies, signal.SIGKILL.value).result()


def test_a_task_that_takes_too_long_is_named() -> None:
    with WorkerExecutor(1, task_timeout=0.05) as executor, pytest.raises(TaskTimeout) as caught:
        executor.submit(jobs.sleeps).result()
    assert str(caught.value) == "sleeps() took longer than 0.05 s on its worker, which was killed"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@dataclasses.dataclass
class Account:
    user: str
    password: str


class Loud:
    def __getattr__(self, name: str) -> object:
        raise LookupError(name)

    def __repr__(self) -> str:
        raise AssertionError("the code of others is not run for it")

    def __call__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ((pow, (2, 10**30), {}), f"pow(2, {10**30})"),
        ((int, ("x" * 1_000,), {"base": 2}), f"int('{'x' * 38}…, base=2)"),
        ((Loud().__call__, (None, 1.5, "é\x1b"), {}), r"Loud.__call__(None, 1.5, 'é\x1b')"),
        ((functools.partial(pow, 2), ([1, 2],), {}), "partial(pow)([1, 2])"),
        ((dict, (), {"user": "me", "api_key": "abc"}), "dict(user='me', api_key=****)"),
        ((id, (Account("me", "abc"), {"token": 1}), {}), "id(Account(user='me', password=****), {'token': ****})"),
        ((jobs.waits_in, range(20), {}), "waits_in(0, 1, 2, 3, 4, 5, 6, 7, …)"),
    ],
)
def test_how_a_call_is_shown(call: tuple[Callable[..., Any], Any, Any], text: str) -> None:
    assert call_text(*call) == text


def test_what_is_long_is_cut() -> None:
    text = call_text(Loud(), (Loud(), 10**5_000, np.zeros(1 << 20)), {"x" * 9_000: 1})
    assert text.startswith("Loud(<Loud instance at ")
    assert len(text) < 1_000
