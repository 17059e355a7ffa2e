"""Messages between a supervisor and its workers, sans I/O: to and from one datagram and its file descriptors.

A datagram (unix(7), SOCK_SEQPACKET) is a kind (one byte), where its body is (one byte), and the body: a pickle. A body
that is large, or has large buffers out of band (PEP 574), is in a memfd that travels beside it: it is written once by
the sender and mapped by the receiver, never squeezed through the socket. Arrays are told apart from the pickle by
`aioelastic.memory`, which is imported when there can be any: those that are shared travel as the descriptors of their
segments, behind that of the body.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from .. import shm

# supervisor → worker, both before it starts
SETUP = b"U"  # (sys.path, sys.argv, main, whether locals are wanted)
CALL = b"C"  # (function, args, kwargs)
# worker → supervisor
RUNS = b"N"  # ready(): ()
# supervisor → a worker of an executor; before the body, a byte: whether it needs the main module
TASK = b"K"  # (function, args, kwargs)
# and back; before the body, the worker's resident size in bytes (8 bytes, little-endian), or 0
DONE = b"D"  # (value,)
FAILED = b"L"  # as ERROR
VALUE = b"V"  # (value,)
ERROR = b"E"  # (phase, what `_failure.describe` says)

# between a supervisor and a function, both ways: what `send` is given
OBJECT = b"O"  # (value,)
# in a `sharing.Queue`; its last descriptor is the item's place
ITEM = b"I"  # (value,)

INLINE = 32_768  # bytes a body may have beside its datagram: several wait in a socket of the default size
APART = 16_384  # bytes from which a buffer is worth a place of its own
SHORT = 512  # the same for an item of a queue: 128 of them fit into one socket
POOL = 65_536  # bytes from which a body is copied into memory that was used before
# where a body is: a pickle, here; pieces in a memfd; pieces here; and whether there are arrays among them
_HERE, _MEMFD, _PIECES, _ARRAYS = 0, 1, 2, 4
_SLOW = 8  # and whether whoever unpickles it waits for the driver of a GPU
_PLAIN = (bool, int, float, type(None))
_ONCE = (SETUP, CALL, VALUE)  # one such message in a life: there is nothing to be used again
_WITH_GPUS = frozenset(("torch.cuda", "cupy", "numba.cuda.cudadrv.devicearray"))  # libraries that may have arrays there
_ALIGN = 64  # of buffers, for vector instructions

Dumps = Callable[..., bytes]
_memory: Any = None  # `aioelastic.memory`, once there were arrays


def encode(kind: bytes, body: tuple[Any, ...], dumps: Dumps = pickle.dumps) -> tuple[bytes, list[int]]:
    """A datagram, and the memfd to send beside it, which the caller closes.

    Args:
        dumps: `pickle.dumps`, or one that can do more, as cloudpickle's.

    Raises:
        Exception: whatever the pickling of `body` raises.
        OSError: out of memory or descriptors.
    """
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

    loaded = memory() if body and not _is_plain(body) else None
    if loaded is None:
        return _packed(kind, 0, [memoryview(dumps(body, protocol=5, buffer_callback=place)), *apart], None)
    message = loaded.outgoing()
    message.last = kind == VALUE
    data = memoryview(message.dumps(body, place, dumps is not pickle.dumps))
    try:
        found = message.finish()
        store = None if kind in _ONCE else loaded.store
        if found is None:
            packet, fds = _packed(kind, 0, [data, *apart], store)
        else:
            table, arrays = found
            what = _ARRAYS | (_SLOW if message.slow else 0)
            packet, fds = _packed(kind, what, [data, memoryview(table), *arrays, *apart], store, len(arrays))
            fds += message.fds
        message.over()
        return packet, fds
    except BaseException:
        message.close()
        raise


def _is_plain(body: tuple[Any, ...]) -> bool:
    """Whether it is one small value in which there is no array."""
    value = body[0]
    return len(body) == 1 and (type(value) in _PLAIN or (type(value) is str and len(value) < SHORT))


def _packed(
    kind: bytes, what: int, pieces: list[memoryview], store: Any = None, arrays: int = 0
) -> tuple[bytes, list[int]]:
    """The datagram of these pieces, of which the first is the pickle."""
    sizes = [one.nbytes for one in pieces]
    inline = SHORT if kind == ITEM else INLINE
    if len(pieces) == 1 and sizes[0] <= inline:
        return kind + bytes((_HERE,)) + pieces[0], []
    head = struct.pack(f"<{len(sizes) + 2}Q", len(sizes), arrays, *sizes)
    if sum(sizes) + (len(sizes) + 1) * _ALIGN <= inline:
        out = bytearray(kind + bytes((_PIECES | what,)))
        for piece in (memoryview(head), *pieces):
            out += bytes(-(len(out) - 2) % _ALIGN)
            out += piece
        return bytes(out), []
    small = bytearray(head)  # what is, is written as one
    joined = next((number for number, size in enumerate(sizes) if size >= APART), len(sizes))
    for piece in pieces[:joined]:
        small += bytes(-len(small) % _ALIGN)
        small += piece
    placed, at = [(0, memoryview(small))], len(small)
    for piece in pieces[joined:]:
        at += -at % _ALIGN
        placed.append((at, piece))
        at += piece.nbytes
    packet = kind + bytes((_MEMFD | what,))
    if store is not None and at >= POOL:
        return packet, [store(placed, at, 1 if joined else 2)]  # the pickle may be looked at
    fd = os.memfd_create("aioelastic", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for offset, piece in placed:
            while piece:
                done = os.pwrite(fd, piece, offset)
                piece, offset = piece[done:], offset + done
        os.ftruncate(fd, at)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)  # or nobody would map it
    except BaseException:
        os.close(fd)
        raise
    return packet, [fd]


def decode(packet: bytes, fds: Sequence[int], private: bool = False) -> tuple[Any, ...]:
    """The body of a datagram whose kind is `packet[:1]`. A memfd in front of `fds` is used up (closed by the caller).

    Args:
        private: what comes by memfd is also somebody else's: writing to it shall not be seen there.

    Raises:
        Exception: whatever unpickling raises.
    """
    # what is unpickled holds on to the mapping as long as it uses one of the buffers
    (data, *pieces), arrays = _pieces(packet, fds, private)
    if not packet[1] & _ARRAYS:
        body = pickle.loads(data, buffers=pieces)
    else:
        table, pieces = pieces[0], pieces[1:]
        with _with_arrays().Incoming(table, pieces[:arrays], fds[1:] if in_memfd(packet) else fds):
            body = pickle.loads(data, buffers=pieces[arrays:])
    if not isinstance(body, tuple):
        raise ValueError("not a message of aioelastic's")
    return body


def pickled(packet: bytes, fds: Sequence[int]) -> bytes:
    """The pickle in it, without its large buffers."""
    return bytes(_pieces(packet, fds, True)[0][0])


def by_value() -> Dumps | None:
    """cloudpickle's `dumps`, for what cannot be found by name; None where it is not installed."""
    try:
        from cloudpickle import dumps
    except ImportError:
        return None
    return cast(Dumps, dumps)


def in_memfd(packet: bytes) -> bool:
    """Whether the first descriptor beside this datagram holds its body."""
    return packet[1] & ~(_ARRAYS | _SLOW) == _MEMFD


def is_slow(packet: bytes) -> bool:
    """Whether unpickling it waits for the driver of a GPU: it is not to be done on an event loop."""
    return bool(packet[1] & _SLOW)


def memory() -> Any:
    """`aioelastic.memory`, where there can be arrays in a message: it is loaded, or a library that has them."""
    loaded = sys.modules
    if "aioelastic.gpu" not in loaded and not _WITH_GPUS.isdisjoint(loaded):
        from .. import gpu  # noqa: F401  # it adds itself
    if _memory is None and ("aioelastic.memory" in loaded or "numpy" in loaded or "torch" in loaded):
        return _with_arrays()
    return _memory


def _with_arrays() -> Any:
    global _memory
    if _memory is None:
        from .. import memory

        _memory = memory  # an import statement takes longer than the rest of a message
    return _memory


def _pieces(packet: bytes, fds: Sequence[int], private: bool) -> tuple[list[memoryview], int]:
    """The pickle and what is beside it, and how many of that are arrays."""
    where = packet[1] & ~(_ARRAYS | _SLOW) if len(packet) > 1 else -1
    if where == _HERE:
        return [memoryview(packet)[2:]], 0
    if where == _PIECES:
        whole = memoryview(bytearray(memoryview(packet)[2:]))  # arrays may be written to
    elif where == _MEMFD and fds:
        size = shm.check_fixed(fds[0]).st_size
        if private or size < POOL:
            whole = memoryview(mmap.mmap(fds[0], size, flags=mmap.MAP_PRIVATE if private else mmap.MAP_SHARED))
        else:
            # by a lease of our own (see `aioelastic.memory`): the one that came is in the sender's name
            mine = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(mine, fcntl.LOCK_SH)
                whole = memoryview(mmap.mmap(mine, size))
            finally:
                os.close(mine)
    else:
        raise ValueError("not a message of aioelastic's")
    count, arrays = struct.unpack_from("<2Q", whole)
    sizes = struct.unpack_from(f"<{count}Q", whole, 16)
    at = 8 * (count + 2)
    pieces = []
    for length in sizes:
        at += -at % _ALIGN
        pieces.append(whole[at : at + length])
        at += length
    return pieces, arrays
