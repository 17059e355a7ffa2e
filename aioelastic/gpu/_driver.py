"""NVIDIA's driver: its calls are made in a thread of ours, one for each device, with that device's context.

So no event loop makes one (but for what only the asking thread can ask: its own default stream), imports do not race
each other, and whoever waits does it as it likes: by `run`, or by the future that `begin` and `post` give. A thread is
begun with the first work for its device; `end` ends them all.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from ..memory import ShareLimit, SharingError
from ..model.errors import SpecError
from ..model.text import shown
from . import _driver_calls, _streams
from ._driver_calls import NO_TIMING, NON_BLOCKING, Wakeup, aside, call, check_fork, has_come, raw
from ._errors import CudaError, DeviceUnavailable, Reason
from ._streams import ALL, DEFAULT, may_wait

T = TypeVar("T")

WATCH = 0.25  # seconds after which a call back that did not come is looked into, and what may pass is tried again

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


class _Job(NamedTuple):
    work: Callable[[Any], object]
    done: Future[Any]
    passes: Callable[[BaseException], bool]


class Device:
    """One device, and the thread that makes its calls. Got by `device`.

    Attributes:
        ordinal: its number in this process.
        uuid: what it is in any.
        stream: one of our own, for copies; None as long as the thread has no context.
        heeding: one of our own that heeds the default stream: what is put there is done after all that was put into
            that one. To put it into that one breaks the capture of any other that heeds it.
        wakeup: the driver posts it, too.
        pending: events for which it will do that, each with whom it is told to; the thread's own.
    """

    def __init__(self, seen: Seen) -> None:
        self.ordinal, self.uuid, self.name = seen
        self.stream: Any = None
        self.heeding: Any = None
        self._scratch: Any = None
        self.wakeup = Wakeup()
        self.pending: list[tuple[Any, Future[None]]] = []
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._chores: deque[Callable[[], object]] = deque()
        self._again: list[_Job] = []  # the thread's own
        self._looked = 0.0
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._leaves: Future[bool] | None = None  # who has asked it to end

    def begin(
        self,
        work: Callable[[Future[T]], object],
        passes: Callable[[BaseException], bool] = lambda exc: False,
    ) -> Future[T]:
        """Have it done after all earlier work, in the thread; in that thread, at once. Never waits.

        Args:
            work: is given the future, and sets it, now or later; what it raises is set, too.
            passes: whether it is to be tried again, after that was raised.

        Returns:
            a future that cannot be cancelled: what it is of goes on.
        """
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()
        job = _Job(work, done, passes)
        if threading.current_thread() is self._thread:
            self._do(job)
            return done
        self._jobs.put(job)
        self.wakeup.notify()
        if self._thread is None and not _driver_calls.forked:
            self._start()
        return done

    def post(self, work: Callable[[], T]) -> Future[T]:
        """As `begin`, with what it returns."""
        return self.begin(lambda done: done.set_result(work()))

    def soon(self, work: Callable[[], object]) -> bool:
        """Have it done before all later work: finalizers use it. It starts no thread; nobody is told what it raises.
        False: this is a forked copy, where nothing is to be done."""
        if _driver_calls.forked:
            return False
        self._chores.append(work)
        if self._thread is not None:
            self.wakeup.notify()
        return True

    def run(self, work: Callable[[], T]) -> T:
        """Do it in the thread, and wait for what comes of it. In that thread, at once."""
        check_fork()
        if threading.current_thread() is self._thread:
            return work()
        may_wait()
        return self.post(work).result()

    def settle(self) -> None:
        """Wait until all is done that was given so far, and what that has given; but not for what is to be tried again,
        after it was tried once more."""
        if _driver_calls.forked or threading.current_thread() is self._thread:
            return
        if self._thread is None and not self._chores:
            return
        told = self.post(self._look)
        if told.exception() is None:
            for one in told.result():
                one.exception()
            self.post(lambda: None).exception()

    def end(self) -> None:
        """Let the thread end, and wait for it, unless somebody still waits for what it has begun."""
        with self._starting:
            thread = self._thread
            if thread is None or _driver_calls.forked:
                return
            self.settle()
            left: Future[bool] = Future()
            self._leaves = left
            self.wakeup.notify()
            if left.result():
                thread.join()
                self._thread = None
                if not self._jobs.empty():  # more has come meanwhile
                    self._start()

    def _start(self) -> None:
        with self._starting:
            # a daemon: a worker that ends joins all other threads
            thread = threading.Thread(target=self._work, name=f"aioelastic-{self.uuid}", daemon=True)
            if self._thread is not None:
                return
            self._thread = thread
            try:
                _driver_calls.start(thread)
            except ShareLimit as exc:
                self._thread = None
                with suppress(Empty):
                    while True:
                        self._jobs.get_nowait().done.set_exception(ShareLimit(*exc.args))

    # --- in the thread ---

    def _work(self) -> None:
        ends = False
        while not ends:
            self._wait()
            while self._chores and self._do(_Job(self._chore, Future(), lambda exc: False)):
                pass
            with suppress(Empty):
                self._do(self._jobs.get_nowait())
            leaves, self._leaves = self._leaves, None
            if leaves is not None:
                ends = not self.pending and not self._again
                leaves.set_result(ends)
        if self.stream is not None:
            with suppress(SharingError):
                self._exit()

    def _wait(self) -> None:
        """Until there may be something to do."""
        left = self._looked + WATCH - time.monotonic()
        if not self.pending and not self._again:
            self.wakeup.wait(None)
            self._looked = time.monotonic()
        elif left > 0:
            self.wakeup.wait(left)
            self._look_at_events()
        else:
            self._look()

    def _do(self, job: _Job) -> bool:
        """False: there is no context, and nothing was done."""
        entered = False
        try:
            self._enter()
            entered = True
            job.work(job.done)
        except BaseException as exc:  # it is the caller's
            if job.passes(exc):
                self._again.append(job)
            else:
                with suppress(InvalidStateError):
                    job.done.set_exception(exc)
        return entered

    def _enter(self) -> None:
        """What fails now is tried again with the next job."""
        if self.stream is not None:
            return
        _driver_calls.relax()
        context = call("cuDevicePrimaryCtxRetain", self.ordinal)
        try:
            call("cuCtxSetCurrent", context)
            self._scratch = call("cuMemAlloc", 4)
            self.heeding = call("cuStreamCreate", 0)
            self.stream = call("cuStreamCreate", NON_BLOCKING)
        except BaseException:
            self._exit()
            raise

    def _exit(self) -> None:
        for stream in (self.stream, self.heeding):
            if stream is not None:
                raw("cuStreamDestroy", stream)
        if self._scratch is not None:
            raw("cuMemFree", self._scratch)
        self.stream = self.heeding = self._scratch = None
        raw("cuDevicePrimaryCtxRelease", self.ordinal)

    def record(self, stream: int) -> Any:
        """A new event behind all that a stream has been given so far. In the thread. Raises `CudaError`."""
        event = call("cuEventCreate", NO_TIMING)
        try:
            if stream == DEFAULT:
                call("cuMemsetD32Async", self._scratch, 0, 1, self.heeding)  # an event by itself is no work
                stream = self.heeding
            call("cuEventRecord", event, DEFAULT if stream == ALL else stream)
        except BaseException:
            raw("cuEventDestroy", event)
            raise
        return event

    def _chore(self, _: object) -> None:
        self._chores.popleft()()

    def _look(self) -> list[Future[None]]:
        """Try again what may have passed; a broken context notifies nobody. Returns what is waited for."""
        self._looked = time.monotonic()
        again, self._again = self._again, []
        for job in again:
            self._do(job)
        self._look_at_events()
        return [done for _, done in self.pending]

    def _look_at_events(self) -> None:
        pending, self.pending = self.pending, []
        for event, done in pending:
            try:
                if not has_come(event):
                    self.pending.append((event, done))
                    continue
                problem = None
            except Exception as exc:  # asked again, unless the GPU is lost
                if not isinstance(exc, CudaError) or not exc.for_good:
                    self.pending.append((event, done))
                    continue
                problem = exc
            with suppress(SharingError):
                raw("cuEventDestroy", event)
            if problem is None:
                done.set_result(None)
            else:
                done.set_exception(problem)


def visible() -> tuple[Seen, ...]:
    """The devices of this process. Raises `DeviceUnavailable`, `ForkedCudaError`."""
    global _seen
    check_fork()
    if _seen is None:
        may_wait()
        found = aside(_find)
        _driver_calls.initialised, _seen = True, found
        _streams.ordinals = [one.ordinal for one in found]
    return _seen


def _find() -> tuple[Seen, ...]:
    call("cuInit", 0)
    found, problem = [], None
    for ordinal in range(call("cuDeviceGetCount")):
        try:
            label = call("cuDeviceGetName", 256, ordinal).split(b"\0")[0].decode().strip()
            hexed = bytes(call("cuDeviceGetUuid", ordinal).bytes).hex()
        except CudaError as exc:
            problem = exc  # it is lost: the others are not
            continue
        uuid = "-".join(hexed[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        found.append(Seen(ordinal, f"{'MIG' if ' MIG ' in label else 'GPU'}-{uuid}", label))
    if problem is not None and not found:
        raise problem
    return tuple(found)


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
        uuids = matching(text, [one.uuid for one in seen])
        found = [one for one in seen if one.uuid in uuids]
    if len(found) > 1:
        raise SpecError("device", shown(name), f"is the beginning of {len(found)} UUIDs", "give more of it")
    if not found:
        there = ", ".join(f"cuda:{one.ordinal} is {one.uuid}" for one in seen)
        raise DeviceUnavailable(Reason.NOT_VISIBLE, f"device {text} (here, {there})")
    return _devices.setdefault(found[0].uuid, Device(found[0]))


def matching(beginning: str, uuids: Collection[str]) -> list[str]:
    """Those that are meant by a UUID of which only the beginning may be given, as CUDA_VISIBLE_DEVICES allows it."""
    return [one for one in uuids if one.startswith(beginning)]


def without_context(work: Callable[[], T]) -> T:
    """Do what needs no context, in a thread that makes none for it."""

    def alone() -> T:
        _driver_calls.relax()
        return work()

    visible()
    for one in list(_devices.values()):
        if one.stream is not None:
            return one.run(work)
    may_wait()
    return aside(alone)


def end() -> None:
    """End the threads. Contexts that nobody else uses here go with them; the next work begins new ones."""
    for one in list(_devices.values()):
        one.end()
