"""Blocks: memory of a GPU, known by its ticket, and the arena of each GPU.

A block is mapped when its address is asked for. As long as it is, the page of its ticket is, too: so `/proc/PID/maps`
tells who has it.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from ..memory import Arena, ShareLimit, after_fork, arenas, gate
from ..memory._arena import rounded
from . import _driver, _legacy, _vmm
from ._driver import Device, call
from ._errors import CudaError
from ._legacy import LEGACY, VMM
from ._ticket import Ticket, What, issue, sweep

ALIGN = 256  # bytes, of arrays in one block


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
        arena_of(device)  # by which `sharing.trim` waits for what is given back
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
        with gate:
            if small and self._slab is not None and self._at + nbytes <= grain:
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


def _in_child() -> None:
    _arenas.clear()
    del arenas[1:]


after_fork.append(_in_child)
