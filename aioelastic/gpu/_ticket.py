"""Tickets: what of a GPU is in the kernel's books.

A GPU's memory has no flock(2), nor has an event. So each has a memfd of one page, its ticket: in it is written what it
is; who holds it holds the ticket, just as a segment of the CPU (see `aioelastic.memory`). The owner also has a lock on
the first byte (F_OFD_SETLK) while it lives: where something dies with its owner, the others see that there.
"""

from __future__ import annotations

import fcntl
import marshal
import mmap
import os
import select
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..memory import Segment, ShareLost, Use, after_exit, after_fork, made_by, named
from ..memory.file_mapping import mapped
from ..memory.incoming import Incoming
from ..memory.lease_locks import held
from ..memory.shared_segments import PAGE, known, new_name
from ..system.descriptors import owned
from ..system.shared_memory_names import check_fixed
from ._foreign_memory import LEGACY, POOL

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
        handles: descriptors that stand for the memory.
        hold: of another library: the object that owns the memory here, as long as anybody has a lease.
    """

    __slots__ = ("handles", "hold", "what", "where")

    def __init__(
        self, file: select.epoll, name: str, what: What, owned: bool, handles: list[select.epoll], hold: Any = None
    ) -> None:
        super().__init__(file, what.size, name, owned)
        self.what = what
        self.where: str = what.uuid
        self.handles = handles
        self.hold = hold

    def beside(self) -> list[int]:
        return [one.fileno() for one in self.handles]

    def map(self) -> int:
        return self.address

    def unused(self) -> None:
        """What is lent for another library is looked at by `sweep`."""

    def came_back(self) -> None:
        """It has come in a message, and was here already."""

    def disown(self) -> None:
        super().disown()
        self.hold = None

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

    def page(self) -> mmap.mmap:
        """A page of it that is mapped: /proc/PID/maps shows by it that it is used here."""
        return mapped(self.fd, PAGE, mmap.MAP_PRIVATE)[0]


def issue(kind: type[Ticket], what: What, handles: list[select.epoll], hold: Any = None) -> Any:
    """A new ticket of this process, of that kind. Raises `OSError`."""
    name = f"{new_name()}-gpu-{what.size}"
    file = owned(os.memfd_create, name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd = file.fileno()
    os.pwrite(fd, marshal.dumps(tuple(what)), 0)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
    return kind(file, name, what, True, handles, hold)


def admit(kind: type[Ticket], message: Incoming, slot: int) -> Any:
    """The one that came in a message. Raises `ShareLost`."""
    fd = message.fd(slot)
    found = known(fd)
    if found is not None:
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
    numbers = range(slot + 1, slot + 1 + beside)
    handles = [owned(fcntl.fcntl, message.fd(number), fcntl.F_DUPFD_CLOEXEC, 3) for number in numbers]
    return kind(mine, name, what, False, handles)


_lent: dict[tuple[Any, ...], Ticket] = {}  # of other libraries: by what it is


def lend(key: tuple[Any, ...], make: Callable[[], Ticket], use: Callable[[Ticket], T]) -> T:
    """Use the ticket of what another library owns: the one that is out already, or a new one."""
    sweep()
    found = _lent.get(key)
    if found is None:
        found = _lent.setdefault(key, make())
    using = Use(found)  # `sweep` leaves it alone
    value = use(found)
    _lent[key] = found  # if it was just looked at
    del using
    return value


def sweep() -> None:
    """What was lent, and is held by nobody any more, is its library's again."""
    for key, one in list(_lent.items()):
        begun = one.begun
        if _lent.pop(key, None) is one and (one.in_use or not one.is_free() or one.in_use or one.begun != begun):
            _lent.setdefault(key, one)


after_exit.append(sweep)
after_fork.append(_lent.clear)
