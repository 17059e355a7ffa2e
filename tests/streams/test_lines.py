"""From chunks to lines: `group.lines()`, the callback, and the splitter under both."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, event_of, py, sh
from helpers_streams import Gate, cat, gate, held, random_bytes, tee_to

from aioelastic import LINE_LIMIT, Group, Line, Logs, SpecError, Std, Stop, supervise
from aioelastic.events import Drained, Event, Exited, SinkTrouble
from aioelastic.streams import LineFeed, LineTap, _lines
from aioelastic.streams._lines import LineSplitter

__all__ = ["gate", "held"]  # fixtures

SIZE = 300_000  # lines of 8 bytes: more than a feed and a pipe hold
LINES = [b"%07d" % i for i in range(SIZE)]
SEQ = f"seq -f %07.0f 0 {SIZE - 1}"


class Holder:
    """Stands in for a pump."""

    def __init__(self) -> None:
        self.by: list[object] = []

    def hold(self, who: object) -> None:
        self.by.append(who)

    def release(self, who: object) -> None:
        self.by.remove(who)


# --- the splitter ---


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a", b"a\n", b"\n\na\n\nb", b"a\r\nb\r", b"\0\n\xff\n", b"a\x0bb\x0cc\x85d\n"]
)
def test_lines_do_not_depend_on_how_the_bytes_come(content: bytes) -> None:
    want = content.split(b"\n")
    rest = want.pop()
    for first in range(len(content) + 1):
        for second in range(first, len(content) + 1):
            splitter = LineSplitter()
            chunks = [one for one in (content[:first], content[first:second], content[second:]) if one]
            assert [line for chunk in chunks for line in splitter.feed(chunk)] == want
            assert splitter.rest() == rest
            assert splitter.rest() == b""


def test_random_bytes_in_random_chunks() -> None:
    chance = random.Random(7)
    content = chance.randbytes(200_000)
    splitter = LineSplitter()
    got, at = [], 0
    while at < len(content):
        size = chance.choice((1, 2, 10, 1000, 60_000))
        got += splitter.feed(content[at : at + size])
        at += size
    assert b"\n".join([*got, splitter.rest()]) == content


def split(*chunks: bytes) -> list[tuple[bytes, bool]]:
    """What a tap makes of them: (line, continued)."""
    out: list[tuple[bytes, bool]] = []
    tap = LineTap(lambda lines, at, pump, continued: out.extend((line, continued) for line in lines))
    pump: Any = Holder()
    for chunk in chunks:
        tap.feed(chunk, pump)
    tap.eof()
    return out


@pytest.mark.parametrize("step", [1, 2, 3, 7, 8, 9, 100, 1000])
def test_long_lines_come_in_the_same_parts_however_the_bytes_come(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lines, "LINE_LIMIT", 8)
    lines = {
        b"": [b""],
        b"1234567": [b"1234567"],
        b"12345678": [b"12345678"],
        b"123456789": [b"12345678", b"9"],
        b"1234567812345678": [b"12345678", b"12345678"],
        b"12345678\r12345678": [b"12345678", b"\r1234567", b"8"],
        "1234567é".encode(): [b"1234567", "é".encode()],
        "123456€9".encode(): [b"123456", "€9".encode()],
        "12345😀9".encode(): [b"12345", "😀9".encode()],
        "1234😀9".encode(): ["1234😀".encode(), b"9"],
        b"\x80" * 9: [b"\x80" * 8, b"\x80"],
        b"12345\xbf\xbf\xbf\xbf": [b"12345\xbf\xbf\xbf", b"\xbf"],
    }
    want = [(part, number < len(parts)) for parts in lines.values() for number, part in enumerate(parts, 1)]
    for end in (b"\n", b""):
        content = b"\n".join(lines) + end
        assert split(*(content[at : at + step] for at in range(0, len(content), step))) == want


def test_an_endless_line_costs_bounded_memory_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of two bytes, each an object of its own: these cost twenty times what they hold."""
    monkeypatch.setattr(_lines, "LINE_LIMIT", 10_000)
    splitter = LineSplitter()
    sizes: list[int] = []
    tap = LineTap(lambda lines, at, pump, continued: sizes.extend(map(len, lines)))
    tap._splitter = splitter
    pump: Any = Holder()
    for number in range(50_000):
        tap.feed(b"%02d" % (number % 100), pump)
        assert splitter.size <= 10_000 + 100
        assert sum(len(one) + 40 for one in splitter._begun) <= 10_000 + 100
    tap.eof()
    assert sizes == [10_000] * 10


# --- group.lines() ---


async def test_all_lines_from_the_very_start() -> None:
    """Workers that have ended before anybody asks lose nothing."""
    script = "echo first; echo e >&2; printf 'second\\n\\nlast, unfinished'"
    before = time.time()
    async with Group(sh(script), n=3, logs=QUIET) as group:
        got = [line async for line in group.lines()]
    for rank in range(3):
        mine = [line for line in got if line.rank == rank]
        outs = [line.data for line in mine if line.stream == "stdout"]
        assert outs == [b"first", b"second", b"", b"last, unfinished"]
        assert [line.data for line in mine if line.stream == "stderr"] == [b"e"]
    assert all(before <= line.time <= time.time() for line in got)
    assert all(isinstance(line, Line) for line in got)


async def test_lines_are_bytes_and_text() -> None:
    async with Group(sh(r"printf 'na\303\257ve \377\r\n'"), logs=QUIET) as group:
        (line,) = [line async for line in group.lines()]
    assert line.data == b"na\xc3\xafve \xff\r"
    assert line.text == "naïve \\xff\r"


async def test_binary_output_of_megabytes_arrives_whole(tmp_path: Path) -> None:
    content = random_bytes(4_000_000)
    (tmp_path / "source").write_bytes(content)
    async with Group(sh(cat(tmp_path / "source")), logs=QUIET) as group:
        got = [line.data async for line in group.lines()]
    assert b"\n".join(got) == content.removesuffix(b"\n")


async def test_only_some_ranks() -> None:
    async with Group(sh("echo $RANK"), n=4, logs=QUIET) as group:
        some, nobody, everybody = group.lines(ranks=[1, 3]), group.lines(ranks=[]), group.lines()
        assert sorted([line.rank async for line in some]) == [1, 3]
        assert [line async for line in nobody] == []
        assert sorted([line.rank async for line in everybody]) == [0, 1, 2, 3]


async def test_several_feeds_get_everything_each() -> None:
    async with Group(sh("seq 1000"), n=2, logs=QUIET) as group:
        feeds = [group.lines() for _ in range(3)]
        got = await asyncio.gather(*(collect(one) for one in feeds))
    assert got[0] == got[1] == got[2]
    assert len(got[0]) == 2000


async def collect(feed: LineFeed) -> list[Line]:
    return [line async for line in feed]


async def test_a_late_feed_begins_where_it_is_made(gate: Gate) -> None:
    async with Group(sh(f"echo early; read x < {gate.path}; echo late"), logs=QUIET) as group:
        first = group.lines()
        assert (await anext(first)).data == b"early"
        second = group.lines()
        gate.open()
        assert [line.data async for line in second] == [b"late"]
        assert [line.data async for line in first] == [b"late"]
    assert [line async for line in group.lines()] == []  # the group is over: it ends at once


async def test_what_is_buffered_can_be_read_after_the_end() -> None:
    async with Group(sh("seq 5"), logs=QUIET) as group:
        feed = group.lines()
        await group.wait()
    assert [line.data async for line in feed] == [b"1", b"2", b"3", b"4", b"5"]


async def test_block_holds_the_worker_and_loses_nothing(held: asyncio.Event) -> None:
    async with Group(sh(SEQ), logs=QUIET) as group:
        feed = group.lines()
        await held.wait()
        assert group.pids  # it waits for us
        assert [line.data async for line in feed] == LINES
        assert feed.dropped == 0
        assert (await group.wait())[0].stdout.total == 8 * SIZE


async def test_a_blocking_feed_does_not_hold_other_ranks(held: asyncio.Event) -> None:
    async with Group([sh(SEQ), sh("seq 3")], logs=QUIET) as group:
        feed = group.lines(ranks=[0])
        other = group.lines(ranks=[1])
        await held.wait()
        await event_of(group, Drained, rank=1)
        for want in (b"1", b"2", b"3"):
            assert (await anext(other)).data == want
        assert 0 in group.pids
        assert [line.data async for line in feed] == LINES


async def test_drop_forgets_the_oldest_and_counts_them(held: asyncio.Event) -> None:
    async with Group(sh(f"{SEQ}; {SEQ}"), n=2, logs=QUIET) as group:
        feed = group.lines(when_full="drop")
        result = await group.wait()  # nobody reads, and yet they end
        got = [line async for line in feed]
    assert result.ok
    assert not held.is_set()
    assert feed.dropped > 0
    assert feed.dropped + len(got) == 4 * SIZE
    for rank in (0, 1):
        mine = [line.data for line in got if line.rank == rank]
        assert mine == (LINES + LINES)[2 * SIZE - len(mine) :]


async def test_closing_a_feed_in_the_middle_releases_the_workers(held: asyncio.Event) -> None:
    async with Group(sh(SEQ), n=3, logs=QUIET) as group:
        feed = group.lines()
        await held.wait()
        assert (await anext(feed)).data == LINES[0]
        feed.close()
        with pytest.raises(StopAsyncIteration):
            await anext(feed)
        result = await group.wait()
    assert result.ok
    assert [one.stdout.total for one in result] == [8 * SIZE] * 3


async def test_aclosing(held: asyncio.Event) -> None:
    async with Group(sh(SEQ), logs=QUIET) as group:
        async with contextlib.aclosing(group.lines()) as feed:
            await held.wait()
            async for line in feed:
                assert line.data == LINES[0]
                break
        assert (await group.wait()).ok


async def test_leaving_the_block_while_a_feed_holds(held: asyncio.Event) -> None:
    """A worker that waits for a reader who left can still be stopped; the feed can still be read, and counts."""
    async with Group(sh(f"{SEQ}; exec sleep 1000"), logs=QUIET) as group:
        feed = group.lines()
        await held.wait()
    assert group.pids == {}
    got = [line.data async for line in feed][:-1]  # the last one may be cut: its writer was stopped
    assert got
    assert got == LINES[feed.dropped : feed.dropped + len(got)]


async def test_a_feed_that_nobody_reads_costs_no_grace(held: asyncio.Event) -> None:
    """When the block is left nobody will read: a worker in the middle of a print must not wait in vain."""
    talker = py(
        "import os, signal\n"
        "stop = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"  # a write that it interrupts is tried again
        "while not stop: os.write(1, b'step\\n' * 1000)\n"
    )
    async with Group(talker, logs=QUIET, stop=Stop(grace=10)) as group:
        feed = group.lines()
        await held.wait()
    feed.close()
    result = await group.wait()
    assert result[0].exit is not None
    assert result[0].exit.code == 0, "it sat out its grace and was killed"


async def test_a_cancelled_read_loses_no_line(gate: Gate) -> None:
    async with Group(sh(f"read x < {gate.path}; seq 3"), logs=QUIET) as group:
        feed = group.lines()
        waiting = asyncio.create_task(anext(feed))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open()
        assert [line.data async for line in feed] == [b"1", b"2", b"3"]


async def test_a_read_that_is_cancelled_after_the_line_came(gate: Gate) -> None:
    feed = LineFeed("block", None)
    waiting = asyncio.create_task(anext(feed))
    await asyncio.sleep(0)
    feed.deliver(0, "stdout", [b"one"], 1.0, None)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await anext(feed)).data == b"one"
    feed.close()


async def test_two_readers_of_one_feed_share_its_lines(gate: Gate) -> None:
    async with Group(sh(f"read x < {gate.path}; seq 100"), logs=QUIET) as group:
        feed = group.lines()
        readers = [asyncio.create_task(collect(feed)) for _ in range(2)]
        await asyncio.sleep(0)
        gate.open()
        await group.wait()
        done, late = await asyncio.wait(readers, timeout=60)  # only how long a hang may last
        for one in late:
            one.cancel()
        assert not late, "a reader was never woken"
    assert sorted(int(line.data) for one in done for line in one.result()) == list(range(1, 101))


async def test_an_unknown_policy_is_refused() -> None:
    async with Group(sh("exit 0"), logs=QUIET) as group:
        with pytest.raises(SpecError):
            group.lines(when_full="grow")  # type: ignore[arg-type]


async def test_memory_of_a_feed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lines, "HIGH", 1000)
    pump: Any = Holder()
    feed = LineFeed("block", None)
    feed.deliver(0, "stdout", [b"x" * 99] * 10, 1.0, pump)
    assert pump.by == []
    feed.deliver(0, "stdout", [b"y"], 1.0, pump)
    assert len(pump.by) == 1
    for _ in range(5):
        await anext(feed)
    assert len(pump.by) == 1
    await anext(feed)
    assert pump.by == []
    feed.deliver(0, "stdout", [b"z" * 2000], 1.0, pump)
    feed.close()
    assert pump.by == []
    feed.deliver(0, "stdout", [b"z" * 2000], 1.0, pump)  # nobody listens any more
    assert pump.by == []


@pytest.mark.parametrize("when_full", ["block", "drop"])
async def test_lines_that_come_one_by_one_are_bounded_in_number(
    when_full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each empty line that is read by itself costs hundreds of bytes, and counts as one."""
    monkeypatch.setattr(_lines, "MANY", 100)
    pump: Any = Holder()
    feed = LineFeed(when_full, None)
    for number in range(101):
        feed.deliver(0, "stdout", [b"%d" % number], 1.0, pump)
    if when_full == "drop":
        assert feed.dropped == 1
        assert (await anext(feed)).data == b"1"
    else:
        assert len(pump.by) == 1
        for number in range(52):
            assert len(pump.by) == 1
            assert (await anext(feed)).data == b"%d" % number
        assert pump.by == []
    feed.close()


async def test_a_line_that_is_too_long_comes_in_parts_everywhere(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    called: list[Line] = []
    size = LINE_LIMIT * 2 + 5
    logs = Logs(tee=Std.NONE, callback=called.append)
    async with Group(sh(f"head -c {size} /dev/zero; read x < {gate.path}; echo; echo end"), logs=logs) as group:
        feed = group.lines()
        first = await anext(feed)
        assert (len(first.data), first.continued) == (LINE_LIMIT, True)  # while the line has no end yet
        gate.open()
        rest = [line async for line in feed]
    assert [(len(line.data), line.continued) for line in rest] == [(LINE_LIMIT, True), (5, False), (3, False)]
    assert [line._replace(time=0) for line in called] == [line._replace(time=0) for line in (first, *rest)]


async def test_drop_keeps_the_newest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lines, "HIGH", 1000)
    feed = LineFeed("drop", None)
    feed.deliver(0, "stdout", [b"old"] * 10, 1.0, None)
    feed.deliver(0, "stdout", [b"x" * 5000], 1.0, None)
    assert feed.dropped == 10
    assert (await anext(feed)).data == b"x" * 5000
    feed.close()


# --- the callback ---


async def test_the_callback_gets_every_line() -> None:
    got: list[Line] = []
    logs = Logs(tee=Std.NONE, callback=got.append, ranks=[0])  # ranks are about the tee only
    await supervise(sh("seq 100; echo err >&2; printf rest"), n=2, logs=logs)
    for rank in (0, 1):
        mine = [(line.stream, line.data) for line in got if line.rank == rank]
        assert [data for stream, data in mine if stream == "stdout"] == [*(b"%d" % i for i in range(1, 101)), b"rest"]
        assert ("stderr", b"err") in mine


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError])
@pytest.mark.parametrize("when", ["line", "end"])
async def test_a_callback_that_raises_is_trouble_and_the_others_go_on(
    when: str, kind: type[BaseException], tmp_path: Path
) -> None:
    def bad(line: Line) -> None:
        if line.rank == 0 and line.data == (b"2" if when == "line" else b"rest"):
            raise kind("mine")
        seen.append(line.data)

    seen: list[bytes] = []
    told: list[Event] = []
    with tee_to() as (out, _):
        async with Group(
            sh("seq 3; printf rest"), n=2, logs=Logs(dir=tmp_path, callback=bad), on_event=told.append
        ) as group:
            lines = [line.data async for line in group.lines(ranks=[0])]
            result = await group.wait()
        data = await out.all()
    assert result.ok
    troubles = [(one.sink, one.problem) for one in told if isinstance(one, SinkTrouble)]
    assert troubles == [("callback", f"{kind.__name__}: mine")]
    assert lines == [b"1", b"2", b"3", b"rest"]
    assert data.count(b"rest\n") == 2
    for one in result:
        assert one.stdout.path is not None
        assert one.stdout.path.read_bytes() == b"1\n2\n3\nrest"
    assert seen.count(b"rest") == 1 if when == "end" else seen.count(b"3") == 1


async def test_a_callback_may_stop_its_group() -> None:
    groups: list[Group] = []
    logs = Logs(tee=Std.NONE, callback=lambda line: groups[0].begin_stop())
    async with Group(sh("echo enough; exec sleep 1000"), n=3, logs=logs) as group:
        groups.append(group)
        result = await group.wait()
    assert result.reason == "stopped"
    exits = [event async for event in group.events() if isinstance(event, Exited)]
    assert len(exits) == 3


async def test_a_callback_may_ask_for_lines() -> None:
    feeds: list[LineFeed] = []
    groups: list[Group] = []

    def callback(line: Line) -> None:
        if not feeds:
            feeds.append(groups[0].lines())

    async with Group(sh("seq 10000"), logs=Logs(tee=Std.NONE, callback=callback)) as group:
        groups.append(group)
        await group.wait()
    got = [int(line.data) async for line in feeds[0]]
    assert got == list(range(10_001 - len(got), 10_001))  # from then on, without a gap
