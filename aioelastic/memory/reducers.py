"""How objects of other libraries are reduced: what is called for them, and what that needs of their message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Reducer = Callable[[Any], Any]


class OutgoingMessage(Protocol):
    """The message that is being packed (`Outgoing`), as far as reducers know it."""

    for_others: bool

    def ref(
        self, low: int, high: int, nbytes: int, keep: Any, tight: Callable[[], Any] | None = None, whole: int = 0
    ) -> int: ...
