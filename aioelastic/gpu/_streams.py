"""On which streams others work: torch, cupy, and threads with default streams of their own.

None of them is imported here; they are asked when somebody else has loaded them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from ..memory import Elsewhere, SharingError, now
from ..memory.dtypes import loaded
from ._driver_calls import LEGACY, NO_TIMING, PER_THREAD, call, check_capture, here, raw

# beside handles of streams: the default one; and it with all that heed it, which cannot be asked during some captures
DEFAULT, ALL = 0, -1

ordinals: Collection[int] | None = None  # of the devices of this process, when they are known


class Mark:
    """What a thread has given its own default stream (CU_STREAM_PER_THREAD) so far, as an event behind it.

    That handle means another stream in each thread, so it is recorded in the one that is meant, which asks for it.
    """

    def __init__(self, ordinal: int) -> None:
        with here(ordinal):
            check_capture(PER_THREAD)
            self.event = call("cuEventCreate", NO_TIMING)
            weakref.finalize(self, _unmark, ordinal, self.event).atexit = False
            call("cuEventRecord", self.event, PER_THREAD)


def _unmark(ordinal: int, event: Any) -> None:
    with suppress(SharingError):
        if raw("cuDevicePrimaryCtxGetState", ordinal)[-1]:  # else it has gone with the context
            with here(ordinal):
                raw("cuEventDestroy", event)


_mine = threading.local()  # the streams on which this thread is to be taken to work


def of_thread(ordinal: int) -> dict[int, Any]:
    """Those on which torch and cupy work in this thread on that device, by handle, each with what keeps it alive: a
    `Mark` for the thread's own default stream."""
    adopted: dict[int, dict[int, Any]] | None = getattr(_mine, "streams", None)
    return _ask(ordinal) if adopted is None else adopted.get(ordinal, {})


def _ask(ordinal: int) -> dict[int, Any]:
    found = _current(ordinal)
    if found.pop(PER_THREAD, None) is not None and raw("cuDevicePrimaryCtxGetState", ordinal)[-1]:
        found[PER_THREAD] = Mark(ordinal)
    return found


def views(ordinal: int) -> dict[int, Any]:
    """Those on which a view may be used that somebody makes now in this thread, each with what keeps it alive; beside
    the default one. `ALL` stands for those that cannot be asked later: of threads, of numba, which is told of them with
    each kernel, and those that their owners may destroy."""
    found: dict[int, Any] = {}
    for handle, current in _current(ordinal).items():
        cupy = loaded("cupy", "ndarray")
        lent = cupy is not None and isinstance(current, getattr(cupy.cuda, "ExternalStream", ()))
        if lent or handle == PER_THREAD or getattr(current, "stream_id", None) == handle:  # torch's ExternalStream
            found[ALL] = None
        else:
            found[handle] = current
    if loaded("numba.cuda.cudadrv.devicearray", "DeviceNDArray") is not None:
        found[ALL] = None
    found.pop(DEFAULT, None)
    return found


def _current(ordinal: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    current = _torch_current(ordinal)
    if current is not None:
        found[int(current.cuda_stream)] = current
    cupy = loaded("cupy", "ndarray")
    if cupy is not None:
        current = cupy.cuda.get_current_stream(ordinal)
        found[int(current.ptr)] = current
    return {DEFAULT if handle == LEGACY else handle: keep for handle, keep in found.items()}


def torch_stream(ordinal: int) -> int:
    """The stream on which torch works in this thread; the default one where it does not."""
    current = _torch_current(ordinal)
    return 0 if current is None else int(current.cuda_stream)


def _torch_current(ordinal: int) -> Any:
    torch = loaded("torch", "Tensor", "torch.utils")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_stream(ordinal)


def may_wait() -> None:
    """Raise `Elsewhere` in a thread that must not wait for a driver."""
    what = now()
    if what is None or what.asks:
        return
    current = {ordinal: _ask(ordinal) for ordinal in _ordinals()}

    def adopt() -> None:
        _mine.streams = current

    raise Elsewhere(adopt)


def _ordinals() -> Collection[int]:
    """Of the devices on which this process may work, without waiting for a driver."""
    if ordinals is not None:
        return ordinals
    torch, cupy = loaded("torch", "Tensor", "torch.utils"), loaded("cupy", "ndarray")
    of_torch = torch.cuda.device_count() if torch is not None and torch.cuda.is_initialized() else 0
    return range(max(of_torch, cupy.cuda.runtime.getDeviceCount() if cupy is not None else 0))
