"""Files that others are to find, shared memory that has a name and error files: one directory for each process that
makes such, removed when it ends.

The directory is locked (flock(2)) while its process lives: that holds between containers which share a file system but
not their process ids. Imports little: the guardian sweeps, too, while who has started it waits for its end.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
from _thread import RLock

from .descriptors import shut

SHM = "/dev/shm"
_DIRECTORY = "aioelastic-shares-"
_TRIES = 100  # to make one that no other process sweeps away
_DIRECTORY_ONLY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # others may put links into /dev/shm

_lock = RLock()  # a signal's handler may come in between
# guarded by it
_own: dict[str, tuple[str, int]] = {}  # below which → the directory and its lock
_held: dict[str, int] = {}  # below which → how many keep it, though it be empty


def sweep(below: str = SHM) -> list[str]:
    """Remove those of processes that are gone, who were killed before they could; returns what could not be removed."""
    stay = []
    try:
        names = os.listdir(below)
    except OSError:
        names = []
    for name in names:
        old = os.path.join(below, name)
        if not name.startswith(_DIRECTORY):
            continue
        try:
            lock = locked(old)
        except OSError:
            continue  # in use, gone meanwhile, or another user's
        remove(old)
        shut(lock)
        if os.path.exists(old):
            stay.append(old)
    return stay


def contents(fd: int, size: int) -> memoryview:
    """So many bytes of a file, which has them, in memory of this process."""
    whole, at = memoryview(bytearray(size)), 0
    while at < size:
        at += os.preadv(fd, [whole[at:]], at)
    return whole


def check_fixed(fd: int) -> os.stat_result:
    """What a file is that another process has sent to be mapped: one that nobody can cut off meanwhile, which would end
    whoever reads there by SIGBUS. That is a memfd that is sealed so, or a file that this user or root has made here.

    Raises:
        ValueError: it is neither.
    """
    about = os.fstat(fd)
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return about
    except OSError:
        pass  # a file system without seals
    if about.st_uid in (os.geteuid(), 0):
        home, _ = os.path.split(os.readlink(f"/proc/self/fd/{fd}"))
        if os.path.basename(home).startswith(_DIRECTORY):
            return about
    raise ValueError("memory that whoever sent it could cut off while it is read: it is not sealed (F_SEAL_SHRINK)")


def has_left(below: str, pid: int) -> bool:
    """Whether a directory is there of the process that had this pid."""
    try:
        return any(name.startswith(f"{_DIRECTORY}{pid}-") for name in os.listdir(below))
    except OSError:
        return False


def own_directory(below: str, hold: bool = False, again: bool = False) -> str:
    """That of this process, made if need be.

    Args:
        hold: keep it, though it be empty, until `let_go`.
        again: make a new one, if the one that there was has been removed by somebody (systemd's RemoveIPC, tmpreaper).

    Raises:
        OSError: it cannot be made.
    """
    below = os.path.abspath(below)
    with _lock:
        if again and below in _own and not os.path.isdir(_own[below][0]):
            shut(_own.pop(below)[1])
        if below not in _own:
            _own[below] = _make(below)
            atexit.unregister(_leave)
            atexit.register(_leave)  # a worker that was forked has forgotten what was registered before
        if hold:
            _held[below] = _held.get(below, 0) + 1
        return _own[below][0]


def let_go(below: str) -> None:
    """Undo one `hold`."""
    below = os.path.abspath(below)
    with _lock:
        _held[below] -= 1
        if not _held[below]:
            del _held[below]
    leave_empty()


def leave_empty() -> None:
    """Remove those of this process that hold nothing."""
    with _lock:
        for below, (own, lock) in list(_own.items()):
            if below in _held:
                continue
            try:
                os.rmdir(own)
            except FileNotFoundError:
                pass  # somebody else has removed it
            except OSError:
                continue  # an array is still there
            shut(lock)
            del _own[below]


def _make(below: str) -> tuple[str, int]:
    """A directory there, and its lock."""
    for _ in range(_TRIES):
        sweep(below)
        own = os.path.join(below, f"{_DIRECTORY}{os.getpid()}-{os.urandom(4).hex()}")
        try:
            os.mkdir(own, mode=0o700)
        except OSError as exc:
            raise OSError(exc.errno, os.strerror(exc.errno or 0), below) from None
        try:
            lock = locked(own)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.rmdir(own)
            if isinstance(exc, BlockingIOError | FileNotFoundError):
                continue  # another process sweeps, and took it for a left-over before it was locked
            raise
        if os.path.exists(own):
            return own, lock
        shut(lock)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), below)


def _leave() -> None:
    for own, _ in _own.values():
        remove(own)  # by its name: the program may have closed our descriptor


def remove(directory: str, within: int | None = None) -> None:
    """A directory and what is in it, as far as that can be done: a worker may have put directories there, too."""
    try:
        fd = os.open(directory, _DIRECTORY_ONLY, dir_fd=within)
    except OSError:
        return
    try:
        for name in os.listdir(fd):
            try:
                os.unlink(name, dir_fd=fd)
            except OSError:
                remove(name, fd)
        os.rmdir(directory, dir_fd=within)
    except (OSError, RecursionError):
        pass
    finally:
        shut(fd)


def forget() -> None:
    """This is a forked copy: they are its parent's, whose lock does not end with this descriptor."""
    global _lock
    _lock = RLock()  # another thread of the parent may have had it
    for _, lock in _own.values():
        shut(lock)
    _own.clear()
    _held.clear()


def locked(directory: str | os.PathLike[str]) -> int:
    """A descriptor that holds its lock. Raises `OSError`, also when somebody else has it."""
    fd = os.open(directory, _DIRECTORY_ONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        shut(fd)
        raise
    return fd


os.register_at_fork(after_in_child=forget)
