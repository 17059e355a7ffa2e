"""One function in an executor of the caller's: in a thread of this process, or in some other process."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pickle
import socket
import struct
import threading
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...model.validation import check_timeout
from ...system.descriptors import shut
from ..wire import datagrams, messages, pickling, sent_objects
from . import context, function_run, interpreter_exit
from .error_record import write_error
from .exceptions import describe

UNBEGUN, VALUE, PICKLED, PACKED, LEFT, EXIT, ERROR = "unbegun", "value", "pickled", "packed", "left", "exit", "error"
HEAD = struct.Struct("<xQ")  # of what is sent to a `Place`: its number, never taken for the kind of a message


class Answer(NamedTuple):
    """What came of a call: a kind, the exit code it stands for, and a value, its pickle or datagram, or (phase,
    description)."""

    kind: str
    code: int
    body: Any = None


class Place(NamedTuple):
    """Where a call in another process fetches its arguments and leaves its result: `launch/_descriptor_exchange.py`.

    Attributes:
        pid: of who serves it.
        name: of its socket.
    """

    pid: int
    name: bytes
    number: int

    def fetch(self) -> tuple[Any, ...]:
        """What is offered there. Raises `OSError`."""
        with self._connected() as sock:
            datagrams.send(sock, HEAD.pack(self.number))
            packet, fds = datagrams.receive(sock)
        try:
            return messages.decode(packet, fds, private=True)
        finally:
            datagrams.close(fds)

    def leave(self, packet: bytes, fds: Sequence[int]) -> None:
        """Raises `OSError`."""
        with self._connected() as sock:
            datagrams.send(sock, HEAD.pack(self.number) + packet, fds)

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            datagrams.connect(sock, self.name)
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if pid != self.pid:
                raise ConnectionRefusedError("whoever wanted this call has ended")
        except BaseException:
            sock.close()
            raise
        return sock


class About(NamedTuple):
    """What a call is told.

    Attributes:
        variables: those of its worker.
        lent: the process is its own for the length of the call: set the variables, and go to `cwd`.
        error_file: where to write what it raises.
        stop_at: a pipe that becomes readable to ask it to stop: (pid of its owner, descriptor there, inode).
        place: where to leave a value that holds descriptors.
    """

    variables: Mapping[str, str | None]
    lent: bool = False
    cwd: str | None = None
    error_file: str | None = None
    with_locals: bool = False
    stop_at: tuple[int, int, int] | None = None
    place: Place | None = None


class Load:
    """A function and its arguments; pickled when that is needed first, once for all ranks.

    Attributes:
        place: where they can be fetched, if they hold descriptors.
    """

    def __init__(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = name
        self.call = (fn, args, kwargs)
        self.place: Place | None = None
        self._lock = threading.Lock()
        self._pickled: bytes | None = None

    def pickled(self) -> bytes | Place:
        """As what another process can make them again of. Raises `PicklingError`."""
        with self._lock:
            if self.place is not None:
                return self.place
            if self._pickled is None:
                with self._explained():
                    self._pickled = _pickle(self.call)
            return self._pickled

    def pack(self, offer: Callable[[tuple[bytes, list[int]]], Place]) -> None:
        """For processes of this machine: what holds descriptors is offered. Raises `PicklingError`, `OSError`."""
        if self.place is not None or self._pickled is not None:
            return
        with self._explained():
            packet, fds = function_run.pack(messages.CALL, self.call)
        if fds:
            self.place = offer((packet, fds))
        else:
            self._pickled = packet

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except pickling.FAILURES as exc:
            words = f"{self.name} or its arguments cannot be pickled: {type(exc).__name__}: {exc}"
            raise pickle.PicklingError(words) from exc


class Hosted:
    """One call, to be submitted. Called where it was made it runs there; what its pickle makes runs elsewhere.

    Attributes:
        stopping: what the function sees, if it runs here.
    """

    def __init__(self, load: Load, about: About, on_ready: Callable[[], object]) -> None:
        self.stopping = Asked()
        self._load = load
        self._about = about
        self._on_ready = on_ready

    def __call__(self) -> Answer:
        if self.stopping:
            return Answer(UNBEGUN, 0)
        about = self._about
        here = context.Here(about.variables, self.stopping, self._on_ready)
        return _run(lambda: self._load.call, here, about, VALUE)

    def __reduce__(self) -> Any:
        return (functools.partial, (elsewhere, self._load.pickled(), self._about))

    def forget(self) -> None:
        """Nobody listens any more."""
        about = self._about
        variables = {key: value for key, value in about.variables.items() if not key.endswith("_ERROR_FILE")}
        self._about = about._replace(error_file=None, variables=variables)


def elsewhere(data: bytes | Place, about: About) -> Answer:
    """In another process than the one that has made the `Hosted`."""
    far = None if about.stop_at is None else Far(*about.stop_at)
    try:
        if far:
            return Answer(UNBEGUN, 0)
        here = context.Here(about.variables, Asked() if far is None else far, lambda: None)
        with _lent(about) if about.lent else contextlib.nullcontext():
            return _run(lambda: _loaded(data), here, about, PICKLED)
    finally:
        if far is not None:
            far.close()


def _run(call: Callable[[], Any], here: context.Here, about: About, kind: str) -> Answer:
    token = context.here.set(here)
    phase, pid = function_run.UNPICKLE, os.getpid()
    try:
        fn, args, kwargs = call()
        phase = function_run.RUN
        value = fn(*args, **kwargs)
        if isinstance(value, types.CoroutineType):
            value = function_run.run(value)
        if os.getpid() != pid:
            interpreter_exit.copy(0)  # what a forked copy returns is nobody's, and the calls to come are not its own
        phase = function_run.RESULT
        return Answer(kind, 0, value) if kind == VALUE else _answer(value, about.place)
    except BaseException as exc:  # it is the caller's
        if os.getpid() != pid:
            interpreter_exit.copy(
                interpreter_exit.code_of(exc) if isinstance(exc, SystemExit) else interpreter_exit.tell(exc)
            )
        if isinstance(exc, SystemExit) and phase == function_run.RUN:
            code = interpreter_exit.code_of(exc)
            return Answer(EXIT, code) if code else Answer(VALUE, 0)
        file = about.error_file
        # its directory is gone once nobody listens any more
        if isinstance(exc, Exception | KeyboardInterrupt) and file and os.path.isdir(os.path.dirname(file)):
            write_error(exc, file)
        told = describe(exc, 1, about.with_locals, pack=kind == PICKLED)
        return Answer(ERROR, 1, (phase, told, None if kind == PICKLED else exc))
    finally:
        context.here.reset(token)


def _loaded(data: bytes | Place) -> Any:
    if isinstance(data, Place):
        return data.fetch()
    return messages.decode(data, (), private=True) if data[:1] == messages.CALL else pickle.loads(data)


def _answer(value: Any, place: Place | None) -> Answer:
    """A value for another process."""
    if place is None:
        return Answer(PICKLED, 0, _pickle(value))
    packet, fds = function_run.pack(messages.OBJECT, (value,))
    if not fds:
        return Answer(PACKED, 0, packet)
    try:
        place.leave(packet, fds)
    finally:
        datagrams.close(fds)
    return Answer(LEFT, 0, place.number)


def _pickle(value: Any) -> bytes:
    try:
        return pickling.dumps(value)[0]
    except pickling.FAILURES as exc:
        if not pickling.is_pickles_own(exc) or messages.by_value() is None:
            raise
    return pickling.dumps(value, by_value=True)[0]


@contextlib.contextmanager
def _lent(about: About) -> Iterator[None]:
    """This process has its variables and directory for a while."""
    before = {name: os.environ.get(name) for name in about.variables}
    home = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _set(about.variables)
        if about.cwd is not None:
            os.chdir(about.cwd)
        yield
    finally:
        _set(before)
        os.fchdir(home)
        shut(home)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Asked(context.Stopping):
    """Where the asking is a call from another thread of the same process."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._wakes: set[Callable[[], object]] = set()

    def ask(self) -> None:
        """From any thread."""
        with self._lock:
            self._event.set()
            for wake in self._wakes:
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    wake()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        seconds = check_timeout("timeout", timeout)
        return self._event.wait(None if seconds == math.inf else seconds)

    def __await__(self) -> Generator[Any, None, None]:
        import asyncio

        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        wake = functools.partial(loop.call_soon_threadsafe, sent_objects.settle, asked)
        with self._lock:
            if self._event.is_set():
                return
            self._wakes.add(wake)
        try:
            yield from asked
        finally:
            with self._lock:
                self._wakes.discard(wake)


class Far(context.Stopping):
    """Where the asking is a byte in a pipe of another process of this machine."""

    def __init__(self, pid: int, fd: int, inode: int) -> None:
        self._asked = False
        try:
            self._fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if os.fstat(self._fd).st_ino == inode:
                return
            shut(self._fd)
        except (FileNotFoundError, ProcessLookupError):
            pass
        # it is closed: nobody wants us to go on
        self._asked = True
        self._fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __bool__(self) -> bool:
        return self.wait(0)

    def close(self) -> None:
        """The call is over."""
        shut(self._fd)
