"""Words on standard output or error, all of them: those may be non-blocking (a parent written in Node), or keep
messages apart, and what does not arrive is to be known here and not at the interpreter's end."""

from __future__ import annotations

import contextlib
import io
import os
import select
from collections.abc import Callable
from functools import partial
from typing import TextIO, TypeVar

from ..system.descriptors import shut

T = TypeVar("T")

PIECE = 8192  # bytes: what keeps messages apart takes so much


def put(stream: TextIO | None, text: str) -> OSError | None:
    """Write it, however long that takes. Returns why it could not be."""
    if stream is None:
        return None
    try:
        fd = stream.fileno()
    except (OSError, ValueError, io.UnsupportedOperation, AttributeError):
        fd = -1
    try:
        if fd < 0:  # an object in its place
            stream.write(text)
            stream.flush()
            return None
        with contextlib.suppress(ValueError):  # closed
            _patiently(fd, stream.flush)
        rest = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))
        while rest:
            rest = rest[_patiently(fd, partial(os.write, fd, rest[:PIECE])) :]
    except ValueError:
        pass  # closed: the exit status still tells
    except OSError as exc:
        if fd >= 0:  # what is buffered must go somewhere, or Python exits with 120
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            shut(null)
        return exc
    return None


def _patiently(fd: int, write: Callable[[], T]) -> T:
    while True:
        try:
            return write()
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
