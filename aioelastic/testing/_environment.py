"""A worse place to run in: no room on the disk, a clock that jumps, a PID namespace."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..model.validation import check_whole

UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")


class Unavailable(Exception):
    """This machine or this user cannot have it; `str()` says why. What is tested has not failed: skip, naming it."""


@contextlib.contextmanager
def full_disk(room: int = 16384) -> Iterator[Path]:
    """A directory on a file system of its own (a tmpfs) with `room` bytes, in whole pages: then ENOSPC.

    Args:
        room: bytes, one page at least.

    Raises:
        SpecError: `room` is less than a page.
        Unavailable: it cannot be mounted, which takes CAP_SYS_ADMIN. See `file_limit` for what all users can have.
    """
    check_whole("room", room, resource.getpagesize())
    with tempfile.TemporaryDirectory(prefix="aioelastic-full-") as where:
        _run(["mount", "-t", "tmpfs", "-o", f"size={room}", "aioelastic-full", where])
        try:
            yield Path(where)
        finally:
            subprocess.run(["umount", "--lazy", where], check=True)


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes (RLIMIT_FSIZE, setrlimit(2)): a write beyond it fails with EFBIG.

    It holds for this process, and for what it starts meanwhile. Python ignores SIGXFSZ; a program that does not is
    killed by it.

    Args:
        size: bytes.

    Raises:
        SpecError: `size` is no size.
    """
    check_whole("size", size, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def clock_jump() -> Iterator[ClockJump]:
    """The wall clock may be set in this block: `jump(-3600)`, as by an administrator, NTP, or the end of a suspend.

    Only `time.time()` and `time.time_ns()` of this process are moved: setting the machine's clock would hit everybody,
    and a time namespace has no wall clock of its own (time_namespaces(7)). So the kernel, other processes, and whoever
    has taken `from time import time` before, see no jump. The monotonic clock never jumps; see `VirtualLoop`.
    """
    jump = ClockJump()
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + jump.by
    time.time_ns = lambda: real_ns() + round(jump.by * 1e9)
    try:
        yield jump
    finally:
        time.time, time.time_ns = real, real_ns


class ClockJump:
    """Attributes:
    by: how many seconds the wall clock is ahead of the real one.
    """

    by = 0.0

    def __call__(self, seconds: float) -> None:
        """It jumps that far; back, if negative."""
        self.by += seconds


def pid_namespace() -> tuple[str, ...]:
    """The words to put before a command to run it as PID 1 of a new PID namespace (unshare(1), of util-linux), with a
    /proc of its own. When it ends, the kernel ends all that is left in there.

    Raises:
        Unavailable: this user cannot have one here.
    """
    _run([*UNSHARE, "true"])
    return UNSHARE


def _run(argv: list[str]) -> None:
    try:
        run = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except OSError as exc:
        raise Unavailable(f"{argv[0]}: {exc.strerror}") from exc
    if run.returncode:
        raise Unavailable(run.stderr.strip() or f"{argv[0]} ended with {run.returncode}")
