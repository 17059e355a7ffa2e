"""Procfiles: what their lines mean, how many of each process there are, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from aioelastic import SpecError
from aioelastic.config import commands, read_procfile

GIVEN = """\
# an application
web: python3 serve.py --port $PORT  # for the shell

  # indented
worker-2_x:echo 'a: b'\r
clock:   true
"""


def written(home: Path, text: str) -> str:
    (home / "Procfile").write_text(text, newline="")
    return str(home / "Procfile")


def test_lines(tmp_path: Path) -> None:
    assert [tuple(one) for one in read_procfile(written(tmp_path, GIVEN))] == [
        ("web", "python3 serve.py --port $PORT  # for the shell", 2),
        ("worker-2_x", "echo 'a: b'", 5),
        ("clock", "true", 6),
    ]


def test_commands(tmp_path: Path) -> None:
    """As foreman has it: the port of a process does not depend on which others run."""
    processes = read_procfile(written(tmp_path, "a: A\nb: B\nc: C\n"))
    made = commands(processes, {"b": 2, "c": 1}, 5000)
    assert [(one.name, one.argv, one.env["PORT"], one.env["PS"]) for one in made] == [
        ("b", ("/bin/sh", "-c", "B"), "5100", "b.1"),
        ("b", ("/bin/sh", "-c", "B"), "5101", "b.2"),
        ("c", ("/bin/sh", "-c", "C"), "5200", "c.1"),
    ]
    assert all(one.env["HONCHO_PROCESS_NAME"] == one.env["PS"] for one in made)


WRONG = [
    ("a: A\na: B\n", ":2: a=", "two processes"),
    ("a: A\nb b: B\n", ":2: line=", "name: command"),
    ("a: A\nb/c: B\n", ":2: line=", "name: command"),
    ("a: A\n\n  continued\n", ":3: line=", "name: command"),
    ("a: A\n: B\n", ":2: line=", "name: command"),
    ("a: A\nb:\n", ":2: b=", "no command"),
    ("a: A\nb: x\0y\n", ":2: b=", "a NUL byte"),
    (f"{'n' * 201}: A\n", ":1: line=", "name: command"),
]


@pytest.mark.parametrize(("text", "field", "words"), WRONG)
def test_what_is_wrong(text: str, field: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read_procfile(path)
    assert str(caught.value).startswith(f"{path}{field}")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n# nothing\n", None])
def test_no_process_at_all(text: str | None, tmp_path: Path) -> None:
    path = str(tmp_path / "Procfile") if text is None else written(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read_procfile(path)
    assert (caught.value.field, caught.value.value) == ("Procfile", path)


def test_ports_end(tmp_path: Path) -> None:
    processes = read_procfile(written(tmp_path, "a: A\nb: B\n"))
    assert commands(processes, {"b": 1}, 65_435)[0].env["PORT"] == "65535"
    with pytest.raises(SpecError, match="65535"):
        commands(processes, {"b": 2}, 65_435)
