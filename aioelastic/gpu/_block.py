"""Blocks: memory of a GPU, known by its ticket, and the arena of each GPU.

A block is mapped when its address is asked for. As long as it is, the page of its ticket is, too: so `/proc/PID/maps`
tells who has it. When nobody here has a part of it any more, kernels may still use it: it goes back, to the arena or to
its owner, when the driver has said that they are done, or that they will never be.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..memory import Arena, Segment, ShareLimit, Use, address_index, after_fork, arenas, ending
from ..memory.incoming import incoming
from . import _driver, _foreign_memory, _vmm
from ._completion import ready
from ._driver import Device
from ._errors import CudaError
from ._foreign_memory import LEGACY, VMM
from ._streams import ALL, DEFAULT
from ._ticket import Ticket, What, admit, issue, sweep

ALIGN = 256  # bytes, of arrays in one block
STREAMS = 64  # of one block that are known one by one: each is kept alive


class Loan:
    """A part of a block that is in use here: what all views hold on to."""

    __slots__ = ("__weakref__", "block", "offset", "use")
    read_only = False

    def __init__(self, block: Block, offset: int) -> None:
        self.block = block
        self.offset = offset
        self.use = Use(block)


class _Mapping:
    """What the driver has mapped for us: given back, in the thread of its device, with the last reference to it.

    Args:
        keep: what must not end before.
    """

    def __init__(self, device: Device, give_back: Callable[[], None], *keep: Any) -> None:
        self.device = device
        self.give_back: Callable[[], None] | None = give_back
        self.keep = keep

    def __del__(self, ending: list[bool] = ending) -> None:
        if self.give_back is not None and not ending:
            self.device.soon(partial(_give_back, self.give_back, self.keep))


def _give_back(give_back: Callable[[], None], keep: Any) -> None:
    give_back()


class Block(Ticket):
    """One of them, in this process. One that came in a message is mapped when its address is asked for.

    Attributes:
        streams: beside the default one, on which others may work with it, each with what keeps it alive.
    """

    __slots__ = ("_base", "streams")

    def __init__(
        self, file: select.epoll, name: str, what: What, owned: bool, handles: list[select.epoll], hold: Any = None
    ) -> None:
        super().__init__(file, name, what, owned, handles, hold)
        self._base: _Mapping | None = None
        self.streams: dict[int, Any] = {}

    def loan(self, offset: int, nbytes: int) -> Loan:
        return Loan(self, offset)

    def came_back(self) -> None:
        arena = _arenas.get(self.where)
        if self.owned and arena is not None:
            arena.came_back(self)

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

    def made(self, device: Device, base: int) -> None:
        """The driver has mapped it there, in this process."""
        what = self.what
        if what.kind == VMM:
            give_back = partial(_vmm.unmap, base, what.sizes)
        elif what.kind == LEGACY:
            give_back = partial(_foreign_memory.close_block, base)
        else:
            give_back = partial(_foreign_memory.close_pooled, what.origin, base)
        self._base = _Mapping(device, give_back, self.page(), self.file, self.handles)  # the lease ends last
        self.known.item = address_index.add(base + what.inset, self.size, self.known)
        self.address = base + what.inset

    def unused(self) -> None:
        if self._base is not None:  # else it is lent for another library, and looked at by `sweep`
            self._base.device.soon(self._look)

    def _look(self) -> None:
        """In the thread of its device: nobody here has a part of it any more, but kernels may use it."""
        begun, base = self.begun, self._base
        if self.in_use or base is None:
            return

        def ended(done: Future[None]) -> None:
            problem = done.exception()
            if problem is not None and not _is_broken(problem):
                _unproven.append(self)  # nobody knows, and so it stays as it is
            elif begun == self.begun and not self.in_use:
                kept, self.streams = self.streams, {}
                base.device.soon(kept.clear)  # not here: it may end streams, and this may be the thread of a loop
                if self.owned:
                    arena_of(base.device).give(self)
                else:
                    self.address, self._base = 0, None

        ready(base.device, {DEFAULT: None, **self.streams}, _may_pass).add_done_callback(ended)

    def disown(self) -> None:
        """In a forked copy: the driver's mappings are not there."""
        super().disown()
        if self._base is not None:
            self._base.give_back = None
        self._base, self.address = None, 0

    def _import(self) -> None:
        """In the thread of its device."""
        if self.address:
            return
        what, device = self.what, _driver.device(self.what.uuid)
        arena_of(device)  # by which `sharing.trim` waits for what is given back
        handles = self.beside()
        try:
            if what.kind == VMM:
                base: Any = _vmm.attach(device.ordinal, handles, what.sizes)
            elif what.kind == LEGACY:
                base = _foreign_memory.open_block(what.handle)
            else:
                base = _foreign_memory.open_pooled(what.origin, handles[0], what.handle)
        except CudaError:
            self.check()  # that explains it
            raise
        self.made(device, base)

    def seen(self, streams: dict[int, Any]) -> None:
        """A view was made for somebody who may work with it on these streams."""
        known = self.streams
        self.streams = {**known, **streams} if len(known) < STREAMS else {**streams, ALL: None}


def _is_broken(exc: BaseException) -> bool:
    """Whether nothing runs in the context any more."""
    return isinstance(exc, CudaError) and exc.for_good


def _may_pass(exc: BaseException) -> bool:
    return isinstance(exc, CudaError | ShareLimit) and not _is_broken(exc)


class DeviceArena(Arena):
    """Blocks of one GPU that are used again. As `Arena`; what needs the driver is done in the device's thread."""

    align = ALIGN

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
            if not self.trim():
                raise
            return self.device.run(lambda: self._loan(nbytes))

    def settle(self) -> None:
        sweep()
        self.device.settle()

    def _loan(self, nbytes: int) -> Loan:
        self.grain = self.slab = _vmm.granularity(self.device.ordinal)
        self.small = self.grain // 4
        return self.part(nbytes)  # type: ignore[no-any-return]

    def _new(self, size: int) -> Segment:
        address, fd = _vmm.create(self.device.ordinal, size)
        handles = list(map(select.epoll.fromfd, (fd,)))
        try:
            block: Block = issue(Block, What(VMM, self.device.uuid, size, (size,)), handles)
            block.made(self.device, address)
        except BaseException as exc:
            _vmm.unmap(address, [size])
            if isinstance(exc, OSError):
                raise ShareLimit(f"cannot make a shared block: {exc}") from exc
            raise
        self.made += 1
        return block


_unproven: list[Block] = []  # of which nobody knows whether kernels still use them
_arenas: dict[str, DeviceArena] = {}
limit = 256 << 20  # bytes that may lie idle on each GPU for the next arrays


def arena_of(device: Device) -> DeviceArena:
    """That of a device."""
    found = _arenas.get(device.uuid)
    if found is None:
        made = DeviceArena(device)
        found = _arenas.setdefault(device.uuid, made)
        if found is made:
            arenas.append(found)
    return found


def set_limit(nbytes: int) -> None:
    """So many bytes may lie idle on each GPU."""
    global limit
    limit = nbytes
    for one in list(_arenas.values()):
        one.limit = nbytes
        one.trim(nbytes)


def _in_child() -> None:
    _unproven.clear()
    _arenas.clear()
    del arenas[1:]


after_fork.append(_in_child)


def take(slot: int, offset: int = 0) -> Loan:
    """A part of the block that came under that number. Raises `ShareLost`."""
    message = incoming()
    block: Block = admit(Block, message, slot)
    loan = block.loan(offset, 0)
    block.came_back()  # only now: as long as it is not in use, it may be idle at any time
    return loan
