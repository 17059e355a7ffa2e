"""Nothing that comes in the middle of a call on shared memory, an exception or one more such call, does any harm: tried
at every bytecode."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers import travelled

from aioelastic import memory, sharing
from aioelastic.memory import _deferred, address_index, shared_segments

HOME = str(Path(memory.__file__).parent)
LARGE = 1 << 18  # bytes: more than one that is small, or copied when it comes


class TooLong(Exception):
    """As of a signal's handler."""


@contextmanager
def at_bytecode(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Call `act` in front of that bytecode of the memory's own functions; how many there were."""
    count = [0]

    def step(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            count[0] += 1
            if count[0] == number:
                act()
        return step

    def begin(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME) or count[0] >= number > 0:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks when it is told to trace, and never again
    sys.settrace(begin)
    try:
        yield count
    finally:
        sys.settrace(before)


def small() -> None:
    x = sharing.empty(10)
    np.asarray(x)[:] = 1


def large() -> None:
    x = sharing.empty(LARGE, "u1")
    np.asarray(x)[:] = 2


def sent() -> None:
    x = sharing.copy(np.full(LARGE, 3, "u1"))
    y, private = travelled(x, np.full(LARGE, 4, "u1"))
    assert np.asarray(y)[-1] == 3
    assert private[-1] == 4


def trimmed() -> None:
    sharing.empty(LARGE, "u1")
    sharing.trim()
    sharing.stats()


def isolated() -> None:
    x = sharing.copy(np.full(10, 5, "u1"), isolated=True)
    assert np.asarray(travelled(x)[0])[-1] == 5


def raises() -> None:
    raise TooLong


def whole(held: list[Any]) -> None:
    """All is found, and nothing lies idle that is in use."""
    assert all(sharing.is_shared(np.asarray(one)) for one in held)
    stats = sharing.stats()
    assert stats.idle <= stats.total


def held_now() -> tuple[int, int, int, int]:
    """Descriptors, segments, their uses, and places of some that are gone."""
    # between the last two bytecodes of `Incoming.loads`, where no signal is looked for (ceval.c: at calls and jumps)
    _deferred.here.__dict__.pop("message", None)
    gc.collect()
    sharing.trim()
    fds = len(os.listdir("/proc/self/fd"))
    gone = sum(item[3]() is None for item in address_index._items)
    return fds, len(memory.segments()), len(shared_segments._used), gone


@pytest.fixture
def held() -> Iterator[list[Any]]:
    """Arrays that are there all the time, and stay as they are."""
    found = [sharing.copy(np.full(size, 9, "u1")) for size in (10, 1000, LARGE)]
    yield found
    assert all((np.asarray(one) == 9).all() for one in found)
    found.clear()  # pytest has the list for a while


OPERATIONS = [small, large, sent, isolated, trimmed]


@pytest.mark.long
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_exception_at_every_bytecode(operation: Callable[[], None], warm: bool, held: list[Any]) -> None:
    operation()
    silent, sys.unraisablehook = sys.unraisablehook, lambda _: None  # in a finalizer nobody hears of it
    before = held_now()
    struck, number = 0, 0
    try:
        while True:
            number += 1
            if not warm or operation is isolated:  # of which each that was interrupted has left a segment
                sharing.trim()
            try:
                with at_bytecode(number, raises) as count:
                    operation()
                if count[0] < number:
                    break
            except TooLong:
                struck += 1
            whole(held)
            operation()
    finally:
        sys.unraisablehook = silent
    assert struck > 30
    assert held_now() == before


@pytest.mark.long
@pytest.mark.parametrize("inner", OPERATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_within_a_call(operation: Callable[[], None], inner: Callable[[], None], held: list[Any]) -> None:
    """As of a signal's handler, a finalizer or the garbage collector; and what was made there stays."""
    operation()
    number, count = 0, [1]
    kept: list[Any] = []

    def act() -> None:
        sys.settrace(None)
        inner()
        kept.append(sharing.copy(np.full(10, 7, "u1")))
        kept.append(sharing.copy(np.full(LARGE, 7, "u1")))

    while count[0] >= number:
        number += 3
        with at_bytecode(number, act) as count:
            operation()
        whole([*held, *kept])
        assert all((np.asarray(one) == 7).all() for one in kept)
        del kept[:]


class Busy(list[Any]):
    """Each time that somebody reads an item, another thread has added one in front, and removed it a little later."""

    def __getitem__(self, at: Any) -> Any:
        self.insert(0, (0, -1, 0, lambda: None))
        try:
            return super().__getitem__(at)
        finally:
            del self[0]


def test_what_others_add_and_remove_meanwhile_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [sharing.empty(100_000, "u1") for _ in range(3)]
    monkeypatch.setattr(address_index, "_items", Busy(address_index._items))
    for one in kept:
        assert address_index.find(one.address, 100_000) is not None
        assert sharing.is_shared(one)
    assert address_index.find(1) is None
