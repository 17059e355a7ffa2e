"""Valid messages with bytes changed, for every reader of what a worker writes.

`python tests/child/fuzz_wire.py N [SEED]`
"""

from __future__ import annotations

import fcntl
import gc
import marshal
import mmap
import os
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aioelastic import memory, sharing
from aioelastic.child.wire import datagrams, messages
from aioelastic.child.worker import exceptions
from aioelastic.diagnosis._error_files import read_report
from aioelastic.executor import tasks
from aioelastic.gpu._ticket import Ticket, What, admit
from aioelastic.launch import _function_channel
from aioelastic.launch._call_outcome import CallOutcome
from aioelastic.memory.incoming import Incoming
from aioelastic.memory.shared_segments import new_name
from aioelastic.system.waiting import nothing

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
ROOM = 4 << 30  # bytes of address space beyond what there is: a pickle may ask for any size, and gets a MemoryError
Packed = tuple[bytes, list[int]]
Message = tuple[bytes, bytes, list[int]]  # a datagram, what is in its memfd, and descriptors of shared memory


def errors() -> list[BaseException]:
    cause = ValueError("cause", 1)
    last = KeyError("last")
    last.__cause__, cause.__context__ = cause, last
    last.add_note("a note")
    return [last, ExceptionGroup("group", [cause, ExceptionGroup("inner", [TypeError("part")])])]


def told(kind: bytes, exc: BaseException) -> Packed:
    packet, fds = exceptions.tell(kind, {"phase": "call", **exceptions.describe(exc)})
    return (packet if kind == messages.ERROR else packet[:2] + bytes(8) + packet[2:]), fds


def content(packet: bytes, fds: list[int]) -> Message:
    """Its parts; the descriptors of shared memory stay open for good."""
    tickets = fds[: len(fds) - messages.copies(packet)]
    copied = fds[len(tickets) :]
    data = os.pread(copied[0], 1 << 24, 0) if copied else b""
    datagrams.close(copied)
    return packet, data, tickets


def shared() -> list[Packed]:
    """Messages with shared memory, made by another process: that of our own we would know again."""
    ours, theirs = datagrams.pair()
    pid = os.fork()
    if pid == 0:
        try:
            array = sharing.copy(np.arange(5000.0))
            isolated = sharing.copy(np.arange(100), isolated=True)
            for value in (array, [array[:100], array[100:200:2]], {"one": array, "two": isolated}):
                datagrams.send(theirs, *messages.encode(messages.VALUE, (value,)))
        finally:
            os._exit(0)
    theirs.close()
    found = []
    while (packed := datagrams.receive(ours))[0]:
        found.append(packed)
    os.waitpid(pid, 0)
    ours.close()
    return found


def seeds() -> list[Message]:
    values: list[Any] = [None, "text", {"key": [1, 2.5, b"bytes", (True, {3})]}, list(range(300)), b"x" * 40_000]
    values += [np.arange(100), np.arange(20_000.0)]
    made = [messages.encode(kind, (one,)) for one in values for kind in (messages.VALUE, messages.OBJECT)]
    made += [told(messages.ERROR, one) for one in errors()]
    made.append(told(messages.ERROR, ValueError("x" * 50_000)))
    made.append(messages.encode(messages.RUNS, ()))
    return [content(*one) for one in (*made, *shared())]


def strangers() -> list[int]:
    """Descriptors of what is no shared memory of ours, or not as large as it says, or not fixed in its size."""
    found = [os.open(os.devnull, os.O_RDWR), os.open("/", os.O_PATH), *os.pipe(), os.eventfd(0)]
    for name, size, seals in (("x", 4096, SEALS), (new_name(), 0, 0), (new_name(), 4096, 0), (new_name(), 4096, SEALS)):
        found += memfd(bytes(size), name, seals)
    return found


def replaced(rng: random.Random, tickets: list[int], others: list[int]) -> list[int]:
    """These, in another order or number, or others among them."""
    found, how = list(tickets), rng.randrange(4)
    if how == 0:
        rng.shuffle(found)
    elif how == 1:
        found.pop(rng.randrange(len(found)))
    elif how == 2:
        found.insert(rng.randrange(len(found) + 1), rng.choice(found + others))
    else:
        found[rng.randrange(len(found))] = rng.choice(others)
    return found


def changed(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        how, at = rng.randrange(6), rng.randrange(len(out) + 1)
        if how == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif how == 1 and out:
            out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 2:
            del out[at:]
        elif how == 3:
            del out[at : at + rng.randrange(1, 9)]
        elif how == 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)))
    return bytes(out)


class Reader(_function_channel.FunctionChannel):
    """Without a socket: what would come by it is given to it."""

    def __init__(self) -> None:
        CallOutcome.__init__(self)
        self._on_ready = self._on_whole = nothing
        self._on_task, self._guess, self._opening, self._left = None, False, False, 0
        self.objects: list[Any] = []

    def _object_came(self, obj: _function_channel.SentObject) -> None:
        self.objects.append(obj)

    def _aside(self, obj: _function_channel.SentObject, then: Any) -> Any:
        self.objects.append(obj)


def memfd(data: bytes, name: str = "fuzz", seals: int = SEALS) -> list[int]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, len(data))
    os.pwrite(fd, data, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return [fd]


def received(data: bytes, tickets: list[int]) -> list[int]:
    return [*map(os.dup, tickets), *(memfd(data) if data else [])]


def read(packet: bytes, data: bytes, tickets: list[int]) -> None:
    """As a host does, whatever it is. Raises nothing."""
    reader, fds = Reader(), received(data, tickets)
    try:
        reader._take(packet, fds)
    finally:
        datagrams.close(fds)
    for obj in reader.objects:
        try:
            obj.open()
        except Exception:  # what a receiver gets
            pass
    reader.value = None


def read_ticket(page: bytes, fds: list[int]) -> None:
    """What is written on that of a GPU's memory, by who need not have one."""
    page = page.ljust(mmap.PAGESIZE, b"\0")[: mmap.PAGESIZE]
    ticket = memfd(page, f"{new_name()}-gpu-4096", SEALS | fcntl.F_SEAL_WRITE)
    try:
        admit(Ticket, Incoming(memoryview(marshal.dumps([])), (), ticket + fds), 0)
    except Exception:  # the failure of who has sent it
        pass
    finally:
        datagrams.close(ticket)


TASK = tasks.Task((abs, (-1,), {}), False)


def read_task(packet: bytes, data: bytes, tickets: list[int]) -> None:
    fds = received(data, tickets)
    try:
        _, problem = tasks.opened(packet, fds, TASK)
        assert problem is None or isinstance(problem, Exception)
    finally:
        datagrams.close(fds)


def fuzz(count: int, seed: int, tick: Callable[[int], object] = lambda _: None) -> None:
    """So many inputs. Raises if a reader does, if it runs something, or if descriptors or mappings stay."""
    rng = random.Random(seed)
    packets, others = seeds(), strangers()
    page = marshal.dumps(tuple(What("pool", "GPU-1", 4096, (4096,), 0, b"x" * 64, "pool-1")))
    reports = [
        b'{"aioelastic": {"message": "m", "traceback": "t", "time": 1.5, "monotonic": 5, "clock": "c", "pid": 7}}',
        b'{"message": {"message": "m", "extraInfo": {"py_callstack": "t", "timestamp": "5"}}}',
        b'{"message": "m", "timestamp": 5}',
    ]
    packed = [exceptions.describe(one)["packed"] for one in errors()]
    maps = _maps()
    before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    _listen()
    try:
        with tempfile.TemporaryDirectory() as home:
            file = Path(home) / "error.json"
            for number in range(count):
                packet, data, tickets = rng.choice(packets)
                if tickets and rng.random() < 0.5:
                    tickets = replaced(rng, tickets, others)
                elif data and rng.random() < 0.6:
                    data = changed(rng, data)
                else:
                    # its kind and place stay as a rule, or most would be no message at all
                    head = 0 if rng.random() < 0.05 else 2
                    packet = packet[:head] + changed(rng, packet[head:])
                read(packet, data, tickets)
                if number % 4 == 0:
                    kind = messages.FAILED if packet[:1] == messages.ERROR else messages.DONE
                    read_task(kind + packet[1:], data, tickets)
                elif number % 4 == 1:
                    file.write_bytes(changed(rng, rng.choice(reports)))
                    read_report(file, "c", {"rank": "0"})
                elif number % 4 == 2:
                    mutated_nodes(rng, rng.choice(packed))
                else:
                    read_ticket(changed(rng, page), rng.sample(others, rng.randrange(3)))
                tick(number)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not _ran, _ran
    gc.collect()
    memory.trim()
    after = len(os.listdir("/proc/self/fd"))
    assert after <= before, f"{after - before} descriptors stay"
    assert _maps() <= maps, "shared memory stays mapped"
    for fd in (*others, *(fd for _, _, tickets in packets for fd in tickets)):
        os.close(fd)


def _maps() -> int:
    """How often shared memory of ours is mapped here."""
    return Path("/proc/self/maps").read_text().count("/memfd:aioelastic")


_ran: list[str] = []  # what was started by unpickling
_STARTS = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen", "os.kill")
_listening = False


def _listen() -> None:
    """An audit hook stays: it is added once."""
    global _listening
    if not _listening:
        _listening = True
        sys.addaudithook(lambda event, _: _ran.append(event) if event in _STARTS else None)
    _ran.clear()


def mutated_nodes(rng: random.Random, packed: dict[str, Any]) -> None:
    nodes = [dict(one) for one in packed["nodes"]]
    for _ in range(rng.choice((1, 2, 5))):
        node = rng.choice(nodes)
        key = rng.choice(["data", "why", "suppress", "notes", "cause", "context", "parts"])
        value = node.get(key)
        if key == "data" and isinstance(value, str) and rng.random() < 0.7:
            node[key] = changed(rng, value.encode()).decode("latin-1")
        else:
            node[key] = rng.choice([None, -1, 0, 1, 1 << 70, True, 1.5, "x", [], [0], ["a", 1], {}, b"x"])
    found, why = exceptions.rebuild({"nodes": nodes})
    assert found is None or isinstance(found, BaseException)
    assert found is not None or isinstance(why, str)


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    start = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for done in range(0, total, 10_000):
        fuzz(min(10_000, total - done), start + done)
        print(f"{done + min(10_000, total - done)} of {total}", flush=True)
