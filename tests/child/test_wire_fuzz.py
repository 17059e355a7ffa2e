"""Every reader of what a worker writes, under changed bytes: see `fuzz_wire.py`, which does a million of them."""

from __future__ import annotations

import os

import fuzz_wire
import pytest
from helpers import QUIET

from aioelastic import Function, WorkerExecutor, WorkerFailed, supervise
from aioelastic.child.wire import datagrams, messages
from aioelastic.child.worker import context


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_hurt_nobody(seed: int) -> None:
    fuzz_wire.fuzz(2500, seed)


def test_what_is_changed_is_valid_before() -> None:
    for packet, data, tickets in fuzz_wire.seeds():
        reader, fds = fuzz_wire.Reader(), [*tickets, *(fuzz_wire.memfd(data) if data else [])]
        reader._take(packet, fds)
        datagrams.close(fds)
        assert not reader.invalid
        assert reader.has_value == (packet[:1] == messages.VALUE)
        assert (reader.error is not None) == (packet[:1] == messages.ERROR)
        for obj in reader.objects:
            obj.open()


def says(packet: bytes) -> None:
    """To its host, by the channel; and ends as if that were all."""
    assert context.channel is not None
    context.channel.send(packet)
    os._exit(0)


BAD = [b"?", b"V", b"V\x00", b"V\x01", b"V\x02", b"V\xff", b"V\x00\x80\x05.", b"V\x02" + b"\xff" * 64]
BAD += [b"E", b"E\x00{}", b"E\x00[[[["]
BAD_REPLIES = [b"D", b"D" + bytes(9), b"D\x02" + b"\xff" * 40, b"L\x00\x00", b"L\x00" + bytes(8) + b"{"]


@pytest.mark.long
@pytest.mark.parametrize("packet", BAD)
async def test_a_bad_message_is_that_workers_failure(packet: bytes) -> None:
    result = await supervise(Function(says, packet), logs=QUIET, check=False)
    assert result[0].failure is not None
    assert "unpickled" in str(result[0].failure)


@pytest.mark.parametrize("packet", BAD_REPLIES)
def test_a_bad_reply_is_that_tasks_failure(packet: bytes) -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(says, packet).exception(60) is not None
        # the next may be given to that worker before its end is known
        assert [executor.submit(abs, -1).exception(60) for _ in range(3)][1:] == [None, None]


@pytest.mark.parametrize("packet", [b"?", b"V\x00", b"E\x00{}"])
def test_what_is_no_reply_ends_with_its_worker(packet: bytes) -> None:
    with WorkerExecutor(1) as executor:
        with pytest.raises(WorkerFailed):
            executor.submit(says, packet).result(60)
        assert executor.submit(abs, -1).result(60) == 1
