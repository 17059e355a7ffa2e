"""Events of a GPU between processes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from .. import memory
from ..model.errors import SpecError
from ..model.text import shown
from . import _driver
from ._block import arena_of
from ._completion import after
from ._driver_calls import LEGACY, PER_THREAD, bindings, call, check_capture, check_fork, has_come, here, raw
from ._streams import torch_stream
from ._ticket import EVENT, Ticket, What, admit, issue, lend

T = TypeVar("T")

_BETWEEN_PROCESSES = 2 | 4  # CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS
_HANDLE = 64


class _Raw:
    """The driver's event: destroyed when nobody here has it, and nobody elsewhere holds its ticket."""

    def __init__(self, uuid: str, ticket: Ticket | None, *opened: Any) -> None:
        self.uuid = uuid
        self.ticket = ticket  # that it came by
        self._opened = [*opened]  # its device, and its handle
        weakref.finalize(self, _destroy, self._opened, ticket).atexit = False

    def handle(self) -> Any:
        """In the thread of its device."""
        if not self._opened:
            assert self.ticket is not None
            other = bindings().CUipcEventHandle()
            ctypes.memmove(other.getPtr(), self.ticket.what.handle, _HANDLE)
            self._opened += [_driver.device(self.uuid), call("cuIpcOpenEventHandle", other)]
        return self._opened[1]


class GpuEvent:
    """A point in the work of a GPU that streams of several processes can wait for.

    It travels like an array: in arguments and results of workers, by `send`, in a queue. Whoever has it may record it
    again. It ends with the process that made it (`ShareLost`).

    Args:
        device: `"cuda:0"`, or the UUID of a GPU.

    Raises:
        DeviceUnavailable: that GPU is not here.

    Example::

        event = gpu.GpuEvent("cuda:0")
        event.record(stream)       # torch's, cupy's, numba's, or a number
        await event                # or event.wait(other_stream), in any process that has it
    """

    __slots__ = ("__weakref__", "_raw")

    def __init__(self, device: Any = "cuda") -> None:
        where = _driver.device(device)
        self._raw = _Raw(where.uuid, None, where, where.run(lambda: call("cuEventCreate", _BETWEEN_PROCESSES)))

    @property
    def uuid(self) -> str:
        """Of its GPU."""
        return self._raw.uuid

    def record(self, stream: Any = None) -> None:
        """It comes when all is done that the stream has been given so far.

        Args:
            stream: torch's, cupy's, numba's, any with `__cuda_stream__`, or its address; the one on which torch works
                in this thread when not given, or the default one.
        """
        number = self._stream(stream)
        self._put(number, lambda: call("cuEventRecord", self._raw.handle(), number))

    def wait(self, stream: Any = None) -> None:
        """What the stream is given from now on is done after the event, as it was recorded last.

        Args:
            stream: as for `record`.
        """
        number = self._stream(stream)
        self._put(number, lambda: call("cuStreamWaitEvent", number, self._raw.handle(), 0))

    def query(self) -> bool:
        """Whether it has come; also true when it was never recorded."""
        return self._run(lambda: has_come(self._raw.handle()))

    def synchronize(self) -> None:
        """Wait for it, in this thread. In an event loop, `await` it."""
        self._come().result()

    def __await__(self) -> Generator[Any, None, None]:
        import asyncio

        return asyncio.wrap_future(self._come()).__await__()

    def _come(self) -> Future[None]:
        self._check()
        device = _driver.device(self.uuid)
        return device.begin(lambda done: after(device, [self._raw.handle()], done))

    def _put(self, stream: int, work: Callable[[], Any]) -> None:
        """Into a stream; that of a thread means another one in the thread of the device, and the default one breaks the
        captures of those that heed it."""
        if stream <= LEGACY:
            self._run(lambda: check_capture(stream))
        if stream == PER_THREAD:
            self._run(self._raw.handle)
            with here(_driver.device(self.uuid).ordinal):
                work()
        else:
            self._run(work)

    def _run(self, work: Callable[[], T]) -> T:
        self._check()
        return _driver.device(self.uuid).run(work)

    def _check(self) -> None:
        check_fork()
        if self._raw.ticket is not None:
            self._raw.ticket.check()

    def _stream(self, stream: Any) -> int:
        if stream is None:
            return torch_stream(_driver.device(self.uuid).ordinal)
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        for name in ("cuda_stream", "ptr", "handle"):
            value = getattr(stream, name, None)
            if value is not None:
                return int(getattr(value, "value", value) or 0)
        if isinstance(stream, int) and not isinstance(stream, bool):
            return stream
        raise SpecError("stream", shown(stream), "is no stream", "give one of torch, cupy or numba, or its address")

    def __reduce__(self) -> Any:
        raise memory.NotShareable("an event travels in arguments of workers, by worker.send() and in queues only")

    def __repr__(self) -> str:
        return f"<GpuEvent on {self.uuid}>"


def _reduce(one: GpuEvent, message: memory.Outgoing) -> Any:
    mine = one._raw
    one._check()
    if mine.ticket is None and message.last:
        raise memory.NotShareable("an event ends with its process, which ends now; make it where it is needed longest")
    if mine.ticket is not None:
        return (_rebuild, (message.slot(mine.ticket),))
    device = _driver.device(mine.uuid)
    arena_of(device)  # by which `sharing.trim` finds what was lent

    def make() -> Ticket:
        told = device.run(lambda: call("cuIpcGetEventHandle", mine.handle()))
        handle = ctypes.string_at(told.getPtr(), _HANDLE)
        ticket: Ticket = issue(Ticket, What(EVENT, mine.uuid, 0, handle=handle), [], mine)
        return ticket

    return (_rebuild, (lend((EVENT, id(mine)), make, message.slot),))


def _rebuild(slot: int) -> GpuEvent:
    message = memory.incoming()
    one = GpuEvent.__new__(GpuEvent)
    ticket: Ticket = admit(Ticket, message, slot)
    if ticket.owned:
        one._raw = ticket.hold
        return one
    one._raw = _Raw(ticket.where, ticket)
    return one


def _destroy(opened: list[Any], ticket: Ticket | None) -> None:
    """A finalizer: it never waits, and in a forked copy the driver's event is not its own."""

    def work(ticket: Ticket | None = ticket) -> None:  # whose lease ends with this
        raw("cuEventDestroy", opened[1])

    if opened:
        opened[0].soon(work)


memory.carry(GpuEvent, _reduce)
