"""What a function worker has of its program: filters of warnings, hooks for imports, arguments."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm_jobs
from helpers import QUIET, program

from aioelastic import Function, GroupResult, SpecError, WorkerExecutor, supervise

STARTS = ["zygote", "spawn"]


async def run(function: Function, **options: Any) -> GroupResult:
    return await supervise(function, 1, **{"logs": QUIET, "check": False, "timeout": 60, **options})


async def value(function: Function, **options: Any) -> Any:
    result = await run(function, **options)
    assert result.ok, result.failures
    return result[0].value


# --- filters of warnings ---


@pytest.fixture
def no_filters() -> Iterator[None]:
    """But those of the test, which are set back."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield


@pytest.mark.parametrize("start", STARTS)
async def test_filters_of_warnings_as_they_are_now(start: Any, no_filters: None, modules: Path) -> None:
    (modules / "warm_category.py").write_text("class Odd(Warning): pass\n")
    (modules / "warm_warns.py").write_text(
        "import warnings, warm_category\n"
        "def told(words, category):\n"
        "    try: warnings.warn(words, category, stacklevel=1)\n"
        "    except Warning as exc: return type(exc).__name__\n"
    )
    warm_category = importlib.import_module("warm_category")

    async def outcome(words: str, category: Any) -> Any:
        function = importlib.import_module("warm_warns").told
        return await value(Function(function, words, category), start=start)

    assert await outcome("any", UserWarning) is None
    warnings.filterwarnings("error", message="so", category=UserWarning)
    assert await outcome("any", UserWarning) is None
    assert await outcome("So it is", UserWarning) == "UserWarning"
    warnings.filterwarnings("ignore", category=UserWarning, module="warm_w")
    assert await outcome("So it is", UserWarning) is None
    warnings.filterwarnings("error", category=warm_category.Odd)
    assert await outcome("any", warm_category.Odd) == "Odd"  # though it is loaded with the function only
    warnings.resetwarnings()
    assert await value(Function(warm_jobs.filters), start=start) == []


@pytest.mark.parametrize("start", STARTS)
async def test_filters_by_variable_are_in_front(start: Any, no_filters: None, monkeypatch: Any) -> None:
    warnings.simplefilter("ignore", UserWarning)
    function = Function(warm_jobs.filters)
    assert await value(function, start=start) == [("ignore", "UserWarning")]
    by_variable = ("error", "BytesWarning")
    seen = await value(function.options(env={"PYTHONWARNINGS": "error::BytesWarning"}), start=start)
    assert seen[0] == by_variable
    assert seen[-1] == ("ignore", "UserWarning")
    monkeypatch.setenv("PYTHONWARNINGS", "error::BytesWarning")  # for those to come
    assert (await value(function, start=start))[0] == by_variable


@pytest.mark.parametrize("start", STARTS)
async def test_a_variable_wins_over_the_program(start: Any, no_filters: None) -> None:
    """Where the program has the same filter, further behind, and where it is the interpreter's, too."""
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("error")
    for category in ("DeprecationWarning", "UserWarning"):
        function = Function(warm_jobs.filters).options(env={"PYTHONWARNINGS": f"ignore::{category},,ignore::x.Odd"})
        seen = await value(function, start=start)
        assert seen[:2] == [("ignore", category), ("error", "Warning")]
        assert len(set(seen)) == len(seen) == len(warnings.filters)


@pytest.mark.parametrize("start", STARTS)
async def test_the_interpreters_own_filters_do_not_come_back(start: Any, no_filters: None) -> None:
    """They are not what the variable says."""
    env = {"PYTHONWARNINGS": "ignore::BytesWarning"}
    assert await value(Function(warm_jobs.filters), start=start, env=env) == [("ignore", "BytesWarning")]


@pytest.mark.parametrize("start", STARTS)
async def test_development_mode_by_variable(start: Any, no_filters: None) -> None:
    """Its filter is in front, as in a command."""
    warnings.simplefilter("ignore", UserWarning)
    seen = await value(Function(warm_jobs.filters), start=start, env={"PYTHONDEVMODE": "1"})
    assert seen == [("default", "Warning"), ("ignore", "UserWarning")]


async def test_filters_that_an_import_has_set_are_in_front(no_filters: None, modules: Path) -> None:
    (modules / "warm_filters.py").write_text("import warnings; warnings.simplefilter('once', BytesWarning)")
    added = ("once", "BytesWarning")
    assert await value(Function(warm_jobs.filters), preload=["warm_filters"]) == [added]
    warnings.simplefilter("ignore", UserWarning)
    assert await value(Function(warm_jobs.filters), preload=["warm_filters"]) == [added, ("ignore", "UserWarning")]


OLD = """
import asyncio, warnings
from aioelastic import Function, Logs, Std, WorkerExecutor, supervise
import warm_old

WORD = "\\d"
warnings.warn("its text is old", PendingDeprecationWarning)

def held():
    try:
        warnings.warn("so is this", PendingDeprecationWarning)
    except PendingDeprecationWarning:
        return "held"

if __name__ == "__main__":
    warnings.filterwarnings("error", ".*(invalid escape|is old|so is)")
    for fn in (held, warm_old.held):
        result = asyncio.run(supervise(Function(fn), 1, start=START, preload=PRELOAD, logs=Logs(tee=Std.NONE)))
        with WorkerExecutor(1, start=START) as executor:
            print(result[0].value, *[executor.submit(fn).result(60) for _ in range(2)])
"""


@pytest.mark.parametrize(("start", "preload"), [("zygote", []), ("zygote", ["warm_old"]), ("spawn", [])])
def test_imports_do_not_heed_filters_that_were_set_after_them(start: str, preload: list[str], tmp_path: Path) -> None:
    """The main module, one that is preloaded, and one that comes with the function or with a task."""
    script = OLD.replace("START", repr(start)).replace("PRELOAD", repr(preload))
    (tmp_path / "warm_old.py").write_text(script.partition("if __name__")[0].replace("import warm_old", ""))
    # from Python 3.12 on the old text is told of at its first compilation, in the program
    assert program(script, tmp_path, options=("-W", "ignore::SyntaxWarning")) == "held held held\n" * 2


MINE = """
import asyncio, warnings
from aioelastic import Function, Logs, Std, WorkerExecutor, supervise
import warm_jobs

class Mine(UserWarning):
    class Inner(UserWarning):
        pass

def told():
    return warm_jobs.raised(Mine), warm_jobs.raised(Mine.Inner)

if __name__ == "__main__":
    warnings.resetwarnings()
    warnings.simplefilter("error", Mine)
    warnings.simplefilter("error", Mine.Inner)
    async def main(function):
        return (await supervise(function, 1, start=START, logs=Logs(tee=Std.NONE)))[0].value
    print(asyncio.run(main(Function(warm_jobs.filters))))
    print(asyncio.run(main(Function(told))))
    print(asyncio.run(main(Function(warm_jobs.raised, Mine))))
    with WorkerExecutor(1, start=START) as executor:
        print(executor.submit(warm_jobs.filters).result(60), executor.submit(told).result(60))
"""


@pytest.mark.parametrize("start", STARTS)
def test_filters_whose_category_is_of_the_main_module(start: str, tmp_path: Path) -> None:
    """They hold where that is imported."""
    out = program(MINE.replace("START", repr(start)), tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[1])})
    assert out == "[]\n('Mine', 'Inner')\nMine\n[] ('Mine', 'Inner')\n"


@pytest.mark.parametrize("start", STARTS)
def test_filters_whose_category_comes_with_a_task(start: Any, no_filters: None, modules: Path) -> None:
    """By its arguments, or by what the task before it has imported."""
    (modules / "warm_odd.py").write_text("class Odd(Warning): pass\n")
    (modules / "warm_other.py").write_text("class Other(Warning): pass\n")
    odd, other = importlib.import_module("warm_odd").Odd, importlib.import_module("warm_other").Other
    warnings.filterwarnings("error", category=odd)
    warnings.filterwarnings("error", category=other)
    with WorkerExecutor(1, start=start) as executor:
        assert executor.submit(warm_jobs.raised, odd).result(60) == "Odd"
        assert executor.submit(warm_jobs.raised_by_name, "warm_other", "Other").result(60) is None
        assert executor.submit(warm_jobs.raised_by_name, "warm_other", "Other").result(60) == "Other"


@pytest.mark.parametrize("start", STARTS)
def test_filters_that_the_worker_of_an_executor_sets_itself(start: Any, no_filters: None, modules: Path) -> None:
    """They stay, and are in front: those of its initializer, of its tasks and of what these import."""
    (modules / "warm_filters.py").write_text(
        "import warnings; warnings.simplefilter('once', BytesWarning)\n"
        "from warm_jobs import filters as seen\n"
        "def at_import(now=seen()): return now\n"
    )
    mine = importlib.import_module("warm_filters")
    warnings.resetwarnings()
    warnings.simplefilter("ignore", UserWarning)
    first = ("error", "FutureWarning")
    with WorkerExecutor(
        1, start=start, initializer=warnings.simplefilter, initargs=("error", FutureWarning)
    ) as executor:
        told = [first, ("ignore", "UserWarning")]
        assert executor.submit(warm_jobs.filters).result(60) == told
        seen = executor.submit(mine.at_import).result(60)
        assert seen[:2] == [("once", "BytesWarning"), first]
        assert ("ignore", "UserWarning") not in seen
        told.insert(0, ("once", "BytesWarning"))
        assert executor.submit(warm_jobs.filters).result(60) == told
        executor.submit(warnings.simplefilter, "ignore", ImportWarning).result(60)
        told.insert(0, ("ignore", "ImportWarning"))
        (modules / "warm_later.py").write_text("later = 1\n")
        executor.submit(warm_jobs.imports, "warm_later").result(60)
        assert executor.submit(warm_jobs.filters).result(60) == told


# --- hooks for imports ---

HOOKS = """
import importlib.machinery, importlib.abc, sys

class Loader(importlib.abc.Loader):
    def exec_module(self, module):
        module.found = module.__name__

def of_path(entry):
    if entry != "warm:/":
        raise ImportError
    return OfPath()

class OfPath:
    def find_spec(self, name, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "warm_by_path" else None

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "warm_by_finder" else None

class First(Finder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "warm_first" else None

    @classmethod
    def of_path(cls, entry):
        if entry != "warm:/":
            raise ImportError
        return OfPath()
"""


@pytest.mark.parametrize("start", STARTS)
async def test_hooks_for_imports(start: Any, modules: Path, monkeypatch: Any) -> None:
    (modules / "warm_hooks.py").write_text(HOOKS)
    hooks = importlib.import_module("warm_hooks")
    monkeypatch.setattr(sys, "path_hooks", [hooks.of_path, *sys.path_hooks, lambda _: None])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, hooks.Finder])
    monkeypatch.setattr(sys, "path", ["warm:/", *sys.path])
    preload = ["warm_by_finder"] if start == "zygote" else []
    assert await value(Function(warm_jobs.found), start=start, preload=preload) == {
        "warm_by_path": "warm_by_path",
        "warm_by_finder": "warm_by_finder",
        "first": "of_path",
        "last": "Finder",
    }


@pytest.mark.parametrize("start", STARTS)
async def test_hooks_stay_before_those_that_they_are_before(start: Any, modules: Path, monkeypatch: Any) -> None:
    (modules / "warm_hooks.py").write_text(HOOKS)
    (modules / "warm_first.py").write_text("found = 'by file'\n")
    hooks = importlib.import_module("warm_hooks")
    monkeypatch.setattr(sys, "meta_path", [hooks.Finder(), hooks.First, *sys.meta_path])
    first = Function(warm_jobs.attribute_of, "warm_first", "found")
    assert await value(first, start=start) == "warm_first"
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path[2:-1], hooks.First, sys.meta_path[-1]])
    assert sys.meta_path[-1] is importlib.machinery.PathFinder
    assert await value(first, start=start) == "warm_first"


@pytest.mark.parametrize("start", STARTS)
async def test_a_hook_that_is_a_method_of_a_class(start: Any, modules: Path, monkeypatch: Any) -> None:
    """As that of setuptools for what is installed to be edited."""
    (modules / "warm_hooks.py").write_text(HOOKS)
    hooks = importlib.import_module("warm_hooks")
    monkeypatch.setattr(sys, "path_hooks", [hooks.First.of_path, *sys.path_hooks])
    monkeypatch.setattr(sys, "path", ["warm:/", *sys.path])
    assert await value(Function(warm_jobs.attribute_of, "warm_by_path", "found"), start=start) == "warm_by_path"
    assert await value(Function(warm_jobs.path_hooks), start=start) == [one.__name__ for one in sys.path_hooks]


@pytest.mark.parametrize("start", STARTS)
async def test_a_hook_that_cannot_be_had(start: Any, modules: Path, monkeypatch: Any) -> None:
    """Its module is not there, or raises something."""
    gone, bad = modules / "warm_gone.py", modules / "warm_bad.py"
    for one in (gone, bad):
        one.write_text("class Finder:\n    @staticmethod\n    def find_spec(*_): return None\n")
    finder = importlib.import_module("warm_gone").Finder
    gone.unlink()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    assert (await value(Function(warm_jobs.filters), start=start)) is not None
    finder = importlib.import_module("warm_bad").Finder
    bad.write_text("raise ValueError('not twice')")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    if start == "zygote":
        with pytest.raises(SpecError, match="ValueError: not twice") as caught:
            await run(Function(warm_jobs.filters), start=start)
        assert caught.value.field == "hooks for imports"
        assert caught.value.value == ["warm_gone.Finder", "warm_bad.Finder"]
    else:
        (failure,) = (await run(Function(warm_jobs.filters), start=start)).failures
        assert "ValueError: not twice" in str(failure)


# --- arguments ---


@pytest.mark.parametrize("start", STARTS)
async def test_arguments_that_are_no_text(start: Any, monkeypatch: Any) -> None:
    class Text(str):
        __slots__ = ()

    monkeypatch.setattr(sys, "argv", [Path("program"), b"bytes", Text("text"), 7])
    seen = await value(Function(warm_jobs.attribute_of, "sys", "argv"), start=start)
    assert seen == ["program", "bytes", "text", "7"]
