"""What comes of a message: its copies are the receiver's own, and who keeps one of them keeps nothing else."""

from __future__ import annotations

import gc
import mmap
import os
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import needs, travelled

from aioelastic import memory, sharing
from aioelastic.child.wire import datagrams, messages
from aioelastic.memory import _received_copies
from aioelastic.memory._limits import few

SIZES = [10, 3000, 5000, 1 << 16, 1 << 18, 1 << 20]  # bytes


def mapped() -> int:
    """Bytes of segments that this process has mapped."""
    found = 0
    with open("/proc/self/maps") as file:
        for line in file:
            if "memfd:aioelastic" in line:
                low, _, high = line.split()[0].partition("-")
                found += int(high, 16) - int(low, 16)
    return found


def in_a_copy(work: Callable[[], object]) -> int:
    """What a forked copy of this process ends with."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() is None else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- private is private ---


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_copy_of_the_process_writes_into_its_own(nbytes: int) -> None:
    (one,) = travelled(np.ones(nbytes, "u1"))
    one[0] = 3
    assert in_a_copy(lambda: one.fill(7)) == 0
    assert one[0] == 3
    assert (one[1:] == 1).all()


@pytest.mark.parametrize("nbytes", SIZES)
def test_what_is_written_later_is_not_seen_in_a_copy(nbytes: int) -> None:
    (one,) = travelled(np.ones(nbytes, "u1"))
    go, tell = os.pipe()

    def look() -> object:
        os.read(go, 1)
        return None if (one == 1).all() else "another value"

    pid = os.fork()
    if pid == 0:
        try:
            os._exit(look() is not None)
        finally:
            os._exit(2)
    one.fill(9)
    os.write(tell, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(go)
    os.close(tell)


def test_many_that_are_kept_and_a_fork() -> None:
    kept = [travelled(np.full(_received_copies.LARGE, number, "u1"))[0] for number in range(_received_copies.MOST + 20)]
    assert len(_received_copies._kept) == few(_received_copies.MOST)
    assert in_a_copy(lambda: [one.fill(0) for one in kept] and None) == 0
    for number, one in enumerate(kept):
        assert (one == number % 256).all()
        one[0] = 5  # it may be written
    assert len(_received_copies._kept) == 0  # the first fork has made them all its own


@pytest.mark.parametrize("kind", [messages.CALL, messages.TASK])
def test_several_that_receive_one_message(kind: bytes) -> None:
    packet, fds = messages.encode(kind, (np.ones(1 << 18, "u1"), np.ones(10)))
    try:
        first, second = (messages.decode(packet, fds, private=True) for _ in range(2))
    finally:
        datagrams.close(fds)
    first[0][:] = first[1][:] = 2
    assert (second[0] == 1).all()
    assert (second[1] == 1).all()
    sharing.trim()


def test_a_copy_that_was_received_is_copied_again() -> None:
    (one,) = travelled(np.ones(1 << 17, "u1"))
    (two,) = travelled(one)
    two.fill(3)
    assert (one == 1).all()
    assert not sharing.is_shared(one)


# --- keeping little costs little ---


@pytest.mark.parametrize("order", [1, -1])
def test_a_small_one_keeps_nothing_of_the_message(order: int) -> None:
    kept = []
    fds = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        arrays = [np.full(100, number, "f8"), np.full(1 << 20, number, "u1"), np.full(1 << 18, number, "u1")]
        kept.append(travelled(*arrays[::order])[::order][0])
    gc.collect()
    sharing.trim()
    assert mapped() == 0
    assert len(os.listdir("/proc/self/fd")) == fds
    assert all((one == number).all() for number, one in enumerate(kept))


def test_each_large_one_is_kept_alone() -> None:
    sharing.configure(limit=0)
    try:
        arrays = [np.full(1 << 20, number, "u1") for number in range(8)]
        second = travelled(*arrays)[1]
        gc.collect()
        assert 1 << 20 < mapped() < 2 << 20
        assert (second == 1).all()
    finally:
        memory.arena.limit = None


def test_more_large_ones_than_have_memory_of_their_own() -> None:
    arrays = [np.full((1 << 18) + number, number, "u1") for number in range(messages.MOST + 10)]
    arrived = travelled(*arrays)
    assert all((one == number).all() for number, one in enumerate(arrived))
    assert all(one.flags.writeable for one in arrived)
    del arrived
    sharing.trim()


def test_more_mappings_than_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Any:
        raise memory.ShareLimit("cannot map")

    monkeypatch.setattr(_received_copies, "show", none)
    (one,) = travelled(np.full(1 << 19, 3, "u1"))
    assert (one == 3).all()
    one[:] = 4
    monkeypatch.undo()
    sharing.trim()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_columns_do_not_carry_the_table(library: str) -> None:
    if library == "numpy":
        table: Any = np.arange(1000 * 2000.0).reshape(1000, 2000)
    else:
        table = needs("torch").arange(1000 * 2000.0).reshape(1000, 2000)
    columns = [table[:, 0], table[:, 1], table[:, 7]]
    packet, fds = messages.encode(messages.OBJECT, (columns,))
    size = len(packet) + sum(os.fstat(fd).st_size for fd in fds)
    (arrived,) = messages.decode(packet, fds)
    datagrams.close(fds)
    assert size < 100_000
    assert all((one == other).all() for one, other in zip(arrived, columns, strict=True))
    del arrived
    sharing.trim()


def test_views_of_one_array_that_need_most_of_it_are_views_again() -> None:
    whole = np.arange(1 << 17, dtype="f8")
    left, right, every = travelled(whole[: 1 << 16], whole[1000:], whole[::2])
    right[0] = -1.0
    assert left[1000] == every[500] == -1.0
    del left, right, every
    sharing.trim()


# --- a fork needs no descriptors ---


def test_a_fork_without_a_descriptor_left() -> None:
    shared = [sharing.copy(np.full(1 << 17, number, "u1")) for number in range(20)]
    views = [np.asarray(one) for one in shared]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        code = in_a_copy(lambda: None if all((one == number).all() for number, one in enumerate(views)) else 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert code == 0


def test_memory_that_a_copy_may_use_is_not_used_again() -> None:
    x = sharing.copy(np.full(1 << 17, 3, "u1"))
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(go, 1)
            os._exit(0 if (np.asarray(x) == 3).all() else 1)
        finally:
            os._exit(2)
    del x
    others = [sharing.empty(1 << 17, "u1") for _ in range(3)]
    for one in others:
        np.asarray(one)[:] = 4
    os.write(tell, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(go)
    os.close(tell)


def test_a_mapping_ends_with_its_last_view() -> None:
    sharing.configure(limit=0)
    try:
        view = np.asarray(sharing.copy(np.full(mmap.PAGESIZE * 20, 5, "u1")))[7:]
        gc.collect()
        sharing.trim()
        assert mapped() == mmap.PAGESIZE * 20
        assert (view == 5).all()
        del view
        assert mapped() == 0
    finally:
        memory.arena.limit = None


class Saved:
    """Comes back when the garbage collector has come for it, with its array."""

    kept: list[Saved] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.array = sharing.copy(np.full(1 << 17, 5, "u1"))
        self.itself = self

    def __del__(self) -> None:
        self.kept.append(self)


def test_what_a_finalizer_saves_is_not_used_again() -> None:
    Saved()
    gc.collect()
    (saved,) = Saved.kept
    others = [sharing.copy(np.full(1 << 17, 6, "u1")) for _ in range(3)]
    assert (np.asarray(saved.array) == 5).all()
    (there,) = travelled(saved.array)
    np.asarray(there)[0] = 7
    assert np.asarray(saved.array)[0] == 7
    Saved.kept.clear()
    saved.itself = None  # type: ignore[assignment]
    del saved, others, there
    gc.collect()
    Saved.kept.clear()
    gc.collect()
