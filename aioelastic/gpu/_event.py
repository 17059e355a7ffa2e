"""Events of a GPU between processes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

from .. import memory
from ..errors import SpecError
from ..shown import shown
from . import _driver
from ._block import arena_of
from ._driver import NOT_READY, bindings, call, raw, torch_stream
from ._ticket import EVENT, Ticket, What, admit, issue, lend
from ._wait import after, waited_for

_BETWEEN_PROCESSES = 2 | 4  # CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS
_HANDLE = 64


class _Raw:
    """The driver's event: destroyed when nobody here has it, and nobody elsewhere holds its ticket."""

    def __init__(self, uuid: str, handle: Any, ticket: Ticket | None) -> None:
        self.uuid = uuid
        self.ticket = ticket  # that it came by
        self._handle = [handle]
        weakref.finalize(self, _destroy, uuid, self._handle, ticket).atexit = False

    def handle(self) -> Any:
        """In the thread of its device."""
        if self._handle[0] is None:
            assert self.ticket is not None
            other = bindings().CUipcEventHandle()
            ctypes.memmove(other.getPtr(), self.ticket.what.handle, _HANDLE)
            self._handle[0] = call("cuIpcOpenEventHandle", other)
        return self._handle[0]


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
        self._raw = _Raw(where.uuid, where.run(lambda: call("cuEventCreate", _BETWEEN_PROCESSES)), None)

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
        self._run(lambda: call("cuEventRecord", self._raw.handle(), number))

    def wait(self, stream: Any = None) -> None:
        """What the stream is given from now on is done after the event, as it was recorded last."""
        number = self._stream(stream)
        self._run(lambda: call("cuStreamWaitEvent", number, self._raw.handle(), 0))

    def query(self) -> bool:
        """Whether it has come; also true when it was never recorded."""

        def ask() -> bool:
            status, *_ = raw("cuEventQuery", self._raw.handle())
            if status not in (0, NOT_READY):
                call("cuEventQuery", self._raw.handle())  # raises
            return bool(status == 0)

        return self._run(ask)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait for it, in this thread. In an event loop, `await` it."""
        self._come().result()

    def __await__(self) -> Generator[Any, None, None]:
        import asyncio

        return asyncio.wrap_future(self._come()).__await__()

    def _come(self) -> Future[None]:
        done = waited_for()
        self._check()
        device = _driver.device(self.uuid)

        def begin() -> None:
            try:
                after(device, [self._raw.handle()], done)
            except BaseException as exc:
                done.set_exception(exc)

        device.post(begin)
        return done

    def _run(self, work: Any) -> Any:
        self._check()
        return _driver.device(self.uuid).run(work)

    def _check(self) -> None:
        _driver.check_fork()
        if self._raw.ticket is not None:
            self._raw.ticket.check()

    def _stream(self, stream: Any) -> int:
        if stream is None:
            return torch_stream(_driver.device(self.uuid).ordinal) or 0
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
        with memory.gate:
            return (_rebuild, (message.slot(mine.ticket),))
    device = _driver.device(mine.uuid)
    arena_of(device)  # by which `sharing.trim` finds what was lent

    def make() -> Ticket:
        told = device.run(lambda: call("cuIpcGetEventHandle", mine.handle()))
        handle = ctypes.string_at(told.getPtr(), _HANDLE)
        with memory.gate:
            ticket: Ticket = issue(Ticket, What(EVENT, mine.uuid, 0, handle=handle), [], mine)
            return ticket

    return (_rebuild, (lend((EVENT, id(mine)), make, message.slot),))


def _rebuild(slot: int) -> GpuEvent:
    message = memory.incoming()
    one = GpuEvent.__new__(GpuEvent)
    with memory.gate:
        ticket: Ticket = admit(Ticket, message, slot)
        if ticket.owned:
            one._raw = ticket.hold
            return one
        ticket.loans += 1
    one._raw = _Raw(ticket.where, None, ticket)
    return one


def _destroy(uuid: str, box: list[Any], ticket: Ticket | None) -> None:
    """A finalizer: it never waits."""
    handle = box[0]

    def work() -> None:
        if handle is not None:
            raw("cuEventDestroy", handle)
        if ticket is not None:
            memory.gate.soon(ticket._returned)

    if handle is not None:
        _driver.device(uuid).post(work)
    elif ticket is not None:
        memory.gate.soon(ticket._returned)


memory.carry(GpuEvent, _reduce)
