"""What other processes have written is read within limits, however much it is, whatever it is, and whoever wrote it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
from helpers import QUIET, until

from aioelastic import Function, Group, Stop, supervise
from aioelastic.child.kernel import bounded_reads
from aioelastic.child.wire import datagrams, messages
from aioelastic.child.worker import lent_run
from aioelastic.launch import _function_channel, _received_values
from aioelastic.processes import cgroups
from aioelastic.supervisor import leak_check
from aioelastic.watch import Poller


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = datagrams.pair()
    here.setblocking(False)
    there.setblocking(False)
    with here, there:
        yield here, there


def open_now() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def raw(sock: socket.socket, packet: bytes, *fds: int) -> None:
    """As whoever does not keep to the protocol sends it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([packet], rights)


# --- datagrams ---


def test_descriptors_by_the_thousand_travel_and_arrive(ends: Any) -> None:
    here, there = ends
    with open(os.devnull) as null:
        datagrams.send(there, b"O1", [null.fileno()] * 900)
    packet, fds = datagrams.receive(here)
    datagrams.close(fds)
    assert (packet, len(fds)) == (b"O1", 900)


def test_more_than_may_travel_are_refused_at_once(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "MOST", 300)
    with pytest.raises(OSError, match="300 can travel"):
        datagrams.send(ends[1], b"O1", [0] * 301)


def test_more_than_a_socket_holds_are_refused_and_not_tried_for_ever(
    ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = datagrams.pair

    def small() -> Any:
        inner, outer = real()
        inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return inner, outer

    monkeypatch.setattr(datagrams, "pair", small)
    before = open_now()
    with pytest.raises(OSError, match="no room"):
        datagrams.send(ends[1], b"O1", [0] * 10_000)
    assert open_now() == before


@pytest.mark.parametrize("what", ["open", "empty", "words", "stream", "none", "two", "nested", "many", "nothing"])
def test_descriptors_that_never_end_or_are_none_make_nobody_wait(what: str, ends: Any, monkeypatch: Any) -> None:
    """Whatever stands in for the socket with the rest of a message's descriptors."""
    here, there = ends
    monkeypatch.setattr(datagrams, "MOST", 100)
    before = open_now()
    inner, outer = datagrams.pair() if what != "stream" else socket.socketpair()
    with inner, outer, open(os.devnull) as null:
        fds = [outer.fileno()]
        if what == "open":
            raw(inner, b".", null.fileno())
        elif what == "words":
            raw(inner, b"..", null.fileno())
        elif what == "stream":
            inner.sendall(bytes(100_000))
        elif what == "none":
            fds = [null.fileno()]
        elif what == "two":
            fds += [null.fileno()]
        elif what == "nested":
            raw(inner, b"+.", outer.fileno())
        elif what == "many":
            for _ in range(3):
                raw(inner, b".", *[null.fileno()] * 50)
        if what not in ("open", "empty"):
            inner.close()
        raw(there, b"+" if what == "nothing" else b"+O1", *fds)
        with pytest.raises(ValueError, match="not a message"):
            datagrams.receive(here)
    assert open_now() == before


def test_an_empty_datagram_with_descriptors_keeps_none(ends: Any) -> None:
    here, there = ends
    before = open_now()
    raw(there, b"", 0)
    assert datagrams.receive(here) == (b"", [])
    assert open_now() == before


def test_the_number_of_a_call_is_not_taken_for_the_kind_of_a_message(ends: Any) -> None:
    here, there = ends
    datagrams.send(there, lent_run.HEAD.pack(ord("+")) + b"V1", [0])
    packet, fds = datagrams.receive(here)
    datagrams.close(fds)
    assert (packet[-2:], len(fds)) == (b"V1", 1)


def test_how_much_waits_is_known(ends: Any) -> None:
    here, there = ends
    assert datagrams.waiting(here) == 0
    there.send(b"one")
    there.send(b"four")
    assert datagrams.waiting(here) == 7


# --- files ---


def test_lines_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"x" * 50 + b"\n\ntwo\nthree")
    for block in (1, 3, 20):
        monkeypatch.setattr(bounded_reads, "BLOCK", block)
        wanted = [b"one", b"", b"two", b"three"] if block >= 5 else [b"one", b"", b"two"] if block == 3 else [b""]
        assert list(bounded_reads.lines(str(path), 1000)) == wanted
    assert list(bounded_reads.lines(str(path), 5)) == [b"one", b"x"]
    assert list(bounded_reads.lines(os.devnull, 100)) == []
    with pytest.raises(FileNotFoundError):
        list(bounded_reads.lines(str(tmp_path / "none"), 5))


@pytest.mark.parametrize("block", [1, 2, 5, 65_536])
def test_a_variable_however_the_bytes_come(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_reads, "BLOCK", block)
    path = tmp_path / "environ"
    for before in range(8):
        path.write_bytes(bytes(before) + b"XTAG=no\0T=TAG=no\0TAG=one:two\0TAG=three\0")
        assert bounded_reads.variable(str(path), b"TAG", 1000, 100) == b"one:two"
        assert bounded_reads.variable(str(path), b"TAG", 1000, 3) == b"one"
        assert bounded_reads.variable(str(path), b"TA", 1000, 3) is None
    path.write_bytes(b"TAG=unfinished")
    assert bounded_reads.variable(str(path), b"TAG", 1000, 100) == b"unfinished"
    assert bounded_reads.variable(str(path), b"TAG", 3, 100) is None
    assert bounded_reads.variable(str(tmp_path / "none"), b"TAG", 3, 100) is None


def test_what_is_not_there_yet_makes_nobody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert bounded_reads.slurp(str(tmp_path / "fifo")) == b""
    assert bounded_reads.variable(str(tmp_path / "fifo"), b"TAG", 100, 100) is None


def test_a_turn_has_a_budget() -> None:
    sizes = iter([3, 3, 3, -1])
    assert bounded_reads.turn(lambda: next(sizes), 5, 60) == 0
    assert bounded_reads.turn(lambda: next(sizes), 5, -1) == 2  # one, in any case
    assert bounded_reads.turn(lambda: next(sizes), 5, 60) == 0
    assert list(sizes) == []


# --- what strangers say of themselves ---


@pytest.mark.parametrize(
    ("lineage", "rank"),
    [
        ("run/3/0", 3),
        ("other:run/3/0", 3),
        ("run/x/0", None),
        ("run/", None),
        ("run/3", None),
        ("run/-1/0", None),
        ("run/" + "9" * 5000 + "/0", None),
        ("run/3/0\n", None),
        ("run/\u0663/\u0660", None),
    ],
)
def test_a_lineage_is_a_strangers_own_choice(lineage: str, rank: int | None) -> None:
    assert leak_check._rank(1, tuple(lineage.split(":")), "run") == rank


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        (b"0::/a/aioelastic-run/3-0\n", 3),
        (b"1:cpu:/\n0::/aioelastic-run/3-0/below\n", 3),
        (b"0::/aioelastic-run/x-0\n", None),
        (b"0::/aioelastic-run/3\n", None),
        (b"0::/aioelastic-run2/3-0\n", None),
        (b"1:name=/aioelastic-run/3-0:/\n0::/\n", None),
        (b"0::/\xff\xfe\n", None),
        (b"", None),
    ],
)
def test_a_control_group_has_any_name(line: bytes, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "slurp", lambda path, size: line)
    assert cgroups.rank_of(1, "run") == rank


# --- the channel of a function worker ---


async def ended(one: _function_channel.FunctionChannel) -> None:
    """Its worker has: on a busy machine, reading takes more than one turn."""
    one.finish()
    await until(lambda: one._channel is None)


@contextlib.asynccontextmanager
async def heard(ends: Any, **options: Any) -> Any:
    """Its host's end."""
    one = _function_channel.FunctionChannel(Poller(asyncio.get_running_loop()), ends[0], lambda: None, **options)
    try:
        yield one
    finally:
        await ended(one)


def said(sock: socket.socket, kind: bytes, *body: Any) -> None:
    packet, fds = messages.encode(kind, body)
    datagrams.send(sock, packet, fds)
    datagrams.close(fds)


async def test_what_it_had_sent_is_read_after_its_end_and_what_its_copies_send_is_not(ends: Any) -> None:
    async with heard(ends) as one:
        for number in range(100):
            said(ends[1], messages.OBJECT, number)
        said(ends[1], messages.VALUE, "value")
        real = one._take

        def busy(*args: Any) -> None:  # as fast as it is read
            real(*args)
            said(ends[1], messages.OBJECT, "of a copy")

        one._take = busy
        await ended(one)
        assert one.value == "value"
        assert [await one.receive() for _ in range(100)] == list(range(100))
        with pytest.raises(ConnectionError):
            said(ends[1], messages.OBJECT, "late")


async def test_the_loop_goes_on_while_it_is_read(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_function_channel, "SLICE", -1)  # one message a turn
    monkeypatch.setattr(_function_channel, "AT_ONCE", 0)
    whole = []
    async with heard(ends, on_whole=lambda: whole.append(True)) as one:
        for number in range(5):
            said(ends[1], messages.OBJECT, number)
        said(ends[1], messages.VALUE, "value")
        one.finish()
        assert (one.has_value, one.whole) == (True, False)  # as far as can be known
        with pytest.raises(ConnectionError):  # at once, not when all is read: nobody keeps it from coming to an end
            said(ends[1], messages.OBJECT, "of a copy")
        await until(lambda: one.whole)
        assert (one.value, whole) == ("value", [True])
        assert [await one.receive() for _ in range(5)] == list(range(5))


async def test_many_small_messages_do_not_hold_the_loop_up(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read at once after its end has a limit of time, too: each message takes as long as a large one."""
    now = [0.0]
    monkeypatch.setattr(bounded_reads, "time", SimpleNamespace(monotonic=lambda: now[0]))
    async with heard(ends) as one:
        for number in range(50):
            said(ends[1], messages.OBJECT, number)
        said(ends[1], messages.VALUE, "value")
        real = one._read

        def slowly() -> int:
            now[0] += 0.001
            return int(real())

        one._read = slowly
        one.finish()
        assert now[0] < 0.01
        assert not one.whole
        await until(lambda: one.whole)
        assert one.value == "value"


async def test_a_value_that_does_not_come_is_missed_when_all_is_read(
    ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_function_channel, "SLICE", -1)  # one message a turn
    monkeypatch.setattr(_function_channel, "AT_ONCE", 0)
    async with heard(ends) as one:
        for number in range(5):
            said(ends[1], messages.OBJECT, number)
        one.finish()
        await until(lambda: one.whole)
        assert not one.has_value


async def test_what_takes_too_long_to_read_is_told(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_function_channel, "SLICE", -1)  # one message a turn
    monkeypatch.setattr(_function_channel, "AT_ONCE", 0)
    async with heard(ends) as one:
        for number in range(5):
            said(ends[1], messages.OBJECT, number)
        one.finish()
        one.too_late()
        assert (one.whole, one.has_value) == (True, False)
        assert "more than could be read in time" in one.invalid


async def test_it_is_ready_once(ends: Any) -> None:
    ready: list[bool] = []
    one = _function_channel.FunctionChannel(Poller(asyncio.get_running_loop()), ends[0], lambda: ready.append(True))
    for _ in range(10):
        said(ends[1], messages.RUNS)
    await ended(one)
    assert ready == [True]


async def test_objects_that_nobody_receives_cost_their_datagrams_and_no_more(ends: Any, monkeypatch: Any) -> None:
    """They are unpickled for who receives them."""
    monkeypatch.setattr(messages, "memory", lambda: None)  # which keeps what it has sent, for the next
    async with heard(ends) as one:
        for _ in range(3):
            said(ends[1], messages.OBJECT, bytes(1 << 20))
        await ended(one)
        assert len(await one.receive()) == 1 << 20
        held = [os.path.realpath(f"/proc/self/fd/{fd}") for obj in one._objects for fd in obj.fds]
        assert held == ["/memfd:aioelastic (deleted)"] * 2
        numbers = {str(fd) for obj in one._objects for fd in obj.fds}
        one._objects.clear()
        assert not numbers & open_now()


async def test_descriptors_that_an_object_does_not_need_are_not_kept(
    ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_function_channel, "DESCRIPTORS", 300)
    async with heard(ends) as one:
        before = open_now()
        packet, _ = messages.encode(messages.OBJECT, (1,))
        for _ in range(10):
            raw(ends[1], packet, *[0] * 200)
        one._poller._ready()
        await until(lambda: len(one._objects) == 10)
        assert len(open_now() - before) == 200
        assert [await one.receive() for _ in range(10)] == [1] * 10
        assert open_now() == before


@pytest.mark.parametrize("packet", [b"O", b"V", b"E", b"D", b"\0", b"O\2" + b"\xff" * 40, b"V\1", b"V\4\0\0", b"+O1"])
async def test_nonsense_is_told_and_stops_nobody(packet: bytes, ends: Any) -> None:
    async with heard(ends) as one:
        raw(ends[1], packet)
        said(ends[1], messages.VALUE, "value")
        await ended(one)
        if packet[:1] == b"O":
            with pytest.raises((ValueError, IndexError, struct.error, pickle.UnpicklingError)):
                await one.receive()
        else:
            assert one.invalid
        assert one.value == "value"


async def test_four_children_that_go_on_sending_hold_nobody(tmp_path: Path) -> None:
    """The loop, the group, or the host's memory."""
    late: list[float] = []
    loop = asyncio.get_running_loop()

    async def tick() -> None:
        while True:
            before = loop.time()
            await asyncio.sleep(0)
            late.append(loop.time() - before)

    ticking = asyncio.create_task(tick())
    async with Group(Function(jobs.leaves_four_that_send), logs=QUIET, stop=Stop(grace=0), check=False) as group:
        await group.wait()
    ticking.cancel()
    assert len(late) > 10
    assert group._supervisor._outcome is not None
    assert group._supervisor._outcome.result()[0].exit is not None


# --- the names of the main module ---


def test_the_main_module_has_both_names_as_long_as_anybody_unpickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
    inside, over = threading.Event(), threading.Event()

    def longer() -> None:
        with _received_values.main_has_both_names():
            inside.set()
            over.wait(60)
            seen.append("__mp_main__" in sys.modules)

    seen: list[bool] = []
    thread = threading.Thread(target=longer)
    with _received_values.main_has_both_names():
        thread.start()
        inside.wait(60)
    over.set()
    thread.join()
    assert seen == [True]
    assert "__mp_main__" not in sys.modules


async def test_a_value_is_whole_when_the_exit_is_told() -> None:
    result = await supervise(Function(jobs.many_objects_then, 150), logs=QUIET)
    assert result[0].value == "value"
