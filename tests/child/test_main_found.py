"""What lives in the main module is found by what it is: in programs of any kind, which run once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

STARTS = ["zygote", "spawn"]
BELOW = 'below if __name__ == "__main__":'


def ran(folder: Path, *argv: str, code: int = 0, given: str | None = None) -> str:
    """What it printed. Each time it, or an import of it, is begun, it adds a line to `runs`, if it is one of ours."""
    environ = {**os.environ, "RUNS": str(folder / "runs")}
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environ, capture_output=True, text=True, timeout=120, input=given
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def runs(folder: Path) -> list[str]:
    """The names under which it was run."""
    return (folder / "runs").read_text().split()


def written(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


BEGUN = """
import os
with open(os.environ["RUNS"], "a") as file:
    print(__name__, file=file)
"""
# nothing in it is wanted by a worker, whatever its data says
UNGUARDED = (
    BEGUN
    + """
import asyncio, dataclasses, tools
from aioelastic import Function, Logs, Std, WorkerExecutor, supervise
said = ["__main__", b"__mp_main__", {"__main__.Point": "c__main__\\nPoint\\n."}]
with WorkerExecutor(1, start=START) as executor:
    assert executor.submit(tools.same, said).result(30) == said
    assert executor.submit(len, "__main__").result(30) == 8
    assert list(executor.map(tools.same, ["__main__"], [1, 2])) or True
async def main():
    result = await supervise(Function(tools.same, said, also="__main__"), n=1, start=START, logs=Logs(tee=Std.NONE))
    assert result[0].value == said
asyncio.run(main())
print("fine")
"""
)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["script", "-m", "folder"])
def test_a_program_without_guard_whose_data_says_main(kind: str, start: str, tmp_path: Path) -> None:
    written(tmp_path / "tools.py", "def same(one, also=None): return one")
    text = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + UNGUARDED.replace("START", repr(start))
    where, argv = {
        "script": ("script.py", ["script.py"]),
        "-m": ("app/__main__.py", ["-m", "app"]),
        "folder": ("app/__main__.py", ["app"]),
    }[kind]
    written(tmp_path / where, text)
    assert ran(tmp_path, *argv) == "fine\n"
    assert runs(tmp_path) == ["__main__"]


def test_unittest_is_not_run_again(tmp_path: Path) -> None:
    written(
        tmp_path / "test_it.py",
        BEGUN
        + """
import unittest
from aioelastic import WorkerExecutor
def double(x): return 2 * x
class Test(unittest.TestCase):
    def test(self):
        with WorkerExecutor(1) as executor:
            self.assertEqual(executor.submit(double, "__main__").result(30), "__main____main__")
""",
    )
    ran(tmp_path, "-m", "unittest", "test_it")
    assert runs(tmp_path) == ["test_it", "test_it"]  # and once by the worker, as the module that it is


# classes and functions of all sorts, and a worker of a worker
APP = (
    BEGUN
    + """
import asyncio, collections, dataclasses, enum, functools, pickle, sys, typing
from aioelastic import Function, Group, Logs, RemoteError, Std, WorkerExecutor, sharing, supervise

T = typing.TypeVar("T")
Pair = collections.namedtuple("Pair", "a b")

class Colour(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Point:
    x: int
    @dataclasses.dataclass
    class Inner:
        y: int
    @classmethod
    def made(cls, x): return cls(x)
    @staticmethod
    def twice(x): return 2 * x
    def plus(self, n): return Point(self.x + n)

class Mine(Exception):
    pass

@functools.singledispatch
def shown(one): return "any"
@shown.register
def _(one: int): return "int"
@functools.lru_cache
def cached(x): return Pair(x, Colour.RED)

def back(*given):
    return given

def told():
    here = sys.modules["__main__"]
    names = [one.__module__ for one in (told, Point, Point.Inner, Point.plus, Mine, Pair, Colour, T, Point(1))]
    return names, __name__, here is sys.modules["__mp_main__"], here.Point is Point, pickle.dumps(Point(3))

def told_by_value():
    return [one.__module__ for one in (Point, Point.Inner, Mine, Pair, Colour, Point(1))]

def fails():
    raise Mine("unlucky")

def size(text):
    return len(text)

def nested(text):
    with WorkerExecutor(1, start=START) as inner:
        return inner.submit(size, text).result(60)

async def deeper(text):
    result = await supervise(Function(size, text), n=2, start=START, logs=Logs(tee=Std.NONE))
    return [one.value for one in result]

async def main():
    quiet = Logs(tee=Std.NONE)
    given = (Point(1), Point.Inner(2), Mine("x"), Pair(1, 2), Colour.RED, T, Point, back, Point.made, Point(2).plus)
    result = await supervise(Function(back, *given), n=1, start=START, logs=quiet)
    assert repr(result[0].value[:2]) == repr(given[:2]), result[0].value
    assert result[0].value[3:7] == given[3:7], result[0].value
    assert type(result[0].value[2]) is Mine
    if BY_VALUE:
        names = (await supervise(Function(told_by_value), n=1, start=START, logs=quiet))[0].value
    else:
        names, name, same, found, data = (await supervise(Function(told), n=1, start=START, logs=quiet))[0].value
        assert name == "__main__" and same and found
        assert pickle.loads(data) == Point(3)
        assert result[0].value[7] is back
    assert set(names) == {"__main__"}, names
    failed = await supervise(Function(fails), n=1, start=START, logs=quiet, check=False)
    error = failed.first_failure.exception
    assert type(error.exception) is Mine and error.type_name == "__main__.Mine", error
    assert "__mp_main__" not in error.traceback, error.traceback
    assert (await supervise(Function(deeper, "four"), n=1, start=START, logs=quiet))[0].value == [4, 4]

if __name__ == "__main__":
    asyncio.run(main())
    with WorkerExecutor(1, start=START) as executor:
        for fn, value in ((Point.made, Point(1)), (Point.twice, 2), (Point(0).plus, Point(1)), (shown, "int"),
                          (cached, Pair(1, Colour.RED)), (functools.partial(functools.partial(Pair, 0), b=1), None)):
            if BY_VALUE and fn in (shown, cached):
                continue  # which cloudpickle cannot
            assert value is None or executor.submit(fn, 1).result(60) == value, fn
        assert executor.submit(nested, "__main__").result(60) == 8
        try:
            executor.submit(fails).result(60)
        except Mine as exc:
            assert "__mp_main__" not in str(exc.__cause__.traceback)
    print("fine")
"""
)


@pytest.mark.long
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["script", "-m", "package", "folder", "zip", "stdin", "/dev/stdin", "frozen"])
def test_all_of_the_main_module_travels_and_comes_back(kind: str, start: str, tmp_path: Path) -> None:
    text = APP.replace("START", repr(start)).replace("BY_VALUE", str(kind in ("stdin", "/dev/stdin", "frozen")))
    given = None
    match kind:
        case "script":
            written(tmp_path / "app.py", text)
            argv = ["app.py"]
        case "-m":
            written(tmp_path / "pack/app.py", text)
            argv = ["-m", "pack.app"]
        case "package":
            written(tmp_path / "pack/__main__.py", text)
            argv = ["-m", "pack"]
        case "folder":
            written(tmp_path / "pack/__main__.py", text)
            argv = ["pack"]
        case "zip":
            written(tmp_path / "pack/__main__.py", text)
            subprocess.run([sys.executable, "-m", "zipapp", "pack", "-o", "app.pyz"], cwd=tmp_path, check=True)
            argv = ["app.pyz"]
        case "stdin" | "/dev/stdin":
            argv, given = ["-" if kind == "stdin" else kind], text
        case _:
            # as of PyInstaller: its main module is nowhere
            argv = ["-c", f"import sys; sys.frozen = True; __file__ = 'app.py'\n{text}"]
    assert ran(tmp_path, *argv, given=given) == "fine\n"
    assert runs(tmp_path).count("__main__") == 1


# what is reduced to a name, with nothing of the script beside it: each by a worker that has not imported it yet
NAMED = (
    BEGUN
    + """
import asyncio, functools, sys, tools
from aioelastic import Function, Logs, Std, WorkerExecutor, supervise

@functools.lru_cache
def cached(x): return x + 1
@tools.Named
def wrapped(x): return x + 1
class Sheet:
    @staticmethod
    @functools.cache
    def cached(x): return x + 1
KNOWN = [cached, wrapped, Sheet.cached]
if sys.version_info >= (3, 12):
    exec("type Alias = int")
    KNOWN.append(Alias)

def names():
    return cached.__module__, Sheet.cached.__module__

async def supervised(fn, *args):
    return (await supervise(Function(fn, *args), n=1, start=START, logs=Logs(tee=Std.NONE)))[0].value

def submitted(fn, *args):
    with WorkerExecutor(1, start=START) as executor:
        return executor.submit(fn, *args).result(60)

if __name__ == "__main__":
    for fn in KNOWN:
        for back in (submitted(tools.same, fn), asyncio.run(supervised(tools.same, fn))):
            assert back is fn, back
    for fn in KNOWN[:3]:
        assert submitted(fn, 1) == asyncio.run(supervised(fn, 1)) == 2
    assert submitted(names) == ("__main__", "__main__")
    print("fine")
"""
)
NAMES = """
import functools
def same(one): return one
class Named:
    def __init__(self, fn): functools.update_wrapper(self, fn)
    def __call__(self, x): return self.__wrapped__(x)
    def __reduce__(self): return self.__qualname__
"""


@pytest.mark.parametrize("start", STARTS)
def test_what_is_found_by_its_own_name(start: str, tmp_path: Path) -> None:
    written(tmp_path / "tools.py", NAMES)
    written(tmp_path / "app.py", NAMED.replace("START", repr(start)))
    assert ran(tmp_path, "app.py") == "fine\n"


# the script, and what its workers are sent besides: none of their own functions is in the script
SENDS = (
    BEGUN
    + """
import asyncio, tools
from dataclasses import dataclass
from aioelastic import Function, Group, Logs, Std, sharing

@dataclass
class Point:
    x: int

async def main():
    queue = sharing.Queue()
    async with Group(Function(tools.echo, queue), n=2, start=START, logs=Logs(tee=Std.NONE)) as group:
        await group[0].send(Point(1))
        print(await group[0].receive())
        await queue.put([Point(2)])
        print(await group[1].receive())

if __name__ == "__main__":
    asyncio.run(main())
"""
)
ECHO = """
import aioelastic
from aioelastic import sharing
def echo(queue):
    sharing.send(sharing.receive() if aioelastic.rank() == 0 else queue.get_sync())
"""


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("argv", [["app.py"], ["-"]])
def test_messages_hold_classes_of_the_script(argv: list[str], start: str, tmp_path: Path) -> None:
    written(tmp_path / "tools.py", ECHO)
    text = SENDS.replace("START", repr(start))
    written(tmp_path / "app.py", text)
    given = text if argv == ["-"] else None
    assert ran(tmp_path, *argv, given=given) == "Point(x=1)\n[Point(x=2)]\n"
    assert runs(tmp_path).count("__main__") == 1


MANY = (
    BEGUN
    + """
import time
from aioelastic import WorkerExecutor
count = 0
def add(x):
    global count
    count += 1
    return x + 1
if __name__ == "__main__":
    count = 10
    with WorkerExecutor(3, start=START, tasks_per_worker=2) as executor:
        assert list(executor.map(add, range(12))) == list(range(1, 13))
    print("fine", count)
"""
)


@pytest.mark.parametrize(("start", "imports"), [("zygote", ["__mp_main__"]), ("fork", [])])
def test_a_warm_process_imports_the_script_once(start: str, imports: list[str], tmp_path: Path) -> None:
    """Not each worker; and a copy of the program has it already."""
    written(tmp_path / "app.py", MANY.replace("START", repr(start)))
    assert ran(tmp_path, "app.py") == "fine 10\n"
    assert runs(tmp_path) == ["__main__", *imports]


CANNOT_BE_IMPORTED = """
import os
from aioelastic import WorkerExecutor
if __name__ == "__mp_main__":
    raise ValueError("not here")
def f(data): return len(data)
if __name__ == "__main__":
    found = []
    with WorkerExecutor(1, start="spawn") as executor:
        for times in (1, 5):
            for _ in range(times):
                assert str(executor.submit(f, bytes(100_000)).exception(60)) == "not here"
            found.append(len(executor.submit(os.listdir, "/proc/self/fd").result(60)))
    assert found[0] == found[1], found
    print("fine")
"""


def test_a_script_that_cannot_be_imported_costs_no_descriptor_each_time(tmp_path: Path) -> None:
    written(tmp_path / "app.py", CANNOT_BE_IMPORTED)
    assert ran(tmp_path, "app.py") == "fine\n"


NO_GUARD = (
    BEGUN
    + """
from aioelastic import WorkerExecutor
def f(x): return x
with WorkerExecutor(2, start=START) as executor:
    print(list(executor.map(f, [1], timeout=60)))
"""
)


@pytest.mark.parametrize("start", STARTS)
def test_an_executor_without_a_guard_is_told_so(start: str, tmp_path: Path) -> None:
    written(tmp_path / "app.py", NO_GUARD.replace("START", repr(start)))
    assert BELOW in ran(tmp_path, "app.py", code=1)
    assert runs(tmp_path) == ["__main__", "__mp_main__"]


def test_a_copy_of_the_program_needs_no_guard(tmp_path: Path) -> None:
    written(tmp_path / "app.py", NO_GUARD.replace("START", "'fork'"))
    assert ran(tmp_path, "app.py") == "[1]\n"
    assert runs(tmp_path) == ["__main__"]


def test_an_executor_may_be_made_at_the_top(tmp_path: Path) -> None:
    """What it starts, it starts below the guard."""
    text = "from aioelastic import WorkerExecutor\nexecutor = WorkerExecutor(1)\ndef f(x): return x\n"
    written(tmp_path / "app.py", text + "if __name__ == '__main__':\n    print(executor.submit(f, 5).result(60))\n")
    assert ran(tmp_path, "app.py") == "5\n"


def test_without_cloudpickle_a_program_at_a_prompt_is_told(tmp_path: Path) -> None:
    text = "import sys; sys.modules['cloudpickle'] = None\nfrom aioelastic import WorkerExecutor\ndef f(x): return x\n"
    text += "with WorkerExecutor(1) as executor: executor.submit(f, 1).result(60)\n"
    assert "put it into a module of its own, or install cloudpickle" in ran(tmp_path, "-c", text, code=1)


def test_a_main_module_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    written(
        tmp_path / "app.py",
        """
        from aioelastic import Function, SpecError, supervise
        import asyncio
        def f(): pass
        if __name__ != "__main__":
            raise ValueError("not twice")
        try:
            asyncio.run(supervise(Function(f), 1))
        except SpecError as exc:
            print(exc.field, exc.value == __file__, exc.problem)
        """,
    )
    assert ran(tmp_path, "app.py") == "main module True could not be imported: ValueError: not twice\n"
