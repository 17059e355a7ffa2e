"""Helpers of `_blows.py`, which obey one line on stdin at a time and end with it: `trace` holds processes as a debugger
does, `hang DIR` is a file system that does not answer."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
MNT_DETACH = 2
# linux/fuse.h
LOOKUP, FORGET, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 26, 36, 42
INIT_OUT = struct.pack("<IIIIHHIIHH28x", 7, 31, 4096, 0, 12, 9, 4096, 1, 0, 0)
EIO, ENOSYS = 5, 38


def trace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for line in sys.stdin:
        pid, stopped = map(int, line.split())
        done = libc.ptrace(PTRACE_SEIZE, pid, None, None)
        if not done and stopped:
            libc.ptrace(PTRACE_INTERRUPT, pid, None, None)
        print("refused" if done else "held", flush=True)


def hang(where: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if libc.mount(b"aioelastic-bench", os.fsencode(where), b"fuse", 6, options):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as exc:
        print(exc, flush=True)
        return
    print("up", flush=True)
    unanswered: list[int] = []
    while True:
        ready, _, _ = select.select([0, fd], [], [])
        if fd in ready:
            _, kind, unique = struct.unpack_from("<IIQ", os.read(fd, 1 << 17))
            if kind == INIT:
                os.write(fd, struct.pack("<IiQ", 16 + len(INIT_OUT), 0, unique) + INIT_OUT)
            elif kind == LOOKUP:
                unanswered.append(unique)
            elif kind not in (FORGET, BATCH_FORGET, INTERRUPT):
                os.write(fd, struct.pack("<IiQ", 16, -ENOSYS, unique))  # who looks at all mounts does not hang
        elif not os.read(0, 4096):
            break
        else:
            for unique in unanswered:
                try:
                    os.write(fd, struct.pack("<IiQ", 16, -EIO, unique))
                except OSError:
                    pass  # nobody waits for it any more
            unanswered.clear()
            print("released", flush=True)
    libc.umount2(os.fsencode(where), MNT_DETACH)


if __name__ == "__main__":
    if sys.argv[1] == "trace":
        trace()
    else:
        hang(sys.argv[2])
