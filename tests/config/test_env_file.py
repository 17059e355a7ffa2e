"""Files with variables: what each kind of line means, and one error with file and line for what means nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aioelastic import Command, SpecError, read_env, supervise

# (a line, what it gives to X)
VALUES = [
    ("X=1", "1"),
    ("  X = 1  ", "1"),
    ("export X=1", "1"),
    ("X=", ""),
    ("X=a b", "a b"),
    ("X=a=b", "a=b"),
    ("X=a # no", "a"),
    ("X= # no", ""),
    ("X=a#b", "a#b"),
    ("X=#b", "#b"),
    ("X='a # b'  # no", "a # b"),
    ("X='a\\n$HOME\"'", 'a\\n$HOME"'),
    ('X="a # b" # no', "a # b"),
    (r'X="a\n\t\r\"\\\$\x"', 'a\n\t\r"\\$\\x'),
    ('X=""', ""),
    ("X=it's", "it's"),
    ('X={"a": 1}', '{"a": 1}'),
    ("X=a\\nb", "a\\nb"),
    ("X=$HOME ${HOME} `id` $(id)", "$HOME ${HOME} `id` $(id)"),
    ('X="$HOME"', "$HOME"),
    ("X=1\nX=2", "2"),
    ("X=1\r\nY=2\r\n", "1"),
    ("\ufeffX=1", "1"),
    ("X=\u00e4\u2028\x85", "\u00e4"),
    ("X", "the caller's"),
    ("export X", "the caller's"),
]


@pytest.mark.parametrize(("line", "value"), VALUES)
def test_values(line: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(f"{line}\n# a comment\n\n  # another\n".encode())
    assert read_env(file, {"X": "the caller's", "HOME": "/"})["X"] == value


def test_names(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("A=1\n_b.c-D=2\nexport = 3")
    assert read_env(file) == {"A": "1", "_b.c-D": "2", "export": "3"}


async def test_bytes_that_are_no_text_arrive(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"X=\xff\xfe")
    result = await supervise(Command("sh", "-c", 'printf %s "$X"'), env=read_env(file))
    assert result[0].stdout.tail == b"\xff\xfe"


# (the second line of the file, what is said of it)
WRONG = [
    ("X='secret", "X=", "a quote that is not closed on its line"),
    ('X="secret\\"', "X=", "a quote that is not closed on its line"),
    ("X='sec'ret", "X=", "text behind its quotes"),
    ('X="sec" "ret"', "X=", "text behind its quotes"),
    ("X=sec\0ret", "X=", "a NUL byte"),
    ("1X=secret", "line=", "no KEY=VALUE"),
    ("=secret", "line=", "no KEY=VALUE"),
    ("X secret", "line=", "no KEY=VALUE"),
    ("X Y=secret", "line=", "no KEY=VALUE"),
    ("export", "export=", "not in the caller's environment"),
    ("MIIEsecretv9", "line='12 characters'", "no KEY=VALUE, nor a variable that the caller has"),  # of a key, wrapped
    ("NOBODY_HAS_THIS", "NOBODY_HAS_THIS=", "not in the caller's environment"),
]


@pytest.mark.parametrize(("line", "field", "words"), WRONG)
def test_what_is_wrong(line: str, field: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the line, and nothing of a value, which may be a secret."""
    monkeypatch.chdir(tmp_path)
    Path("my.env").write_text(f"A=1\n{line}\nB=2\n")
    with pytest.raises(SpecError) as caught:
        read_env("my.env")
    assert str(caught.value).startswith(f"my.env:2: {field}")
    assert words in str(caught.value)
    assert "ret" not in str(caught.value)
    assert caught.value.status == 2


@pytest.mark.parametrize("kind", ["missing", "directory", "endless", "empty", "number"])
def test_files_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    given = {"missing": tmp_path / "no", "directory": tmp_path, "endless": "/dev/zero", "empty": "", "number": 5}[kind]
    with pytest.raises(SpecError) as caught:
        read_env(given)  # type: ignore[arg-type]
    assert caught.value.field == "env file"
    assert caught.value.value == (os.fspath(given) if isinstance(given, Path) else given)
