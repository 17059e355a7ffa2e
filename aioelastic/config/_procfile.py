"""Procfiles, as foreman and honcho take them: `name: command`, one process a line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..model.entries import Command
from ..model.errors import SpecError
from ._text_file import place, read_lines

SHELL = "/bin/sh"
NAME = "[A-Za-z0-9_-]{1,200}"  # of a process, as a pattern
_LINE = re.compile(rf"({NAME}):\s*(.*)")
APART = 100  # from the first port of one process to that of the next one
PORT_MAX = 65_535


class Process(NamedTuple):
    """One line of a Procfile.

    Attributes:
        command: for the shell.
        line: where it stands, from 1.
    """

    name: str
    command: str
    line: int


def read_procfile(path: str | os.PathLike[str]) -> tuple[Process, ...]:
    """The processes of a Procfile, in its order. Empty lines and those that begin with `#` are skipped.

    Raises:
        SpecError: it cannot be read, or a line is wrong: `field` begins with the file and the number of the line then.

    Source: https://ddollar.github.io/foreman/#PROCFILE
    """
    remedy = "write lines like `web: python3 serve.py`"
    out: dict[str, Process] = {}
    for number, text in read_lines("Procfile", path, "name another one by -f"):
        where = place(path, number)
        found = _LINE.fullmatch(text)
        if found is None:
            words = "is no `name: command` with a name of letters, digits, - and _"
            raise SpecError(f"{where}: line", text, words, remedy)
        name, command = found.groups()
        field = f"{where}: {name}"
        if not command:
            raise SpecError(field, command, "has no command", remedy)
        if "\0" in command:
            raise SpecError(field, command, "holds a NUL byte", "remove it: execve(2) would cut there")
        if name in out:
            words = f"makes two processes of that name, with line {out[name].line}"
            raise SpecError(field, command, words, "give one of them another name")
        out[name] = Process(name, command, number)
    if not out:
        raise SpecError("Procfile", os.fspath(path), "names no process", remedy)
    return tuple(out.values())


def commands(
    processes: Sequence[Process], counts: Mapping[str, int], port: int, options: Mapping[str, Any] | None = None
) -> list[Command]:
    """What runs them: `sh -c` with PORT and the name of the process, PS (foreman) or HONCHO_PROCESS_NAME.

    Args:
        processes: all of the Procfile: their order gives the ports.
        counts: how many of which run; those left out do not.
        port: the first one. Each process has the next hundred, each of its copies the next one of these.
        options: what each `Command` is given beside.

    Raises:
        SpecError: that would be a port that does not exist.
    """
    out = []
    for at, one in enumerate(processes):
        first, count = port + at * APART, counts.get(one.name, 0)
        if count and first + count - 1 > PORT_MAX:
            words = f"would give {one.name} ports up to {first + count - 1}, and the last one is {PORT_MAX}"
            raise SpecError("--port", port, words, "begin lower, or run fewer")
        for number in range(count):
            called = f"{one.name}.{number + 1}"
            env = {"PORT": str(first + number), "PS": called, "HONCHO_PROCESS_NAME": called}
            out.append(Command(SHELL, "-c", one.command, name=one.name, env=env, **(options or {})))
    return out
