"""Functions that live in the caller's main module: a script, `-m`, `-c`, a notebook."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from aioelastic.child.wire import messages
from aioelastic.launch import decoded

SCRIPT = """
import asyncio
from dataclasses import dataclass
from aioelastic import Function, Logs, Std, supervise

@dataclass
class Point:
    x: int

class Mine(Exception):
    pass

def work(point):
    if point.x == 13:
        raise Mine("unlucky")
    return Point(point.x + 1)

def main():
    result = asyncio.run(supervise(Function(work, Point(4)), 2, start=START, logs=Logs(tee=Std.NONE)))
    print([one.value for one in result], isinstance(result[0].value, Point))
    result = asyncio.run(supervise(Function(work, Point(13)), check=False, start=START, logs=Logs(tee=Std.NONE)))
    print(type(result.first_failure.exception.exception) is Mine)
"""
GUARD = 'if __name__ == "__main__":\n    main()\n'
OUT = "[Point(x=5), Point(x=5)] True\nTrue\n"
STARTS = ["zygote", "spawn", "fork"]


def python(*argv: str, cwd: Path | None = None, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=150, input=given)


@pytest.mark.parametrize("start", STARTS)
def test_a_script(start: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("START", repr(start)) + GUARD)
    done = python("script.py", cwd=tmp_path)
    assert done.stdout == OUT, done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_a_module_of_a_package(start: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "tool.py").write_text(SCRIPT.replace("START", repr(start)) + GUARD)
    done = python("-m", "package.tool", cwd=tmp_path)
    assert done.stdout == OUT, done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_code_that_cannot_be_imported_goes_by_value(start: str, tmp_path: Path) -> None:
    done = python("-c", SCRIPT.replace("START", repr(start)) + "main()\n", cwd=tmp_path)
    assert done.stdout == OUT, done.stderr
    done = python("-", cwd=tmp_path, given=SCRIPT.replace("START", repr(start)) + "main()\n")
    assert done.stdout == OUT, done.stderr


def test_without_cloudpickle_that_is_an_error(tmp_path: Path) -> None:
    script = "import sys; sys.modules['cloudpickle'] = None\n" + SCRIPT.replace("START", "'zygote'") + "main()\n"
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 1
    assert "install cloudpickle" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("start", ["zygote", "spawn"])
def test_a_script_without_a_guard_is_told_so(start: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("START", repr(start)) + "main()\n")
    done = python("script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert 'below if __name__ == "__main__"' in done.stderr
    assert done.stdout == ""


def test_a_preload_may_import_multiprocessing(tmp_path: Path) -> None:
    start = "'zygote', preload=['multiprocessing']"
    (tmp_path / "script.py").write_text(SCRIPT.replace("START", start) + GUARD)
    done = python("script.py", cwd=tmp_path)
    assert done.stdout == OUT, done.stderr


def test_what_says_no_module_is_found_by_the_name_that_a_worker_has_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec("def nameless(): pass", names)
    theirs = types.ModuleType("__mp_main__")
    theirs.nameless = names["nameless"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__mp_main__", theirs)
    packet, fds = messages.encode(messages.VALUE, (names["nameless"],))
    monkeypatch.delitem(sys.modules, "__mp_main__")
    monkeypatch.setattr(sys.modules["__main__"], "nameless", abs, raising=False)
    assert decoded(packet, fds) is abs
