"""Segments: memory that several processes map, known by a file descriptor, and who holds it.

The kernel keeps the books. Whoever holds a segment does so by an open file description of its own with a shared
flock(2) on it: a process, by its descriptor and its mapping; a message that is under way, by the descriptor in it. The
lock ends when the last of them is gone, however that came about: a view that died, a message that nobody ever read, a
process that was killed. The owner may use a segment again when it can have the lock for itself. So nothing has to be
counted, told or cleaned up, and `/proc/locks` lists all leases.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import functools
import itertools
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from ..shm import check_fixed
from ._errors import ShareLimit, ShareLost

PAGE = os.sysconf("SC_PAGE_SIZE")
NAME = "aioelastic"  # of memfds, as /proc/PID/maps shows them: /memfd:aioelastic-PID-NUMBER
PLACES = f"{NAME}-places"  # that of the places of a queue
_MADE = re.compile(rf"{NAME}-(\d+)-\d")
_HUGE = 2 << 20
_HIGH = 64  # descriptors from here on are nobody's
_PROT, _SHARED = 3, 1
_MADV_HUGEPAGE = 14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_numbers = itertools.count()


class Gate:
    """The lock of the tables below. What finalizers want done is done when it is free.

    A finalizer may run at any time, in any thread, also in one that holds the lock: it never waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._later: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        while True:
            self._drain()
            self._lock.release()
            if not self._later or not self._lock.acquire(blocking=False):
                return

    def soon(self, work: Callable[[], None]) -> None:
        """Now, or when the lock is released."""
        self._later.append(work)
        if self._lock.acquire(blocking=False):
            self.__exit__(None, None, None)

    def _drain(self) -> None:
        while self._later:
            self._later.popleft()()


gate = Gate()
# guarded by the gate
_known: dict[tuple[int, int], Segment] = {}  # by device and inode
_starts: list[int] = []  # where they are mapped, in order
_mapped: list[Segment] = []  # beside it


class Segment:
    """One of them, in this process. Made by `create` or `attach`.

    Attributes:
        where: the memory that it is of: "" for the CPU's.
        key: device and inode: what it is, in any process.
        owned: this process made it, and may use it again.
        loans: parts of it that are in use here.
        on_idle: called, behind the gate, when the last of them has died.
    """

    __slots__ = ("__weakref__", "address", "born", "fd", "key", "loans", "name", "on_idle", "owned", "path", "size")
    where = ""

    def __init__(self, fd: int, size: int, name: str, owned: bool, key: tuple[int, int] | None = None) -> None:
        self.fd = fd
        self.size = size
        self.name = name
        self.owned = owned
        self.key = key or _key(os.fstat(fd))
        self.address = 0
        self.loans = 0
        self.born = time.monotonic()
        self.path: str | None = None
        self.on_idle: Callable[[Segment], None] = _close
        _known[self.key] = self

    def map(self) -> int:
        """Where it is in this process. Raises `ShareLimit`."""
        if not self.address:
            address = _libc.mmap(None, self.size, _PROT, _SHARED, self.fd, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                raise ShareLimit(f"cannot map {self.size} bytes: {os.strerror(ctypes.get_errno())}")
            if self.size >= _HUGE:  # where the system gives them to those who ask
                _libc.madvise(address, self.size, _MADV_HUGEPAGE)
            self.mapped_at(address)
        return self.address

    def mapped_at(self, address: int) -> None:
        """It is there from now on, and found by its addresses. Behind the gate."""
        self.address = address
        at = bisect.bisect(_starts, address)
        _starts.insert(at, address)
        _mapped.insert(at, self)

    def not_mapped(self) -> None:
        """It is not found by its addresses any more. Behind the gate."""
        at = bisect.bisect_left(_starts, self.address)
        while _mapped[at] is not self:
            at += 1  # others may begin at the same address
        del _starts[at], _mapped[at]
        self.address = 0

    def loan(self, offset: int, nbytes: int) -> Any:
        """`nbytes` of it as a ctypes array, which is what all views hold on to. Behind the gate."""
        # `from_address` holds nothing by itself: its finalizer holds the segment
        part = block(nbytes).from_address(self.map() + offset)
        self.loans += 1
        weakref.finalize(part, gate.soon, self._returned).atexit = False
        return part

    def lend(self) -> int:
        """A descriptor for a message: an open file description of its own, whose lock holds the segment."""
        return held(self.fd)

    def beside(self) -> list[int]:
        """What else a message needs to carry it: descriptors that stay ours."""
        return []

    def inherit(self, fd: int) -> None:
        """In a forked copy: it is used by this lease from now on, and belongs to another process."""
        os.close(self.fd)
        self.fd = fd
        self.owned, self.path, self.on_idle = False, None, _close

    def disinherit(self) -> None:
        """In a forked copy: it is not ours, and not used."""
        self.path = None
        self.close()

    def is_free(self) -> bool:
        """Nobody but us holds it. Only for its owner."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        """It is not in use here any more. Behind the gate."""
        if self.fd < 0:
            return
        if _known.get(self.key) is self:
            del _known[self.key]
        if self.address:
            _libc.munmap(self.address, self.size)
            self.not_mapped()
        os.close(self.fd)
        self.fd = -1
        if self.path is not None and self.owned:
            try:
                os.unlink(self.path)
            except OSError:
                pass

    def _returned(self) -> None:
        self.loans -= 1
        if self.loans == 0:
            self.on_idle(self)


def _close(segment: Segment) -> None:
    segment.close()


def held(fd: int) -> int:
    """The same file by a description of its own, with a lease. Raises `ShareLimit`."""
    try:
        mine = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise ShareLimit(f"cannot open a shared segment: {exc}") from exc
    fcntl.flock(mine, fcntl.LOCK_SH)
    return mine


def create(size: int, directory: str | None = None) -> Segment:
    """A new one of this process, zeroed. Behind the gate.

    Args:
        directory: make a file there, which has a name and counts against that file system; else a memfd, which has
            neither.

    Raises:
        ShareLimit: there is no room for it.
    """
    size += -size % PAGE
    name = new_name()
    path = None
    try:
        if directory is None:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            path = os.path.join(directory, name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            # the directory lets nobody else in; who gets a descriptor of it opens it again, as another user too
            os.fchmod(fd, 0o666)
    except OSError as exc:
        raise ShareLimit(f"cannot make a shared segment: {exc}") from exc
    try:
        os.ftruncate(fd, size)
        if path is None:
            # nobody can cut it off under another's feet
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        else:
            os.posix_fallocate(fd, 0, size)  # a full file system says so now, and not by a SIGBUS later
        segment = Segment(fd, size, name, True)
    except OSError as exc:
        os.close(fd)
        if path is not None:
            os.unlink(path)
        raise ShareLimit(f"cannot have {size} bytes of shared memory: {exc}") from exc
    segment.path = path
    return segment


def new_name() -> str:
    """For a segment of this process."""
    return f"{NAME}-{os.getpid()}-{next(_numbers)}"


def named(shown: str) -> str:
    """The name of a file by what a link or a map of proc(5) shows."""
    return os.path.basename(shown.removesuffix(" (deleted)")).removeprefix("memfd:")


def made_by(name: str) -> int | None:
    """The process that has made the segment of this name; None: no segment has such a name."""
    ours = _MADE.match(name)
    return None if ours is None else int(ours[1])


def attach(fd: int) -> Segment:
    """That of a descriptor which came with a message (and stays the caller's). Behind the gate.

    Raises:
        ShareLost: it is none of ours, or was cut off.
    """
    found = _known.get(_key(os.fstat(fd)))
    if found is not None:
        return found
    try:
        stat = check_fixed(fd)
    except ValueError as exc:
        raise ShareLost(str(exc)) from None
    mine = held(fd)  # by this process, in /proc/locks too
    target = os.readlink(f"/proc/self/fd/{mine}")
    name = named(target)
    if made_by(name) is None or not stat.st_size:
        os.close(mine)
        raise ShareLost(f"not a segment of aioelastic's: {target}")
    return Segment(mine, stat.st_size, name, False, _key(stat))


def known(fd: int) -> Segment | None:
    """The one of a descriptor, if this process has it already. Behind the gate."""
    return _known.get(_key(os.fstat(fd)))


def _key(stat: os.stat_result) -> tuple[int, int]:
    """What a file is, in any process."""
    return (stat.st_dev, stat.st_ino)


def find(address: int, nbytes: int = 1) -> Segment | None:
    """The segment in which these bytes lie. Behind the gate."""
    at = bisect.bisect(_starts, address) - 1
    if at >= 0:
        segment = _mapped[at]
        if segment.loans and address + nbytes <= segment.address + segment.size:
            return segment
    return None


def segments() -> Iterator[Segment]:
    """All that this process has, its own and others'."""
    with gate:
        found = list(_known.values())
    return iter(found)


@functools.lru_cache(256)
def block(nbytes: int) -> Any:
    """The type of so many bytes. ctypes forgets it with its last object, and making it takes longer than a send."""
    return ctypes.c_ubyte * nbytes


def view(address: int, nbytes: int, keep: Any) -> memoryview:
    """Memory that `keep` keeps alive, as the view does that."""
    part = block(nbytes).from_address(address)
    part.keep = keep
    return memoryview(part).cast("B")


# --- fork: a copied process may use what it inherits, by leases of its own, and owns nothing ---

_inherited: list[tuple[Segment, int]] = []  # leases for the copy, made before it


def _before_fork() -> None:
    gate._lock.acquire()
    for segment in _known.values():
        if segment.loans:
            try:
                fd = segment.lend()
                # out of the way of those that a worker is given
                _inherited.append((segment, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)))
                os.close(fd)
            except (OSError, ShareLimit):
                pass  # no descriptors left: the fork itself is worth more


def _in_parent() -> None:
    for _, fd in _inherited:
        os.close(fd)
    _inherited.clear()
    gate.__exit__(None, None, None)


def _in_child() -> None:
    gate._later.clear()
    gate._lock = threading.Lock()
    leases = dict(_inherited)
    _inherited.clear()
    for segment in list(_known.values()):
        if segment in leases:
            segment.inherit(leases[segment])
        else:
            segment.disinherit()
    for forget in after_fork:
        forget()
    _let_go()


def _let_go() -> None:
    """In a forked copy: of messages that were under way. Their numbers stay taken: somebody may still close them."""
    try:
        mine = set(descriptors())
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        found = [int(one) for one in os.listdir("/proc/self/fd")]
    except OSError:
        return  # no descriptors left: it holds them as long as it lives
    for fd in found:
        try:
            name = named(os.readlink(f"/proc/self/fd/{fd}"))
            if fd not in mine and (name == PLACES or made_by(name) is not None):
                os.dup2(null, fd, inheritable=False)
        except OSError:
            pass  # that of the list itself
    os.close(null)


def descriptors() -> list[int]:
    """Those that a copied process must keep to use what it inherits."""
    return sorted(fd for one in _known.values() for fd in (one.fd, *one.beside()))


def peer_gone() -> None:
    """A process has ended that may have used what we share: who waits for it shall look again."""
    for look in list(after_exit):
        look()


after_exit: list[Callable[[], None]] = []
after_fork: list[Callable[[], None]] = []
os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
