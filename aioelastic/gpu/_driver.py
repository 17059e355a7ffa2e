"""NVIDIA's driver: every call of it is made in a thread of ours, one for each device, with that device's context.

So no event loop ever makes one, imports do not race each other, and whoever waits does it as it likes: by `run`, or by
the future that `post` gives. A thread is begun with the first work for its device; `end` ends them all.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from ..errors import SpecError
from ..memory import Elsewhere, ShareLimit, after_fork, now
from ..shown import shown
from ._errors import CudaError, DeviceUnavailable, ForkedCudaError, Reason

T = TypeVar("T")

OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE, NOT_READY = 2, 3, 100, 600  # of CUresult, cuda.h
VMM, POSIX_FD = 102, 103  # of CUdevice_attribute: VIRTUAL_MEMORY_MANAGEMENT, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
POOLS, IPC_EVENTS = 115, 125  # MEMORY_POOLS, IPC_EVENT

WATCH = 1.0  # seconds after which a call back that did not come is looked into

_lock = threading.Lock()
_began = False  # cuInit has worked in this process
_forked = False  # it had, in one that this is a copy of
_seen: tuple[Seen, ...] | None = None
_devices: dict[str, Device] = {}


class Seen(NamedTuple):
    """A device of this process.

    Attributes:
        ordinal: its number here; another process may give it another.
        uuid: what it is in any process, as `"GPU-…"` or `"MIG-…"`.
    """

    ordinal: int
    uuid: str
    name: str


class Device:
    """One device, and the thread that makes its calls. Got by `device`.

    Attributes:
        ordinal: its number in this process.
        uuid: what it is in any.
    """

    def __init__(self, seen: Seen) -> None:
        self.ordinal, self.uuid, self.name = seen
        self.pending: dict[
            int, Future[None]
        ] = {}  # what the driver will call back for; the thread's own, but for `pop`
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._trouble: BaseException | None = None

    def post(self, work: Callable[[], T]) -> Future[T]:
        """Do it after all earlier work, in the thread. Never waits; finalizers use it."""
        done: Future[T] = Future()

        def job() -> None:
            try:
                if self._trouble is not None:
                    raise self._trouble
                value = work()
            except BaseException as exc:
                done.set_exception(exc)
            else:
                done.set_result(value)

        self._jobs.put(job)
        if self._thread is None and not _forked:
            self._begin()
        return done

    def run(self, work: Callable[[], T]) -> T:
        """Do it in the thread, and wait for what comes of it. In that thread, at once."""
        check_fork()
        if threading.current_thread() is self._thread:
            return work()
        _may_wait()
        return self.post(work).result()

    def settle(self) -> None:
        """Wait until all work is done that was given so far, and what that has given."""
        if self._thread is None or _forked or threading.current_thread() is self._thread:
            return
        for _ in range(2):
            self.post(lambda: None).exception()

    def end(self) -> None:
        """Let the thread end after its work, and wait for it."""
        thread = self._thread
        if thread is None or _forked:
            return
        self.settle()
        self._jobs.put(None)
        thread.join()
        self._thread = None
        if not self._jobs.empty():  # more has come meanwhile
            self._begin()

    def _begin(self) -> None:
        with _lock:
            if self._thread is None:
                # a daemon: a worker that ends joins all other threads
                self._thread = threading.Thread(target=self._work, name=f"aioelastic-{self.uuid}", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:
                    self._thread = None  # the interpreter is ending: the kernel will clean up

    def _work(self) -> None:
        held = False
        try:
            self._trouble = None
            context = call("cuDevicePrimaryCtxRetain", self.ordinal)
            held = True
            call("cuCtxSetCurrent", context)
        except Exception as exc:
            self._trouble = exc
        while (job := self._next()) is not None:
            job()
            del job  # it may hold what it was done for
        if held:
            call("cuDevicePrimaryCtxRelease", self.ordinal)

    def _next(self) -> Callable[[], None] | None:
        while True:
            try:
                return self._jobs.get(timeout=WATCH if self.pending else None)
            except Empty:
                self._look()

    def _look(self) -> None:
        """In a context that is broken, the driver calls nobody back (cuLaunchHostFunc)."""
        status, *_ = raw("cuStreamQuery", 0)
        if status in (0, NOT_READY):
            return
        for number in list(self.pending):
            done = self.pending.pop(number, None)
            if done is not None:
                done.set_exception(_refusal("cuStreamQuery", status))


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
        raise _refusal(name, status)
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


def _refusal(name: str, status: int) -> Exception:
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


def visible() -> tuple[Seen, ...]:
    """The devices of this process. Raises `DeviceUnavailable`, `ForkedCudaError`."""
    global _began, _seen
    check_fork()
    if _seen is None:
        _may_wait()
        found = aside(_look)
        with _lock:
            _began, _seen = True, found
    return _seen


def device(name: Any) -> Device:
    """The device of that name.

    Args:
        name: `"cuda"`, `"cuda:1"`, or a UUID, of which the beginning is enough.

    Raises:
        SpecError: no device has such a name.
        DeviceUnavailable: it is not here.
    """
    text = str(name)  # torch.device too
    known = _devices.get(text)
    if known is not None:
        check_fork()
        return known
    number = re.fullmatch(r"cuda(?::(\d+))?", text)
    if number is None and not text.startswith(("GPU-", "MIG-")):
        raise SpecError("device", shown(name), "is no device", 'give "cpu", "cuda:0", or the UUID of a GPU, "GPU-…"')
    seen = visible()
    if number is not None:
        found = [one for one in seen if one.ordinal == int(number[1] or 0)]
    else:
        found = [one for one in seen if one.uuid.startswith(text)]
    if len(found) > 1:
        raise SpecError("device", shown(name), f"is the beginning of {len(found)} UUIDs", "give more of it")
    if not found:
        here = ", ".join(f"cuda:{one.ordinal} is {one.uuid}" for one in seen)
        raise DeviceUnavailable(Reason.NOT_VISIBLE, f"device {text} (here, {here})")
    with _lock:
        return _devices.setdefault(found[0].uuid, Device(found[0]))


def attribute(number: int, ordinal: int) -> int:
    """A property of a device; see CUdevice_attribute in cuda.h."""
    return int(call("cuDeviceGetAttribute", bindings().CUdevice_attribute(number), ordinal))


def aside(work: Callable[[], T]) -> T:
    """Do it in a thread of its own and wait."""
    done: Future[T] = Future()

    def job() -> None:
        try:
            done.set_result(work())
        except BaseException as exc:
            done.set_exception(exc)

    thread = threading.Thread(target=job, name="aioelastic-gpu")
    thread.start()
    thread.join()
    return done.result()


def end() -> None:
    """End the threads. Contexts that nobody else uses here go with them; the next work begins new ones."""
    for one in list(_devices.values()):
        one.end()


def check_fork() -> None:
    """Raise `ForkedCudaError` where CUDA cannot be used."""
    if _forked:
        raise ForkedCudaError


def _look() -> tuple[Seen, ...]:
    call("cuInit", 0)
    found = []
    for ordinal in range(call("cuDeviceGetCount")):
        label = call("cuDeviceGetName", 256, ordinal).split(b"\0")[0].decode().strip()
        hexed = bytes(call("cuDeviceGetUuid", ordinal).bytes).hex()
        uuid = "-".join(hexed[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        found.append(Seen(ordinal, f"{'MIG' if ' MIG ' in label else 'GPU'}-{uuid}", label))
    return tuple(found)


def _in_child() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    _forked = _forked or _began


after_fork.append(_in_child)


def _may_wait() -> None:
    """Raise `Elsewhere` in a thread that must not."""
    what = now()
    if what is None or what.asks:
        return
    torch = sys.modules.get("torch.cuda")
    count = torch.device_count() if torch is not None and torch.is_initialized() else 0
    current = {ordinal: torch_stream(ordinal) for ordinal in range(count)}, cupy_stream()

    def adopt() -> None:
        _mine.current = current

    raise Elsewhere(adopt)


_mine = threading.local()  # the streams on which this thread is to be taken to work


def torch_stream(ordinal: int) -> int | None:
    """The stream on which torch works in this thread, if it does."""
    current = getattr(_mine, "current", None)
    if current is not None:
        return current[0].get(ordinal)  # type: ignore[no-any-return]
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.current_stream(ordinal).cuda_stream)


def cupy_stream() -> int | None:
    """The stream on which cupy works in this thread, if it is loaded."""
    current = getattr(_mine, "current", None)
    if current is not None:
        return current[1]  # type: ignore[no-any-return]
    cupy = sys.modules.get("cupy")
    return None if cupy is None else int(cupy.cuda.get_current_stream().ptr)
