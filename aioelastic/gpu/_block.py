"""Blocks: memory of a GPU in the kernel's books.

A GPU's memory has no flock(2). So each block has a memfd of one page, its ticket: in it is written what the block is;
who holds the block holds the ticket, just as a segment of the CPU (see `aioelastic.memory`). It is mapped as long as
the block is, so `/proc/PID/maps` tells who has it. Its owner also has a lock on its first byte (F_OFD_SETLK) while it
lives: where the memory dies with its owner, the others see that there.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..memory import Arena, Incoming, Segment, ShareLimit, ShareLost, after_exit, after_fork, arenas, gate
from ..memory._arena import rounded
from ..memory._segment import NAME, PAGE, _known, _libc, held, known, new_name
from . import _driver, _legacy, _vmm
from ._driver import Device, call
from ._errors import CudaError
from ._legacy import LEGACY, POOL, VMM

T = TypeVar("T")
ALIGN = 256  # bytes, of arrays in one block
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


class Loan:
    """A part of a block that is in use here: what all views hold on to."""

    __slots__ = ("__weakref__", "block", "offset")

    def __init__(self, block: Block, offset: int) -> None:
        self.block = block
        self.offset = offset


class Block(Ticket):
    """One of them, in this process. One that came in a message is mapped when its address is asked for."""

    __slots__ = ("_base",)

    def __init__(self, fd: int, name: str, what: What, owned: bool, handles: list[int], hold: Any = None) -> None:
        super().__init__(fd, name, what, owned, handles, hold)
        self._base: Any = None  # what the driver gave us, to be given back

    def loan(self, offset: int, nbytes: int) -> Loan:
        part = Loan(self, offset)
        self.loans += 1
        weakref.finalize(part, gate.soon, self._returned).atexit = False
        return part

    def there(self) -> int:
        """Where it begins in this process. Waits for the driver the first time.

        Raises:
            ShareLost: it died with its owner.
            DeviceUnavailable: its GPU is not here.
            ForkedCudaError: CUDA cannot be used here.
        """
        self.check()
        if not self.address:
            _driver.device(self.what.uuid).run(self._import)
        return self.address

    def made(self, address: int) -> None:
        """It was made here, and is mapped there. Behind the gate."""
        self._base = address
        self.mapped_at(address)
        self.map_page()

    def close(self) -> None:
        if self.fd < 0:
            return
        self._forget()
        if self._base is None:
            self._close()
            return
        self.not_mapped()
        base, self._base = self._base, None
        _driver.device(self.what.uuid).post(lambda: self._give_back(base))

    def inherit(self, fd: int) -> None:
        super().inherit(fd)
        self._not_here()

    def disinherit(self) -> None:
        self._not_here()
        super().disinherit()

    def _not_here(self) -> None:
        """In a forked copy: the driver's mappings are not."""
        if self._base is not None:
            self.not_mapped()
        self._base, self.address = None, 0

    def _import(self) -> None:
        """In the thread of its device."""
        if self.address:
            return
        what, device = self.what, _driver.device(self.what.uuid)
        try:
            if what.kind == VMM:
                base: Any = _vmm.attach(device.ordinal, self.handles, what.sizes)
            elif what.kind == LEGACY:
                base = _legacy.open_block(what.handle)
            else:
                base = _legacy.open_pooled(what.origin, self.handles[0], what.handle)
        except CudaError:
            self.check()  # that explains it
            raise
        with gate:
            self._base = base
            self.mapped_at(base + what.inset)
            self.map_page()

    def _give_back(self, base: int) -> None:
        """In the thread of its device: what the driver gave; the lease ends last."""
        what = self.what
        try:
            if what.kind == VMM:
                _vmm.unmap(base, what.sizes)
            elif what.kind == LEGACY:
                _legacy.close_block(base)
            else:
                _legacy.close_pooled(what.origin, base)
        finally:
            self._close()

    def _returned(self) -> None:
        self.loans -= 1
        if self.loans:
            return
        if self._base is None:
            if not self.owned:
                self.close()
            return  # what is lent for another library is looked at by `sweep`
        _driver.device(self.what.uuid).post(self._quiet)

    def _quiet(self) -> None:
        """In the thread of its device: nobody here uses it any more, but kernels may."""
        if self.loans or self.fd < 0:
            return
        try:
            call("cuCtxSynchronize")
        except CudaError:
            pass  # the context is broken: nothing runs in it any more
        with gate:
            if not self.loans and self.fd >= 0:
                self.on_idle(self)


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
        arena = _arenas.get(found.where)
        if found.owned and arena is not None:
            arena.came_back(found)
        return found
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")).removeprefix("memfd:")
    if not name.startswith(NAME) or "-gpu-" not in name:
        raise ShareLost(f"not memory of a GPU of aioelastic's: {name}")
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


class DeviceArena(Arena):
    """Blocks of one GPU that are used again. As `Arena`; what needs the driver is done in the device's thread."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.limit = limit
        self.where = device.uuid
        self.device = device

    def loan(self, nbytes: int) -> Loan:
        """Memory for one array, with any contents. Raises `ShareLimit`, `DeviceUnavailable`."""
        sweep()
        try:
            return self.device.run(lambda: self._loan(nbytes))
        except ShareLimit:
            self.settle()
            with gate:
                went = self.trim()
            if not went:
                raise
            return self.device.run(lambda: self._loan(nbytes))

    def settle(self) -> None:
        sweep()
        self.device.settle()

    def _loan(self, nbytes: int) -> Loan:
        grain = _vmm.granularity(self.device.ordinal)
        small = nbytes <= grain // 4
        if small and self._slab is not None and self._at + nbytes <= grain:
            with gate:
                return self._from_slab(nbytes)
        size = grain if small else rounded(nbytes)
        size += -size % grain
        with gate:
            found: Any = self.again(size)
            if found is not None and not small:
                return found.loan(0, nbytes)  # type: ignore[no-any-return]
        block = found if found is not None else self._new(size)
        with gate:
            if not small:
                return block.loan(0, nbytes)
            full, self._slab, self._at = self._slab, block, 0
            if full is not None and not full.loans:
                self.device.post(full._quiet)  # type: ignore[attr-defined]
            return self._from_slab(nbytes)

    def _from_slab(self, nbytes: int) -> Loan:
        assert self._slab is not None
        part: Loan = self._slab.loan(self._at, nbytes)
        self._at += nbytes + -nbytes % ALIGN
        return part

    def _new(self, size: int) -> Block:
        address, fd = _vmm.create(self.device.ordinal, size)
        try:
            with gate:
                block: Block = issue(Block, What(VMM, self.device.uuid, size, (size,)), [fd])
                block.made(address)
                self.own(block)
                return block
        except BaseException as exc:
            _vmm.unmap(address, [size])
            os.close(fd)
            if isinstance(exc, OSError):
                raise ShareLimit(f"cannot make a shared block: {exc}") from exc
            raise


_arenas: dict[str, DeviceArena] = {}
limit = 256 << 20  # bytes that may lie idle on each GPU for the next arrays
_lent: dict[tuple[Any, ...], Ticket] = {}  # of other libraries: by what it is
_lending = threading.Lock()


def arena_of(device: Device) -> DeviceArena:
    """That of a device."""
    with gate:
        found = _arenas.get(device.uuid)
        if found is None:
            found = _arenas[device.uuid] = DeviceArena(device)
            arenas.append(found)
        return found


def set_limit(nbytes: int) -> None:
    """So many bytes may lie idle on each GPU."""
    global limit
    with gate:
        limit = nbytes
        for one in _arenas.values():
            one.limit = nbytes
            one.trim(nbytes)


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
    _arenas.clear()
    _lent.clear()
    del arenas[1:]


after_exit.append(sweep)
after_fork.append(_in_child)
