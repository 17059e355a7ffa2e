"""Who is offered something, as another user, has that and nothing else; and cannot write to what is only to be read."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import importlib
import mmap
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import share_jobs
from helpers import QUIET, needs, travelled
from numpy.lib.recfunctions import repack_fields
from test_sharing_endpoint import stranger
from test_sharing_users import NOBODY, Crowded, as_user, needs_root

from aioelastic import Function, SpecError, memory, sharing, supervise
from aioelastic.child.wire import datagrams, messages, sent_objects
from aioelastic.memory._errors import NotShareable
from aioelastic.sharing import _items

SECRET = 0xA5
OTHERS = [12_345]
NO_WRITING = r"read-only|cannot modify"


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="socket-", dir="/tmp") as name:
        os.chmod(name, 0o711)
        yield f"{name}/offered"


@pytest.fixture
def used() -> Iterator[None]:
    """Memory of which every byte was something else before lies idle; some of it is in use still."""
    sharing.trim()
    kept = [sharing.copy(np.full(1000, SECRET, "u1"))]
    for size in (1 << 10, 1 << 16, 1 << 17, 1 << 20, 20 << 20):
        for _ in range(2):
            sharing.copy(np.full(size, SECRET, "u1"))
            travelled(np.full(size, SECRET, "u1"))
    yield
    del kept
    gc.collect()
    sharing.trim()


def secrets(fds: list[int]) -> int:
    """How many bytes of other things there are in what a message carries."""
    return sum(os.pread(fd, os.fstat(fd).st_size, 0).count(SECRET) for fd in fds if os.fstat(fd).st_size)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("size", [10, 1 << 14, 1 << 16, (1 << 17) + 1, 1 << 20, 20 << 20])
@pytest.mark.parametrize("kind", ["isolated", "array", "bytes", "several"])
def test_there_is_nothing_else_in_a_message_for_others(kind: str, size: int) -> None:
    made: dict[str, Callable[[], Any]] = {
        "isolated": lambda: sharing.copy(np.ones(size, "u1"), isolated=True),
        "array": lambda: np.ones(size, "u1"),
        "bytes": lambda: bytearray(size),
        "several": lambda: [np.ones(size, "u1"), sharing.empty(size, "u1", isolated=True), bytes(size)],
    }
    value = made[kind]()
    packet, fds = messages.encode(messages.OBJECT, (value,), for_others=True)
    try:
        assert secrets(fds) + packet.count(SECRET) == 0
        (got,) = messages.decode(packet, fds)
    finally:
        datagrams.close(fds)
    for one, sent in zip(got, value, strict=True) if kind == "several" else [(got, value)]:
        assert bytes(np.asarray(one)) == bytes(np.asarray(sent))


@pytest.mark.usefixtures("used")
async def test_nor_where_other_threads_copy() -> None:
    packet, fds = await sent_objects.ready(
        lambda: messages.encode(messages.ITEM, (np.ones(20 << 20, "u1"),), for_others=True)
    )
    assert secrets(fds) == 0
    (got,) = messages.decode(packet, fds)
    assert got.sum() == 20 << 20
    datagrams.close(fds)


def test_an_isolated_array_is_alone_and_zeroed_and_its_memory_is_not_used_again() -> None:
    sharing.trim()
    made = sharing.stats().made
    for dtype in ("u1", "float64"):
        for size in (1, 1000, 1 << 20):
            sharing.copy(np.full(size, SECRET, dtype))
            one, two = (sharing.empty(size, dtype, isolated=True) for _ in range(2))
            assert not np.asarray(one).any()
            keys = {memory.address_index.find(x.address).key for x in (one, two)}
            assert len(keys) == 2
            np.asarray(one)[:] = SECRET
            (back,) = travelled(one)  # it stays the same there
            assert np.asarray(back)[0] == SECRET
            del one, two, back
            assert keys.isdisjoint(segment.key for segment in memory.segments())
    assert sharing.stats().made >= made + 12


def test_copies_of_all_kinds_can_be_isolated() -> None:
    source = np.arange(60.0).reshape(3, 4, 5)[:, ::2].T
    one = sharing.copy(source, isolated=True)
    assert (np.asarray(one) == source).all()
    assert not np.asarray(sharing.copy(source[:0], isolated=True)).size
    again = sharing.copy(one)
    with pytest.raises(NotShareable):
        messages.encode(messages.OBJECT, (again,), for_others=True)


def views() -> dict[str, Callable[[], Any]]:
    return {
        "small": lambda: sharing.empty(10),
        "large": lambda: sharing.empty(1 << 20),
        "a part": lambda: sharing.empty(1 << 20)[5:7],
        "numpy's": lambda: np.asarray(sharing.empty(10)),
        "a buffer": lambda: sharing.empty(1 << 20, "u1").buffer,
        "deep inside": lambda: {"x": [(1, sharing.empty(10))]},
        "received": lambda: travelled(sharing.empty(10))[0],
    }


@pytest.mark.parametrize("which", views())
@pytest.mark.parametrize("how", ["for_others", "read_only"])
def test_what_lies_beside_others_is_refused(which: str, how: str) -> None:
    value = views()[which]()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotShareable, match=r"isolated=True") as told:
        messages.encode(messages.OBJECT, (value,), for_others=how == "for_others", read_only=how == "read_only")
    assert "holds other arrays" in str(told.value)
    assert os.listdir("/proc/self/fd") == before
    travelled(value)  # for this user it is right, in the same thread


def test_a_tensor_that_lies_beside_others_is_refused() -> None:
    torch = needs("torch")
    x = sharing.empty(10)
    with pytest.raises(NotShareable, match=r"isolated=True"):
        messages.encode(messages.OBJECT, (torch.from_dlpack(x),), for_others=True)


def test_memory_of_a_gpu_is_refused(fake: Any) -> None:
    x = sharing.copy(np.ones(10), device="cuda:0")
    with pytest.raises(NotShareable, match="memory of a GPU"):
        messages.encode(messages.OBJECT, (x,), for_others=True)
    with pytest.raises(SpecError, match=r"^isolated=True.*cuda:0"):
        sharing.empty(10, device="cuda:0", isolated=True)
    with pytest.raises(SpecError, match=r"^isolated=True"):
        sharing.copy(np.ones(3), "cuda:0", isolated=True)
    on_cpu = sharing.copy(x, isolated=True)
    assert (np.asarray(on_cpu) == 1).all()
    datagrams.close(messages.encode(messages.OBJECT, (on_cpu,), for_others=True)[1])


@pytest.mark.parametrize("given", [1, None, "yes"])
def test_what_is_no_answer(given: Any) -> None:
    with pytest.raises(SpecError, match=r"^isolated="):
        sharing.empty(3, isolated=given)
    with pytest.raises(SpecError, match=r"^isolated="):
        sharing.copy(np.ones(3), isolated=given)
    with pytest.raises(SpecError, match=r"^read_only="):
        sharing.Endpoint("x", {}, read_only=given)


@pytest.mark.parametrize("how", [{"uids": OTHERS}, {"read_only": True}])
async def test_an_endpoint_says_which_it_cannot_offer_before_it_begins(path: str, how: Any) -> None:
    objects = {"right": sharing.empty(3, isolated=True), "wrong": sharing.empty(3)}
    with pytest.raises(NotShareable, match=r"^objects\['wrong'\]: .*isolated=True"):
        async with sharing.Endpoint(path, objects, **how):
            pass
    assert os.listdir(os.path.dirname(path)) == []


async def test_one_that_is_added_later_is_refused_to_who_comes(path: str) -> None:
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["exception"]))
    objects: dict[str, Any] = {}
    async with sharing.Endpoint(path, objects, uids=OTHERS):
        objects["late"] = sharing.empty(3)
        with pytest.raises(sharing.ShareLost, match="holds other arrays"):
            await asyncio.to_thread(sharing.attach, path)
    assert [type(one) for one in said] == [NotShareable]


OTHER_USER = """
import os, sys
import numpy
from aioelastic import memory, sharing
import aioelastic.child.worker.function_run, aioelastic.sharing._endpoint, aioelastic.memory._numpy_arrays
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
with sharing.attach(sys.argv[1], uids=[0]) as offered:
    x = offered["x"]
    print(int(offered["private"].sum()), x.read_only, int(numpy.asarray(x).sum()), flush=True)
    (segment,) = memory.segments()
    whole = os.pread(segment.fd, 1 << 30, 0)
    print(len(whole) - whole.count(0), flush=True)
    """


@needs_root
@pytest.mark.usefixtures("used")
async def test_another_user_reads_and_writes_what_it_was_offered(path: str) -> None:
    x = sharing.copy(np.ones(100, "u1"), isolated=True)
    async with sharing.Endpoint(path, {"x": x, "private": np.ones(50_000)}, uids=[NOBODY]):
        process = await stranger(OTHER_USER + "numpy.asarray(x)[:] = 3", path)
        out, _ = await process.communicate()
        assert out.decode() == "50000 False 100\n100\n"
        assert (np.asarray(x) == 3).all()


WRITES = """
import mmap
try:
    numpy.asarray(x)[0] = 3
except ValueError:
    print("numpy", flush=True)
for how in (os.O_RDWR, os.O_WRONLY):
    try:
        os.open(f"/proc/self/fd/{segment.fd}", how)
    except PermissionError:
        print("open", flush=True)
try:
    mmap.mmap(segment.fd, 4096)
except PermissionError:
    print("map", flush=True)
sys.stdin.read()
print(int(numpy.asarray(x).sum()))
""".replace("\n", "\n    ")


@needs_root
@pytest.mark.parametrize("seals", [True, False])
async def test_another_user_cannot_write_to_what_is_only_to_be_read(
    path: str, seals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not seals:  # as before Linux 5.1: a seal that the kernel does not know
        monkeypatch.setattr(memory.shared_segments, "_SEAL_FUTURE_WRITE", 1 << 20)
    x = sharing.copy(np.ones(100, "u1"), isolated=True)
    async with sharing.Endpoint(path, {"x": x, "private": np.ones(50_000)}, uids=[NOBODY], read_only=True):
        process = await stranger(OTHER_USER + WRITES, path)
        assert process.stdout is not None
        told = [(await process.stdout.readline()).decode() for _ in range(6)]
        assert told == ["50000 True 100\n", "100\n", "numpy\n", "open\n", "open\n", "map\n"]
        np.asarray(x)[:] = 2
        out, _ = await process.communicate(b"")
        assert out.decode() == "200\n"
        assert (np.asarray(x) == 2).all()


async def received_read_only(path: str, *arrays: Any) -> Any:
    """What another process of this user sees."""
    code = f"""
import os, sys
sys.path += {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]!r}
from aioelastic import sharing
from test_sharing_offered import look
with sharing.attach(sys.argv[1]) as offered:
    print([look(one) for one in offered["arrays"]])
"""
    async with sharing.Endpoint(path, {"arrays": arrays}, read_only=True):
        process = await stranger(code, path)
        out, _ = await process.communicate()
    return eval(out)


def look(one: Any) -> list[Any]:
    """How writing to it ends, and what is there afterwards."""
    found: list[Any] = []
    if isinstance(one, memory.SharedArray):
        found.append(one.read_only)
        with pytest.raises(BufferError, match="read-only"):
            one.__dlpack__()
        assert one.__dlpack__(copy=True)
        assert one[1:].buffer.readonly
        assert one[:0].read_only
        with pytest.raises(NotShareable):  # it is not this process's to give on
            messages.encode(messages.OBJECT, (sharing.copy(one),), for_others=True)
        fds: list[int] = []
        messages.encode(messages.OBJECT, (one,), fds=fds)
        assert fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        datagrams.close(fds)
        sharing.copy(one)
        with pytest.raises(ValueError, match="WRITEABLE"):
            np.asarray(one).flags.writeable = True
    view = np.asarray(one)
    with pytest.raises(ValueError, match=NO_WRITING):
        view[0] = 9
    memory_of = memory.address_index.find(view.ctypes.data)
    with pytest.raises(PermissionError):
        mmap.mmap(memory_of.fd, 4096)
    with pytest.raises(PermissionError):
        mmap.mmap(os.open(f"/proc/self/fd/{memory_of.fd}", os.O_RDWR), 4096)
    return [*found, int(view.sum())]


async def test_views_of_what_is_only_to_be_read(path: str) -> None:
    x = sharing.copy(np.ones(10, "u1"), isolated=True)
    told = await received_read_only(path, x, np.asarray(x), x.buffer, np.asarray(x).reshape(2, 5).T.ravel("K"))
    assert told == [[True, 10], [10], [10], [10]]
    np.asarray(x)[:] = 2  # we may write still
    assert await received_read_only(path, x) == [[True, 20]]


async def test_who_knew_it_before_may_write_still(path: str) -> None:
    x = sharing.copy(np.ones(10, "u1"), isolated=True)
    (back,) = travelled(x)
    assert await received_read_only(path, x) == [[True, 10]]
    np.asarray(back)[:] = 5
    assert not x.read_only
    assert np.asarray(x).sum() == 50


async def test_a_worker_that_gets_it_afterwards_reads(path: str) -> None:
    x = sharing.copy(np.ones(10), isolated=True)
    assert (await supervise(Function(share_jobs.adds_if_it_may, x), logs=QUIET))[0].value == "added"
    assert await received_read_only(path, x) == [[True, 20]]
    assert (await supervise(Function(share_jobs.adds_if_it_may, x), logs=QUIET))[0].value == "read-only"
    assert np.asarray(x).sum() == 20


async def test_a_tensor_of_what_is_only_to_be_read_is_a_copy_once_it_is_written_to(path: str) -> None:
    torch = needs("torch")
    x = sharing.copy(np.ones(10, "u1"), isolated=True)
    code = """
import sys
from aioelastic import sharing
with sharing.attach(sys.argv[1]) as offered:
    one, same = offered["tensor"], offered["x"]
    one[:] = 7
    print(one.sum().item(), sum(same.buffer))
"""
    async with sharing.Endpoint(path, {"tensor": torch.from_dlpack(x), "x": x}, read_only=True):
        process = await stranger(code, path)
        out, _ = await process.communicate()
    assert out.decode() == "70 70\n"  # of one process
    assert np.asarray(x).sum() == 10


# --- queues ---


async def test_what_is_put_into_a_queue_that_was_offered(path: str) -> None:
    q, _ = sharing.Queue(2), sharing.empty(3)
    before = os.listdir("/proc/self/fd")
    async with sharing.Endpoint(path, {"q": q}, uids=OTHERS):
        for put in (q.put_nowait, q.put_sync):
            with pytest.raises(NotShareable, match="isolated=True"):
                put(sharing.empty(3))
        with pytest.raises(NotShareable, match="isolated=True"):
            await q.put(sharing.empty(3))
        q.put_nowait(sharing.copy(np.ones(3), isolated=True))
        await q.put(np.ones(3))
        assert [float(np.asarray(q.get_nowait()).sum()) for _ in range(2)] == [3, 3]  # places were given back
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(NotShareable, match="isolated=True"):  # whoever has got it has it still
        q.put_nowait(sharing.empty(3))


@pytest.mark.usefixtures("used")
def test_items_for_others_hold_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = datagrams.send

    def looks(to: Any, packet: bytes, fds: list[int], *flags: int) -> None:
        sent.append(secrets(fds) + packet.count(SECRET))
        send(to, packet, fds, *flags)

    monkeypatch.setattr(datagrams, "send", looks)
    q = sharing.Queue(8, uids=OTHERS)
    for size in (10, 1 << 17, 1 << 20):
        q.put_nowait(np.ones(size, "u1"))
        assert q.get_nowait().sum() == size
    assert sent == [0, 0, 0]


async def test_other_processes_of_ours_know_that_it_was_offered() -> None:
    q = sharing.Queue(2, uids=OTHERS)
    result = await supervise(Function(share_jobs.puts, q, [sharing.empty(3)]), logs=QUIET, check=False)
    assert "isolated=True" in str(result[0].failure)
    await supervise(Function(share_jobs.puts, q, [sharing.empty(3, isolated=True)]), logs=QUIET)
    _, x = q.get_nowait()
    assert x.shape == (3,)


@pytest.mark.parametrize("held", ["an item", "a place"])
async def test_a_queue_with_something_in_it_is_not_offered(path: str, held: str) -> None:
    q = sharing.Queue(2)
    place: list[int] = []
    if held == "an item":
        q.put_nowait(sharing.empty(3))
    else:  # somebody packs it just now
        putting = _items.Putting(q)
        assert putting.finds_room()
        place = putting._place
    for _ in range(2):  # the second time it is known to be offered, and still not empty
        with pytest.raises(NotShareable, match=r"^objects\['q'\]: this queue is not empty"):
            async with sharing.Endpoint(path, {"q": q}, uids=OTHERS):
                pass
    if place:
        putting.close()
    else:
        q.get_nowait()
    async with sharing.Endpoint(path, {"q": q}, uids=OTHERS):
        q.put_nowait(1)
        offered = await asyncio.to_thread(sharing.attach, path)  # though there is something in it by now
        assert offered["q"] is q
        offered.close()
    assert q.get_nowait() == 1


def test_a_queue_of_this_user_carries_all() -> None:
    q = sharing.Queue(2)
    (same,) = travelled(q)
    assert same is q
    q.put_nowait(sharing.empty(3))
    assert q.get_nowait().shape == (3,)


def test_files_stay_out_of_it(tmp_path: Path) -> None:
    """With segments that have names, an isolated one has none."""
    sharing.configure(strategy="file", directory=tmp_path)
    try:
        x = sharing.empty(1 << 20, isolated=True)
        assert [one for one in tmp_path.rglob("*") if one.is_file()] == []
        assert travelled(x)[0].shape == x.shape
        del x
    finally:
        gc.collect()
        sharing.configure(strategy="memfd")


# --- what lies beside, in between and around ---


def carried(value: Any) -> bytes:
    """All that travels with it."""
    packet, fds = messages.encode(messages.OBJECT, (value,), for_others=True)
    try:
        return packet + b"".join(os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
    finally:
        datagrams.close(fds)


def between() -> dict[str, Callable[[], Any]]:
    def table(rows: int) -> Any:
        made = np.full((rows, 2), SECRET, "u1")
        made[:, 0] = 1
        return made

    return {
        "a column": lambda: table(1000)[:, 0],
        "a large column": lambda: table(1 << 18)[:, 0],
        "twice": lambda: [one[:, 0] for one in [table(1000)] * 2],
        "its two halves": lambda: [one[:500, 0] for one in [table(1000)]] + [one[400:, 0] for one in [table(1000)]],
        "backwards": lambda: table(1000)[::-1, 0],
    }


@pytest.mark.parametrize("which", between())
def test_what_lies_between_the_elements_stays_here(which: str) -> None:
    assert SECRET not in carried(between()[which]())


def test_what_lies_between_the_elements_of_a_tensor_stays_here() -> None:
    torch = needs("torch")
    table = torch.full((1000, 2), SECRET, dtype=torch.uint8)
    table[:, 0] = 1
    assert SECRET not in carried(table[:, 0])
    own = importlib.import_module("share_jobs_torch").Plain
    for one in (table[:, 0].as_subclass(own), table.untyped_storage()):
        with pytest.raises(NotShareable, match="a storage carries all"):
            carried(one)
    assert carried(table[:, 0].clone())


def test_fields_that_were_left_out_are_refused() -> None:
    table = np.zeros(100, [("name", "u1"), ("wage", "u1")])
    table["wage"] = SECRET
    padded = np.zeros(3, np.dtype({"names": ["a"], "formats": ["u1"], "offsets": [3]}))
    nested = np.zeros(3, [("x", padded.dtype, (2,))])
    for one in (table[["name"]], padded, nested, table[["name"]].view(np.recarray)):
        with pytest.raises(NotShareable, match="repack_fields"):
            carried(one)
    assert SECRET not in carried(repack_fields(table[["name"]]))
    assert bytes([SECRET]) in carried(table)  # which is offered


@pytest.mark.parametrize("part", ["array", "view", "every second"])
def test_a_part_of_an_isolated_array_is_refused(part: str) -> None:
    x = sharing.copy(np.ones(2000, "u1"), isolated=True)
    given = {"array": x[:10], "view": np.asarray(x)[10:], "every second": np.asarray(x)[::2]}[part]
    with pytest.raises(NotShareable, match="a part of an isolated array"):
        carried(given)
    for whole in (x[...], np.asarray(x).reshape(20, 100).T, np.asarray(x)[::-1]):
        assert carried(whole)


def test_an_item_that_was_refused_by_the_system_is_packed_again_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place was given back: the queue may have been offered meanwhile."""
    q = sharing.Queue(1)
    Crowded(monkeypatch, 1, messages.ITEM)
    monkeypatch.setattr(_items.Putting, "room_sync", lambda *_: q._offered())
    with pytest.raises(NotShareable, match="isolated=True"):
        q.put_sync(sharing.empty(3))
    q.put_sync(1)
    assert q.get_nowait() == 1


async def test_so_is_that_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    q = sharing.Queue(1)
    Crowded(monkeypatch, 1, messages.ITEM)

    async def room(_: object) -> None:
        q._offered()

    monkeypatch.setattr(_items.Putting, "room", room)
    with pytest.raises(NotShareable, match="isolated=True"):
        await q.put(sharing.empty(3))


async def test_a_queue_that_was_offered_can_be_offered_on(path: str) -> None:
    """By another process, though there is something in it."""
    q, around = sharing.Queue(2, uids=OTHERS), sharing.Queue(2, uids=OTHERS)
    q.put_nowait(1)
    await supervise(Function(share_jobs.puts, around, [q]), logs=QUIET)
    assert around.get_nowait()[1] is q
    assert q.get_nowait() == 1


@pytest.mark.parametrize("reason", ["another", "itself"])
async def test_who_is_refused_changes_nothing(path: str, reason: str) -> None:
    q, x = sharing.Queue(2), sharing.copy(np.ones(3), isolated=True)
    objects: dict[str, Any] = {"x": x, "q": q}
    if reason == "another":
        objects["wrong"] = sharing.empty(3)
    else:
        q.put_nowait(sharing.empty(3))
    with pytest.raises(NotShareable, match=r"^objects\['(wrong|q)'\]"):
        async with sharing.Endpoint(path, objects, uids=OTHERS, read_only=True):
            pass
    q.put_nowait(sharing.empty(3))  # as before
    assert (await supervise(Function(share_jobs.adds_if_it_may, x), logs=QUIET))[0].value == "added"


async def test_what_the_callers_code_says_is_not_told_to_others(path: str) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    objects: dict[str, Any] = {}
    async with sharing.Endpoint(path, objects, uids=OTHERS):
        objects["wrong"] = Says("password")
        with pytest.raises(sharing.ShareLost, match="cannot be pickled") as told:
            await asyncio.to_thread(sharing.attach, path)
    assert "password" not in str(told.value)


class Says:
    """Raises that when it is pickled."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        raise ValueError(self.text)


# --- another user who means no good ---


def theirs(fd: int, how: int = os.O_RDWR) -> int:
    """A descriptor of the same file, with an open file description of its own."""
    return os.open(f"/proc/self/fd/{fd}", how)


def test_a_lock_of_theirs_holds_nobody_up() -> None:
    x = sharing.copy(np.ones(3), isolated=True)
    lock = theirs(memory.address_index.find(x.address).fd, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(lock)
    packet, fds = messages.encode(messages.OBJECT, (x,))
    datagrams.close(fds)
    lock = theirs(memory.address_index.find(x.address).fd, os.O_RDONLY)
    fcntl.flock(memory.address_index.find(x.address).fd, fcntl.LOCK_UN)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert carried(x)  # it needs no lease
    os.close(lock)
    y = sharing.copy(np.ones(1 << 20))
    lock = theirs(memory.address_index.find(y.address).fd)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(sharing.ShareLost, match="locked"):
        travelled(y)
    os.close(lock)
    assert travelled(y)
    assert packet


def test_a_queue_whose_descriptors_they_have_changed() -> None:
    q = sharing.Queue(2, uids=OTHERS)
    (same,) = travelled(q)
    assert same is q
    for fd in (q._room, *(one.fileno() for one in q._ends())):
        os.set_blocking(fd, True)
    os.eventfd_write(q._room, 2**64 - 2 - os.eventfd_read(q._room) if datagrams.readable(0, q._room) else 2**64 - 2)
    with pytest.raises(sharing.Empty):
        q.get_nowait()
    q.put_nowait(1)
    q.put_nowait(2)
    with pytest.raises(sharing.Full):
        q.put_nowait(3)
    assert [q.get_nowait(), q.get_nowait()] == [1, 2]
    q.close()


def test_places_that_they_have_locked_are_free_when_they_are_gone() -> None:
    q = sharing.Queue(2, uids=OTHERS)
    packet, fds = messages.encode(messages.OBJECT, (q,), for_others=True)
    named = [fd for fd in fds if "places" in os.readlink(f"/proc/self/fd/{fd}")]
    fcntl.fcntl(named[0], fcntl.F_OFD_SETLK, _items._LOCK(fcntl.F_WRLCK, 0, 0, 2, 0))
    with pytest.raises(sharing.Full):
        q.put_nowait(1)
    datagrams.close(fds)
    q.put_nowait(1)
    assert q.get_nowait() == 1
    assert packet


def test_what_was_sealed_since_it_came_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sharing.copy(np.ones(3), isolated=True)
    segment = memory.address_index.find(x.address)
    one = memory.Segment(memory.lease_locks.held(segment.fd), segment.size, segment.name, False)
    segment.seal()
    assert not one.read_only
    loan = one.loan(0, 24)
    assert one.read_only
    assert loan.read_only
    assert bytes(loan) == np.ones(3).tobytes()


@needs_root
def test_one_that_another_user_has_sealed_is_sent_on() -> None:
    x = sharing.copy(np.ones(3), isolated=True)
    segment = memory.address_index.find(x.address)
    segment.seal()
    fds: list[int] = []

    def sends() -> None:
        segment.read_only = False  # it came when it was not sealed
        segment.lend(fds)
        assert fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        segment.seal()  # which it is

    as_user(NOBODY, sends)


def test_without_the_seal_others_get_it_read_only_by_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.shared_segments, "_SEAL_FUTURE_WRITE", 1 << 20)
    x = sharing.copy(np.ones(3), isolated=True)
    memory.address_index.find(x.address).seal()
    for others, how in ((True, os.O_RDONLY), (False, os.O_RDWR)):
        _, fds = messages.encode(messages.ITEM, (x,), for_others=others)
        assert fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_ACCMODE == how
        datagrams.close(fds)


@pytest.mark.parametrize(
    "name", ["aioelastic-1-1-isolated-x", "aioelastic-1-1-isolated-", "aioelastic-1-1-isolated-5x"]
)
def test_a_name_that_is_none_of_ours(name: str) -> None:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, mmap.PAGESIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert memory.shared_segments.attach(fd).isolated == 0
    os.close(fd)


def test_a_bell_of_any_number() -> None:
    """Above what select(2) can be asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2_000:
        pytest.skip("needs 2,000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        q = sharing.Queue(2, uids=OTHERS)
        low, q._room = q._room, fcntl.fcntl(q._room, fcntl.F_DUPFD_CLOEXEC, 1_500)
        q.put_nowait(1)
        assert q.get_nowait() == 1
        os.close(q._room)
        q._room = low
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
