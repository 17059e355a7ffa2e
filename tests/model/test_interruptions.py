"""What a signal's handler raises while code of others is called is the program's, and no error of that code."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aioelastic import Command, Placement, RemoteError, SpecError
from aioelastic.model import text, validation
from aioelastic.model.group_spec import GroupSpec


class Over(Exception):
    """A time-out."""


def late(*_: object) -> Any:
    """As if a signal came in the middle of it."""
    os.kill(os.getpid(), signal.SIGUSR1)
    return Command("true")


class Late(Exception):
    __str__ = __reduce__ = late  # type: ignore[assignment]


class LateItems:
    def __iter__(self) -> Iterator[Any]:
        yield late()


class LateRebuilt(Exception):
    def __reduce__(self) -> Any:
        return late, ()


class LateAttributes:
    def __getattribute__(self, name: str) -> Any:
        return late()


CALLS: dict[str, Callable[[], Any]] = {
    "a builder of commands": lambda: GroupSpec.of(late, n=2),
    "a builder of places": lambda: GroupSpec.of(Command("true"), placement=late),
    "a list": lambda: Placement(cpus=LateItems()),  # type: ignore[arg-type]
    "an input": lambda: Command("cat", input=LateAttributes()),  # type: ignore[arg-type]
    "a method": lambda: validation.has_method(LateAttributes(), "write"),
    "a text": lambda: text.told(Late()),
    "a name": lambda: text.call_text(LateAttributes(), (), {}),  # type: ignore[arg-type]
    "a pickle": lambda: pickle.dumps(RemoteError("call", "Late", "", "", LateRebuilt())),
}


@pytest.fixture
def interrupted() -> Iterator[None]:
    def raises(*_: object) -> None:
        raise Over

    before = signal.signal(signal.SIGUSR1, raises)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_goes_on(call: Callable[[], Any]) -> None:
    with pytest.raises(Over):
        call()


def fails(*_: object) -> Any:
    raise Over


def test_what_that_code_raises_itself_is_told() -> None:
    with pytest.raises(SpecError, match=r"raised Over: .*mend the builder"):
        GroupSpec.of(fails, n=2)
