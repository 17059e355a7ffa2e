"""Which segment an address of this process lies in.

Each change is one operation of a list, which nothing interrupts; who does not find what he looks for looks into a copy,
made by one such operation, too. So it needs no lock.
"""

from __future__ import annotations

import itertools
import math
import weakref
from bisect import bisect, insort
from typing import Any, TypeAlias

Item: TypeAlias = tuple[int, int, int, "weakref.ref[Any]"]  # where it begins, a number of its own, its end, whose

_items: list[Item] = []
_numbers = itertools.count()


def add(start: int, size: int, whose: weakref.ref[Any]) -> Item:
    """It is there from now on. It counts as long as its `address` is that, and it is `in_use`."""
    item = start, next(_numbers), start + size, whose
    insort(_items, item)
    return item


def remove(item: Item) -> None:
    """It is there no more."""
    try:
        _items.remove(item)
    except ValueError:
        pass  # somebody has come across it already


def sweep() -> None:
    """What an interruption has left of segments that are gone."""
    for item in list(_items):
        segment = item[3]()
        if segment is None or segment.address not in (0, item[0]):
            remove(item)


def find(address: int, nbytes: int = 1) -> Any:
    """Whose memory it is in which these bytes lie; None: nobody's."""
    found = _walk(_items, address)
    if found is None:  # or it was passed over, since others came and went meanwhile: a copy of the list stands still
        found = _walk(list(_items), address)  # no slice: a collection in the midst of making that may remove some
    return found if found is not None and address + nbytes <= found.address + found.size else None


def _walk(items: list[Item], address: int) -> Any:
    """The nearest that begins there or before. On a GPU, those that are not in use may lie there, too."""
    at, nearest = bisect(items, (address, math.inf)), -1
    while at:
        at -= 1
        try:
            start, _, end, whose = item = items[at]
        except IndexError:
            return None
        segment = whose()
        if segment is None:  # its end was interrupted
            remove(item)
        elif segment.address == start:
            if start <= address < end:
                if segment.in_use:
                    return segment
            elif not segment.where or (segment.in_use and nearest not in (-1, start)):
                return None  # what is mapped lies apart; on a GPU several may begin at one address
            elif segment.in_use:
                nearest = start
    return None
