"""How values and texts of others are shown: whatever they are, an error can be, and they do nothing to who reads it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import pickle
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, py
from test_cli import run
from test_outcome import failure_of, group_of

import aioelastic
from aioelastic import (
    Cause,
    Command,
    Function,
    Group,
    Logs,
    Output,
    Placement,
    RemoteError,
    Restart,
    SpecError,
    Std,
    Stop,
    WorkerFailed,
    plan,
    supervise,
)
from aioelastic.errors import LaunchFailed
from aioelastic.events import Restarting, SinkTrouble
from aioelastic.model.failures import ErrorReport
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.leftovers import Process, Remains
from aioelastic.model.logs import Match, Rotate
from aioelastic.model.text import ITEMS, printable, shown, text_of

# --- values ---


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class Endless:
    def __repr__(self) -> str:
        while True:
            pass

    __str__ = __repr__


class Interrupted:
    def __repr__(self) -> str:
        raise KeyboardInterrupt

    __str__ = __repr__


class EndlessList(list[int]):
    def __iter__(self) -> Any:
        return itertools.count()

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __repr__(self) -> str:
        return str([*self])


class EndlessDict(dict[int, int]):
    def items(self) -> Any:
        return ((one, one) for one in itertools.count())

    __repr__ = EndlessList.__repr__


class BadText(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class Meta(type):
    def __repr__(cls) -> str:
        raise RuntimeError("no repr of the class")


class OfMeta(metaclass=Meta):
    pass


class Attributes:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("cannot be compared")

    def __hash__(self) -> int:
        raise RuntimeError("cannot be hashed")

    __repr__ = Broken.__repr__


@dataclasses.dataclass
class Holds:
    value: object


Pair = collections.namedtuple("Pair", ["a", "b"])  # noqa: PYI024  # as others still make them
ITSELF: list[Any] = []
ITSELF.append(ITSELF)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]

HARD: dict[str, Callable[[], Any]] = {
    "broken": Broken,
    "endless": Endless,
    "interrupted": Interrupted,
    "a list of broken ones": lambda: [Broken(), Endless()],
    "a dict of them": lambda: {"key": Broken(), Pair(1, 2): Interrupted()},
    "a dataclass of one": lambda: Holds(Broken()),
    "a pair of them": lambda: Pair(Broken(), Endless()),
    "an endless list": lambda: EndlessList([1]),
    "an endless dict": lambda: EndlessDict({1: 2}),
    "a text": lambda: BadText("x"),
    "its class": lambda: OfMeta,
    "of that class": OfMeta,
    "without attributes": Attributes,
    "itself": lambda: ITSELF,
    "deep": lambda: DEEP,
    "huge": lambda: list(range(1_000_000)),
    "a huge text": lambda: "x" * 10_000_000,
    "huge bytes": lambda: b"x" * 10_000_000,
    "a huge number": lambda: 1 << 10_000_000,
    "an exception": lambda: ValueError(Broken()),
    "numbers": itertools.count,
    "control codes": lambda: "\x1b]0;evil\x07\x9b2J\u202e",
    "a surrogate": lambda: "a\udcff",
}


@pytest.mark.parametrize("name", HARD)
def test_any_value_is_shown_in_one_short_line(name: str) -> None:
    for limit in (10, 60, 200):
        text = shown(HARD[name](), limit)
        assert len(text) <= limit
        assert text.isprintable()


PARTS: dict[str, Callable[[Any], object]] = {
    "entry": lambda x: GroupSpec.of(x),
    "entries": lambda x: GroupSpec.of([x]),
    "built": lambda x: GroupSpec.of(lambda rank: x, 1),
    "n": lambda x: GroupSpec.of(Command("true"), x),
    "name": lambda x: GroupSpec.of(Command("true"), name=x),
    "env": lambda x: GroupSpec.of(Command("true"), env=x),
    "env of a value": lambda x: Command("true", env={"A": x}),
    "env of a key": lambda x: Command(
        "true", env=collections.UserDict([("B", "1")]) | collections.UserDict({Key(x): "1"})
    ),
    "argv": lambda x: Command("true", x),
    "cwd": lambda x: Command("true", cwd=x),
    "stdin": lambda x: Command("true", stdin=x),
    "fn": lambda x: Function(x),
    "Command.name": lambda x: Command("true", name=x),
    "placement": lambda x: GroupSpec.of(Command("true"), placement=x),
    "placements": lambda x: GroupSpec.of(Command("true"), placement=[x]),
    "cpus": lambda x: Placement(cpus=x),
    "cpu": lambda x: Placement(cpus=[x]),
    "gpus": lambda x: Placement(gpus=x),
    "nice": lambda x: Placement(nice=x),
    "limits": lambda x: Placement(limits=x),
    "limit": lambda x: Placement(limits={"NOFILE": x}),
    "cgroup": lambda x: Placement(cgroup=x),
    "dir": lambda x: Logs(dir=x),
    "tee": lambda x: Logs(tee=x),
    "save": lambda x: Logs(dir="x", save=x),
    "prefix": lambda x: Logs(prefix=x),
    "ranks": lambda x: Logs(ranks=x),
    "match": lambda x: Logs(dir="x", match=x),
    "rotate": lambda x: Logs(dir="x", rotate=x),
    "callback": lambda x: Logs(callback=x),
    "color": lambda x: Logs(color=x),
    "when_full": lambda x: Logs(when_full=x),
    "drain": lambda x: Logs(drain=x),
    "timestamps": lambda x: Logs(timestamps=x),
    "Match.include": lambda x: Match(include=x),
    "Match.std": lambda x: Match(std=x),
    "Match.file": lambda x: Match(file=x),
    "Rotate.size": lambda x: Rotate(size=x),
    "signal": lambda x: Stop(signal=x),
    "grace": lambda x: Stop(grace=x),
    "scope": lambda x: Stop(scope=x),
    "if_lost": lambda x: Stop(if_lost=x),
    "Restart.max": lambda x: Restart.on_failure(x),
    "Restart.scope": lambda x: Restart.on_failure(1, x),
    "logs": lambda x: GroupSpec.of(Command("true"), logs=x),
    "stop": lambda x: GroupSpec.of(Command("true"), stop=x),
    "restart": lambda x: GroupSpec.of(Command("true"), restart=x),
    "start": lambda x: GroupSpec.of(Function(print), start=x),
    "preload": lambda x: GroupSpec.of(Function(print), preload=x),
    "ports": lambda x: GroupSpec.of(Command("true"), ports=x),
    "port": lambda x: GroupSpec.of(Command("true"), ports=[x]),
    "on_event": lambda x: Group(Command("true"), on_event=x),
    "launcher": lambda x: Group(Command("true"), launcher=x),
}


class Key:
    """Of a mapping: hashed and compared as any object."""

    def __init__(self, value: object) -> None:
        self.value = value

    __repr__ = Broken.__repr__


WRONG = (
    "broken",
    "endless",
    "interrupted",
    "a list of broken ones",
    "without attributes",
    "an endless list",
    "numbers",
)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", WRONG)
def test_each_argument_is_checked_with_a_value_that_cannot_be_shown(part: str, name: str) -> None:
    value = HARD[name]()
    with pytest.raises(SpecError) as caught:
        PARTS[part](value)
    for text in (str(caught.value), repr(caught.value)):
        assert len(text) < 1_000
        assert text.isprintable()
    assert caught.value.field
    assert caught.value.remedy in str(caught.value)


async def test_a_task_that_ends_with_one_can_be_shown() -> None:
    """asyncio shows the exception of a task, and so calls its repr()."""
    task = asyncio.ensure_future(supervise(Broken()))  # type: ignore[arg-type]
    await asyncio.wait({task})
    assert "SpecError('entry', <Broken instance at " in repr(task)
    error = RemoteError("call", "Odd", "no", "", ValueError(Broken()))
    assert repr(error) == "RemoteError('call', 'Odd: no')"
    assert "failed: exit code 3" in repr(WorkerFailed(failure_of(exception=error)))
    again = pickle.loads(pickle.dumps(SpecError("a", 1, "is wrong", "mend it", status=126)))
    assert (str(again), again.status) == ("a=1 is wrong; mend it", 126)


def test_values_are_shown_as_one_would_write_them() -> None:
    many = range(ITEMS + 1)
    for text, value in {
        "None": None,
        "True": True,
        "5": 5,
        "2.5": 2.5,
        "'a b'": "a b",
        r"'a\nb'": "a\nb",
        "b'x'": b"x",
        "[]": [],
        "()": (),
        "(1,)": (1,),
        "{}": {},
        "set()": set(),
        "{1}": {1},
        "frozenset({1})": frozenset({1}),
        "{'a': [1, (2,)]}": {"a": [1, (2,)]},
        "[0, 1, 2, 3, 4, 5, 6, 7, …]": [*many],
        "PosixPath('/a')": Path("/a"),
        "<Std.OUT>": Std.OUT,
        "<Signals.SIGTERM>": signal.SIGTERM,
        "Pair((1, 2))": Pair(1, 2),
        "Holds(value=1)": Holds(1),
        "<builtin_function_or_method print>": print,
        "ValueError('x')": ValueError("x"),
        "<class test_shown.Broken>": Broken,
        "range(0, 3)": range(3),
    }.items():
        assert shown(value) == text
    assert shown("x" * 100) == "'" + "x" * 58 + "…"


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    assert "2.5" in shown(numpy.float64(2.5))
    assert "3" in shown(numpy.int64(3))
    assert shown(numpy.zeros(10**6)).startswith("<ndarray instance at ")


def test_an_exception_whose_text_raises() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert text_of(Odd()) == "<str() raised RuntimeError>"
    with pytest.raises(SpecError, match="raised Odd: <str"):
        GroupSpec.of(_raises(Odd()), 1)


def _raises(exc: Exception) -> Callable[[int], Any]:
    def build(rank: int) -> Any:
        raise exc

    return build


def test_the_plan_and_the_summary_show_any_value(tmp_path: Path) -> None:
    spec = GroupSpec.of(Function(print, Broken(), more=Endless()))
    assert re.search(r"print\(<Broken instance at \w+>, more=<Endless instance at \w+>\)", str(plan(spec)))
    (tmp_path / "job.py").write_text(
        "class Broken:\n    def __repr__(self): raise RuntimeError\n"
        "class Endless:\n    def __repr__(self):\n        while True: pass\n"
        "def broken(): return [Broken(), {1: Endless()}]\n"
    )
    done = run("-m", "job:broken", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[<Broken instance at \w+>, \{1: <Endless", done.stderr)


# --- control codes ---

EVIL = "\x1b]0;evil\x07\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\u202eabc\x7f\r\b\x00"


def clean(text: str) -> bool:
    """Nothing in it steers a terminal."""
    return not any(one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cs") for one in text) and not re.search(
        "[\u2028-\u202e\u2066-\u2069]", text
    )


def test_what_is_escaped() -> None:
    every = "".join(map(chr, range(0x300))) + "\u2028\u202a\u202e\u2066\u2069\ud800é日本😀"
    text = printable(every)
    assert clean(text)
    assert text.encode().decode() == text
    assert "\n" in text
    assert "\t" in text
    assert text.endswith(r"\u2028\u202a\u202e\u2066\u2069\ud800é日本😀")
    assert printable("\x1b[1m\x9b") == r"\x1b[1m\x9b"


def test_all_words_of_ours() -> None:
    """Each value that becomes text, with what a worker could put into it."""
    error = RemoteError("call", "ValueError", EVIL, f"Traceback\n{EVIL}")
    output = Output(tail=f"first\n{EVIL}\n".encode(), path=Path(f"/{EVIL[:5]}"))
    failure = failure_of(
        argv=("prog", EVIL),
        cwd=EVIL,
        cause=EVIL,
        stderr=output,
        error=ErrorReport(EVIL, f"Traceback\n{EVIL}"),
        why=Cause("crash", "crashed", (EVIL,)),
    )
    result = group_of(failure)
    told = [
        failure.headline,
        failure.describe(),
        dataclasses.replace(failure, exception=error).describe(),
        dataclasses.replace(failure, stderr=Output(), stdout=output, error=None).describe(),
        str(failure.why),
        str(error),
        error.headline,
        str(WorkerFailed(failure)),
        str(LaunchFailed(0, ["prog", EVIL], FileNotFoundError(2, "No such file", EVIL))),
        str(SpecError(EVIL, EVIL, EVIL, EVIL)),
        str(Remains("process", EVIL)),
        Remains("process", EVIL).words,
        Process(1, EVIL).command,
        str(plan(GroupSpec.of(Command("echo", EVIL.replace("\0", ""), cwd="\x1b[2J")))),
        *result.history(),
    ]
    with pytest.raises(aioelastic.GroupFailed) as caught:
        result.raise_for_failures()
    told += [str(caught.value), repr(caught.value), *map(str, caught.value.exceptions)]
    for text in told:
        assert clean(text), ascii(text)
    assert "\n" not in failure.headline
    assert output.tail.decode().endswith(f"{EVIL}\n")  # data stay as they are
    assert error.message == EVIL


async def test_events_and_stacks() -> None:
    evil = "\\033]0;evil\\007"

    def callback(line: Any) -> None:
        raise ValueError(EVIL)

    seen: list[Any] = []
    code = f"def f(): raise ValueError('{evil}')\nf()"
    await supervise(
        py(code),
        logs=Logs(tee=Std.NONE, callback=callback),
        restart=Restart.on_failure(1),
        check=False,
        on_event=seen.append,
    )
    reasons = [one.reason for one in seen if isinstance(one, Restarting)]
    problems = [one.problem for one in seen if isinstance(one, SinkTrouble)]
    assert reasons
    assert problems
    assert all(map(clean, [*reasons, *problems]))


async def test_a_process_that_is_left_running_with_an_evil_command_line() -> None:
    name = "sleep\x1b[2J 1000"
    code = (
        f"import os\npid = os.fork()\nif pid == 0:\n    os.setsid(); os.execv('/bin/sleep', [{name!r}, '1000'])\n"
        "while b'1000' not in open(f'/proc/{pid}/cmdline', 'rb').read(): pass\n"  # it has become that
    )
    result = await supervise(py(code), logs=QUIET, stop=Stop(grace=1))
    assert [clean(one.command) for one in result.leaked] == [True]
    assert r"\x1b[2J" in result.leaked[0].command


def test_the_command_line(tmp_path: Path) -> None:
    script = r"printf '\033]0;evil\007\033[2J\r\b last\n' >&2; exit 3"
    options = ["--tee", "none", "--log-dir", tmp_path / "\x1b[2J"]
    done = subprocess.run(
        [sys.executable, "-m", "aioelastic", "run", *options, "--", "sh", "-c", script], capture_output=True
    )
    assert done.returncode == 3
    assert clean(done.stderr.decode())
    assert r"\x1b]0;evil\x07" in done.stderr.decode()
    missing = subprocess.run([sys.executable, "-m", "aioelastic", "run", "--", "\x1b[2J"], capture_output=True)
    assert clean(missing.stderr.decode())


def test_the_tee_is_byte_exact() -> None:
    done = run("--prefix", "", "--", "printf", r"\033[1mbold\033[0m\n")
    assert done.stdout == "\x1b[1mbold\x1b[0m\n"
