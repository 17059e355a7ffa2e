"""Messages between a supervisor and a process that starts others for it, sans I/O: to and from one datagram.

A datagram (unix(7), SOCK_SEQPACKET) is a kind (one byte), where its body is (one byte), and the body, by marshal: both
ends are the same interpreter, and to import pickle takes as long as to start Python. A body that is
too large for a datagram is in a memfd that travels beside it, in front of the other descriptors, or in as many pipes as
the second byte says (`datagrams.in_pipes`); then its first item is in the datagram, too: whose descriptors could not be
taken can be told by it.
"""

from __future__ import annotations

import errno
import marshal
import os

from ...system.descriptors import shut
from . import datagrams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# supervisor → zygote
SETUP = b"U"  # (directory, what `host_program.own` says, locales, main, preload, idle seconds, key)
FORK = (
    b"F"  # (id, overlay, cwd, place, streams, mark, lost, state, stop signal); descriptors: its channel, stdout, stderr
)
# supervisor → guardian, over its control socket
PROGRAM = b"I"  # (directory of its temporary files, its pid), the first of all; descriptor: the program's pidfd
CONNECT = b"O"  # (); descriptor: the other end of a new connection
HELPER = b"H"  # (id, argv, environ, state): a process for the program itself; descriptors: stdin, stderr
END = b"K"  # (id,): of a helper
REMOVE = b"C"  # (path,): a directory of a group, control groups too, to be removed when the program is gone
LEAVE = b"V"  # (whether the program ends,): it asks for nothing but the end of what was started for it
# supervisor → guardian, over one of the connections
GROUP = b"P"  # (environ, cwd, lost): what its workers begin with, and how they end with the program:
# None at once, or (signal, seconds of grace)
EXEC = b"A"  # (id, program, argv, overlay, cwd or None, mark, streams, place, state, stop, who, numbers of further
# descriptors); descriptors: its streams, and those
TERMINAL = 8  # in `streams`, where 1, 2 and 4 are descriptors 0, 1 and 2: the first is a terminal, for all three
# a place: (what `Placement.orders` says, the path of a control group or ""); or None
# a state as above; or None: that of the guardian
# who: (umask, supplementary groups, group, user), None for each that is that of the guardian; or None for all
TRY = b"T"  # (place, state, who): could a process have it? Answered by TRIED
LEFT = b"W"  # (): who was left to it by now? Answered by the same, (pids,)
# supervisor → either
WITHDRAW = b"Z"  # (id,): that start is not wanted any more; answered by REFUSED if it had not been answered
# (a zygote has answered each start before it reads on)
SIGNAL = b"G"  # (id, signal): to its process group, if it still runs
# and back
READY = b"Y"  # warm: (its pid, files it has imported: path, time of last change in ns, size)
BROKEN = b"B"  # cannot serve: (field and value of a `SpecError`, reason, traceback)
TRIED = b"D"  # (errno or 0, what was refused)
STARTED = b"S"  # (id, pid, peak resident size before it began); descriptor: its pidfd
REFUSED = b"X"  # (id, errno, words or path)
EXITED = b"Q"  # (id, wait status, rusage as a tuple, monotonic ns, wall clock s, whether its group has others)

INLINE = 32_768  # bytes a body may have beside its datagram: several wait in a socket of the default size
HERE, _MEMFD = b"\0", b"\1"


def encode(kind: bytes, body: tuple[Any, ...]) -> tuple[bytes, list[int]]:
    """A datagram, and the memfd (or pipes) to send in front of its other descriptors, which the caller closes.

    Raises:
        OSError: out of memory or descriptors.
    """
    data = marshal.dumps(body)
    if len(data) <= INLINE:
        return kind + HERE + data, []
    first = marshal.dumps(body[0] if isinstance(body[0], int) else 0)
    fd = os.memfd_create("aioelastic", os.MFD_CLOEXEC)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError as exc:
        shut(fd)
        if exc.errno != errno.EFBIG:
            raise
        fds = datagrams.in_pipes([memoryview(data)])
        return kind + bytes((len(fds),)) + first, fds
    except BaseException:
        shut(fd)
        raise
    return kind + _MEMFD + first, [fd]


def decode(packet: bytes, fds: list[int]) -> tuple[tuple[Any, ...], list[int]]:
    """The body of a datagram whose kind is `packet[:1]`, and the descriptors that belong to it; none is closed.

    Raises:
        ValueError, EOFError, TypeError: it is not one of ours.
    """
    if packet[1:2] == HERE:
        body, rest = marshal.loads(memoryview(packet)[2:]), fds
    elif packet[1:2] > HERE and len(fds) >= packet[1]:
        large, rest = fds[: packet[1]], fds[packet[1] :]
        if datagrams.is_pipe(large[0]):
            body = marshal.loads(datagrams.out_of_pipes(large))
        else:
            body = marshal.loads(os.pread(large[0], os.fstat(large[0]).st_size, 0))
    else:
        raise ValueError("not a message of aioelastic's")
    if not isinstance(body, tuple):
        raise ValueError("not a message of aioelastic's")
    return body, rest


def number(packet: bytes) -> int:
    """The first item of a body, if that is the number of a request; 0: it is not. Without the descriptors.

    Raises:
        ValueError, EOFError, TypeError: it is not one of ours.
    """
    first = marshal.loads(memoryview(packet)[2:])
    if packet[1:2] == HERE and isinstance(first, tuple) and first:
        first = first[0]
    return first if isinstance(first, int) else 0
