"""Shared memory that has a name: one directory for each process that makes such, removed when it ends.

The directory is locked (flock(2)) while its process lives: that holds between containers which share a file system but
not their process ids.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
from pathlib import Path

SHM = Path("/dev/shm")
_DIRECTORY = "aioelastic-shares-"

_own: dict[Path, tuple[Path, int]] = {}  # below which → the directory and its lock


def sweep(below: Path = SHM) -> list[Path]:
    """Remove those of processes that are gone, who were killed before they could; returns what could not be removed."""
    stay = []
    for old in below.glob(f"{_DIRECTORY}*"):
        try:
            lock = locked(old)
        except OSError:
            continue  # in use, gone meanwhile, or another user's
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)
        if old.exists():
            stay.append(old)
    return stay


def own_directory(below: Path) -> str:
    """That of this process, made if need be.

    Raises:
        OSError: it cannot be made.
    """
    if below not in _own:
        sweep(below)
        me = os.getpid()
        fresh = below / f".{_DIRECTORY}{me}-{os.urandom(4).hex()}"
        fresh.mkdir(mode=0o700)
        lock = locked(fresh)
        own = fresh.with_name(fresh.name[1:])  # by that name it is found, and is locked
        fresh.rename(own)
        _own[below] = own, lock
        atexit.unregister(_leave)
        atexit.register(_leave)  # a worker that was forked has forgotten what was registered before
    return str(_own[below][0])


def leave_empty() -> None:
    """Remove those of this process that hold nothing."""
    for below, (own, lock) in list(_own.items()):
        try:
            own.rmdir()
        except OSError:
            continue  # an array is still there
        os.close(lock)
        del _own[below]


def _leave() -> None:
    for own, _ in _own.values():
        shutil.rmtree(own, ignore_errors=True)


def forget() -> None:
    """This is a forked copy: they are its parent's, whose lock does not end with this descriptor."""
    for _, lock in _own.values():
        os.close(lock)
    _own.clear()


def locked(directory: Path) -> int:
    """A descriptor that holds its lock. Raises `OSError`, also when somebody else has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
