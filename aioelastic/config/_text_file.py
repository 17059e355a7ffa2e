"""A file of text, read whole, within bounds: its lines that say something."""

from __future__ import annotations

import os
from typing import Any

from ..model.errors import SpecError, refusal
from ..model.validation import check_path

MOST = 2**20  # bytes; a file that is longer is something else


def read_lines(field: str, path: Any, remedy: str) -> list[tuple[int, str]]:
    """Its lines, each with its number from 1, without the space around them; not those that are empty or begin with
    `#`. Bytes that are not UTF-8 are kept, as `os.fsdecode` keeps them.

    Raises:
        SpecError: it cannot be read, or is too long; of that field.
    """
    name = check_path(field, path)
    try:
        with open(name, "rb") as file:
            data = file.read(MOST + 1)
    except OSError as exc:
        raise SpecError(field, name, f"cannot be read: {exc.strerror or refusal(exc)}", remedy) from None
    if len(data) > MOST:
        raise SpecError(field, name, f"is longer than {MOST:,} bytes", remedy)
    text = data.decode("utf-8-sig", "surrogateescape")
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def place(path: str | os.PathLike[str], line: int) -> str:
    """Where something stands, as compilers say it."""
    return f"{os.fspath(path)}:{line}"
