"""Arrays go to functions and back without being copied; the kernel knows who holds what, and nothing is left."""

from __future__ import annotations

import array
import asyncio
import ctypes
import fcntl
import gc
import os
import pickle
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import share_jobs
from helpers import QUIET, gone, travelled

from aioelastic import Function, Group, GroupFailed, SpecError, WorkerExecutor, sharing, supervise
from aioelastic.child.wire import datagrams, messages
from aioelastic.memory import shared_segments


def address(x: Any) -> int:
    where: int = np.asarray(x).__array_interface__["data"][0]
    return where


# --- SharedArray ---


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "float32", "float64", "complex64", "<f4", "i8", np.int32])
def test_numpy_sees_the_same_memory(dtype: Any) -> None:
    x = sharing.empty((3, 4), dtype)
    a = np.asarray(x)
    assert a.dtype == np.dtype(dtype)
    a[...] = 1
    assert (np.asarray(x) == 1).all()
    assert (np.from_dlpack(x) == 1).all()
    assert address(np.from_dlpack(x)) == address(x) == x.address
    assert x.nbytes == a.nbytes
    assert sharing.is_shared(a[1:])
    assert not sharing.is_shared(a.copy())


def test_indexing_gives_views() -> None:
    x = sharing.copy(np.arange(24).reshape(2, 3, 4))
    a = np.asarray(x)
    for key in [
        0,
        -1,
        slice(None),
        (0, 1),
        (slice(None), 1),
        (..., 2),
        (1, ..., slice(3, 0, -2)),
        (0, 1, 2),
        slice(5, 1),
    ]:
        view = x[key]
        assert np.array_equal(np.asarray(view), a[key]), key
        assert view.shape == a[key].shape
    with pytest.raises(IndexError):
        x[2]
    with pytest.raises(IndexError):
        x[0, 0, 0, 0]
    assert len(x) == 2


def test_its_buffer() -> None:
    x = sharing.copy(np.arange(6, dtype="f4").reshape(2, 3))
    assert x.buffer.tolist() == [[0, 1, 2], [3, 4, 5]]
    x.buffer[1, 2] = 9
    assert np.asarray(x)[1, 2] == 9
    assert x[1].buffer.tolist() == [3, 4, 9]
    with pytest.raises(BufferError):
        x[:, 1].buffer  # noqa: B018
    assert sharing.empty(0).buffer.nbytes == 0


def test_a_shape_of_any_whole_numbers() -> None:
    x = sharing.empty((np.int64(2), np.uint8(3)))
    assert x.shape == (2, 3)
    assert all(type(size) is int for size in x.shape)
    assert sharing.empty(np.int32(4)).shape == (4,)


@pytest.mark.parametrize("shape", [-1, (2, -3), 1.5, "12", (2, None), True, np.int64(-1)])
def test_a_wrong_shape(shape: Any) -> None:
    with pytest.raises(SpecError, match="shape"):
        sharing.empty(shape)


@pytest.mark.parametrize("dtype", ["f3", "object", ">f4", dict, None])
def test_a_wrong_dtype(dtype: Any) -> None:
    with pytest.raises(SpecError, match=r"dtype.*give one of bool"):
        sharing.empty(3, dtype)


def test_more_than_there_is() -> None:
    with pytest.raises(SpecError, match="shape"):
        sharing.empty(2**62)
    with pytest.raises(sharing.ShareLimit):
        sharing.empty(2**58)
    assert issubclass(sharing.ShareLimit, MemoryError)


def test_copies_of_anything() -> None:
    source = np.arange(24.0).reshape(2, 3, 4)
    for one in (source, source.T, source[:, ::-2], source[0, 0, 0], sharing.copy(source).__getitem__((slice(None), 1))):
        x = sharing.copy(one)
        assert np.array_equal(np.asarray(x), np.asarray(one))
        assert not np.shares_memory(np.asarray(x), np.asarray(one))
    assert sharing.copy(b"bytes").buffer.tobytes() == b"bytes"
    assert sharing.copy(bytearray(b"more")).buffer.tobytes() == b"more"
    assert sharing.copy((ctypes.c_double * 3)(1, 2, 3)).buffer.tolist() == [1, 2, 3]
    assert sharing.copy((ctypes.c_int32 * 2 * 2)((1, 2), (3, 4))).buffer.tolist() == [[1, 2], [3, 4]]
    assert np.asarray(sharing.copy(np.empty((0, 3)))).shape == (0, 3)
    other = (ctypes.c_int32.__ctype_be__ * 2)(1, 2)
    characters = array.array("w" if sys.version_info >= (3, 13) else "u", "abc")
    for bad in ("text", object(), np.array([object()]), np.zeros(2, "M8[s]"), characters, other):
        with pytest.raises(sharing.NotShareable):
            sharing.copy(bad)


def test_a_pickle_elsewhere_is_refused() -> None:
    with pytest.raises(sharing.NotShareable, match="worker"):
        pickle.dumps(sharing.empty(3))
    with pytest.raises(sharing.NotShareable):
        pickle.dumps(sharing.Queue())


# --- messages ---


def test_what_is_shared_stays_the_same_memory() -> None:
    x = sharing.empty((3, 4), "f4")
    a = np.asarray(x)
    a[...] = 0
    y, column, part, flat = travelled(x, a[:, 1], x[1:, ::2], a[::-1, ::-1])
    assert y.address == x.address
    column[:] = 5
    np.asarray(part)[...] = 7
    assert a.tolist() == [[0, 5, 0, 0], [7, 5, 7, 0], [7, 5, 7, 0]]
    assert flat.tolist() == a[::-1, ::-1].tolist()


@pytest.mark.parametrize("size", [10, 1000, 100_000, 1_000_000])
def test_private_arrays_are_copied_once_and_views_stay_views(size: int) -> None:
    base = np.arange(float(size))
    whole, half, part = travelled(base, base[::2], base[4:8])
    assert np.array_equal(whole, base)
    whole[6] = -1
    assert half[3] == part[2] == -1
    assert base[6] == 6
    assert not sharing.is_shared(whole)


def test_only_the_part_that_is_sent_is_copied() -> None:
    big = np.ones((1000, 5000))  # 40 MB
    packet, fds = messages.encode(messages.TASK, (big[:2, :10], big[500:502]))
    assert sum(os.fstat(fd).st_size for fd in fds) < 400_000  # they do not overlap
    datagrams.close(fds)
    packet, fds = messages.encode(messages.TASK, (big[:, 7],))
    assert len(packet) + sum(os.fstat(fd).st_size for fd in fds) < 40_000
    (column,) = messages.decode(packet, fds)
    assert (column == 1).all()
    datagrams.close(fds)


def test_all_kinds_of_arrays_arrive() -> None:
    kinds = [
        np.array(3.5),
        np.empty((0, 4)),
        np.arange(6).reshape(2, 3).T,
        np.asfortranarray(np.ones((3, 3))),
        np.array(["a", "bc"]),
        np.array([b"x"]),
        np.zeros(2, "M8[ns]"),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array([{"any": "thing"}]),
        np.ones(3, ">f4"),
        np.broadcast_to(np.arange(3), (4, 3)),
        np.arange(10)[::-3],
    ]
    (arrived,) = travelled(kinds)
    for one, other in zip(kinds, arrived, strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.array_equal(one, other)


@pytest.mark.parametrize("n", [249, 250, 251, 600])
def test_any_number_of_arrays_in_one_message(n: int) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    arrays: list[Any] = []
    try:
        if hard < n:  # each has one
            with pytest.raises(sharing.ShareLimit, match="Too many open files"):
                arrays += [sharing.copy(np.full(70_000, i % 256, "u1")) for i in range(n)]
            return
        arrays += [sharing.copy(np.full(70_000, i % 256, "u1")) for i in range(n)]
        (arrived,) = travelled(arrays)
        assert [np.asarray(x)[-1] for x in arrived] == [i % 256 for i in range(n)]
        assert [x.address for x in arrived] == [x.address for x in arrays]
        del arrived
    finally:
        arrays.clear()
        gc.collect()
        sharing.trim()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_descriptors_are_told() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    x = sharing.empty(100_000)
    packet, fds = messages.encode(messages.TASK, (x,))
    here, there = datagrams.pair()
    with here, there:
        datagrams.send(here, packet, fds)
        datagrams.close(fds)
        used = max(int(one) for one in os.listdir("/proc/self/fd"))
        blocked = [os.dup(0) for _ in range(used)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(blocked), hard))
        try:
            with pytest.raises(ValueError, match="descriptors"):
                datagrams.receive(there)
            with pytest.raises(sharing.ShareLimit):
                sharing.empty(200_000)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            datagrams.close(blocked)


def make_frame(parts: Any) -> Frame:
    return Frame(*parts)


class Frame:
    def __init__(self, pixels: Any, time: float) -> None:
        self.pixels = pixels
        self.time = time

    def __reduce__(self) -> Any:
        raise TypeError("not by pickle")


@pytest.mark.parametrize("size", [10, 10_000])
def test_what_may_not_be_written_to_may_not_be_there(size: int) -> None:
    protected = np.zeros(size)
    protected.flags.writeable = False
    part = np.asarray(sharing.empty(size))[1:]
    part.flags.writeable = False
    for one in travelled(protected, part, np.broadcast_to(np.zeros(size), (3, size))):
        with pytest.raises(ValueError, match="read-only"):
            one[...] = 1
    (writeable,) = travelled(np.zeros(size))
    writeable[:] = 1


def test_buffers_stay_views() -> None:
    x = sharing.empty(10_000, "float32")
    whole, part, backwards, fixed, empty = travelled(
        x.buffer, x.buffer[10:20], x.buffer[::-1], memoryview(b"abc"), memoryview(bytearray())
    )
    whole[12], part[3] = 5, 6
    assert np.asarray(x)[[12, 13]].tolist() == [5, 6]
    assert (part.format, part.shape, whole.nbytes) == ("f", (10,), 40_000)
    assert backwards[10_000 - 13] == 0  # copied, as it was then
    assert (bytes(fixed), fixed.readonly, empty.nbytes) == (b"abc", True, 0)
    records = np.zeros(3, dtype=[("a", "u1"), ("b", "u1")])
    others = travelled(memoryview(records), memoryview((ctypes.c_double * 3)(1, 2, 3)), memoryview(np.array(7.0)))
    assert [(one.format, one.shape) for one in others] == [("B", (6,)), ("d", (3,)), ("d", ())]
    assert others[2][()] == 7
    private = bytearray(100_000)
    (own,) = travelled(memoryview(private).cast("d", (125, 100)))
    own[3, 4] = 1.0
    assert (own.shape, any(private)) == ((125, 100), False)


def test_other_types_by_what_they_are_made_of() -> None:
    from aioelastic.memory import array_messages

    frame = Frame(sharing.copy(np.ones(3)), 1.5)
    with pytest.raises(TypeError, match="not by pickle"):
        travelled(frame)
    sharing.register(Frame, lambda one: (one.pixels, one.time), make_frame)
    try:
        (other,) = travelled(frame)
        assert other.time == 1.5
        assert other.pixels.address == frame.pixels.address
    finally:
        del array_messages._registered[Frame]


def test_what_is_registered_last_counts() -> None:
    from aioelastic.memory import array_messages

    class Kind:
        pass

    try:
        for word in ("first", "second"):
            sharing.register(Kind, lambda _, word=word: word, str)  # type: ignore[misc]
            assert travelled(Kind()) == (word,)
    finally:
        del array_messages._registered[Kind]


def test_a_message_keeps_nothing() -> None:
    x = np.ones(1000)
    gone = weakref.ref(x)
    travelled(x)
    with pytest.raises(TypeError):
        travelled(x, threading.Lock())
    del x
    assert gone() is None


def test_what_is_no_share_is_refused() -> None:

    fd = os.memfd_create("somebody-else's", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        with pytest.raises(sharing.ShareLost, match="not sealed"):
            shared_segments.attach(fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with pytest.raises(sharing.ShareLost, match="not a segment"):
            shared_segments.attach(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("made", ["memfd", "forged", "file", "of another user"])
def test_memory_that_its_sender_can_cut_off_is_not_mapped(made: str, size: int, tmp_path: Path) -> None:
    """Who reads what was cut off is ended by SIGBUS."""
    if made in ("memfd", "forged"):
        fd = os.memfd_create("aioelastic" if made == "memfd" else f"aioelastic-{os.getpid()}-0", os.MFD_ALLOW_SEALING)
    else:
        home = tmp_path / ("aioelastic-shares-1-0" if made == "of another user" else "home")
        home.mkdir()
        fd = os.open(home / "aioelastic-1-0", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, size)
        if made == "of another user":
            if os.geteuid():
                pytest.skip("needs root")
            os.fchown(fd, 65_534, 65_534)
        with pytest.raises(ValueError, match="not sealed"):
            messages.decode(messages.VALUE + b"\1", [fd])
        with pytest.raises(ValueError, match="not sealed"):
            messages.decode(messages.VALUE + b"\1", [fd], private=True)
    finally:
        os.close(fd)


def test_what_we_send_by_memory_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (messages.VALUE, messages.OBJECT):
        packet, fds = messages.encode(kind, (bytes(100_000), np.ones(100_000)))
        try:
            assert messages.copies(packet) == len(fds) == 2
            for fd in fds:
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, 0)
        finally:
            datagrams.close(fds)
    sharing.trim()


# --- the arena ---


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    sharing.trim()
    before = sharing.stats()
    x = sharing.empty(1 << 20, "u1")
    y = sharing.empty(1 << 20, "u1")
    where = x.address
    del x
    z = sharing.empty(1 << 20, "u1")
    assert z.address == where
    now = sharing.stats()
    assert (now.made - before.made, now.reused - before.reused, now.idle) == (2, 1, 0)
    del y, z
    assert sharing.stats().idle == 2 << 20
    assert sharing.trim() >= 2 << 20
    assert sharing.stats().idle == 0


def test_memory_in_a_message_is_not_used_again() -> None:
    x = sharing.empty(1 << 20, "u1")
    np.asarray(x)[:] = 3
    packet, fds = messages.encode(messages.TASK, (x,))
    where = x.address
    del x
    y = sharing.empty(1 << 20, "u1")
    assert y.address != where
    np.asarray(y)[:] = 4
    (arrived,) = messages.decode(packet, fds)
    assert (np.asarray(arrived) == 3).all()
    del arrived
    datagrams.close(fds)
    assert sharing.empty(1 << 20, "u1").address == where


def test_a_view_keeps_its_memory() -> None:
    x = sharing.copy(np.arange(1 << 17))
    part = np.asarray(x)[5:10]
    where = x.address
    del x
    gc.collect()
    assert sharing.empty(1 << 17, "i8").address != where
    assert part.tolist() == [5, 6, 7, 8, 9]


def test_small_arrays_share_segments() -> None:
    before = len(os.listdir("/proc/self/fd"))
    arrays = [sharing.copy(np.full(10, i)) for i in range(5000)]
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    assert all((np.asarray(x) == i).all() for i, x in enumerate(arrays))
    (arrived,) = travelled(arrays)
    assert [x.address for x in arrived] == [x.address for x in arrays]


def test_many_small_messages_cost_nothing() -> None:
    x = sharing.empty(100, "f4")
    travelled(x, np.ones(10))
    before, made = len(os.listdir("/proc/self/fd")), sharing.stats().made
    for _ in range(3000):
        travelled(x, np.ones(10))
    assert len(os.listdir("/proc/self/fd")) == before
    assert sharing.stats().made == made


@pytest.mark.parametrize(("nbytes", "asked"), [(8 << 20, True), (1 << 20, False)])
def test_huge_pages_are_asked_for_where_they_are_worth_it(nbytes: int, asked: bool) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("needs a kernel with transparent huge pages")
    x = sharing.empty(nbytes, "u1")
    maps = Path("/proc/self/smaps").read_text()
    mine = maps[maps.index(f"{x.address:x}-") :]
    flags = next(line.split()[1:] for line in mine.splitlines() if line.startswith("VmFlags:"))
    assert ("hg" in flags) == asked


def test_the_limit_is_kept() -> None:
    sharing.trim()
    sharing.configure(limit=1 << 20)
    try:
        arrays = [sharing.empty(300_000, "u1") for _ in range(8)]
        del arrays
        assert 0 < sharing.stats().idle <= 1 << 20
    finally:
        sharing.configure(limit=1 << 30)
    with pytest.raises(SpecError, match="limit"):
        sharing.configure(limit=-1)


# --- functions ---


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
async def test_arguments_and_results(start: Any) -> None:
    x = sharing.copy(np.zeros((100, 100)))
    result = await supervise(Function(share_jobs.add_one, x), n=3, start=start, preload=(), logs=QUIET)
    assert (np.asarray(x) >= 1).all()  # they do not lock, so some additions may be lost
    for one in result:
        assert one.value.address == x.address


async def test_an_argument_keeps_its_views() -> None:
    x = sharing.copy(np.ones((10, 10)))
    private = np.ones(10)
    result = await supervise(Function(share_jobs.facts, x, x[0], np.asarray(x)[:, 1], private), n=1, logs=QUIET)
    assert result[0].value == [
        ("SharedArray", True, 100.0),
        ("SharedArray", True, 10.0),
        ("ndarray", True, 10.0),
        ("ndarray", False, 10.0),
    ]


async def test_a_result_outlives_its_owner() -> None:
    result = await supervise(Function(share_jobs.born_here, 100_000), n=2, logs=QUIET)
    for rank in (0, 1):
        assert (np.asarray(result[rank].value) == rank).all()
    assert sharing.stats().borrowed == 2
    # and goes on: the same memory in a third process, and back
    again = await supervise(Function(share_jobs.add_one, result[1].value), n=1, logs=QUIET)
    assert again[0].value.address == result[1].value.address
    assert (np.asarray(result[1].value) == 2).all()
    del result, again
    await asyncio.sleep(0)  # the loop still holds what woke us
    gc.collect()
    assert sharing.stats().borrowed == 0


async def test_an_executor_maps_over_arrays() -> None:
    async with WorkerExecutor(2) as executor:
        arrays = [sharing.copy(np.full(100_000, float(i))) for i in range(6)]
        back = await asyncio.to_thread(lambda: list(executor.map(share_jobs.add_one, arrays)))
        assert [x.address for x in back] == [x.address for x in arrays]
        assert [np.asarray(x)[0] for x in arrays] == [1, 2, 3, 4, 5, 6]
        private = [np.full(100_000, float(i)) for i in range(6)]
        others = await asyncio.to_thread(lambda: list(executor.map(share_jobs.add_one, private)))
        assert [x[0] for x in private] == [0, 1, 2, 3, 4, 5]
        assert [x[-1] for x in others] == [1, 2, 3, 4, 5, 6]


async def test_memory_that_lies_idle_does_not_count_as_growth() -> None:
    async with WorkerExecutor(1, memory_limit=200 << 20) as executor:
        first = await executor.run(share_jobs.private, 64 << 20)
        pids = executor.pids
        for _ in range(6):
            await executor.run(share_jobs.private, 64 << 20)
        assert executor.pids == pids
    assert first.sum() == 64 << 20


async def test_a_task_that_died_holds_nothing() -> None:
    from aioelastic import WorkerFailed

    x = sharing.empty(1 << 20, "u1")
    where = x.address
    async with WorkerExecutor(1) as executor:
        failed = executor.submit(share_jobs.dies_with, x)
        await asyncio.wait([asyncio.wrap_future(failed)])
        assert isinstance(failed.exception(), WorkerFailed)
        del x
        assert sharing.empty(1 << 20, "u1").address == where


async def test_what_a_killed_worker_held_is_free_at_once() -> None:
    with pytest.raises(GroupFailed, match="SIGKILL"):
        await kill_a_holder()


async def kill_a_holder() -> None:
    x = sharing.empty(1 << 20, "u1")
    where = x.address
    async with Group(Function(share_jobs.holds), logs=QUIET) as group:
        await group[0].send(x)
        pid = await group[0].receive()
        assert any(one.holder == pid and one.segment for one in sharing.leases())
        del x
        assert sharing.empty(1 << 20, "u1").address != where
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        fresh = [sharing.empty(1 << 20, "u1") for _ in range(2)]
        assert where in [one.address for one in fresh]


# --- objects ---


@pytest.mark.parametrize("job", [share_jobs.echo, share_jobs.echo_async])
async def test_objects_go_both_ways(job: Any) -> None:
    x = sharing.copy(np.zeros(100_000))
    async with Group(Function(job), logs=QUIET) as group:
        worker = group[0]
        for value in (1, "text", {"x": x, "column": x[::2]}, np.arange(50_000)):
            await worker.send(value)
            back = await worker.receive()
            if isinstance(value, dict):
                assert back["x"].address == x.address
                np.asarray(back["column"])[:] = 3
                assert np.asarray(x)[2] == 3
            else:
                assert np.array_equal(back, value)
        await worker.send(None)
        result = await group.wait()
        assert result[0].value == 4
        with pytest.raises(EOFError):
            await worker.receive()
        with pytest.raises(BrokenPipeError):
            await worker.send(1)


def test_no_import_of_asyncio() -> None:
    import subprocess
    import sys

    code = "import sys; from aioelastic import sharing as s; s.empty(3); s.Queue(); assert 'asyncio' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(sharing.__file__).parents[2])},
    )


@pytest.mark.parametrize("start", ["zygote", "fork", "spawn"])
async def test_who_ends_without_having_received_all_has_its_value(start: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    async with Group(Function(share_jobs.receives_one, tmp_path / "go"), start=start, logs=QUIET) as group:
        await group[0].send(1)
        await group[0].send(2)
        await asyncio.to_thread((tmp_path / "go").write_text, "go")
        result = await group.wait()
    assert result[0].value == 1
