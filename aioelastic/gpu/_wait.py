"""When a GPU has done what was asked of it: told by the driver's own thread, so that none of ours waits for it.

An event is recorded behind the work; a stream of our own waits for it and calls back (cuLaunchHostFunc). The call back
is not put into the stream that does the work: that would stand still meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any

from ._driver import NOT_READY, Device, bindings, call, cupy_stream, raw, torch_stream

_NO_TIMING, _NON_BLOCKING = 2, 1  # CU_EVENT_DISABLE_TIMING, CU_STREAM_NON_BLOCKING
_numbers = itertools.count(1)
_waiting: dict[int, Device] = {}


def streams(device: Device) -> set[int]:
    """Those on which arrays are likely to be written: the default one, and those of torch and cupy in this thread."""
    return {0, torch_stream(device.ordinal) or 0, cupy_stream() or 0}


def ready(device: Device, of: Collection[int]) -> Future[None]:
    """Done when all is done that those streams have been given so far.

    Raises, when it is asked:
        CudaError: the work failed, and with it the context of this process.
    """
    done = waited_for()

    def begin() -> None:
        events = []
        try:
            for stream in of:
                events.append(call("cuEventCreate", _NO_TIMING))
                call("cuEventRecord", events[-1], stream)
            after(device, events, done)
        except BaseException as exc:
            done.set_exception(exc)
        finally:
            for one in events:
                raw("cuEventDestroy", one)  # the driver keeps it as long as a stream waits for it

    device.post(begin)
    return done


def waited_for() -> Future[None]:
    """A future that who waits for it cannot cancel: it is set by the driver."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()
    return done


def after(device: Device, events: Collection[Any], done: Future[None]) -> None:
    """`done` when all those events have come. In the device's thread."""
    pending = [one for one in events if _query(one)]
    if not pending:
        done.set_result(None)
        return
    stream = call("cuStreamCreate", _NON_BLOCKING)
    number = next(_numbers)
    try:
        for one in pending:
            call("cuStreamWaitEvent", stream, one, 0)
        _waiting[number] = device
        device.pending[number] = done
        call("cuLaunchHostFunc", stream, bindings().CUhostFn(_address), number)
    except BaseException:
        _waiting.pop(number, None)
        device.pending.pop(number, None)
        raise
    finally:
        raw("cuStreamDestroy", stream)  # the driver keeps it until it has nothing left to do


def _query(event: Any) -> bool:
    """Whether it is still to come."""
    status, *_ = raw("cuEventQuery", event)
    if status == NOT_READY:
        return True
    if status:
        call("cuEventQuery", event)  # raises
    return False


def _called_back(number: int) -> None:
    """In a thread of the driver's, where it must not be called."""
    device = _waiting.pop(number, None)
    done = device.pending.pop(number, None) if device is not None else None
    if done is not None:
        done.set_result(None)


_callback = ctypes.CFUNCTYPE(None, ctypes.c_size_t)(_called_back)
_address = ctypes.cast(_callback, ctypes.c_void_p).value
