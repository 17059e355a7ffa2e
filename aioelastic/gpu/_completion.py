"""When a GPU has done what was asked of it: the driver's own thread tells, so that none of ours waits for that alone.

An event is recorded behind the work; a stream of our own waits for it and wakes ours (cuLaunchHostFunc). That is
not put into the stream that does the work, which would stand still meanwhile. Nothing is asked of a whole context,
nor put into the default stream or one that is being captured: any of these breaks captures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

from . import _streams
from ._driver import Device
from ._driver_calls import NO_TIMING, NON_BLOCKING, bindings, call, check_capture, has_come, notify, raw
from ._errors import CAPTURED, CAPTURED_IMPLICITLY, CudaError
from ._streams import DEFAULT, Mark

CAPTURE = 30.0  # seconds that are waited for the end of a capture in which the default stream cannot be asked


def streams(device: Device, more: Mapping[int, Any]) -> dict[int, Any]:
    """Those on which arrays are likely to be written, by handle, with what keeps each alive: the default one, those of
    torch and cupy in this thread, and `more`."""
    return {DEFAULT: None, **more, **_streams.of_thread(device.ordinal)}


def ready(
    device: Device,
    of: Mapping[int, Any],
    passes: Callable[[BaseException], bool] | None = None,
) -> Future[None]:
    """Done when all is done that those streams have been given so far.

    Args:
        passes: after which errors it is tried again; when not given, for `CAPTURE` seconds, during a capture that began
            meanwhile, or that keeps `ALL` from being asked.

    Raises, when it is asked:
        CudaError: one of the streams is being captured; or the work failed, and with it the context of this process.
    """
    until = time.monotonic() + CAPTURE
    meanwhile = False

    def is_captured(exc: BaseException) -> bool:
        if not isinstance(exc, CudaError) or time.monotonic() > until:
            return False
        return exc.status == CAPTURED_IMPLICITLY or (meanwhile and exc.status == CAPTURED)

    def begin(done: Future[None]) -> None:
        nonlocal meanwhile
        # `ALL` last: who is being captured itself is told so
        plain = sorted((stream for stream, keep in of.items() if not isinstance(keep, Mark)), reverse=True)
        events = []
        try:
            for stream in plain:
                if stream != DEFAULT:
                    check_capture(max(stream, DEFAULT))
                events.append(device.record(stream))
            # an event that has become a part of a capture must not be asked about
            meanwhile = True
            for stream in plain:
                if stream > DEFAULT:
                    check_capture(stream)
            meanwhile = False
            after(device, [*events, *(keep.event for keep in of.values() if isinstance(keep, Mark))], done)
        finally:
            for one in events:
                raw("cuEventDestroy", one)  # the driver keeps it as long as a stream waits for it

    return device.begin(begin, passes or is_captured)


def after(device: Device, events: Collection[Any], done: Future[None]) -> None:
    """`done` when all those events have come. In the device's thread."""
    pending = [one for one in events if not has_come(one)]
    if not pending:
        done.set_result(None)
        return
    stream = call("cuStreamCreate", NON_BLOCKING)
    try:
        for one in pending:
            call("cuStreamWaitEvent", stream, one, 0)
        event = call("cuEventCreate", NO_TIMING)
        device.pending.append((event, done))
        try:
            call("cuEventRecord", event, stream)
            call("cuLaunchHostFunc", stream, bindings().CUhostFn(notify), device.wakeup.address)
        except BaseException:
            device.pending.remove((event, done))
            raw("cuEventDestroy", event)
            raise
    finally:
        raw("cuStreamDestroy", stream)  # the driver keeps it until it has nothing left to do
