"""The pump and the tail, and what holds for all sinks together."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, event_of, gone, py, sh
from helpers_streams import Collect, Gate, cat, gate, held, random_bytes, tee_to

from aioelastic import Group, Logs, Std, Stop, supervise
from aioelastic.events import Drained, Exited
from aioelastic.streams import Pump, Tail
from aioelastic.streams._pump import READ
from aioelastic.streams._tail import KEEP
from aioelastic.watch import Poller

__all__ = ["gate", "held"]  # fixtures

BOUND = 16 * 2**20  # what all buffers before one slow sink may hold together, with room


class Piped:
    """A pump over a pipe of our own."""

    def __init__(self, *taps: Any) -> None:
        read, self.fd = os.pipe()
        for fd in (read, self.fd):
            os.set_blocking(fd, False)
        self.eofs = 0
        self.ended = asyncio.Event()
        self.troubles: list[tuple[Any, Exception]] = []
        self.pump = Pump(
            Poller(asyncio.get_running_loop()),
            read,
            list(taps),
            self._eof,
            lambda tap, exc: self.troubles.append((tap, exc)),
        )

    def _eof(self) -> None:
        self.eofs += 1
        self.ended.set()

    def write(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.pump.close()

    async def fill(self, limit: int) -> int:
        """Write as a worker would until the pump is held and its pipe is full; how much it took, `limit` at most."""
        written = 0
        while written < limit:
            try:
                written += os.write(self.fd, b"x" * 65_536)
            except BlockingIOError:
                if self.pump._held:
                    return written
                await asyncio.sleep(0)
        return written


@pytest.fixture
def piped() -> Iterator[list[Piped]]:
    made: list[Piped] = []
    yield made
    for one in made:
        one.close()


# --- the pump ---


async def test_a_pump_hands_all_bytes_to_each_tap_in_order_and_ends_once(piped: list[Piped]) -> None:
    taps = Collect(), Collect()
    one = Piped(*taps)
    piped.append(one)
    one.pump.start()
    content = random_bytes(1_000_000)
    view = memoryview(content)
    while view:
        try:
            view = view[os.write(one.fd, view) :]
        except BlockingIOError:
            await asyncio.sleep(0)
    os.close(one.fd)
    one.fd = -1
    await one.ended.wait()
    assert [bytes(tap.data) for tap in taps] == [content] * 2
    assert [tap.over for tap in taps] == [True, True]
    one.pump.close()
    assert one.eofs == 1
    assert one.pump.over
    assert one.pump.fd == -1


async def test_a_read_asks_for_much_only_where_much_has_come(
    piped: list[Piped], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for half a MiB can cost more than reading a line does."""
    asked: list[int] = []
    read = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: asked.append(size) or read(fd, size))
    one = Piped(Collect())
    piped.append(one)
    one.pump.start()
    for data in (b"a line\n", b"x" * 65_536, b"a line\n", b"another\n"):
        one.write(data)
        one.pump._readable()
    assert asked == [65_536, 65_536, READ, 65_536]


@pytest.mark.parametrize(("size", "grows"), [(65_529, True), (1_000, False)])
async def test_the_pipe_of_a_busy_writer_is_grown(piped: list[Piped], size: int, grows: bool) -> None:
    """Though no write of it fills the pipe to its last byte, as those of whole lines never do."""
    tap = Collect()
    one = Piped(tap)
    piped.append(one)
    assert fcntl.fcntl(one.fd, fcntl.F_GETPIPE_SZ) == 65_536
    assert os.write(one.fd, bytes(size)) == size
    one.pump.start()
    while len(tap.data) < size:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (fcntl.fcntl(one.fd, fcntl.F_GETPIPE_SZ) > 65_536) is grows


async def test_a_held_pump_does_not_read(piped: list[Piped]) -> None:
    tap = Collect(lambda data, pump: pump.hold("sink"))
    one = Piped(tap)
    piped.append(one)
    one.pump.start()
    took = await one.fill(BOUND)
    assert took <= READ + 2 * 1_048_576
    assert len(tap.data) <= READ
    one.pump.hold("another")
    one.pump.release("sink")
    one.pump.release("a stranger")
    before = len(tap.data)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(tap.data) == before  # both must let go
    os.close(one.fd)
    one.fd = -1
    one.pump.release("another")
    while not one.ended.is_set():
        one.pump.release("sink")
        await asyncio.sleep(0)
    assert len(tap.data) == took


async def test_a_tap_that_raises_is_taken_off_and_the_others_go_on(piped: list[Piped]) -> None:
    def raises(data: bytes, pump: Pump) -> None:
        raise ValueError(data)

    first, bad, last = Collect(), Collect(raises), Collect()
    one = Piped(first, bad, last)
    piped.append(one)
    one.write(b"one")
    one.pump.finish()
    one.write(b"two")
    one.pump.finish()
    one.close()
    assert bytes(first.data) == bytes(last.data) == b"onetwo"
    assert bytes(bad.data) == b"one"
    assert [(tap, type(exc)) for tap, exc in one.troubles] == [(bad, ValueError)]
    assert (first.over, bad.over, last.over) == (True, False, True)


async def test_a_tap_that_raises_at_the_end(piped: list[Piped]) -> None:
    class Bad(Collect):
        def eof(self) -> None:
            raise ValueError("end")

    bad, last = Bad(), Collect()
    one = Piped(bad, last)
    piped.append(one)
    one.close()
    assert last.over
    assert one.eofs == 1
    assert [tap for tap, _ in one.troubles] == [bad]


async def test_finish_reads_what_is_left_whoever_holds(piped: list[Piped]) -> None:
    tap = Collect(lambda data, pump: pump.hold("sink"))
    one = Piped(tap)
    piped.append(one)
    one.pump.start()
    took = await one.fill(BOUND)
    assert not one.pump.finish()  # we still hold the other end
    assert len(tap.data) == took
    os.close(one.fd)
    one.fd = -1
    assert one.pump.finish()
    assert tap.over


async def test_finish_is_bounded_while_somebody_else_writes(piped: list[Piped]) -> None:
    def more(data: bytes, pump: Pump) -> None:
        try:
            while os.write(one.fd, b"y" * 65_536):
                pass
        except BlockingIOError:
            pass

    tap = Collect(more)
    one = Piped(tap)
    piped.append(one)
    one.write(b"y")
    assert not one.pump.finish()  # it returned, though there is always more
    assert len(tap.data) < BOUND


async def test_a_pump_can_be_held_after_finish(piped: list[Piped]) -> None:
    """The worker is gone, but what it left running writes as fast as it can: memory stays bounded all the same."""
    tap = Collect(lambda data, pump: pump.hold("sink"))
    one = Piped(tap)
    piped.append(one)
    one.pump.start()
    one.pump.finish()
    assert await one.fill(8 * BOUND) <= BOUND


async def test_a_tap_added_in_the_middle_gets_the_rest(piped: list[Piped]) -> None:
    early, late = Collect(), Collect()
    one = Piped(early)
    piped.append(one)
    one.write(b"one")
    one.pump.finish()
    one.pump.taps = [*one.pump.taps, late]
    one.write(b"two")
    one.pump.finish()
    one.close()
    assert (bytes(early.data), bytes(late.data)) == (b"onetwo", b"two")


# --- the tail ---


@pytest.mark.parametrize(
    "sizes", [[], [1], [KEEP], [KEEP + 1], [10] * 5000, [KEEP - 1, 1, 1], [1, 10 * KEEP, 3], [262_144] * 20]
)
def test_the_tail_keeps_the_last_bytes_and_little_more(sizes: list[int]) -> None:
    tail, whole = Tail(), b""
    for size in sizes:
        data = random_bytes(size)
        whole += data
        tail.feed(data)
        assert sum(map(len, tail._chunks)) < 2 * KEEP + 1
    assert tail.last() == whole[-KEEP:]
    assert tail.total == len(whole)


async def test_the_tail_is_kept_without_any_sink_and_shown_in_failures() -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; exit 3"
    result = await supervise(sh(script), logs=QUIET, check=False)
    whole = b"".join(b"line %d\n" % i for i in range(3000))
    assert result[0].stderr.tail == whole[-KEEP:]
    assert result[0].stderr.total == len(whole)
    assert result.first_failure is not None
    assert result.first_failure.stderr.last_lines() == [f"line {i}" for i in range(2980, 3000)]


# --- all together ---


async def test_order_within_each_stream(tmp_path: Path) -> None:
    """Both streams at once from several workers, through file, tee, callback and lines."""
    seen: list[tuple[int, str, bytes]] = []
    logs = Logs(dir=tmp_path, callback=lambda line: seen.append((line.rank, line.stream, line.data)))
    script = "i=0; while [ $i -lt 2000 ]; do echo $i; echo $i >&2; i=$((i+1)); done"
    want = [b"%d" % i for i in range(2000)]
    with tee_to() as (out, err):
        assert out.reader is not err.reader
        async with Group(sh(script), n=3, logs=logs) as group:
            got = [(line.rank, line.stream, line.data) async for line in group.lines()]
        result = await group.wait()
        shown = {"stdout": await out.all(), "stderr": await err.all()}
    for rank in range(3):
        for stream in ("stdout", "stderr"):
            assert [data for r, s, data in seen if (r, s) == (rank, stream)] == want
            assert [data for r, s, data in got if (r, s) == (rank, stream)] == want
            prefix = b"[worker%d]: " % rank
            mine = [one for one in shown[stream].splitlines() if one.startswith(prefix)]
            assert mine == [prefix + one for one in want]
            path = getattr(result[rank], stream).path
            assert path.read_bytes().split() == want


async def test_a_worker_that_closes_its_streams_early(tmp_path: Path, gate: Gate) -> None:
    script = f"echo x; exec >&- 2>&-; read x < {gate.path}"
    async with Group(sh(script), logs=Logs(dir=tmp_path, tee=Std.NONE)) as group:
        feed = group.lines()
        assert (await anext(feed)).data == b"x"
        assert group.pids
        gate.open()
        result = await group.wait()
    assert result.ok
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"x\n"
    assert result[0].stdout.holders == ()


async def test_200_workers_lose_nothing(tmp_path: Path) -> None:
    """All of them write both streams at once, into files, tee, filter and lines."""
    content = random_bytes(100_000)
    (tmp_path / "source").write_bytes(content)
    logs = Logs(dir=tmp_path / "runs", match="never there")
    with tee_to() as (out, err):
        assert out.reader is not err.reader
        async with Group(sh(f"{cat(tmp_path / 'source')}; echo $RANK >&2"), n=200, logs=logs) as group:
            got = [line async for line in group.lines() if line.stream == "stderr"]
        result = await group.wait()
        await out.all()
        shown = await err.all()
    assert sorted(int(line.data) for line in got) == list(range(200))
    assert sorted(shown.splitlines()) == sorted(b"[worker%d]: %d" % (rank, rank) for rank in range(200))
    for one in result:
        assert one.stdout.path is not None
        assert one.stdout.path.read_bytes() == content
        assert one.stdout.lost == 0


async def test_a_grandchild_that_goes_on_writing_is_read_until_it_ends(tmp_path: Path, gate: Gate) -> None:
    """The exit is known at once; what the worker left running still reaches the log."""
    script = f"(read x < {gate.path}; echo from below; echo and this >&2) & echo from above"
    logs = Logs(dir=tmp_path, tee=Std.NONE, drain=3600)
    async with Group(sh(script), logs=logs, stop=Stop(scope="leader")) as group:
        feed = group.lines()
        assert (await anext(feed)).data == b"from above"
        assert (await event_of(group, Exited)).exit.ok
        gate.open()
        drained = await event_of(group, Drained)
        assert sorted([line.data async for line in feed]) == [b"and this", b"from below"]
    result = await group.wait()
    assert drained.holders == ()
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"from above\nfrom below\n"
    assert result[0].stdout.holders == result[0].stderr.holders == ()


async def test_a_grandchild_that_never_stops_writing_is_given_up_and_named(tmp_path: Path, gate: Gate) -> None:
    """Drained with its pid, and what it wrote until then is kept."""
    logs = Logs(dir=tmp_path, tee=Std.NONE, drain=0.05)
    script = f"(trap '' PIPE; read x < {gate.path}; while :; do echo again || exit; done) & echo $!"
    async with Group(sh(script), logs=logs, stop=Stop(scope="leader")) as group:
        pid = int((await anext(group.lines(when_full="drop"))).data)
        gate.open()
        drained = await event_of(group, Drained)
        result = await group.wait()
    await gone(pid)  # its next write told it that nobody listens
    assert drained.holders == (pid,)
    assert result[0].stdout.holders == (pid,)
    assert result[0].stdout.path is not None
    data = result[0].stdout.path.read_bytes()
    assert result[0].stdout.total == len(data)
    assert set(data.split(b"\n")[1:-1]) <= {b"again"}


async def test_a_grandchild_is_swept_and_its_last_words_are_kept(tmp_path: Path) -> None:
    """It gets the stop signal, and what it then says is in the log."""
    worker = py(
        "import os, signal\n"
        "r, w = os.pipe()\n"
        "if os.fork():\n"
        "    os.read(r, 1); os._exit(0)\n"
        "def bye(*_): os.write(1, b'goodbye\\n'); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, bye); os.write(w, b'x')\n"
        "while True: signal.pause()\n"
    )
    result = await supervise(worker, logs=Logs(dir=tmp_path, tee=Std.NONE, drain=3600))
    assert result.ok
    assert len(result.leaked) == 1
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"goodbye\n"


async def test_memory_before_a_slow_console_is_bounded(held: asyncio.Event) -> None:
    """100 MB through a console whose reader comes late: we hold a few, the worker the rest."""
    size = 100_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tee_to() as (out, _):
        script = f"yes 123456789012345678901234567890 | head -c {size}"
        async with Group(sh(script), logs=Logs(prefix="")) as group:
            await held.wait()
            got = asyncio.create_task(asyncio.to_thread(count, out.read_fd))
            result = await group.wait()
        out.file.close()
        assert await got == size + (size % 31 > 0)  # an unfinished last line gets its newline
        os.close(out.read_fd)
        out.close = lambda: None
    assert result[0].stdout.total == size
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 64 * 2**20


def count(fd: int) -> int:
    total = 0
    while data := os.read(fd, 1 << 20):
        total += len(data)
    return total


async def test_a_killed_worker_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    """What stands in the pipe when it dies is read to the end."""
    worker = py("import os, signal; os.write(1, b'z' * 60000); os.kill(os.getpid(), signal.SIGKILL)")
    result = await supervise(worker, logs=Logs(dir=tmp_path, tee=Std.NONE), check=False)
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGKILL
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"z" * 60_000


async def test_a_worker_that_is_stopped_can_say_goodbye(tmp_path: Path, gate: Gate) -> None:
    worker = sh(f"trap 'echo saved; exit 0' TERM; echo up; read x < {gate.path}")
    async with Group(worker, logs=Logs(dir=tmp_path, tee=Std.NONE)) as group:
        assert (await anext(group.lines())).data == b"up"
        result = await group.stop()
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"up\nsaved\n"
