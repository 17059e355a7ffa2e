"""The bounded reader: what strangers have written is read within limits of bytes, and on a loop of time.

Whoever reads what another process can make longer (files of /proc, error files, the kernel's log, pipes, channels) does
it by one of these. Nothing is read whole before its length is known to be bounded, nothing is waited for: a FIFO in a
file's place is empty, a terminal does not become ours.
"""

from __future__ import annotations

import os
import time

from ...system.descriptors import shut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 65_536  # bytes of one read
_HOW = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def slurp(path: str, size: int = 4096) -> bytes:
    """What is in it, at most `size` bytes, by one read, which is one moment; b"" when it is gone or may not be read.

    For files of /proc that the kernel makes in one piece: `open` would take several reads, and ten times as long.
    """
    try:
        # files of /proc never make anybody wait; so marked, those who look for calls that block see that too
        fd = os.open(path, _HOW)
    except OSError:
        return b""
    try:
        return os.read(fd, size)
    except OSError:
        return b""
    finally:
        shut(fd)


def blocks(path: str, most: int, first: int | None = None) -> Iterator[bytes]:
    """What is in it, piece by piece, up to `most` bytes, by `first` at first; it ends where it cannot be read.

    Raises:
        OSError: it cannot be opened.
    """
    fd, size = os.open(path, _HOW), first or BLOCK
    try:
        while most > 0:
            try:
                data = os.read(fd, min(size, most))
            except OSError:
                return
            if not data:
                return
            most, size = most - len(data), BLOCK
            yield data
    finally:
        shut(fd)


def upto(fd: int, most: int) -> bytes:
    """What is in an open file from its offset on, at most `most` bytes. Raises `OSError`."""
    found = bytearray()
    while len(found) < most and (data := os.read(fd, min(BLOCK, most - len(found)))):
        found += data
    return bytes(found)


def lines(path: str, most: int) -> Iterator[bytes]:
    """The lines of it, within the first `most` bytes, without their ends. One longer than `BLOCK` is left out.

    Raises:
        OSError: it cannot be opened.
    """
    rest, long = b"", False
    for data in blocks(path, most):
        first, *more = data.split(b"\n")
        rest += first
        for line in more:
            if not long:
                yield rest
            rest, long = line, False
        if len(rest) > BLOCK:
            rest, long = b"", True
    if rest and not long:
        yield rest


def variable(path: str, name: bytes, most: int, size: int) -> bytes | None:
    """The value of the first variable of that name in an environment (/proc/PID/environ): its first `size` bytes.

    Args:
        most: bytes of the environment that are looked through.
    """
    start = b"\0" + name + b"="
    kept = b"\0"
    try:
        for data in blocks(path, most):
            kept += data
            at = kept.find(start)
            if at < 0:
                kept = kept[1 - len(start) :]
                continue
            value = kept[at + len(start) :]
            end = value.find(b"\0")
            if end >= 0 or len(value) >= size:
                return value[: min(size, end if end >= 0 else size)]
            kept = kept[at:]
    except OSError:
        return None
    return kept[len(start) :] if kept.startswith(start) else None


def turn(read: Callable[[], int], size: int, seconds: float) -> int:
    """Call `read`, which tells how many bytes it has read, or -1 for none, until it has `size`, or the time is over.

    Returns:
        how many of `size` are left to another turn; 0 when there is nothing more to be read.
    """
    until = time.monotonic() + seconds
    while size > 0:
        got = read()
        if got < 0:
            return 0
        size -= got
        if time.monotonic() > until:
            break
    return max(size, 0)
