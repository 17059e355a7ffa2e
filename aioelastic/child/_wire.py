"""Messages between a supervisor and its workers, sans I/O: to and from one datagram and its file descriptors.

A datagram (unix(7), SOCK_SEQPACKET) is a kind (one byte), where its body is (one byte), and the body: a pickle. A body
that is large, or has large buffers out of band (PEP 574), is in a memfd that travels beside it: it is written once by
the sender and mapped by the receiver, never squeezed through the socket.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

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

INLINE = 32_768  # bytes a body may have in its datagram: several wait in a socket of the default size
APART = 16_384  # bytes from which a buffer is worth a place of its own
_HERE, _MEMFD = b"\0", b"\1"
_ALIGN = 64  # of buffers, for vector instructions

Dumps = Callable[..., bytes]


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

    data = dumps(body, protocol=5, buffer_callback=place)
    if not apart and len(data) <= INLINE:
        return kind + _HERE + data, []
    sizes = [len(data), *(one.nbytes for one in apart)]
    head = struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes)
    fd = os.memfd_create("aioelastic", os.MFD_CLOEXEC)
    try:
        at = 0
        for piece in (memoryview(head), memoryview(data), *apart):
            at += -at % _ALIGN
            os.lseek(fd, at, os.SEEK_SET)
            at += piece.nbytes
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.ftruncate(fd, at)
    except BaseException:
        os.close(fd)
        raise
    return kind + _MEMFD, [fd]


def decode(packet: bytes, fds: Sequence[int], private: bool = False) -> tuple[Any, ...]:
    """The body of a datagram whose kind is `packet[:1]`. A memfd in front of `fds` is used up (closed by the caller).

    Args:
        private: what comes by memfd is also somebody else's: writing to it shall not be seen there.

    Raises:
        Exception: whatever unpickling raises.
    """
    data, *buffers = _pieces(packet, fds, private)
    # what is unpickled holds on to the mapping as long as it uses one of the buffers
    body = pickle.loads(data, buffers=buffers)
    if not isinstance(body, tuple):
        raise ValueError("not a message of aioelastic's")
    return body


def pickled(packet: bytes, fds: Sequence[int]) -> bytes:
    """The pickle in it, without its large buffers."""
    return bytes(_pieces(packet, fds, True)[0])


def by_value() -> Dumps | None:
    """cloudpickle's `dumps`, for what cannot be found by name; None where it is not installed."""
    try:
        from cloudpickle import dumps
    except ImportError:
        return None
    return cast(Dumps, dumps)


def in_memfd(packet: bytes) -> bool:
    """Whether the first descriptor beside this datagram holds its body."""
    return packet[1:2] == _MEMFD


def _pieces(packet: bytes, fds: Sequence[int], private: bool) -> list[memoryview]:
    """The pickle and its buffers."""
    if packet[1:2] == _HERE:
        return [memoryview(packet)[2:]]
    if packet[1:2] != _MEMFD or not fds:
        raise ValueError("not a message of aioelastic's")
    size = os.fstat(fds[0]).st_size
    whole = memoryview(mmap.mmap(fds[0], size, flags=mmap.MAP_PRIVATE if private else mmap.MAP_SHARED))
    (count,) = struct.unpack_from("<Q", whole)
    sizes = struct.unpack_from(f"<{count}Q", whole, 8)
    at = 8 * (count + 1)
    pieces = []
    for length in sizes:
        at += -at % _ALIGN
        pieces.append(whole[at : at + length])
        at += length
    return pieces
