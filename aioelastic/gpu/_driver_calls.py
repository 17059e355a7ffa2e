"""Calls of NVIDIA's driver, what it says, and threads for them.

Sources: CUDA driver API, "Stream Management" (capture of graphs, cuThreadExchangeStreamCaptureMode), and "Data types
used by CUDA driver" (CUresult).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from ..memory import ShareLimit, after_fork
from ._errors import CAPTURED, CudaError, DeviceUnavailable, ForkedCudaError, Reason

T = TypeVar("T")

OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE, NOT_READY = 2, 3, 100, 600  # of CUresult, cuda.h
LEGACY, PER_THREAD = 1, 2  # handles of streams: CU_STREAM_LEGACY, which 0 is too, and CU_STREAM_PER_THREAD
NO_TIMING, NON_BLOCKING = 2, 1  # CU_EVENT_DISABLE_TIMING, CU_STREAM_NON_BLOCKING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_libc = ctypes.PyDLL(None)  # no call of these waits, but for the two of `_waiting`
_libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
_libc.sem_post.argtypes = [ctypes.c_void_p]
_waiting = ctypes.CDLL(None)
_waiting.sem_wait.argtypes = [ctypes.c_void_p]
_clock = time.CLOCK_MONOTONIC if hasattr(_waiting, "sem_clockwait") else time.CLOCK_REALTIME  # the latter: musl
notify = ctypes.cast(_libc.sem_post, ctypes.c_void_p).value  # for cuLaunchHostFunc, with the address of a `Wakeup`

initialised = False  # cuInit has worked in this process
forked = False  # it had, in one that this is a copy of


class Wakeup:
    """What a thread waits for. The driver posts it, too, without running any Python: that might collect garbage, and
    with it free memory of a GPU or end a stream, which the driver's own thread must not do.

    Attributes:
        address: for `notify`.
    """

    def __init__(self) -> None:
        self._semaphore = (ctypes.c_uint64 * 8)()  # sem_t has 32 bytes at most
        self.address = ctypes.addressof(self._semaphore)
        _libc.sem_init(self.address, 0, 0)

    def notify(self) -> None:
        """Who waits goes on; or who will."""
        _libc.sem_post(self.address)

    def wait(self, seconds: float | None) -> None:
        """Until it is posted, or so long; or less."""
        if seconds is None:
            _waiting.sem_wait(self.address)
            return
        until = time.clock_gettime_ns(_clock) + round(seconds * 1e9)
        moment = ctypes.byref((ctypes.c_long * 2)(until // 1_000_000_000, until % 1_000_000_000))
        if _clock == time.CLOCK_MONOTONIC:
            _waiting.sem_clockwait(ctypes.c_void_p(self.address), _clock, moment)
        else:
            _waiting.sem_timedwait(ctypes.c_void_p(self.address), moment)


def bindings() -> Any:
    """`cuda.bindings.driver`. Raises `DeviceUnavailable`."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DeviceUnavailable(Reason.NO_EXTRA) from None
    return driver


def call(name: str, *args: Any) -> Any:
    """Call the driver: what it returns, beside its status.

    Raises:
        DeviceUnavailable: there is no driver, no GPU, or the driver is too old.
        ForkedCudaError: it was initialised before this process was forked.
        ShareLimit: the GPU has no more memory.
        CudaError: it refused.
    """
    status, *values = raw(name, *args)
    if status:
        raise refusal(name, status)
    return values[0] if len(values) == 1 else tuple(values)


def raw(name: str, *args: Any) -> tuple[Any, ...]:
    """As `call`, with the status, a number, in front of what it returns."""
    check_fork()
    driver = bindings()
    try:
        status, *values = getattr(driver, name)(*args)
    except AttributeError:
        raise DeviceUnavailable(Reason.TOO_OLD, f"cuda-python has no {name}") from None
    except RuntimeError as exc:  # the two that the bindings raise
        if type(exc).__name__ == "FunctionNotFoundError":
            raise DeviceUnavailable(Reason.TOO_OLD, f"it has no {name}") from None
        if type(exc).__name__ == "DynamicLibNotFoundError":
            raise DeviceUnavailable(Reason.NO_DRIVER) from None
        raise
    return (int(status), *values)


def refusal(name: str, status: int) -> Exception:
    """What that status stands for."""
    if status == NOT_INITIALIZED:
        return ForkedCudaError()  # we have initialised it, or cuInit itself says so: after a fork
    if status == NO_DEVICE:
        return DeviceUnavailable(Reason.NO_GPU)
    driver = bindings()
    texts = [getattr(driver, one)(driver.CUresult(status)) for one in ("cuGetErrorName", "cuGetErrorString")]
    label, words = [text.decode() if not int(failed) and text else "unknown" for failed, text in texts]
    if status == OUT_OF_MEMORY:
        return ShareLimit(f"the GPU has no more memory: {name} says {words}")
    return CudaError(name, status, label, words)


def has_come(event: Any) -> bool:
    """Whether an event has. Raises `CudaError`."""
    status, *_ = raw("cuEventQuery", event)
    if status not in (0, NOT_READY):
        raise refusal("cuEventQuery", status)
    return bool(status == 0)


def check_capture(stream: int) -> None:
    """Raise `CudaError` if that stream, or for the default one any that waits for it, is being captured.

    Asking does not disturb the capture; recording an event there would.
    """
    status, *told = raw("cuStreamIsCapturing", stream)
    if status:
        raise refusal("cuStreamIsCapturing", status)
    if int(told[0]) in (1, 2):  # CU_STREAM_CAPTURE_STATUS_ACTIVE, _INVALIDATED
        raise refusal("cuStreamIsCapturing", CAPTURED)


def relax() -> Any:
    """What this thread asks from now on disturbs no capture of another; returns the mode that it had."""
    return call("cuThreadExchangeStreamCaptureMode", bindings().CUstreamCaptureMode(_RELAXED))


@contextmanager
def here(ordinal: int) -> Iterator[None]:
    """Calls in this thread, for the few that mean another thing in any other: with the context of that device."""
    before = relax()
    try:
        context = call("cuDevicePrimaryCtxRetain", ordinal)
        try:
            call("cuCtxPushCurrent", context)
            try:
                yield
            finally:
                raw("cuCtxPopCurrent")
        finally:
            raw("cuDevicePrimaryCtxRelease", ordinal)
    finally:
        raw("cuThreadExchangeStreamCaptureMode", before)


def attribute(number: int, ordinal: int) -> int:
    """A property of a device; see CUdevice_attribute in cuda.h."""
    return int(call("cuDeviceGetAttribute", bindings().CUdevice_attribute(number), ordinal))


def start(thread: threading.Thread) -> None:
    """Start it. Raises `ShareLimit`."""
    try:
        thread.start()
    except RuntimeError as exc:
        remedy = "raise `ulimit -u`, or pids.max of the control group"
        raise ShareLimit(f"no thread can be had to speak to a GPU: {exc}; {remedy}") from None


def aside(work: Callable[[], T]) -> T:
    """Do it in a thread of its own and wait. Raises `ShareLimit`, and what it raises."""
    done: Future[T] = Future()

    def job() -> None:
        try:
            done.set_result(work())
        except BaseException as exc:  # it is the caller's
            done.set_exception(exc)

    thread = threading.Thread(target=job, name="aioelastic-gpu", daemon=True)
    start(thread)
    thread.join()
    return done.result()


def check_fork() -> None:
    """Raise `ForkedCudaError` where CUDA cannot be used."""
    if forked:
        raise ForkedCudaError


def _in_child() -> None:
    global forked
    forked = forked or initialised


after_fork.append(_in_child)
