"""What a function worker has sent, unpickled here: it may be of our main module, which workers know by another name."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import ModuleType
from typing import Any

from ..child.wire import messages
from ..child.worker import exceptions
from ..model.errors import RemoteError
from ..system import forked_copies


def decoded(packet: bytes, fds: list[int]) -> Any:
    """The value in it. Raises whatever unpickling it raises."""
    with main_has_both_names() if messages.is_of_main(packet) else contextlib.nullcontext():
        (value,) = messages.decode(packet, fds)
    return value


def failure_in(packet: bytes, fds: list[int]) -> tuple[RemoteError, int | None]:
    """What an `ERROR` or `FAILED` message tells, and when that was raised. Raises `ValueError`, `OSError`."""
    told = exceptions.told(packet, fds)
    return remote_error(told), exceptions.raised_ns(told)


def remote_error(told: dict[str, Any], task: str = "") -> RemoteError:
    """The error that a worker has told of (`exceptions.describe`)."""
    with main_has_both_names():
        exc, why = exceptions.rebuild(told["packed"])
    why = told.get("not_rebuilt") or why
    return RemoteError(told["phase"], told["type"], told["message"], told["traceback"], exc, why, task)


class main_has_both_names:
    """A worker knows our main module by another name, as in multiprocessing: so do we while we unpickle, in whatever
    threads: the first adds it, the last takes it away."""

    def __enter__(self) -> None:
        global _users, _added
        with _names:
            _users += 1
            if _users == 1 and "__mp_main__" not in sys.modules and "__main__" in sys.modules:
                _added = sys.modules["__mp_main__"] = sys.modules["__main__"]

    def __exit__(self, *_: object) -> None:
        global _users, _added
        with _names:
            _users -= 1
            if not _users:
                added, _added = _added, None
                if added is not None and sys.modules.get("__mp_main__") is added:
                    del sys.modules["__mp_main__"]


_names = threading.RLock()  # a signal's handler may come in between
# guarded by it
_users = 0
_added: ModuleType | None = None


@forked_copies.in_copies
def _renew() -> None:
    global _names
    _names = threading.RLock()  # another thread of the original may have had it
