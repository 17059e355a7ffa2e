"""What a worker of another user tries against its host. Run as a program (its name, arguments), or as a function."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import struct
import sys

NOBODY = 65_534
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_MM, _PR_SET_MM_MAP = 4, 15, 35, 14
_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _name(name: bytes) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)


def _map(start: int, size: int, field: int) -> int:
    """Have /proc/self/environ (field 9) or cmdline (field 7) show that memory (prctl(2), PR_SET_MM_MAP)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/stat", "rb") as file:
        stat = file.read().rpartition(b") ")[2].split()
    # start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end, env_start, env_end
    here = [int(stat[n]) for n in (23, 24, 42, 43, 44, 44, 25, 45, 46, 47, 48)]
    here[field], here[field + 1] = start, start + size
    packed = struct.pack("11QQII", *here, 0, 0, 0xFFFFFFFF)
    room = ctypes.create_string_buffer(packed)
    done: int = libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, room, len(packed), 0)
    return 0 if done == 0 else ctypes.get_errno()


def _shows(field: int, size: int) -> None:
    zeros = mmap.mmap(-1, size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(zeros))
    problem = _map(start, size, field)
    print(f"refused {problem}" if problem else "shown", flush=True)
    signal.pause()


def environ() -> None:
    """128 MiB of zeros."""
    _shows(9, 128 << 20)


def command_line() -> None:
    _shows(7, 128 << 20)


def environment() -> None:
    """As much as execve(2) takes, with a lineage that is a forgery, and one of thousands of names."""
    resource.setrlimit(resource.RLIMIT_STACK, (resource.getrlimit(resource.RLIMIT_STACK)[1],) * 2)
    run = os.environ["AIOELASTIC_RUN_ID"]
    many = {f"X{number}": "x" * 100_000 for number in range(15)}
    forged = ":".join([f"{run}/x/y", f"{run}/", run + "/" + "9" * 5000, *(f"n{i}" for i in range(20_000))])
    env = {**os.environ, **many, "AIOELASTIC_LINEAGE": forged[:120_000]}
    os.execve("/bin/sh", ["sh", "-c", "echo shown; exec sleep 1000", "x" * 100_000], env)


def names() -> None:
    """Children whose names look like the rest of a line of /proc."""
    for name in (b") Z 1 1 1 1 1", b"(a) R 0 (", b"\n1 (x) S 1 1\n", b"x[1]: segfault", b"\xff\xfe) R"):
        if os.fork() == 0:
            os.setsid()
            _name(name)
            signal.pause()
    _name(b") X 1 (")
    print("shown", flush=True)
    signal.pause()


def stops_itself() -> None:
    """And its children."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                os.kill(os.getpid(), signal.SIGSTOP)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("shown", flush=True)
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def _attach(pid: int, interrupt: bool = True) -> bool:
    """Trace it (ptrace(2)), and stop it. False: that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_SEIZE, pid, None, None):
        return False
    if interrupt:
        libc.ptrace(_PTRACE_INTERRUPT, pid, None, None)
    return True


def traces(host: str) -> None:
    """Its children, one of which traces it; and it tries its host and the guardian."""
    me = os.getpid()
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else root alone may trace those who changed their user
    ours = [pid for pid in (int(host), os.getppid()) if _attach(pid)]
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        _attach(child)
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # said here: from then on any signal, that of a child that is stopped, too, stops the worker itself
        held = _attach(me, interrupt=False)
        print("shown" if held and not ours else f"refused {held} {ours}", flush=True)
        while True:
            signal.pause()
    while True:
        signal.pause()


def stops_others(host: str) -> None:
    """Whoever it may signal, again and again; and it tries its host and the guardian."""
    taken = []
    for pid in (int(host), os.getppid()):
        try:
            os.kill(pid, signal.SIGSTOP)
            taken.append(pid)
        except PermissionError:
            pass
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os.setsid()
            while True:
                signal.pause()
        children.append(child)
    for one in children:
        os.kill(one, signal.SIGSTOP)
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        children.append(os.getppid())
        said = False
        while True:
            for one in children:
                try:
                    os.kill(one, signal.SIGSTOP)
                except (ProcessLookupError, PermissionError):
                    pass  # it has ended, and somebody else may have its number
            if not said:  # here: the worker itself may be stopped before it can say it
                print(f"refused {taken}" if taken else "shown", flush=True)
                said = True
    while True:
        signal.pause()


def floods(what: str) -> None:
    chunk = {"newlines": b"\n" * 65_536, "returns": b"50%\r" * 16_384, "line": b"x" * 65_536}[what]
    print("shown", flush=True)
    for _ in range({"newlines": 8, "returns": 60}.get(what, 600)):
        for fd in (1, 2):
            os.write(fd, chunk)
    os.write(1, b"\n")


def error_file(what: str) -> None:
    path = os.environ["AIOELASTIC_ERROR_FILE"]
    print("shown", flush=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        os.symlink("/etc/hostile-secret.json", path)
    elif what == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif what == "nested":
        with open(path, "wb") as file:
            file.write(b"[" * 1_000_000)
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(path)
    elif what == "forged":
        with open(path, "wb") as file:
            file.write(b'{"aioelastic": {"message": "m", "run_id": 5, "pid": true, "monotonic": 1e400, "time": "nan"}}')
    sys.exit(1)


def shares(what: str, below: str, pid: str) -> None:
    """Something in the temporary directory by a name of its host's."""
    home = os.path.join(below, f"aioelastic-shares-{pid}-hostile")
    if what == "socket":
        socket.socket(socket.AF_UNIX).bind(home)
    elif what == "link":
        os.symlink("/etc", home)
    elif what == "fifo":
        os.mkfifo(home)
    elif what == "listens":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(home)
        sock.listen(0)
    elif what == "many":
        for number in range(3000):
            socket.socket(socket.AF_UNIX).bind(home.replace("hostile", f"{number}-hostile"))
    print("shown", flush=True)
    sys.exit(1)


# --- functions: what comes by their channel ---


def _channel(nobody: bool = False) -> socket.socket:
    """As the user of its host, what it sends is looked at more closely."""
    from aioelastic.child.worker import context

    if nobody:
        become_nobody()
    assert context.channel is not None
    return context.channel


def raw(sock: socket.socket, packet: bytes, *fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([packet], rights)


def floods_channel(what: str, nobody: bool) -> None:
    """Until its host has had enough."""
    import pickle

    channel = _channel(nobody)
    channel.setblocking(True)
    packets: dict[str, tuple[bytes, list[int]]] = {
        "ready": (b"N\0" + pickle.dumps(()), []),
        "letters": (b"O\0" + pickle.dumps((bytes(30_000),)), []),
        "values": (b"V\0" + pickle.dumps((bytes(30_000),)), []),
        "descriptors": (b"O\0" + pickle.dumps((1,)), [0] * 250),
        "nonsense": (b"?" * 30_000, [0] * 250),
        "tasks": (b"D\0" + pickle.dumps((1,)), []),
        "large": (b"O\1", []),
    }
    packet, fds = packets[what]
    if what == "large":
        from aioelastic.child.wire import messages

        packet, fds = messages.encode(messages.OBJECT, (bytes(8 << 20),))
    try:
        for _ in range(3000):
            raw(channel, packet, *fds)
    except OSError:
        pass
    os._exit(3)


def says(packet: bytes, when_told: bool = False) -> None:
    from aioelastic import sharing

    channel = _channel(nobody=True)
    if when_told:
        sharing.receive()
    raw(channel, packet)
    os._exit(0)


def endless_descriptors() -> None:
    channel = _channel()
    inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw(inner, b".", 0)
    raw(channel, b"+V\0", outer.fileno())
    signal.pause()


def shrinks(size: int) -> None:
    channel = _channel()
    fd = os.memfd_create("aioelastic", 0)
    os.ftruncate(fd, size)
    raw(channel, b"V\1", fd)
    os.ftruncate(fd, 0)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] != "error_file":  # which only its own user may write
        become_nobody()
    globals()[sys.argv[1]](*sys.argv[2:])
