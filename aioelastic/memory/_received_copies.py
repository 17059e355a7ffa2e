"""What came in a message as a copy: it is the receiver's own.

A small one is read. The memory of a large one shows what the sender has written, without a copy of it. The sender does
not write there again as long as the receiver has a lease. What the receiver writes goes there, too, which is a fifth of
the work of a page of its own for each page; only when it forks, others could see it. Then its memory is made its own
(`MAP_PRIVATE`), from the same moment for both. Another thread may receive meanwhile. So memory is known here before it
is mapped, and then it is looked whether a fork has been prepared: what the copy can see was either known by then, or is
private from the beginning.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any

from ..system.shared_memory_names import check_fixed, contents
from ._errors import ShareLimit
from ._forked_copies import before_fork
from ._limits import few
from .file_mapping import block, show, show_once, showing, unmapped
from .lease_locks import held
from .shared_segments import forks

COPIED = 1 << 18  # bytes below which a copy takes less than a mapping, its pages and its end
LARGE = 1 << 20  # bytes from which that is worth a descriptor
MOST = 64  # of them that have one, for a fork, if there are so many (`few`); others are MAP_PRIVATE from the beginning

_kept: dict[int, weakref.ref[Any]] = {}


def received(fd: int, size: int, by_others: bool = False) -> memoryview:
    """So many bytes of a file that came with a message; `fd` stays the caller's.

    Args:
        by_others: others receive it, too.

    Raises:
        ValueError: whoever sent it could cut it off, or it has less.
        OSError: out of memory or descriptors.
    """
    if check_fixed(fd).st_size < size:
        raise ValueError("memory that came with a message is smaller than what should be in it")
    if size < COPIED:
        return contents(fd, size)
    file = held(fd)  # its lock holds as long as there is a mapping
    private = by_others or size < LARGE or len(_kept) >= few(MOST)
    try:
        mapping, address = unmapped(size)
        part = block(size).from_buffer(mapping)
        part.private = [] if private else [showing(address, file.fileno(), size, mmap.MAP_PRIVATE)]
        if not private:
            part.file = file
            number = id(part)
            _kept[number] = weakref.ref(part, lambda _: _kept.pop(number, None))
            show(address, file.fileno(), size, mmap.MAP_SHARED)
            private = bool(forks) or not part.private
        if private:
            part.private.clear()
            show(address, file.fileno(), size, mmap.MAP_PRIVATE)
    except ShareLimit:  # a process has room for some 65,000 mappings (vm.max_map_count)
        return contents(fd, size)
    return memoryview(part).cast("B")


def _make_private() -> None:
    """From now on what is written there is seen by this process alone."""
    failed = None
    for number, one in list(_kept.items()):
        part = one()
        if part is not None:
            try:
                show_once(part.private)
            except ShareLimit as exc:
                failed = exc
                continue
            part.file = None
        _kept.pop(number, None)
    if failed is not None:
        raise failed


before_fork.append(_make_private)
