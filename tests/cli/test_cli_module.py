"""`aioelastic run -m package.module:function`, and `-m package.module` as `python -m` runs it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import HOUSE, run

SOURCE = """
import os, sys
from functools import partial
import aioelastic

def show(*args):
    print("args", args)
    return [*args, aioelastic.rank()]

def long(*args):
    return "x" * 10_000

def nothing(*args):
    pass

async def later(*args):
    return "async"

def fails(*args):
    raise ValueError("not today")

def leaves(code):
    sys.exit(int(code))

def cwd():
    return os.getcwd()

def variable(name):
    return os.environ.get(name)

def loaded(name):
    return name in sys.modules

class Tools:
    @staticmethod
    def tool():
        return "tool"

class Opaque:
    def __repr__(self):
        raise RuntimeError("no")

def opaque():
    return Opaque()

doubled = partial(show, "twice")
CONSTANT = 3
print("imported by", "a worker" if "AIOELASTIC_RANK" in os.environ else "somebody else")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Any) -> Path:
    """A directory with modules, which is the current one."""
    here = tmp_path / "home"
    (here / "package").mkdir(parents=True)
    (here / "package" / "__init__.py").write_text("")
    (here / "package" / "jobs.py").write_text(SOURCE)
    (here / "package" / "broken.py").write_text("def f(:\n")
    (here / "package" / "raises.py").write_text("raise RuntimeError('while imported')\ndef f(): pass\n")
    (here / "package" / "dynamic.py").write_text("def __getattr__(name):\n    raise AttributeError(name)\n")
    (here / "package" / "starred.py").write_text("from package.jobs import *\n")
    (here / "space" / "inner").mkdir(parents=True)
    (here / "space" / "inner" / "deep.py").write_text("def f():\n    return 'deep'\n")
    # in one piece: with PYTHONUNBUFFERED, print() is several, and a worker may be stopped between them
    main = 'import sys\nsys.stdout.write(f"{__name__} {sys.argv[1:]}\\n")\nraise SystemExit(3)\n'
    (here / "main.py").write_text(main)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(HOUSE))
    return here


START = ["--start", "zygote"], ["--start", "spawn"], ["--start", "fork"], []


@pytest.mark.parametrize("start", START, ids=[" ".join(one) or "default" for one in START])
def test_a_function_with_arguments(home: Path, start: list[str]) -> None:
    done = run("-n", "2", *start, "-m", "package.jobs:show", "--lr", "0.1", "-n", "-m", "--tee")
    assert done.returncode == 0, done.stderr
    out = [line for line in done.stdout.splitlines() if "args" in line]
    assert sorted(out) == [f"[worker{rank}]: args ('--lr', '0.1', '-n', '-m', '--tee')" for rank in (0, 1)]
    table = done.stderr.splitlines()[1:]
    assert table[0].split()[-1] == "value"
    assert [row.partition("MiB")[2].split("s ", 1)[1].strip() for row in table[1:3]] == [
        f"['--lr', '0.1', '-n', '-m', '--tee', {rank}]" for rank in (0, 1)
    ]


def test_it_is_imported_in_the_worker_alone(home: Path) -> None:
    done = run("-n", "2", "-m", "package.jobs:nothing")
    assert "somebody else" not in done.stdout + done.stderr
    assert done.stdout.count("imported by a worker") == 2


def test_values_are_shown_only_where_there_are_some(home: Path) -> None:
    assert "value" not in run("-m", "package.jobs:nothing").stderr
    assert "async" in run("-m", "package.jobs:later").stderr.splitlines()[2]
    (row,) = [line for line in run("-m", "package.jobs:long").stderr.splitlines() if "xxx" in line]
    assert len(row) < 200
    assert "<Opaque instance at" in run("-m", "package.jobs:opaque").stderr


@pytest.mark.parametrize(
    "name", ["package.jobs:Tools.tool", "space.inner.deep:f", "package.starred:show", "package.jobs:doubled"]
)
def test_other_names(home: Path, name: str) -> None:
    done = run("-m", name)
    assert done.returncode == 0, done.stderr


def test_a_first_double_dash_is_left_out(home: Path) -> None:
    done = run("-m", "package.jobs:show", "--", "a", "--", "b")
    assert "args ('a', '--', 'b')" in done.stdout
    done = run("-mpackage.jobs:show", "--", "a", "--", "b")
    assert "args ('a', '--', 'b')" in done.stdout


def test_exit_status(home: Path) -> None:
    done = run("-n", "2", "-m", "package.jobs:fails")
    assert done.returncode == 1
    assert "raised ValueError: not today" in done.stderr
    assert "in fails\n" in done.stderr
    assert "_named.py" not in done.stderr
    assert run("-m", "package.jobs:leaves", "7").returncode == 7
    assert "_named.py" not in run("--start", "fork", "-m", "package.jobs:fails").stderr


def test_preload(home: Path) -> None:
    done = run("--preload", "colorsys,html.parser", "--preload", "wave", "-m", "package.jobs:loaded", "html.parser")
    assert "True" in done.stderr
    assert "True" in run("--preload", "wave,colorsys", "-m", "package.jobs:loaded", "wave").stderr
    assert "False" in run("-m", "package.jobs:loaded", "wave").stderr


def test_cwd_and_env(home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "there.py").write_text("def f():\n    return 'there'\n")
    (elsewhere / "script.py").write_text("print('script', __name__)\n")
    assert "'there'" in run("--cwd", str(elsewhere), "-m", "there:f").stderr
    assert run("--cwd", str(elsewhere), "--prefix", "", "-m", "script").stdout == "script __main__\n"
    path = ["--env", f"PYTHONPATH={elsewhere}{os.pathsep}{os.environ['PYTHONPATH']}"]
    assert "'there'" in run(*path, "-m", "there:f").stderr
    assert run(*path, "--prefix", "", "-m", "script").stdout == "script __main__\n"
    assert "'yes'" in run("--env", "MINE=yes", "-m", "package.jobs:variable", "MINE").stderr


def test_a_module_runs_as_python_would_run_it(home: Path) -> None:
    done = run("-n", "2", "--prefix", "", "-m", "main", "-n", "5")
    assert set(done.stdout.splitlines()) == {"__main__ ['-n', '5']"}
    assert done.returncode == 3


def test_dry_run(home: Path) -> None:
    done = run("-n", "2", "--dry-run", "--preload", "json,wave", "-m", "package.jobs:show", "--lr", "0.1")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "rank 1: function package.jobs:show('--lr', '0.1'), forked by a zygote" in done.stdout
    assert "preload: json, wave" in done.stdout
    assert "imported by" not in done.stdout
    done = run("--dry-run", "--start", "spawn", "-m", "package.jobs:show")
    assert "in a fresh interpreter" in done.stdout
    done = run("--dry-run", "-m", "main", "-x")
    assert re.search(r"rank 0: \S+ -m main -x$", done.stdout, re.MULTILINE)
    assert os.path.basename(sys.executable) in done.stdout


WRONG: list[tuple[list[str], list[str]]] = [
    (["-m"], ["-m=", "names no module"]),
    (["-m", ""], ["-m=", "names no module"]),
    (["-m", ":f"], ["-m=':f'", "names no module"]),
    (["-m", "package.jobs:"], ["-m='package.jobs:'", "names no function"]),
    (["-m", "absent:f"], ["-m='absent:f'", "no module 'absent'", "current directory"]),
    (["-m", "absent"], ["-m='absent'", "no module 'absent'"]),
    (["-m", "package.absent:f"], ["-m='package.absent:f'", "no module 'package.absent'"]),
    (["-m", "package.jobs.deeper:f"], ["no module 'package.jobs.deeper'"]),
    (["-m", "main.py"], ["-m='main.py'", "no module 'main.py'", "without .py"]),
    (["-m", "package/jobs.py:show"], ["without .py"]),
    (["-m", "package.jobs:shwo"], ["-m='package.jobs:shwo'", "names nothing in package.jobs", "show"]),
    (["-m", "package.jobs:xyz"], ["names nothing in package.jobs", "show"]),
    (["-m", "package.broken:f"], ["-m='package.broken:f'", "SyntaxError"]),
    (["-m", "package.dynamic:f"], ["-m='package.dynamic:f'", "names nothing in package.dynamic"]),
    (["-n", "3", "-m", "package.jobs:Tools.absent"], ["-m='package.jobs:Tools.absent'", "names nothing"]),
    (["-m", "package.jobs:CONSTANT"], ["-m='package.jobs:CONSTANT'", "cannot be called"]),
    (["-m", "package"], ["-m='package'", "__main__"]),
    (["--preload", "json", "--", "true"], ["--preload", "-m"]),
    (["--preload", "json", "-m", "main"], ["--preload", "function"]),
    (["--start", "spawn", "--", "true"], ["--start", "-m"]),
    (["--start", "spawn", "-m", "main"], ["--start", "function"]),
    (["--start", "never", "-m", "package.jobs:show"], ["--start", "zygote"]),
    (["--start", "spawn", "--preload", "json", "-m", "package.jobs:show"], ["preload", "zygote"]),
    (["--preload", "absent_module", "-m", "package.jobs:show"], ["preload", "absent_module"]),
    (["--preload", ",", "-m", "package.jobs:show"], ["preload"]),
]


@pytest.mark.parametrize(("args", "told"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_wrong_usage_is_one_error(home: Path, args: list[str], told: list[str]) -> None:
    """Status 2, one message that names field, value and remedy, whether it was found before the start or after."""
    done = run(*args)
    assert done.returncode == 2, done.stderr
    for one in told:
        assert one in done.stderr
    assert "Traceback" not in done.stderr or "--preload" in args
    assert sum(line.startswith("aioelastic run: ") for line in done.stderr.splitlines()) == 1


def test_a_module_that_raises_tells_its_traceback(home: Path) -> None:
    done = run("-m", "package.raises:f")
    assert done.returncode == 1
    assert "RuntimeError: while imported" in done.stderr
    assert "raises.py" in done.stderr


def test_what_a_package_opens_as_it_is_imported_is_written(home: Path, tmp_path: Path) -> None:
    (home / "opens").mkdir()
    (home / "opens" / "__init__.py").write_text(f"file = open({str(tmp_path / 'file')!r}, 'a'); file.write('all')")
    assert run("-m", "opens.made:f", cwd=home).returncode == 2
    assert (tmp_path / "file").read_text() == "all"
