"""Messages between a supervisor and its workers, sans I/O: to and from one datagram and its file descriptors.

A datagram (unix(7), SOCK_SEQPACKET) is a kind (one byte), where its body is (one byte), and the body: a pickle, and
buffers out of band (PEP 574). A body that is large is in a memfd that travels beside it, and each large buffer in one
of its own: it is written once by the sender and mapped by the receiver, never squeezed through the socket, and who
keeps one keeps nothing else. What is small is copied by the receiver. Arrays are told apart from the pickle by
`aioelastic.memory`, which is imported when there can be any: those that are shared travel as the descriptors of their
segments, in front of those of the copies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

from ...system import shared_memory_names
from ...system.descriptors import into, shut_all
from ..kernel.libc import mapped
from . import datagrams, main_names, pickling

# supervisor → worker, both before it starts
SETUP = (
    b"U"  # (what `host_program.own` says, main, whether locals are wanted, key, whether a tracker's pipe comes first)
)
CALL = b"C"  # (function, args, kwargs)
# worker → supervisor
RUNS = b"N"  # ready(): ()
# supervisor → a worker of an executor
TASK = b"K"  # (function, args, kwargs)
# and back; before the body, the worker's resident size in bytes (8 bytes, little-endian), or 0
DONE = b"D"  # (value,)
FAILED = b"L"  # as ERROR
VALUE = b"V"  # (value,)
ERROR = b"E"  # what `exceptions.describe` says, and the phase: JSON, which can be read safely (`exceptions.tell`)

# between a supervisor and a function, both ways: what `send` is given
OBJECT = b"O"  # (value,)
# in a `sharing.Queue`; its last descriptor is the item's place
ITEM = b"I"  # (value,)

INLINE = 32_768  # bytes a body may have beside its datagram: several wait in a socket of the default size
APART = 16_384  # bytes from which a buffer is worth a place of its own
FOREIGN = "not a message of aioelastic's"
SHORT = 512  # characters of a text that is not looked at
MANY = 1_000  # values of a list of which none is looked at by itself
ALONE = 65_536  # bytes from which a body or buffer is copied into memory that was used before, a buffer one of its own
MOST = 32  # buffers of a message that have memory of their own: the largest
# where a body is: a pickle, here; pieces in a memfd; pieces here; and whether there are arrays among them
_HERE, _MEMFD, _PIECES, _ARRAYS = 0, 1, 2, 4
_SLOW = 8  # and whether whoever unpickles it waits for the driver of a GPU
_MAIN = 16  # and whether something in it is found in the main module
_ALONE = 32  # and whether there are buffers with memory of their own: their number is the last byte
_OF_MAIN = 64  # and whether something in it is of the main module, if it is found there or travels itself
_OWN = 1 << 63  # added to the size of such a buffer
_PLAIN = frozenset((bool, int, float, type(None)))
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_NOT_PLAIN = (main_names.NAME, main_names.ALIAS, None)  # modules of functions
_ALIAS = main_names.ALIAS.encode()
_ONCE = (SETUP, CALL, VALUE)  # one such message in a life: there is nothing to be used again
_WITH_GPUS = frozenset(("torch.cuda", "cupy", "numba.cuda.cudadrv.devicearray"))  # libraries that may have arrays there
_ALIGN = 64  # of buffers, for vector instructions
# bytes in front of a buffer that has memory of its own. Most begin 16 or 64 bytes behind a page, and what is copied to
# the beginning of one is copied at half the speed: loads seem to depend on stores that are a multiple of 4 KiB away
_GAP = 1024

Dumps = Callable[..., bytes]
on_main: Callable[[], None] | None = None  # in a worker: what imports the main module, for a message that needs it
_memory: Any = None  # `aioelastic.memory`, once there were arrays


def encode(
    kind: bytes,
    body: tuple[Any, ...],
    by_value: bool = False,
    fds: list[int] | None = None,
    inline: int = INLINE,
    for_others: bool = False,
    read_only: bool = False,
) -> tuple[bytes, list[int]]:
    """A datagram, and the descriptors to send beside it, which the caller closes.

    Args:
        by_value: functions and classes that cannot be found by name travel themselves, by cloudpickle.
        fds: an empty list for them, in which each is from its first moment on.
        inline: bytes that the body may have beside its datagram.
        for_others: processes of other users may get it: there is nothing in it but the body.
        read_only: who gets it cannot write to the shared arrays in it.

    Raises:
        BaseException: whatever the pickling of `body` raises.
        OSError: out of memory or descriptors.
    """
    fds = [] if fds is None else fds
    try:
        return _encoded(kind, body, by_value, fds, inline, for_others, read_only), fds
    except BaseException:
        shut_all(fds)
        raise


def _encoded(
    kind: bytes,
    body: tuple[Any, ...],
    by_value: bool,
    fds: list[int],
    inline: int,
    for_others: bool,
    read_only: bool,
) -> bytes:
    if not by_value and _is_plain(body):
        try:
            return packed(kind, 0, [memoryview(pickle.dumps(body, protocol=5))], fds, inline)
        except pickling.FAILURES:
            pass  # it has a function that is not what its name says: told below
    apart: list[memoryview] = []

    def place(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True  # not contiguous
        if raw.nbytes < APART:
            return True
        apart.append(raw)
        return False

    loaded = memory()
    if loaded is None:
        pickled, main = pickling.dumps(body, place, by_value)
        return packed(kind, _main_flags(main, by_value, pickled), [memoryview(pickled), *apart], fds, inline)
    message = loaded.outgoing()
    message.last, message.fds = kind == VALUE, fds
    message.for_others, message.read_only = for_others, read_only
    try:
        pickled, main = pickling.dumps(body, place, by_value, message)
        data, what = memoryview(pickled), _main_flags(main, by_value, pickled)
        found = message.finish()
        store = None if kind in _ONCE else partial(loaded.store, for_others=for_others)
        if found is None:
            packet = packed(kind, what, [data, *apart], fds, inline, store)
        else:
            table, arrays = found
            what |= _ARRAYS | (_SLOW if message.slow else 0)
            packet = packed(kind, what, [data, memoryview(table), *arrays, *apart], fds, inline, store, len(arrays))
        message.over()
        return packet
    except BaseException:
        message.clear()
        raise


def _main_flags(main: bool, by_value: bool, pickled: bytes) -> int:
    if not main:
        # pickle looks for what does not say its module in all that there are
        return _OF_MAIN if _ALIAS in pickled else 0
    return _OF_MAIN if by_value else _OF_MAIN | _MAIN


def check(value: Any, for_others: bool, read_only: bool, trial: bool) -> None:
    """Whether memory in it may go to those, as `for_others` and `read_only` of `encode` say; nothing is copied.

    Args:
        trial: nothing is changed either. Otherwise what is made read-only, or for others, is that from now on.

    Raises:
        BaseException: whatever the pickling raises.
    """
    loaded = memory()
    if loaded is None:
        return
    message = loaded.outgoing()
    message.for_others, message.read_only, message.trial = for_others, read_only, trial
    try:
        pickling.dumps((value,), lambda _: False, False, message)
    finally:
        shut_all(message.fds)
        message.clear()


def _is_plain(body: tuple[Any, ...]) -> bool:
    """Whether there is nothing in it to be looked at: one small value, or a call of a function of some module with such
    arguments; or a list of such, or several calls."""
    if len(body) == 3:
        fn, args, kwargs = body
        if type(fn) not in _FUNCTIONS or fn.__module__ in _NOT_PLAIN or type(args) is not tuple or len(args) > 8:
            return False
        if type(kwargs) is not dict or kwargs:
            return False
        body = args
    elif len(body) > 1:
        return False
    for value in body:  # noqa: SIM110  # a generator takes longer
        if type(value) not in _PLAIN and not _is_plain_too(value, 2):
            return False
    return True


def _is_plain_too(value: Any, depth: int) -> bool:
    """What is no number; of lists and tuples in one another so many."""
    kind = type(value)
    if kind is str:
        return len(value) < SHORT
    if kind is list or kind is tuple:
        if depth == 0 or len(value) > MANY:
            return False
        if _PLAIN.issuperset(map(type, value)):
            return True
        return all(type(one) in _PLAIN or _is_plain_too(one, depth - 1) for one in value)
    return kind in _FUNCTIONS and value.__module__ not in _NOT_PLAIN


def packed(
    kind: bytes,
    what: int,
    pieces: list[memoryview],
    fds: list[int],
    inline: int = INLINE,
    store: Any = None,
    arrays: int = 0,
) -> bytes:
    """The datagram of these pieces, of which the first is the pickle. Descriptors for it are added to `fds`."""
    sizes = [one.nbytes for one in pieces]
    if len(pieces) == 1 and sizes[0] <= inline:
        return kind + bytes((_HERE | what,)) + pieces[0]
    alone: list[int] = []
    if len(sizes) > 1 and max(sizes[1:]) >= ALONE:
        largest = sorted((-size, number) for number, size in enumerate(sizes) if number and size >= ALONE)[:MOST]
        alone = sorted(number for _, number in largest)
        for number in alone:
            sizes[number] |= _OWN
    body = [memoryview(struct.pack(f"<{len(sizes) + 2}Q", len(sizes), arrays, *sizes))]
    body += [one for number, one in enumerate(pieces) if number not in alone] if alone else pieces
    bodies = [[pieces[number]] for number in alone]
    what |= _ALONE if alone else 0
    if sum([one.nbytes for one in body]) + _ALIGN * len(body) <= inline:
        packet = bytearray(kind + bytes((_PIECES | what,)))
        for piece in body:
            packet += bytes(-(len(packet) - 2) % _ALIGN)
            packet += piece
    else:
        packet = bytearray(kind + bytes((_MEMFD | what,)))
    others = len(fds)
    try:
        if packet[1] & _MEMFD and store is not None and sum([one.nbytes for one in body]) >= ALONE:
            store([body], fds, now=True)  # the pickle may be looked at
        elif packet[1] & _MEMFD:
            _memfd(body, fds)
        if store is not None and bodies:
            store(bodies, fds, _GAP)
        else:
            for one in bodies:
                _memfd(one, fds, _GAP)
    except (OSError, MemoryError) as exc:
        if not _is_too_large(exc):
            raise
        shut_all(fds[others:])
        del fds[others:]
        return _in_pipes(kind, what & ~_ALONE, pieces, fds, arrays)
    return bytes(packet + bytes((len(alone),)) if alone else packet)


def _is_too_large(exc: BaseException) -> bool:
    """For RLIMIT_FSIZE."""
    return errno.EFBIG in (getattr(exc, "errno", 0), getattr(exc.__cause__, "errno", 0))


def _in_pipes(kind: bytes, what: int, pieces: list[memoryview], fds: list[int], arrays: int) -> bytes:
    """The datagram of these pieces, in as many pipes as its last byte says, but for the first."""
    sizes = [one.nbytes for one in pieces]
    body = [memoryview(struct.pack(f"<{len(sizes) + 2}Q", len(sizes), arrays, *sizes))]
    at = body[0].nbytes
    for piece in pieces:
        body += [memoryview(bytes(-at % _ALIGN)), piece]
        at += -at % _ALIGN + piece.nbytes
    pipes = datagrams.in_pipes(body)
    fds += pipes
    return kind + bytes((_MEMFD | what | _ALONE, len(pipes) - 1))


def _memfd(pieces: list[memoryview], fds: list[int], gap: int = 0) -> None:
    """A new one, of these pieces behind so many bytes, added to `fds`, also where it cannot be filled."""
    into(fds, os.memfd_create, "aioelastic", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd, at = fds[-1], gap
    for piece in pieces:
        at += -at % _ALIGN
        while piece:
            done = os.pwrite(fd, piece, at)
            piece, at = piece[done:], at + done
    os.ftruncate(fd, at)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)  # or nobody would map it


def taken_in(fd: int) -> memoryview:
    """What is in the memfd of a message that is not sent yet: it is kept so without a descriptor.

    Raises:
        OSError: it is in a pipe, from which it could be read once.
    """
    if datagrams.is_pipe(fd):
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
    return shared_memory_names.contents(fd, os.fstat(fd).st_size)


def taken_out(body: memoryview) -> int:
    """A memfd with that in it. Raises `OSError`."""
    fds: list[int] = []
    try:
        _memfd([body], fds)
    except BaseException:
        shut_all(fds)
        raise
    return fds[0]


def decode(packet: bytes, fds: Sequence[int], private: bool = False) -> tuple[Any, ...]:
    """The body of a datagram whose kind is `packet[:1]`. `fds` stay the caller's.

    Args:
        private: what comes by memfd is also somebody else's: writing to it shall not be seen there.

    Raises:
        Exception: whatever unpickling raises.
    """
    if packet[1:2] == b"\0":  # `_HERE`, as most are
        body = pickle.loads(memoryview(packet)[2:])
    else:
        if len(packet) > 1 and packet[1] & _MAIN and on_main is not None:
            on_main()
        (data, *pieces), arrays = unpacked(packet, fds, private)
        if not packet[1] & _ARRAYS:
            body = pickle.loads(data, buffers=pieces)
        else:
            table, *pieces = pieces
            incoming = _with_arrays().Incoming(table, pieces[:arrays], fds)
            body = incoming.loads(data, pieces[arrays:])
    if not isinstance(body, tuple):
        raise ValueError(FOREIGN)
    return body


def is_of_main(packet: bytes) -> bool:
    """Whether something in it is of the main module of who has sent it."""
    return len(packet) > 1 and bool(packet[1] & _OF_MAIN)


def needs_main(packet: bytes) -> bool:
    """Whether something in it is found in the main module of who has sent it."""
    return bool(packet[1] & _MAIN)


def by_value() -> Dumps | None:
    """cloudpickle's `dumps`, for what cannot be found by name; None where it is not installed."""
    try:
        from cloudpickle import dumps
    except ImportError:
        return None
    return cast("Dumps", dumps)


def copies(packet: bytes) -> int:
    """How many of the descriptors beside this datagram, the last ones, hold its body and large buffers."""
    return (_where(packet) == _MEMFD) + (packet[-1] if packet[1] & _ALONE else 0)


def _where(packet: bytes) -> int:
    return packet[1] & (_HERE | _MEMFD | _PIECES)


def is_slow(packet: bytes) -> bool:
    """Whether unpickling it waits for the driver of a GPU: it is not to be done on an event loop."""
    return len(packet) > 1 and bool(packet[1] & _SLOW)


def memory() -> Any:
    """`aioelastic.memory`, where there can be arrays in a message: it is loaded, or a library that has them."""
    loaded = sys.modules
    if "aioelastic.gpu" not in loaded and not _WITH_GPUS.isdisjoint(loaded):
        from ... import gpu  # noqa: F401  # it adds itself
    if _memory is None and ("aioelastic.memory" in loaded or "numpy" in loaded or "torch" in loaded):
        return _with_arrays()
    return _memory


def _with_arrays() -> Any:
    global _memory
    if _memory is None:
        from ... import memory  # few messages have arrays

        _memory = memory  # an import statement takes longer than the rest of a message
    return _memory


def unpacked(packet: bytes, fds: Sequence[int], private: bool) -> tuple[list[memoryview], int]:
    """The pickle and what is beside it, and how many of that are arrays."""
    where = _where(packet) if len(packet) > 1 else -1
    if where == _HERE:
        return [memoryview(packet)[2:]], 0
    alone = list(fds[max(len(fds) - copies(packet), 0) :]) if where in (_MEMFD, _PIECES) else []
    if where == _PIECES:
        whole = memoryview(packet)[2:]
    elif where == _MEMFD and alone:
        fd = alone.pop(0)
        if datagrams.is_pipe(fd):
            whole = memoryview(datagrams.out_of_pipes([fd, *alone]))
        else:
            whole = mapped(fd, shared_memory_names.check_fixed(fd).st_size, True)
    else:
        raise ValueError(FOREIGN)
    try:
        count, arrays = struct.unpack_from("<2Q", whole)
        sizes = struct.unpack_from(f"<{count}Q", whole, 16)
    except (struct.error, OverflowError):
        raise ValueError(FOREIGN) from None
    at, pieces = 8 * (count + 2), list[memoryview]()
    first = 2 if packet[1] & _ARRAYS else 1
    for marked in sizes:
        size = marked & ~_OWN
        if marked & _OWN:
            if not alone or not pieces:
                raise ValueError(FOREIGN)
            held = _with_arrays().received(alone.pop(0), _GAP + size, private)
            pieces.append(held[_GAP:])
            continue
        at += -at % _ALIGN
        if at + size > len(whole):
            raise ValueError(FOREIGN)
        one = whole[at : at + size]
        # who keeps one keeps nothing else; the pickle, and the table of arrays, are only read
        pieces.append(memoryview(bytearray(one)) if len(pieces) >= first else one)
        at += size
    if not pieces:
        raise ValueError(FOREIGN)
    return pieces, arrays
