"""Files with variables, as docker, compose and honcho take them (`.env`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..model.errors import SpecError
from ._text_file import place, read_lines

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_.-]*)\s*(?:=(.*))?", re.DOTALL)
_QUOTED = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$"}


def read_env(path: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    r"""The variables that a file sets, for `supervise(env=...)`. Nothing is run or expanded, and no environ is changed.

    One `KEY=VALUE` a line; empty lines and those that begin with `#` are skipped, and so is `export` before a key.
    Space around key and value is dropped; ` #` behind a value begins a comment. In single quotes all stands for itself;
    in double quotes ``\n``, ``\r``, ``\t``, ``\"``, ``\\`` and ``\$`` are what they are elsewhere. Without quotes a
    backslash, a quote in the middle and `$` stand for themselves. A key without `=` takes the caller's value. The last
    of several wins.

    Args:
        path: of the file: UTF-8, at most 1 MiB.
        environ: the caller's variables; `os.environ` when not given.

    Raises:
        SpecError: it cannot be read, or a line is none of these: its `field` begins with the file and the number of the
            line. Values are not shown.

    Example::

        await supervise(Command("serve"), n=2, env=read_env(".env"))

    Source: https://docs.docker.com/reference/cli/docker/container/run/#env
    """
    caller = os.environ if environ is None else environ
    out: dict[str, str] = {}
    for number, text in read_lines("env file", path, "name a file of KEY=VALUE lines"):
        where = place(path, number)
        found = _LINE.fullmatch(text)
        if found is None:
            raise SpecError(f"{where}: line", _hidden(text), "is no KEY=VALUE", "write that, or # before a comment")
        key, value = found[1], found[2]
        if value is not None:
            out[key] = _value(f"{where}: {key}", value)
        elif key in caller:
            out[key] = caller[key]
        elif not (key.isupper() or key.islower()):  # maybe a line of a wrapped key, and no name
            problem = "is no KEY=VALUE, nor a variable that the caller has"
            raise SpecError(f"{where}: line", _hidden(text), problem, "write KEY=VALUE, all of it in one line")
        else:
            raise SpecError(f"{where}: {key}", "", "is not in the caller's environment", f"write {key}=VALUE")
    return out


def _value(field: str, given: str) -> str:
    text = given.strip()
    if "\0" in text:
        raise SpecError(field, _hidden(text), "holds a NUL byte", "remove it: execve(2) would cut there")
    if not text.startswith(("'", '"')):
        return re.sub(r"\s#.*", "", given, flags=re.DOTALL).strip()
    quoted = _QUOTED.match(text)
    if quoted is None:
        remedy = "close it, or leave it out; a line's end is \\n in double quotes"
        raise SpecError(field, _hidden(text), "has a quote that is not closed on its line", remedy)
    rest = text[quoted.end() :].lstrip()
    if rest and not rest.startswith("#"):
        raise SpecError(field, _hidden(text), "has text behind its quotes", "put all of it in quotes, or nothing")
    if quoted[1] is not None:
        return quoted[1]
    return re.sub(r"\\(.)", lambda one: _ESCAPED.get(one[1], one[0]), quoted[2], flags=re.DOTALL)


def _hidden(text: str) -> str:
    return f"{len(text)} characters"  # it may be a secret
