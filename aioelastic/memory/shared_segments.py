"""Segments: memory that several processes map, known by a file descriptor, and who holds it.

The kernel keeps the books. Whoever holds a segment does so by an open file description of its own with a shared
flock(2) on it: a process, by its descriptor and its mapping; a message that is under way, by the descriptor in it. The
lock ends when the last of them is gone, however that came about: a view that died, a message that nobody ever read, a
process that was killed. The owner may use a segment again when it can have the lock for itself. So nothing has to be
counted, told or cleaned up, and `/proc/locks` lists all leases.

In this process there is no lock at all. What is held is held by objects that let go of it in C with their last
reference (`owned`, `mmap`), and the tables are changed by one operation of a dict, set or list at a time. So a signal's
handler that raises in the middle of a call, or a handler, finalizer or collection that makes the same call in the
middle of it, finds tables that are true, and what was begun is gone with its last reference.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import functools
import itertools
import mmap
import os
import re
import select
import stat
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ..system.descriptors import owned, reopened, shut
from ..system.shared_memory_names import check_fixed
from . import address_index
from ._errors import NotShareable, ShareLimit, ShareLost
from .file_mapping import block, mapped
from .lease_locks import lease, opened

PAGE = os.sysconf("SC_PAGE_SIZE")
NAME = "aioelastic"  # of memfds, as /proc/PID/maps shows them: /memfd:aioelastic-PID-NUMBER
_ISOLATED = "-isolated-"  # in the names of those that are; the bytes of the one array follow
PLACES = f"{NAME}-places"  # that of the places of a queue
_MADE = re.compile(rf"{NAME}-(\d+)-\d+(?:{_ISOLATED}(\d+)$)?")
_SEAL_FUTURE_WRITE = 0x10  # fcntl.h; `fcntl` has it from Python 3.13 on

_numbers = itertools.count()

Key = tuple[int, int]  # device and inode: what a file is, in any process


class _Known(weakref.ref["Segment"]):
    """That there is a segment, until there is none."""

    __slots__ = ("item", "key", "path")
    item: address_index.Item | None
    key: Key
    path: str | None


_known: dict[Key, _Known] = {}


class Segment:
    """One of them, in this process, as long as anything refers to it. Made by `create` or `attach`.

    Attributes:
        where: the memory that it is of: "" for the CPU's.
        file: its descriptor.
        address: where it is mapped; 0: it is not.
        owned: this process made it, and may use it again.
        isolated: there is nothing in it but one array of so many bytes, and never will be: other users may have it. 0:
            it is none of those.
        read_only: it came from who lets nobody write there.
        has_copies: a process that was forked may use it, too: then it is not used again.
        uses: one for each `Use`.
        begun: changes with each `Use`.
    """

    __slots__ = (
        "__weakref__",
        "_mapping",
        "_maps",
        "address",
        "begun",
        "born",
        "file",
        "has_copies",
        "isolated",
        "key",
        "known",
        "name",
        "owned",
        "read_only",
        "size",
        "uses",
    )
    where = ""
    arena: Any = None  # that has those of ours which nobody uses

    def __init__(self, file: select.epoll, size: int, name: str, owned: bool, path: str | None = None) -> None:
        self.file = file
        self.size = size
        self.name = name
        self.owned = owned
        made = _MADE.match(name)
        self.isolated = int(made[2] or 0) if made else 0
        self.read_only = False
        self.has_copies = False
        self.address = self.begun = 0
        self.uses: set[weakref.ref[Use]] = set()
        self.born = time.monotonic()
        self.key = _key(os.fstat(file.fileno()))
        self._mapping: mmap.mmap | None = None
        self._maps: dict[str, tuple[mmap.mmap, int, address_index.Item]] = {}
        self.known = _Known(self, _ended)
        self.known.key, self.known.item, self.known.path = self.key, None, path
        _known[self.key] = self.known

    @property
    def fd(self) -> int:
        """Its descriptor, which stays its own."""
        return self.file.fileno()

    @property
    def path(self) -> str | None:
        """Of its file, where it has one."""
        return self.known.path

    @property
    def in_use(self) -> bool:
        """In this process. A view without a use is one of an array that was garbage, and was saved by a finalizer
        (PEP 442)."""
        if self.uses or self._mapping is None:
            return bool(self.uses)
        try:
            self._mapping.resize(self.size)  # is refused while there are views, and else changes nothing
        except BufferError:
            return True
        return False

    def map(self) -> int:
        """Where it is in this process. Raises `ShareLimit`."""
        if not self.address:
            # a library that knows no memory which is read only changes its own copy, instead of ending the process
            try:
                mapping, address = mapped(self.fd, self.size, mmap.MAP_PRIVATE if self.read_only else mmap.MAP_SHARED)
            except ShareLimit:
                if self.read_only or not _is_read_only(self.fd):
                    raise
                self.read_only = True  # since it came
                mapping, address = mapped(self.fd, self.size, mmap.MAP_PRIVATE)
            item = address_index.add(address, self.size, self.known)
            # another thread may be here, too: the first one's counts, for both
            self._mapping, address, self.known.item = self._maps.setdefault("first", (mapping, address, item))
            if self.known.item is not item:
                address_index.remove(item)
            self.address = address  # from now on that counts
        return self.address

    def loan(self, offset: int, nbytes: int) -> Any:
        """`nbytes` of it as a ctypes array, which is what all views hold on to; it keeps the mapping. Raises
        `ShareLimit`."""
        self.map()
        part = block(nbytes).from_buffer(self._mapping, offset)
        part.use, part.read_only = Use(self), self.read_only
        return part

    def lend(self, fds: list[int], read_only: bool = False, for_others: bool = False) -> None:
        """Add a descriptor for a message: an open file description of its own, whose lock holds the segment.

        Args:
            read_only: who gets it cannot write there.
            for_others: other users may get it, who cannot write where the mode of the file says so.

        Raises:
            ShareLimit: this process has no more of them.
        """
        try:
            how = os.O_RDWR
            if read_only or self.read_only or (for_others and not os.fstat(self.fd).st_mode & stat.S_IWOTH):
                how = os.O_RDONLY
            try:
                reopened(fds, self.fd, how)
            except PermissionError:  # another user's, who has sealed it since it came
                reopened(fds, self.fd, os.O_RDONLY)
            self._hold(fds[-1])
        except OSError as exc:
            raise ShareLimit(f"cannot open a shared segment: {exc}") from exc

    def _hold(self, fd: int) -> None:
        try:
            lease(fd)
        except ShareLost:
            if not self.isolated:  # which is not used again, whoever holds it
                raise

    def seal(self) -> None:
        """Nobody can write there from now on who has not mapped it by now. Raises `NotShareable`."""
        if self.read_only:
            return
        is_ours = True
        try:
            os.fchmod(self.fd, 0o644)  # another user cannot open it again to write
        except PermissionError:
            is_ours = False
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
        except OSError as exc:
            # before Linux 5.1, and in gVisor, there is no such seal
            if not (exc.errno == errno.EINVAL and is_ours) and not _is_read_only(self.fd):
                raise NotShareable(f"it cannot be made read-only, as another has made it: {exc.strerror}") from exc

    def unused(self) -> None:
        """Its last use in this process has ended."""
        if self.owned and not self.isolated:
            self.arena.give(self)

    def disown(self) -> None:
        """In a forked copy: it is the other's."""
        self.owned, self.known.path = False, None

    def beside(self) -> list[int]:
        """What else a message needs to carry it: descriptors that stay ours."""
        return []

    def is_free(self) -> bool:
        """No other process holds it, and no message. Only for its owner."""
        try:
            # both at once: nobody else could take it if this ended in between
            deque(map(fcntl.flock, (self.fd, self.fd), (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN)), maxlen=0)
        except BlockingIOError:
            return False
        return True


class Use:
    """Somebody in this process uses a segment. With the last of them its owner may use it for something else.

    It does not refer to the segment, which would be garbage with it in a cycle, but is known by a weak reference that
    does.
    """

    __slots__ = ("__weakref__",)

    def __init__(self, segment: Segment) -> None:
        one = weakref.ref(self, _over)
        _used[one] = segment
        segment.begun = next(_numbers)
        segment.uses.add(one)
        if forks:
            segment.has_copies = True  # another thread's fork has looked already at what is used

    @property
    def segment(self) -> Segment:
        """Which."""
        return _used[weakref.ref(self)]


_used: dict[weakref.ref[Use], Segment] = {}
forks: list[None] = []  # of this process, that are prepared and not yet made
ending: list[bool] = []  # not empty when the interpreter ends: modules are taken down then, in any order
atexit.register(ending.append, True)


def _over(one: weakref.ref[Use], ending: list[bool] = ending) -> None:
    """That use has ended."""
    if ending:
        return
    segment = _used.pop(one, None)  # from here on it would go if this were interrupted; before, see `sweep`
    if segment is not None:
        segment.uses.discard(one)
        if not segment.uses:
            segment.unused()


def sweep() -> None:
    """What an interruption has kept from being told: uses and segments that have ended."""
    for one in list(_used):
        if one() is None:
            _over(one)
    for segment in segments():
        segment.uses.difference_update([one for one in list(segment.uses) if one() is None])
    for known in list(_known.values()):
        if known() is None:
            _ended(known)
    address_index.sweep()


def _ended(one: _Known, ending: list[bool] = ending) -> None:
    """Nothing refers to that segment any more."""
    if ending:
        return
    if _known.get(one.key) is one:
        _known.pop(one.key, None)
    if one.item is not None:
        address_index.remove(one.item)
    if one.path is not None:
        try:
            os.unlink(one.path)
        except OSError:
            pass


def create(size: int, directory: str | None = None, isolated: bool = False) -> Segment:
    """A new one of this process, zeroed.

    Args:
        isolated: as the attribute; without a directory.
        directory: make a file there, which has a name and counts against that file system; else a memfd, which has
            neither.

    Raises:
        FileNotFoundError: there is no such directory.
        ShareLimit: there is no room for it.
    """
    nbytes, size = size, size + -size % PAGE
    name, path = new_name(), None
    if isolated:
        name += f"{_ISOLATED}{nbytes}"
    try:
        if directory is None:
            file = owned(os.memfd_create, name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            path = os.path.join(directory, name)
            file = owned(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ShareLimit(f"cannot make a shared segment: {exc}") from exc
    try:
        os.ftruncate(file.fileno(), size)
        if path is None:
            # nobody can cut it off under another's feet
            fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        else:
            # the directory lets nobody else in; who gets a descriptor of it opens it again, as another user too
            os.fchmod(file.fileno(), 0o666)
            os.posix_fallocate(file.fileno(), 0, size)  # a full file system says so now, and not by a SIGBUS later
        return Segment(file, size, name, True, path)
    except BaseException as exc:
        if path is not None:
            os.unlink(path)
        if isinstance(exc, OSError):
            raise ShareLimit(f"cannot have {size} bytes of shared memory: {exc}") from exc
        raise


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
    """That of a descriptor which came with a message, and stays the caller's.

    Raises:
        ShareLost: it is none of ours, or could be cut off.
        ShareLimit: this process has no more descriptors.
    """
    found = known(fd)
    if found is not None:
        return found
    try:
        size = check_fixed(fd).st_size
    except ValueError as exc:
        raise ShareLost(str(exc)) from None
    read_only = _is_read_only(fd)
    file = opened(fd, read_only)
    target = os.readlink(f"/proc/self/fd/{fd}")
    name = named(target)
    if made_by(name) is None or not size:
        raise ShareLost(f"not a segment of aioelastic's: {target}")
    made = Segment(file, size, name, False)
    made.read_only = read_only
    made._hold(file.fileno())
    return made


def _is_read_only(fd: int) -> bool:
    """Whether it was opened so, or can only be mapped so."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return True
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEAL_FUTURE_WRITE)
    except OSError:
        return False  # a file system without seals


def known(fd: int) -> Segment | None:
    """The one of a descriptor, if this process has it already."""
    found = _known.get(_key(os.fstat(fd)))
    return None if found is None else found()


def kept(fd: int) -> Callable[[], int] | None:
    """What makes a descriptor for a message like that one, which need not stay open meanwhile. None: it has to."""
    segment = known(fd)
    if segment is None or segment.where or not segment.uses:  # else it might be used for something else meanwhile
        return None
    return functools.partial(_lent, segment, Use(segment))


def _lent(segment: Segment, use: Use) -> int:
    fds: list[int] = []
    try:
        segment.lend(fds)
        return fds[0]
    except BaseException:
        shut(*fds)
        raise


def _key(stat: os.stat_result) -> Key:
    return (stat.st_dev, stat.st_ino)


def segments() -> list[Any]:
    """All that this process has, its own and others'."""
    return [segment for one in list(_known.values()) if (segment := one()) is not None]
