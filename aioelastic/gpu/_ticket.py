"""Tickets: what of a GPU is in the kernel's books.

A GPU's memory has no flock(2), nor has an event. So each has a memfd of one page, its ticket: in it is written what it
is; who holds it holds the ticket, just as a segment of the CPU (see `aioelastic.memory`). The owner also has a lock on
the first byte (F_OFD_SETLK) while it lives: where something dies with its owner, the others see that there.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..memory import Incoming, Segment, ShareLost, after_exit, after_fork, gate
from ..memory._segment import PAGE, _known, _libc, held, known, made_by, named, new_name
from ..shm import check_fixed
from ._legacy import LEGACY, POOL

T = TypeVar("T")
EVENT = "event"
_DIES = (LEGACY, POOL, EVENT)  # with their owner


class What(NamedTuple):
    """What is written on a ticket.

    Attributes:
        sizes: bytes of the pieces behind the descriptors that travel beside the ticket.
        inset: where the block begins in them, or in what `handle` stands for.
        handle: of the driver's, for other processes, where it has one.
        origin: names its pool, in any process.
    """

    kind: str
    uuid: str
    size: int
    sizes: tuple[int, ...] = ()
    inset: int = 0
    handle: bytes = b""
    origin: str = ""


class Ticket(Segment):
    """What is held, and by whom. Made by `issue` and `admit`.

    Attributes:
        what: is written on it.
        handles: descriptors that stand for the memory, ours to close.
        hold: of another library: the object that owns the memory here, as long as anybody has a lease.
    """

    __slots__ = ("_page", "handles", "hold", "what", "where")

    def __init__(self, fd: int, name: str, what: What, owned: bool, handles: list[int], hold: Any = None) -> None:
        super().__init__(fd, what.size, name, owned)
        self.what = what
        self.where: str = what.uuid
        self.handles = handles
        self.hold = hold
        self._page = 0

    def beside(self) -> list[int]:
        return self.handles

    def map(self) -> int:
        return self.address

    def came_back(self) -> None:
        """It has come in a message, and was here already. Behind the gate."""

    def owner_lives(self) -> bool:
        """Whether the process that made it still has it."""
        if self.owned:
            return True
        told = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
        return bool(struct.unpack("hhqqi4x", told)[0] != fcntl.F_UNLCK)

    def check(self) -> None:
        """Raise `ShareLost` if it died with its owner."""
        if self.what.kind in _DIES and not self.owner_lives():
            raise ShareLost(
                "the process that shared this memory of a GPU has ended, and the memory with it; "
                "what comes of sharing.empty() or sharing.copy() outlives its process"
            )

    def close(self) -> None:
        """It is not in use here any more. Behind the gate."""
        if self.fd >= 0:
            self._forget()
            self._close()

    def inherit(self, fd: int) -> None:
        self._unmap_page()
        os.close(self.fd)
        self.fd = fd
        self.owned, self.hold = False, None

    def disinherit(self) -> None:
        if self.fd >= 0:
            self._forget()
            self._close()

    def map_page(self) -> None:
        """Show in /proc/PID/maps that it is used here."""
        page = _libc.mmap(None, PAGE, 1, 2, self.fd, 0)  # PROT_READ, MAP_PRIVATE
        self._page = 0 if page in (None, 2**64 - 1) else page

    def _unmap_page(self) -> None:
        if self._page:
            _libc.munmap(self._page, PAGE)
            self._page = 0

    def _forget(self) -> None:
        if _known.get(self.key) is self:
            del _known[self.key]

    def _close(self) -> None:
        self._unmap_page()
        for fd in (*self.handles, self.fd):
            os.close(fd)
        self.handles, self.fd, self.hold = [], -1, None


def issue(kind: type[Ticket], what: What, handles: list[int], hold: Any = None) -> Any:
    """A new ticket of this process, of that kind. Behind the gate. Raises `OSError`."""
    name = f"{new_name()}-gpu-{what.size}"
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(fd, marshal.dumps(tuple(what)), 0)
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
        return kind(fd, name, what, True, handles, hold)
    except BaseException:
        os.close(fd)
        raise


def admit(kind: type[Ticket], message: Incoming, slot: int) -> Any:
    """The one that came in a message. Behind the gate. Raises `ShareLost`."""
    fd = message.fd(slot)
    found = known(fd)
    if found is not None:
        if isinstance(found, Ticket):
            found.came_back()
        return found
    name = named(os.readlink(f"/proc/self/fd/{fd}"))
    if made_by(name) is None or "-gpu-" not in name:
        raise ShareLost(f"not memory of a GPU of aioelastic's: {name}")
    try:
        check_fixed(fd)
    except ValueError as exc:
        raise ShareLost(str(exc)) from None
    what = What(*marshal.loads(os.pread(fd, PAGE, 0)))
    beside = len(what.sizes) or int(what.kind == POOL)
    mine = held(fd)
    handles: list[int] = []
    try:
        for number in range(slot + 1, slot + 1 + beside):
            handles.append(fcntl.fcntl(message.fd(number), fcntl.F_DUPFD_CLOEXEC, 3))
        one = kind(mine, name, what, False, handles)
    except BaseException:
        for other in (*handles, mine):
            os.close(other)
        raise
    return one


_lent: dict[tuple[Any, ...], Ticket] = {}  # of other libraries: by what it is
_lending = threading.Lock()


def lend(key: tuple[Any, ...], make: Callable[[], Ticket], use: Callable[[Ticket], T]) -> T:
    """Use, behind the gate, the ticket of what another library owns: the one that is out already, or a new one."""
    sweep()
    with _lending:
        with gate:
            found = _lent.get(key)
            if found is not None:
                return use(found)
        made = make()
        with gate:
            _lent[key] = made
            return use(made)


def sweep() -> None:
    """What was lent, and is held by nobody any more, is its library's again."""
    ended: deque[Any] = deque()
    with gate:
        for key, one in list(_lent.items()):
            if not one.loans and one.is_free():
                del _lent[key]
                ended.append(one.hold)
                one.close()
    ended.clear()  # not behind the gate: what it does is its library's business


def _in_child() -> None:
    global _lending
    _lending = threading.Lock()
    _lent.clear()


after_exit.append(sweep)
after_fork.append(_in_child)
