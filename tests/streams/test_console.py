"""The tee: prefixes, terminals, slow and dead consoles, and the caller's own stdout."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import io
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from helpers import QUIET, event_of, py, sh
from helpers_streams import (
    Gate,
    Reader,
    Target,
    Troubles,
    cat,
    console_on,
    gate,
    held,
    random_bytes,
    tee_to,
    text_of,
)

from aioelastic import LINE_LIMIT, Group, Logs, Std, Stop, supervise
from aioelastic.events import Drained, Event, Exited, SinkTrouble
from aioelastic.streams import Console, ConsoleTap, _tee
from aioelastic.system.deadlines import Deadline

__all__ = ["gate", "held"]  # fixtures

ISO = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
COUNT = "i=0; while [ $i -lt {n} ]; do echo $RANK line $i; i=$((i+1)); done"


def of_rank(data: bytes, rank: int, prefix: bytes = b"[worker%d]: ") -> list[bytes]:
    """The lines of one rank, without their prefix."""
    mine = prefix % rank
    return [one.removeprefix(mine) for one in data.split(b"\n") if one.startswith(mine)]


# --- prefixes ---


async def test_each_line_has_its_prefix_once_and_order_is_kept() -> None:
    with tee_to() as (out, _):
        reader = out.reader
        await supervise(sh(COUNT.format(n=2000)), n=5)
        data = await out.all()
    assert reader.over
    for rank in range(5):
        assert of_rank(data, rank) == [b"%d line %d" % (rank, i) for i in range(2000)]
    assert data.count(b"[worker") == data.count(b"\n") == 5 * 2000
    assert data.endswith(b"\n")


@pytest.mark.parametrize("kind", ["pipe", "pty"])
async def test_binary_rubbish_only_gains_prefixes(kind: str, tmp_path: Path) -> None:
    content = random_bytes(500_000).replace(b"\r", b"") + b"\n"
    (tmp_path / "source").write_bytes(content)
    with tee_to(kind) as (out, _):
        assert out.reader is not None
        await supervise(sh(cat(tmp_path / "source")), logs=Logs(prefix="<{rank}>"))
        data = await out.all()
    head = b"\x1b[36m<0>\x1b[0m" if kind == "pty" else b"<0>"
    assert data == b"".join(head + line + b"\n" for line in content.removesuffix(b"\n").split(b"\n"))


async def test_stdout_goes_to_stdout_and_stderr_to_stderr() -> None:
    with tee_to() as (out, err):
        await supervise(sh("echo to out; echo to err >&2"), name="w", n=1)
        assert await out.all() == b"[w0]: to out\n"
        assert await err.all() == b"[w0]: to err\n"


@pytest.mark.parametrize(
    ("logs", "outs", "errs"),
    [
        (Logs(tee=Std.NONE), [], []),
        (Logs(tee=Std.OUT), [0, 1, 2], []),
        (Logs(tee=Std.ERR), [], [0, 1, 2]),
        (Logs(tee={0: Std.ERR, 2: Std.ALL}), [2], [0, 2]),
        (Logs(ranks=[1]), [1], [1]),
        (Logs(ranks=[]), [], []),
        (Logs(ranks={0, 2}, tee={0: Std.OUT, 1: Std.ALL}), [0], []),
    ],
)
async def test_which_ranks_and_streams_are_teed(logs: Logs, outs: list[int], errs: list[int]) -> None:
    with tee_to() as (out, err):
        await supervise(sh("echo o; echo e >&2"), n=3, logs=logs)
        assert sorted((await out.all()).splitlines()) == [b"[worker%d]: o" % rank for rank in outs]
        assert sorted((await err.all()).splitlines()) == [b"[worker%d]: e" % rank for rank in errs]


async def test_every_field_of_a_prefix() -> None:
    prefix = "{name}|{rank:03}|{local_rank}|{host}|{pid}|{attempt}|{stream}|{time}|"
    with tee_to() as (out, err):
        result = await supervise(sh("echo o; echo e >&2"), n=2, name="net", logs=Logs(prefix=prefix))
        shown = {"stdout": await out.all(), "stderr": await err.all()}
    host = os.uname().nodename.encode()
    for stream, data in shown.items():
        for one in result:
            want = rb"net\|%03d\|%d\|%s\|%d\|0\|%s\|%s\|[oe]\n" % (
                *(one.rank, one.rank, re.escape(host), one.pid, stream.encode(), ISO),
            )
            assert len(re.findall(want, data)) == 1


async def test_a_worker_with_a_name_of_its_own(tmp_path: Path) -> None:
    """It stands before its lines, in merged files and in results too; who has none is told by group and rank."""
    workers = [sh("echo a", name="{web}"), sh("echo b"), sh("echo c; exit 3", name="{web}")]
    with tee_to() as (out, _):
        logs = Logs(dir=tmp_path, match="c")
        result = await supervise(workers, name="app", logs=logs, on_failure="continue", check=False)
        assert sorted((await out.all()).splitlines()) == [b"[app1]: b", b"[{web}.1]: a", b"[{web}.2]: c"]
    assert result.log_dir is not None
    assert (result.log_dir / "attempt_0" / "matched.log").read_text() == "[{web}.2]: c\n"
    assert [one.worker for one in result] == ["{web}.1", "", "{web}.2"]
    assert [(one.worker, one.name) for one in result.failures] == [("{web}.2", "app")]


async def test_a_name_in_json() -> None:
    with tee_to() as (out, _):
        await supervise([sh("echo a", name="web"), sh("echo b")], logs=Logs(json=True))
        told = [json.loads(line) for line in (await out.all()).splitlines()]
    assert sorted((one["rank"], one["name"], one.get("worker")) for one in told) == [
        (0, "worker", "web"),
        (1, "worker", None),
    ]


async def test_timestamps_stand_first() -> None:
    with tee_to() as (out, _):
        await supervise(sh("echo one; echo two"), logs=Logs(timestamps=True))
        lines = (await out.all()).splitlines()
    assert [re.sub(b"^" + ISO + b" ", b"T ", one) for one in lines] == [b"T [worker0]: one", b"T [worker0]: two"]


async def test_json_is_one_object_per_line_whatever_the_bytes() -> None:
    script = r"""printf 'plain\n\377\376 "quoted" \\ \t\nna\303\257ve\n\n\000nul\rcr\r\nno newline'; echo bad >&2"""
    with tee_to() as (out, err):
        await supervise(sh(script), n=2, name="j", logs=Logs(json=True, timestamps=True))
        outs = [json.loads(one) for one in (await out.all()).decode().splitlines()]
        errs = [json.loads(one) for one in (await err.all()).decode().splitlines()]
    want = ["plain", '\\xff\\xfe "quoted" \\ \t', "naïve", "", "\0nul\rcr\r", "no newline"]
    for rank in (0, 1):
        mine = [one for one in outs if one["rank"] == rank]
        assert [one["line"] for one in mine] == want
        assert all(re.fullmatch(ISO.decode(), one["time"]) for one in mine)
        assert {one["name"] for one in mine} == {"j"}
        assert {one["stream"] for one in mine} == {"stdout"}
        assert [base64.b64decode(one["raw"]) for one in mine if "raw" in one] == [b'\xff\xfe "quoted" \\ \t']
        assert [set(one) - {"raw"} for one in mine] == [{"time", "name", "rank", "stream", "line"}] * len(want)
    assert sorted((one["rank"], one["stream"], one["line"]) for one in errs) == [
        (0, "stderr", "bad"),
        (1, "stderr", "bad"),
    ]


def strictly(data: bytes) -> list[dict[str, Any]]:
    """Lines of JSON as a strict parser takes them: text is UTF-8 and has no lone surrogate, numbers are finite."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = data.decode()
    out = [json.loads(one, parse_constant=refuse) for one in text.splitlines()]  # which ends lines at U+2028 and more
    json.dumps(out, ensure_ascii=False).encode()
    assert len(out) == data.count(b"\n")
    return out


LOOKALIKES = [b"\xff", rb"\xff", b"\xed\xa0\x80", rb"\ud800", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\0", rb"\u0000"]
ODD = ["\u2028", "\u2029", "\x85\x9b1m", "\x7f", "\x1b[2J\x1c", "\ufeff", "\uffff", "\U0001f600", "NaN", '"}\\', "\r"]


async def test_json_tells_bytes_from_text_that_looks_like_them() -> None:
    lines = [*LOOKALIKES, *(one.encode() for one in ODD), bytes(range(10)) + bytes(range(11, 256))]
    content = b"".join(line + b"\n" for line in lines)
    with tee_to() as (out, _):
        await supervise(py(f"import os; os.write(1, {content!r})"), logs=Logs(json=True))
        data = await out.all()
    told = strictly(data)
    assert [base64.b64decode(one["raw"]) if "raw" in one else one["line"].encode() for one in told] == lines
    assert len({(one["line"], one.get("raw")) for one in told}) == len(lines)
    assert not set(data.decode()) & set(map(chr, (*range(10), *range(11, 32), *range(0x80, 0xA0), 0x2028, 0x2029)))


async def test_json_of_a_line_that_is_too_long_is_in_parts() -> None:
    size = LINE_LIMIT * 2 + 9
    with tee_to() as (out, _):
        reader = out.reader
        await supervise(sh(f"head -c {size} /dev/zero | tr '\\0' x; echo; echo short"), logs=Logs(json=True))
        await out.all()
    told = strictly(bytes(reader.data))
    assert [(len(one["line"]), one.get("continued")) for one in told] == [
        (LINE_LIMIT, True),
        (LINE_LIMIT, True),
        (9, None),
        (5, None),
    ]


# in a pipe, and on a terminal
COLOURED: list[tuple[Any, dict[str, str], bool, bool]] = [
    ("auto", {}, False, True),
    ("auto", {"NO_COLOR": "1"}, False, False),
    ("auto", {"NO_COLOR": "", "FORCE_COLOR": ""}, False, True),  # empty, they say nothing (no-color.org)
    ("auto", {"TERM": "dumb"}, False, False),
    ("auto", {"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
    ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ("always", {"NO_COLOR": "1", "TERM": "dumb"}, True, True),
    ("never", {"FORCE_COLOR": "1"}, False, False),
]


@pytest.mark.parametrize("kind", ["pipe", "pty"])
@pytest.mark.parametrize(("color", "env", "in_a_pipe", "on_a_terminal"), COLOURED)
async def test_colours_only_on_a_terminal_and_where_wanted(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    color: Any,
    env: dict[str, str],
    in_a_pipe: bool,
    on_a_terminal: bool,
) -> None:
    for key in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"TERM": "xterm", **env}.items():
        monkeypatch.setenv(key, value)
    with tee_to(kind, kind) as (out, err):
        await supervise(sh("echo x; echo y >&2"), n=2, logs=Logs(color=color))
        data = await out.all() + await err.all()
    if on_a_terminal if kind == "pty" else in_a_pipe:
        assert data.count(b"\x1b[") == 8
        assert b"\x1b[36m[worker0]: \x1b[0mx\n" in data
        assert b"\x1b[33m[worker1]: \x1b[0my\n" in data
    else:
        assert b"\x1b" not in data
        assert b"[worker0]: x\n" in data


class Plain:
    """What somebody may put in place of a stream: an object that takes text."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


# --- unfinished lines and carriage returns ---


async def test_a_prompt_is_shown_and_its_line_gets_one_prefix(gate: Gate) -> None:
    with tee_to() as (out, _):
        async with Group(sh(f"printf 'name? '; read x < {gate.path}; echo $x; printf end")) as group:
            assert await out.until(b"name? ") == b"[worker0]: name? "
            gate.open()
            await group.wait()
        assert await out.all() == b"[worker0]: name? go\n[worker0]: end\n"


@pytest.mark.parametrize(("kind", "seconds"), [("pty", _tee.QUIET), ("pipe", _tee.READ_BY_PROGRAM)])
async def test_a_program_that_reads_gets_lines_whole_for_longer(kind: str, seconds: float) -> None:
    with tee_to(kind):
        console = Console(asyncio.get_running_loop(), sys.stdout, "stdout", "block", Troubles())
        loop = Mock()
        tap = ConsoleTap(loop, console, lambda at: b"> ", True)
        tap.feed(b"half of a line", NOBODY)
        loop.call_later.assert_called_once_with(seconds, tap._quiet)
        tap.eof()
        await console.leave(Deadline(), 1.0)


async def test_two_workers_never_share_a_line(gate: Gate, tmp_path: Path) -> None:
    other = Gate(tmp_path / "other")
    asks = sh(f"printf 'name? '; read x < {gate.path}; printf 'it is '; read x < {gate.path}; echo $x")
    with tee_to() as (out, _):
        async with Group([asks, sh(f"read x < {other.path}; echo hello; printf bye")]) as group:
            await out.until(b"name? ")
            other.open()
            await event_of(group, Drained, rank=1)
            gate.open()
            await out.until(b"it is ")
            gate.open()
            await group.wait()
        data = await out.all()
    other.close()
    assert data == b"[worker0]: name? \n[worker1]: hello\n[worker1]: bye\n[worker0]: it is go\n"


@pytest.mark.parametrize("kind", ["pipe", "pty"])
async def test_a_progress_bar_keeps_its_prefix(kind: str, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with tee_to(kind) as (out, _):
        script = rf"printf '10%%\r'; read x < {gate.path}; printf '20%%\r'; read x < {gate.path}; printf '30%%\ndone\n'"
        async with Group(sh(script)) as group:
            await out.until(b"10%")
            gate.open()
            await out.until(b"20%")
            gate.open()
            await group.wait()
        data = await out.all()
    assert data == b"[worker0]: 10%\r[worker0]: 20%\r[worker0]: 30%\n[worker0]: done\n"


async def test_crlf_is_no_progress_bar() -> None:
    with tee_to() as (out, _):
        await supervise(sh(r"printf 'one\r\n\r\ntwo\r\n'"))
        assert await out.all() == b"[worker0]: one\r\n[worker0]: \r\n[worker0]: two\r\n"


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"10%\r20%\r\nx\r\ny\n", b"> 10%\r> 20%\r\n> x\r\n> y\n"),
        (b"\rstart\rstop\n", b"> \r> start\r> stop\n"),
        (b"a\n\nb", b"> a\n> \n> b\n"),
        (b"\n\n\n", b"> \n> \n> \n"),
        (b"end\r", b"> end\r\n"),
        (b"end\r\n", b"> end\r\n"),
        (b"a\r\rb\n", b"> a\r> \r> b\n"),
    ],
)
async def test_prefixes_do_not_depend_on_how_the_bytes_come(data: bytes, want: bytes) -> None:
    """Every way to cut it into three reads, shown at once or only at the end of a line."""
    for show in (False, True):
        for first in range(len(data) + 1):
            for second in range(first, len(data) + 1):
                raw = io.BytesIO()
                with Shown(raw) as console:
                    tap = ConsoleTap(asyncio.get_running_loop(), console, lambda at: b"> ", True)
                    for chunk in (data[:first], data[first:second], data[second:]):
                        if chunk:
                            tap.feed(chunk, NOBODY)
                            if show:
                                quiet(tap)
                    tap.eof()
                assert raw.getvalue() == want, (data[:first], data[first:second], data[second:], show)


NOBODY: Any = None  # a pump that is not asked for anything


class Shown:
    """A console whose every write is kept."""

    def __init__(self, raw: io.BytesIO) -> None:
        self.raw = raw
        self._stream = io.StringIO()

    def __enter__(self) -> Console:
        return Console(asyncio.get_running_loop(), self._stream, "stdout", "block", Troubles())

    def __exit__(self, *args: object) -> None:
        self.raw.write(self._stream.getvalue().encode())


def quiet(tap: ConsoleTap) -> None:
    """As if the time after which an unfinished line is shown had gone by."""
    if tap._armed is not None:
        tap._armed.cancel()
        tap._fed = False
        tap._quiet()


async def test_a_very_long_line_gets_one_prefix() -> None:
    with tee_to() as (out, _):
        assert out.reader is not None
        await supervise(sh("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo y"))
        assert await out.all() == b"[worker0]: " + b"x" * 3_000_000 + b"\n[worker0]: y\n"


async def test_200_workers_at_once() -> None:
    with tee_to() as (out, err):
        readers = (out.reader, err.reader)
        result = await supervise(sh(f"{COUNT.format(n=50)}; printf partial; echo $RANK >&2"), n=200)
        await out.all()
        await err.all()
    assert result.ok
    lines = bytes(readers[0].data).split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == 200 * 51
    mine: dict[bytes, list[bytes]] = {}
    for one in lines:
        prefix, _, rest = one.partition(b": ")
        mine.setdefault(prefix, []).append(rest)
    for rank in range(200):
        assert mine[b"[worker%d]" % rank] == [b"%d line %d" % (rank, i) for i in range(50)] + [b"partial"]
    assert sorted(readers[1].data.splitlines()) == sorted(b"[worker%d]: %d" % (r, r) for r in range(200))


# --- slow consoles ---

SIZE = 60_000  # lines of 20 bytes with their prefix: more than the console and its pipe hold
LINES = [b"%07d" % i for i in range(SIZE)]
SEQ = f"seq -f %07.0f 0 {SIZE - 1}"
PREFIX = b"[worker0]: "
WHOLE = b"".join(b"%s%s\n" % (PREFIX, one) for one in LINES * 3)


async def test_block_lets_the_worker_wait_and_loses_nothing(held: asyncio.Event, tmp_path: Path) -> None:
    """Meanwhile the loop, another rank, and the other stream go on."""
    with tee_to() as (out, err):
        entries = [sh(f"{SEQ}; {SEQ}; {SEQ}; echo told >&2"), sh("echo other >&2")]
        async with Group(entries, logs=Logs(dir=tmp_path), stop=Stop(grace=0)) as group:
            await held.wait()
            await event_of(group, Drained, rank=1)
            assert await err.until(b"other\n") == b"[worker1]: other\n"
            assert 0 in group.pids
            reader = out.reader
            result = await group.wait()
        await out.all()
        assert await err.all() == b"[worker1]: other\n[worker0]: told\n"
    assert reader.data == WHOLE
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"".join(one + b"\n" for one in LINES * 3)


async def test_drop_forgets_the_oldest_and_counts(held: asyncio.Event) -> None:
    told: list[Event] = []
    with tee_to() as (out, _):
        async with Group(sh(f"{SEQ}; {SEQ}; {SEQ}"), logs=Logs(when_full="drop"), on_event=told.append) as group:
            trouble = await event_of(group, SinkTrouble)
            exit_ = await event_of(group, Exited)  # nobody reads, and yet it could write all
            assert exit_.exit.ok
            reader = out.reader
            await group.wait()
        data = await out.all()
    assert reader.over
    assert not held.is_set()
    assert trouble.sink == "stdout"
    assert "slow" in trouble.problem
    lost = [one.lost for one in told if isinstance(one, SinkTrouble)]
    assert lost == sorted(lost)
    assert lost[-1] + len(data) == len(WHOLE)
    lines = data.split(b"\n")
    assert all(re.fullmatch(rb"\[worker0\]: \d{7}", one) for one in lines[:-1])
    half = len(data) // 2
    assert WHOLE.endswith(data[half:][data[half:].index(b"\n") + 1 :])  # the newest are there, in order
    assert WHOLE.startswith(data[:60_000][: data[:60_000].rindex(b"\n")])


async def test_drop_keeps_lines_whole_and_apart() -> None:
    """Long lines reach the console in pieces: what is dropped must not glue the pieces of two lines together."""
    with tee_to() as (out, _):
        script = (
            "for c in a b c d e f g h i j k l m n o p q r s t; do head -c 300000 /dev/zero | tr '\\0' $c; echo; done"
        )
        async with Group(sh(script), logs=Logs(when_full="drop", prefix="<{rank}>")) as group:
            await event_of(group, Drained)
            reader = out.reader
            await group.wait()
        await out.all()
    for line in bytes(reader.data).split(b"\n")[:-1]:
        assert re.fullmatch(rb"<0>([a-t])\1*", line), line[:20] + b"..." + line[-20:]
    assert reader.data.endswith(b"t\n")


@pytest.mark.parametrize("when_full", ["block", "drop"])
async def test_a_hurry_does_not_wait_for_a_console_that_nobody_reads(when_full: Any, held: asyncio.Event) -> None:
    told: list[SinkTrouble] = []
    logs = Logs(when_full=when_full)
    with tee_to() as (out, _):
        group = Group(sh(f"{SEQ}; {SEQ}; {SEQ}; exec sleep 1000"), logs=logs, check=False)
        async with group:
            if when_full == "block":
                await held.wait()
            else:
                async for line in group.lines(when_full="drop"):
                    if line.data == LINES[-1]:
                        break
            group.hurry()
            result = await group.stop()
            told = [one async for one in group.events() if isinstance(one, SinkTrouble)]
        data = await out.all()
    assert result[0].exit is not None
    assert told[-1].sink == "stdout"
    assert told[-1].lost > 0
    shown = result[0].stdout.total // 8 * len(PREFIX + b"0000000\n")
    assert abs(told[-1].lost + len(data) - shown) <= len(PREFIX) + 8  # it may have been killed within a line


async def test_a_blocked_console_in_a_thread_hurts_no_file_and_no_end(held: asyncio.Event, tmp_path: Path) -> None:
    """stdout is an object whose `write` does not return."""
    free = threading.Event()

    class Hangs(Plain):
        def write(self, text: str) -> int:
            free.wait()
            return len(text)

    entries = [sh(f"{SEQ}; {SEQ}; {SEQ}"), sh(f"read x < {tmp_path}/gate; seq 10")]
    gate = Gate(tmp_path / "gate")
    logs = Logs(dir=tmp_path / "runs", ranks=[0])
    try:
        with tee_to(Hangs(), "pipe"):
            async with Group(entries, logs=logs, stop=Stop(grace=0, bound=0.2)) as group:
                await held.wait()  # the thread hangs by now, with the first piece
                gate.open()
                await event_of(group, Drained, rank=1)
                result = await group.stop()
        written = b"".join(one.read_bytes() for one in (tmp_path / "runs").glob("*/attempt_0/1/stdout.log"))
        told = [one async for one in group.events() if isinstance(one, SinkTrouble)]
    finally:
        free.set()
        gate.close()
        for thread in threading.enumerate():
            if thread.name.startswith("aioelastic"):
                await asyncio.to_thread(thread.join)
    assert [(one.sink, one.problem) for one in told] == [
        ("stdout", f"did not take its last {told[0].lost} bytes"),
    ]
    assert written == b"".join(b"%d\n" % i for i in range(1, 11))
    assert result[1].stdout.lost == 0


# --- consoles that are dead, closed, or something else ---


async def test_a_reader_that_goes_away_is_trouble_and_nothing_more(tmp_path: Path, gate: Gate) -> None:
    with tee_to() as (out, err):
        script = f"echo hello; read x < {gate.path}; {SEQ}; echo fine >&2"
        async with Group(sh(script), n=2, logs=Logs(dir=tmp_path)) as group:
            await out.until(b"hello\n")
            out.reader.close()
            gate.open(2)
            trouble = await event_of(group, SinkTrouble)
            result = await group.wait()
        assert sorted((await err.all()).splitlines()) == [b"[worker0]: fine", b"[worker1]: fine"]
    assert result.ok
    assert trouble.sink == "stdout"
    assert "Broken pipe" in trouble.problem
    assert trouble.lost > 0
    for one in result:
        assert one.stdout.path is not None
        assert one.stdout.path.read_bytes() == b"hello\n" + b"".join(line + b"\n" for line in LINES)


async def test_a_reader_that_goes_away_frees_held_workers(held: asyncio.Event) -> None:
    with tee_to() as (out, _):
        async with Group(sh(f"{SEQ}; {SEQ}; {SEQ}"), n=2) as group:
            await held.wait()
            out.reader.close()
            result = await group.wait()
    assert result.ok
    assert [one.stdout.total for one in result] == [3 * 8 * SIZE] * 2


async def test_a_pipe_whose_reader_is_gone_before_the_start() -> None:
    with tee_to() as (out, _):
        out.reader.close()
        told: list[Event] = []
        result = await supervise(sh("echo x"), on_event=told.append)
    assert result.ok
    problems = [(one.sink, one.problem, one.lost) for one in told if isinstance(one, SinkTrouble)]
    assert problems == [("stdout", "Broken pipe", len(b"[worker0]: x\n"))]


@pytest.mark.parametrize("how", ["none", "closed", "closed fd"])
async def test_a_closed_stdout_is_trouble_and_nothing_more(how: str, tmp_path: Path) -> None:
    stream: io.TextIOWrapper | None = None
    if how != "none":
        stream = open(os.open(os.devnull, os.O_WRONLY), "w", closefd=how == "closed")  # noqa: SIM115
        if how == "closed":
            stream.close()
        else:
            high = fcntl.fcntl(stream.fileno(), fcntl.F_DUPFD_CLOEXEC, 900)  # a number that nobody gets meanwhile
            os.close(stream.fileno())
            stream = open(high, "w", closefd=False)  # noqa: SIM115
            os.close(high)
    with tee_to(stream, "pipe") as (_, err):
        told: list[Event] = []
        result = await supervise(sh("echo x; echo y >&2"), logs=Logs(dir=tmp_path), on_event=told.append)
        assert await err.all() == b"[worker0]: y\n"
    troubles = [one for one in told if isinstance(one, SinkTrouble)]
    assert [one.sink for one in troubles] == ["stdout"]
    assert "closed" in troubles[0].problem
    assert result.ok
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"x\n"


async def test_dev_full_is_trouble_and_dev_null_is_none() -> None:
    for path, want in (("/dev/full", ["No space left on device"]), ("/dev/null", [])):
        with open(path, "w") as stream, tee_to(stream, "pipe"):
            told: list[Event] = []
            result = await supervise(sh(SEQ), on_event=told.append)
        assert result.ok
        assert [one.problem for one in told if isinstance(one, SinkTrouble)] == want


async def test_a_regular_file_as_the_console(tmp_path: Path) -> None:
    path = tmp_path / "redirected"
    with open(path, "w") as stream, tee_to(stream, "pipe"):
        print("before", end="\n", file=stream)
        await supervise(sh(COUNT.format(n=3000)), n=3)
        print("after", file=stream, flush=True)
    lines = path.read_bytes().splitlines()
    assert lines[0] == b"before"
    assert lines[-1] == b"after"
    for rank in range(3):
        assert of_rank(path.read_bytes(), rank) == [b"%d line %d" % (rank, i) for i in range(3000)]
    assert len(lines) == 2 + 3 * 3000


@pytest.mark.parametrize("kind", ["file", "pipe", "pty"])
async def test_both_streams_into_one(kind: str, tmp_path: Path, gate: Gate) -> None:
    """`> file 2>&1`: nothing overwritten, nobody's line shared, one stream's open line known to the other."""
    if kind == "file":
        first = open(tmp_path / "both", "w")  # noqa: SIM115  # closed below
        target = None
    else:
        target = Target(kind)
        assert target.reader is not None
        first = target.file
    second = open(os.dup(first.fileno()), "w")  # noqa: SIM115  # closed below
    script = f"printf 'open '; read x < {gate.path}; echo err >&2; read x < {gate.path}; echo closed; {SEQ}; {SEQ} >&2"
    with tee_to(first, second):
        async with Group(sh(script), logs=Logs(prefix="{stream}: ")) as group:
            feed = group.lines()
            if target is not None:
                await target.until(b"open ")
            gate.open()
            assert (await anext(feed)).data == b"err"
            gate.open()
            feed.close()
            await group.wait()
    second.close()
    if target is None:
        first.close()
        data = (tmp_path / "both").read_bytes()
    else:
        data = await target.all()
    data = re.sub(rb"\x1b\[\d+m", b"", data)
    lines = data.splitlines()
    assert [one for one in lines if one.startswith(b"stdout: ")][-SIZE:] == [b"stdout: " + one for one in LINES]
    assert [one for one in lines if one.startswith(b"stderr: ")] == [b"stderr: err", *(b"stderr: " + o for o in LINES)]
    shown_first = [b"stdout: open ", b"stderr: err", b"stdout: closed"]
    if target is None:  # whether the prompt was shown by then is a matter of time
        assert lines[:3] == shown_first or lines[:2] == [b"stderr: err", b"stdout: open closed"]
    else:
        assert lines[:3] == shown_first
    assert all(re.fullmatch(rb"std(out|err): [^:]*", one) for one in lines)


async def test_a_stand_in_without_a_file_gets_text() -> None:
    out, err = io.StringIO(), io.StringIO()
    with tee_to(out, err):
        await supervise(sh("echo naïve; printf '\\377\\n'; printf end; echo bad >&2"), n=1)
    assert out.getvalue() == "[worker0]: naïve\n[worker0]: \ufffd\n[worker0]: end\n"
    assert err.getvalue() == "[worker0]: bad\n"


async def test_a_stand_in_gets_letters_whole(gate: Gate) -> None:
    """An unfinished line may be shown when only the first byte of a letter is there."""
    out = io.StringIO()
    with tee_to(out, "pipe"):
        async with Group(sh(rf"printf 'a\303'; read x < {gate.path}; printf '\251\n'")) as group:
            await shown(out, "a")
            gate.open()
            await group.wait()
    assert out.getvalue() == "[worker0]: aé\n"


async def test_both_streams_into_one_stand_in(gate: Gate) -> None:
    """`contextlib.redirect_stdout` and `redirect_stderr` into the same object."""
    both = io.StringIO()
    with tee_to(both, both):
        async with Group(
            sh(f"printf 'open '; read x < {gate.path}; echo err >&2"), logs=Logs(prefix="{stream}: ")
        ) as g:
            await shown(both, "open ")
            gate.open()
            await g.wait()
    assert both.getvalue() == "stdout: open \nstderr: err\n"


async def shown(stream: io.StringIO, needle: str) -> None:
    """Until the tee has written it there."""
    real, event = stream.write, asyncio.Event()

    def write(text: str) -> int:
        done = real(text)
        if needle in stream.getvalue():
            event.set()
        return done

    stream.write = write  # type: ignore[method-assign]
    if needle not in stream.getvalue():
        await event.wait()


async def test_a_text_file_in_memory_gets_text() -> None:
    """What capsys, click's CliRunner and others put in place of stdout: a TextIOWrapper that has no descriptor."""
    raw = io.BytesIO()
    with text_of(raw) as stream, tee_to(stream, "pipe"):
        told: list[Event] = []
        await supervise(sh("echo x"), on_event=told.append)
    assert [one for one in told if isinstance(one, SinkTrouble)] == []
    assert raw.getvalue() == b"[worker0]: x\n"


async def test_a_stand_in_that_raises_is_trouble_and_nothing_more() -> None:
    class Bad(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("no")

    with tee_to(Bad(), "pipe") as (_, err):
        told: list[Event] = []
        result = await supervise(sh("echo x; echo y >&2"), on_event=told.append)
        assert await err.all() == b"[worker0]: y\n"
    assert result.ok
    assert [(one.sink, one.problem) for one in told if isinstance(one, SinkTrouble)] == [("stdout", "RuntimeError: no")]


async def test_a_stand_in_that_cannot_be_flushed_is_trouble_and_nothing_more() -> None:
    class Writes:
        def write(self, text: str) -> int:
            return len(text)

    class Bad(Writes):
        def flush(self) -> None:
            raise RuntimeError("no")

    wanted = {Bad: "RuntimeError: no", Writes: "AttributeError: 'Writes' object has no attribute 'flush'"}
    for kind, problem in wanted.items():
        with tee_to(kind(), "pipe") as (_, err):  # type: ignore[arg-type]
            told: list[Event] = []
            result = await supervise(sh("echo x; echo y >&2"), on_event=told.append)
            assert await err.all() == b"[worker0]: y\n"
        assert result.ok
        assert [(one.sink, one.problem) for one in told if isinstance(one, SinkTrouble)] == [("stdout", problem)]


@pytest.mark.parametrize("kind", ["pipe", "pty"])
async def test_the_callers_stdout_keeps_its_blocking_mode(kind: str, gate: Gate) -> None:
    with tee_to(kind, kind) as (out, err):
        fds = [one.file.fileno() for one in (out, err)]
        async with Group(sh(f"echo x; echo y >&2; read x < {gate.path}")) as group:
            await out.until(b"x\n")
            await err.until(b"y\n")
            during = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in fds]
            gate.open()
            await group.wait()
        after = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in fds]
    assert during == after == [0, 0]


async def test_what_was_printed_before_comes_before() -> None:
    with tee_to() as (out, _):
        out.file.write("mine, not flushed\n")
        await supervise(sh("echo x"))
        assert await out.all() == b"mine, not flushed\n[worker0]: x\n"


async def test_two_groups_share_a_console_line_by_line(held: asyncio.Event) -> None:
    """Even where the console takes only a part of what one of them writes."""
    with tee_to() as (out, _):
        groups = [asyncio.create_task(supervise(sh(f"{SEQ}; {SEQ}; {SEQ}"), name=name)) for name in ("a", "b")]
        await held.wait()
        reader = out.reader
        await asyncio.gather(*groups)
        await out.all()
    for name in (b"a", b"b"):
        assert of_rank(reader.data, 0, b"[" + name + b"%d]: ") == LINES * 3


async def test_nothing_of_ours_is_written_when_nothing_is_teed() -> None:
    with tee_to() as (out, err):
        await supervise(sh("echo x; echo y >&2"), logs=QUIET)
        assert await out.all() == await err.all() == b""


# --- the console alone ---


async def test_a_console_takes_everything_in_order_while_its_target_is_full() -> None:
    target = Target()
    async with console_on(target.file, "block") as (console, troubles):
        for i in range(20_000):
            console.write([b"%d " % i, b"line\n"], None)
        assert console.queued
        reader = target.reader
    await target.all()
    assert reader.data == b"".join(b"%d line\n" % i for i in range(20_000))
    assert not troubles
    assert console.lost == 0


async def test_drop_keeps_the_newest_even_when_it_is_larger_than_the_limit() -> None:
    """A read of nothing but empty lines is megabytes with its prefixes."""
    target = Target()
    async with console_on(target.file, "drop") as (console, troubles):
        console.write([b"first\n" * 20_000], None)
        newest = b"".join(b"%07d\n" % i for i in range(200_000))
        console.write([newest], None)
        reader = target.reader
    await target.all()
    assert reader.data.endswith(newest)
    assert troubles == [] or troubles[-1][2] + len(reader.data) == 120_000 + len(newest)


async def test_closing_a_console_whose_thread_hangs_leaves_no_descriptor() -> None:
    entered, free = threading.Event(), threading.Event()

    class Hangs(Plain):
        def write(self, text: str) -> int:
            entered.set()
            free.wait()
            return len(text)

    async with console_on(Hangs(), "block", bound=0.0) as (console, troubles):
        console.write([b"x" * 4_000_000], None)
        await asyncio.to_thread(entered.wait)
    assert troubles == [("stdout", "did not take its last 4000000 bytes", 4_000_000)]
    hung = [one for one in threading.enumerate() if one.name == "aioelastic-stdout"]
    assert hung
    free.set()
    for thread in hung:
        await asyncio.to_thread(thread.join)


async def test_a_reader_is_a_reader() -> None:
    """The helper itself: it must tell an end from a pause, or these tests prove nothing."""
    read, write = os.pipe()
    reader = Reader(read)
    os.write(write, b"one")
    assert await reader.until(b"one") == b"one"
    assert not reader.over
    os.close(write)
    assert await reader.all() == b"one"


@pytest.mark.parametrize("read", [b"\r" * 100_000, b"x\r" * 100_000, b"\r\r\n" * 100_000])
def test_a_read_full_of_carriage_returns_takes_a_few_steps(read: bytes) -> None:
    """And not one of Python's for each, while the loop waits."""
    steps: list[str] = []
    sys.setprofile(lambda frame, event, arg: steps.append(event))
    try:
        made = _tee._after_returns(b"> ", read)
    finally:
        sys.setprofile(None)
    assert len(steps) < 20
    assert made == re.sub(rb"\r(?!\n)", b"\r> ", read)
