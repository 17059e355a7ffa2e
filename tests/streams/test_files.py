"""Log files: bytes in = bytes out, layout, rotation, filters, and file systems that refuse or stall."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from helpers import event_of, sh
from helpers_streams import Gate, Troubles, cat, gate, held, random_bytes, tee_to, tiny_disk

from aioelastic import LINE_LIMIT, Group, GroupResult, Line, Logs, Match, Rotate, SpecError, Std, Stop, supervise
from aioelastic.events import Drained, Event, SinkTrouble
from aioelastic.streams import FileSink, FileThread, Pump
from aioelastic.testing._environment import file_limit
from aioelastic.watch import Poller

__all__ = ["gate", "held"]  # fixtures


def saved(result: GroupResult, rank: int, stream: str = "stdout") -> bytes:
    path = getattr(result[rank], stream).path
    assert path is not None
    return path.read_bytes()


@asynccontextmanager
async def sink_on(
    path: Path | None, rotate: Rotate | None = None, fd: int | None = None
) -> AsyncIterator[tuple[FileSink, Troubles]]:
    """A file sink of our own; leaving it writes all that is queued."""
    troubles = Troubles()
    thread = FileThread(asyncio.get_running_loop(), "test-files")
    sink = FileSink(thread, path, rotate, troubles, fd=fd, name=None if path else "sink")
    await thread.submit(sink.open)
    try:
        yield sink, troubles
    finally:
        sink.close()
        await thread.end()


# --- bytes in = bytes out ---

CONTENTS = {
    "binary": random_bytes(5_000_000),
    "nothing": b"",
    "one newline": b"\n",
    "no newline at the end": b"first\nsecond",
    "nul": b"a\0b\0\n\0\0\n\0",
    "crlf": b"one\r\ntwo\r\n\r\n" * 1000,
    "bare cr": b"10%\r20%\r30%\r",
    "not utf-8": b"\xff\xfe\xc3\n\xc3\xa9\n",
    "many short lines": b"\n" * 300_000,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
async def test_files_hold_the_workers_bytes(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    result = await supervise(
        sh(f"{cat(source)}; {cat(source, True)}"), n=2, logs=Logs(dir=tmp_path / "runs", tee=Std.NONE)
    )
    for one in result:
        for stream in ("stdout", "stderr"):
            assert saved(result, one.rank, stream) == content
        assert one.stdout.total == len(content)
        assert one.stdout.lost == 0
        assert one.stdout.tail == content[-16_384:]


async def test_one_line_of_50_megabytes_through_every_sink(tmp_path: Path) -> None:
    size = 50_000_000
    called: list[Line] = []
    logs = Logs(
        dir=tmp_path,
        match=Match(include="\0", file="m"),
        prefix="",
        callback=called.append,
    )
    with tee_to() as (out, _):
        reader = out.reader
        async with Group(sh(f"head -c {size} /dev/zero; printf '\\nend'"), logs=logs) as group:
            got = [line async for line in group.lines()]
        result = await group.wait()
        shown = await out.all()
    assert not reader.data[:100].strip(b"\0")
    want = bytes(size) + b"\nend"
    assert saved(result, 0) == want
    assert shown == want + b"\n"
    assert [line._replace(time=0) for line in called] == [line._replace(time=0) for line in got]
    assert b"".join(line.data for line in got) == bytes(size) + b"end"
    assert [line.continued for line in got] == [True] * (len(got) - 2) + [False, False]
    assert {len(line.data) for line in got[:-2]} == {LINE_LIMIT}
    assert result.log_dir is not None
    parts = (result.log_dir / "attempt_0" / "m").read_bytes().splitlines()  # the end has no NUL
    assert [len(one) for one in parts] == [len(line.data) for line in got[:-1]]


async def test_every_sink_at_once_changes_no_byte_of_the_files(tmp_path: Path) -> None:
    content = random_bytes(3_000_000)
    source = tmp_path / "source"
    source.write_bytes(content)
    seen: list[bytes] = []
    logs = Logs(
        dir=tmp_path / "runs",
        match=[Match(file="all"), "\t", re.compile(b"\xff")],
        callback=lambda line: seen.append(line.data),
        timestamps=True,
    )
    with tee_to() as (out, err):
        readers = (out.reader, err.reader)
        async with Group(sh(f"{cat(source)} & {cat(source, True)}; wait"), logs=logs) as group:
            got = [line async for line in group.lines()]
        result = await group.wait()
        await out.all()
        await err.all()
    assert all(len(one.data) > len(content) for one in readers)
    assert saved(result, 0, "stdout") == saved(result, 0, "stderr") == content
    for stream in ("stdout", "stderr"):
        assert b"\n".join(line.data for line in got if line.stream == stream) == content.removesuffix(b"\n")
    assert sorted(seen) == sorted(line.data for line in got)


# --- layout ---


async def test_layout_of_a_run(tmp_path: Path) -> None:
    result = await supervise(
        sh("echo out; echo err >&2; [ $RANK = 0 ] || echo '{}' > $TORCHELASTIC_ERROR_FILE"),
        n=2,
        name="my trainer",
        logs=Logs(dir=tmp_path / "a" / "b", tee=Std.NONE, match="out"),
    )
    assert result.log_dir == tmp_path / "a" / "b" / result.run_id
    assert "my_trainer" in result.run_id
    files = {str(one.relative_to(result.log_dir)) for one in result.log_dir.rglob("*") if one.is_file()}
    assert files == {
        "attempt_0/matched.log",
        "attempt_0/0/stdout.log",
        "attempt_0/0/stderr.log",
        "attempt_0/1/stdout.log",
        "attempt_0/1/stderr.log",
        "attempt_0/1/error.json",
    }
    assert result[1].stdout.path == result.log_dir / "attempt_0" / "1" / "stdout.log"
    assert saved(result, 1, "stderr") == b"err\n"


async def test_save_chooses_streams_and_ranks(tmp_path: Path) -> None:
    loud = sh("echo out; echo err >&2")
    only_err = await supervise(loud, logs=Logs(dir=tmp_path, tee=Std.NONE, save=Std.ERR))
    assert only_err[0].stdout.path is None
    assert saved(only_err, 0, "stderr") == b"err\n"
    some = await supervise(loud, n=3, logs=Logs(dir=tmp_path, tee=Std.NONE, save={0: Std.OUT, 2: Std.ALL}))
    names = {str(one.relative_to(some.log_dir)) for one in some.log_dir.rglob("*.log")}  # type: ignore[union-attr, arg-type]
    assert names == {f"attempt_0/{one}" for one in ("0/stdout.log", "2/stdout.log", "2/stderr.log")}
    assert str(some[1].stdout) == "out\n"  # its tail is kept all the same
    nothing = await supervise(loud, logs=Logs(dir=tmp_path, tee=Std.NONE, save=Std.NONE, match="err"))
    assert nothing.log_dir is not None
    assert [one.name for one in nothing.log_dir.rglob("*.log")] == ["matched.log"]


async def test_no_run_overwrites_another(tmp_path: Path) -> None:
    async def run(number: int) -> GroupResult:
        return await supervise(sh(f"echo {number}"), logs=Logs(dir=tmp_path, tee=Std.NONE))

    one_by_one = [await run(number) for number in range(3)]
    at_once = await asyncio.gather(*(run(number) for number in range(3, 23)))
    assert len(os.listdir(tmp_path)) == 23
    for number, result in enumerate([*one_by_one, *at_once]):
        assert saved(result, 0) == f"{number}\n".encode()


async def test_a_directory_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for bad in (file, file / "below"):
        with pytest.raises(SpecError) as caught:
            await supervise(sh("exit 0"), logs=Logs(dir=bad, tee=Std.NONE))
        assert str(bad) in str(caught.value)
    assert file.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


# --- rotation ---


def parts(path: Path) -> list[bytes]:
    """Oldest first."""
    older = [one for one in path.parent.iterdir() if one.name.startswith(f"{path.name}.")]
    older.sort(key=lambda one: -int(one.suffix[1:]))
    return [one.read_bytes() for one in (*older, path)]


async def test_rotation_cuts_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    result = await supervise(sh(script), logs=Logs(dir=tmp_path, tee=Std.NONE, rotate=Rotate(size=10_000, keep=1000)))
    path = result[0].stdout.path
    assert path is not None
    files = parts(path)
    assert b"".join(files) == b"".join(b"line %d\n" % i for i in range(20_000))
    assert all(0 < len(one) <= 10_000 for one in files)
    assert all(one.endswith(b"\n") for one in files)
    assert all(len(one) > 9_980 for one in files[:-1])


async def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done"
    whole = b"".join(b"line %d\n" % i for i in range(3000))
    for keep in (0, 1, 3):
        result = await supervise(
            sh(script), logs=Logs(dir=tmp_path, tee=Std.NONE, rotate=Rotate(size=5_000, keep=keep))
        )
        path = result[0].stdout.path
        assert path is not None
        files = parts(path)
        assert len(files) == keep + 1
        assert whole.endswith(b"".join(files))
        assert result[0].stdout.total == len(whole)
        assert result[0].stdout.lost == 0  # what rotation forgets is not lost: it was asked for


@pytest.mark.parametrize("content", [b"x" * 1000, b"x" * 1000 + b"\n", b"ab\n" + b"x" * 1000 + b"\ncd\n", b"\n" * 1000])
async def test_a_line_longer_than_a_file(tmp_path: Path, content: bytes) -> None:
    async with sink_on(tmp_path / "log", Rotate(size=64, keep=1000)) as (sink, troubles):
        sink.write(content, None)
    files = parts(tmp_path / "log")
    assert b"".join(files) == content
    assert all(len(one) <= 64 for one in files)
    assert not troubles


@pytest.mark.parametrize("step", [1, 3, 7, 64, 1000])
async def test_rotation_cuts_at_line_ends_however_the_bytes_come(tmp_path: Path, step: int) -> None:
    """A chunk may end within a line: the line still goes whole into one file."""
    content = b"".join(b"%d %s\n" % (i, b"x" * (i % 40)) for i in range(300))
    async with sink_on(tmp_path / "log", Rotate(size=100, keep=1000)) as (sink, _):
        for at in range(0, len(content), step):
            sink.write(content[at : at + step], None)
    files = parts(tmp_path / "log")
    assert b"".join(files) == content
    assert all(len(one) <= 100 for one in files)
    assert all(one.endswith(b"\n") for one in files)


async def test_rotation_that_fails_goes_on_in_the_same_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    async with sink_on(home / "log", Rotate(size=10, keep=1)) as (sink, troubles):
        sink.write(b"12345678\n", None)
        await sink._writer.submit(lambda: (home / "log.1" / "full").mkdir(parents=True))
        sink.write(b"abcdefgh\n", None)
        sink.write(b"ABCDEFGH\n", None)
    assert (home / "log").read_bytes() == b"12345678\nabcdefgh\nABCDEFGH\n"
    assert [(sink, lost) for sink, _, lost in troubles] == [(str(home / "log"), 0)]
    assert "cannot rotate" in troubles[0][1]


# --- filters ---


async def test_match_copies_chosen_lines_of_both_streams_with_their_prefix(tmp_path: Path) -> None:
    logs = Logs(
        dir=tmp_path,
        tee=Std.NONE,
        prefix="<{rank} {stream}> ",
        match=[
            "loss=",
            re.compile(r"step \d+0\b"),
            Match(include=("loss", re.compile(b"step")), exclude=("loss=3", re.compile("nan$")), file="chosen.log"),
            Match(exclude=("noise",), std=Std.ERR, file="errors.log"),
            Match(file="everything.log"),
        ],
    )
    script = "printf 'step 9\\nstep 10\\nloss=3 here\\nnoise\\nloss is nan\\nloss=4'; printf 'noise\\nbad' >&2"
    result = await supervise(sh(script), n=2, logs=logs)
    assert result.log_dir is not None
    home = result.log_dir / "attempt_0"

    def lines(file: str, rank: int) -> list[str]:
        return [one for one in (home / file).read_text().splitlines() if one.startswith(f"<{rank} ")]

    for rank in (0, 1):
        out, err = f"<{rank} stdout> ", f"<{rank} stderr> "
        assert lines("matched.log", rank) == [f"{out}step 10", f"{out}loss=3 here", f"{out}loss=4"]
        assert lines("chosen.log", rank) == [f"{out}step 9", f"{out}step 10", f"{out}loss=4"]
        assert lines("errors.log", rank) == [f"{err}bad"]
        assert len(lines("everything.log", rank)) == 8
    assert len((home / "everything.log").read_text().splitlines()) == 16


async def test_matched_lines_are_rotated_too(tmp_path: Path) -> None:
    logs = Logs(dir=tmp_path, tee=Std.NONE, prefix="", rotate=Rotate(size=1000, keep=2), match=Match())
    result = await supervise(sh("seq 2000"), logs=logs)
    assert result.log_dir is not None
    files = parts(result.log_dir / "attempt_0" / "matched.log")
    assert len(files) == 3
    assert all(0 < len(one) <= 1000 for one in files)
    assert b"".join(b"%d\n" % i for i in range(1, 2001)).endswith(b"".join(files))


async def test_a_matched_file_with_the_name_of_a_rotated_one_is_refused(tmp_path: Path) -> None:
    files = [Match(file="loss.2"), Match(file="loss")]
    with pytest.raises(SpecError, match=r"loss\.2"):
        Logs(dir=tmp_path, match=files, rotate=Rotate(keep=2))
    Logs(dir=tmp_path, match=files, rotate=Rotate(keep=1))
    Logs(dir=tmp_path, match=files)


async def test_match_never_mixes_workers_within_a_line(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo $RANK $RANK $i; i=$((i+1)); done"
    result = await supervise(sh(script), n=6, logs=Logs(dir=tmp_path, tee=Std.NONE, match=Match(), prefix="{rank}: "))
    assert result.log_dir is not None
    lines = (result.log_dir / "attempt_0" / "matched.log").read_bytes().splitlines()
    for rank in range(6):
        mine = [one for one in lines if one.startswith(b"%d: " % rank)]
        assert mine == [b"%d: %d %d %d" % (rank, rank, rank, i) for i in range(3000)]
    assert len(lines) == 6 * 3000


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("é", ["café"]),
        (re.compile("[éà]"), ["café"]),  # a class of two letters, not of their bytes
        (re.compile(r"^caf\w$"), ["café", "cafe"]),
        (re.compile("^.{4}$"), ["café", "cafe", "über"]),
        (re.compile("É", re.IGNORECASE), ["café"]),
        (re.compile("\\u00e9"), ["café"]),  # an escape that only text patterns know
        (re.compile("(?u)über"), ["über"]),
        (re.compile("über".encode()), ["über"]),
    ],
    ids=str,
)
async def test_match_of_text_beyond_ascii(tmp_path: Path, pattern: str | re.Pattern[str], wanted: list[str]) -> None:
    logs = Logs(dir=tmp_path, tee=Std.NONE, prefix="", match=pattern)
    result = await supervise(sh("printf 'café\\ncafe\\nüber\\n'"), logs=logs)
    assert result.log_dir is not None
    assert (result.log_dir / "attempt_0" / "matched.log").read_text().splitlines() == wanted


# --- files that others meddle with ---

TURNS = [None, Rotate(size=100, keep=2), Rotate(size=100, keep=0)]
turns = pytest.mark.parametrize("rotate", TURNS, ids=["plain", "keep 2", "keep 0"])


async def meddle(sink: FileSink, work: Callable[[], object]) -> None:
    """Do it once all that was written so far is in the file."""
    sink._writer.flush()
    await sink._writer.submit(work)


@turns
async def test_a_file_that_others_truncate_goes_on_at_its_new_end(rotate: Rotate | None, tmp_path: Path) -> None:
    """As logrotate's copytruncate does."""
    path = tmp_path / "log"
    async with sink_on(path, rotate) as (sink, troubles):
        sink.write(b"old\n" * 15 + b"unfin", None)
        await meddle(sink, lambda: os.truncate(path, 0))
        sink.write(b"ished\n" + b"new\n" * 15, None)
    assert path.read_bytes() == b"ished\n" + b"new\n" * 15
    assert os.listdir(tmp_path) == ["log"]  # there was room for all of it
    assert (sink.lost, troubles) == (0, [])


async def test_rotation_counts_what_others_write(tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with sink_on(path, Rotate(size=100, keep=9)) as (sink, _):
        sink.write(b"ours\n", None)
        await meddle(sink, lambda: path.write_bytes(path.read_bytes() + b"theirs" * 20 + b"\n"))
        sink.write(b"ours again\n", None)
    assert parts(path) == [b"ours\n" + b"theirs" * 20 + b"\n", b"ours again\n"]


async def test_matched_lines_that_others_truncate(tmp_path: Path, gate: Gate) -> None:
    logs = Logs(dir=tmp_path, tee=Std.NONE, prefix="", match=Match())
    async with Group(sh(f"seq 1000; read x < {gate.path}; echo new"), logs=logs) as group:
        async for line in group.lines():
            if line.data == b"1000":
                break
        group._supervisor.resources._files.flush()
        await group._supervisor.resources._files.submit(lambda: None)
        for path in tmp_path.rglob("*.log"):
            os.truncate(path, 0)
        gate.open()
        result = await group.wait()
    assert result.log_dir is not None
    assert (result.log_dir / "attempt_0" / "matched.log").read_bytes() == b"new\n"
    assert saved(result, 0) == b"new\n"


@turns
@pytest.mark.parametrize("what", ["file", "directory", "directories"])
async def test_what_was_deleted_is_made_anew(what: str, rotate: Rotate | None, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "log"
    path.parent.mkdir(parents=True)
    gone = {
        "file": path.unlink,
        "directory": partial(rmtree, path.parent),
        "directories": partial(rmtree, tmp_path / "a"),
    }
    async with sink_on(path, rotate) as (sink, troubles):
        sink.write(b"old\n", None)
        await meddle(sink, gone[what])
        sink.write(b"new\n", None)
        sink._writer.flush()
        sink.write(b"newer\n", None)
    assert path.read_bytes() == b"new\nnewer\n"
    assert (sink.lost, troubles) == (0, [])


@turns
async def test_a_directory_that_a_file_replaces_costs_bytes_until_it_is_back(
    rotate: Rotate | None, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def block() -> None:
        rmtree(home)
        home.write_text("mine")

    async with sink_on(home / "log", rotate) as (sink, troubles):
        sink.write(b"old\n", None)
        await meddle(sink, block)
        sink.write(b"lost\n", None)
        sink._writer.flush()
        sink.write(b"lost too\n", None)
        await meddle(sink, home.unlink)
        sink.write(b"new\n", None)
    assert (home / "log").read_bytes() == b"new\n"
    assert sink.lost == 14
    assert [(words, lost) for _, words, lost in troubles] == [("Not a directory", 5), ("Not a directory", 14)]


async def test_a_file_that_was_moved_is_written_on(tmp_path: Path) -> None:
    """Its mover may have it back, or tell us nothing at all: as every program's log."""
    async with sink_on(tmp_path / "log") as (sink, _):
        sink.write(b"one\n", None)
        await meddle(sink, lambda: os.rename(tmp_path / "log", tmp_path / "moved"))
        sink.write(b"two\n", None)
    assert os.listdir(tmp_path) == ["moved"]
    assert (tmp_path / "moved").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("instead", ["nothing", "file"])
async def test_a_file_that_was_moved_is_made_anew_when_we_rotate(instead: str, keep: int, tmp_path: Path) -> None:
    path, moved = tmp_path / "log", tmp_path / "moved"

    def move() -> None:
        path.rename(moved)
        if instead == "file":
            path.write_bytes(b"theirs\n")

    async with sink_on(path, Rotate(size=100, keep=keep)) as (sink, troubles):
        sink.write(b"one\n", None)
        await meddle(sink, move)
        sink.write(b"two\n", None)
    assert moved.read_bytes() == b"one\n"
    assert path.read_bytes() == (b"theirs\n" if instead == "file" else b"") + b"two\n"
    assert (sink.lost, troubles) == (0, [])


@pytest.mark.parametrize("keep", [0, 2])
async def test_a_name_that_a_directory_holds(keep: int, tmp_path: Path) -> None:
    """What was moved away holds the bytes, is not emptied, and the directory stays where it is."""
    path, moved = tmp_path / "log", tmp_path / "moved"

    def move() -> None:
        path.rename(moved)
        (path / "theirs").mkdir(parents=True)

    lines = [b"%d %s\n" % (i, b"x" * 30) for i in range(20)]
    async with sink_on(path, Rotate(size=100, keep=keep)) as (sink, troubles):
        sink.write(lines[0], None)
        await meddle(sink, move)
        for line in lines[1:10]:
            sink.write(line, None)
        await meddle(sink, lambda: rmtree(path))
        sink.write(lines[10], None)
    assert moved.read_bytes() == b"".join(lines[:10])
    assert path.read_bytes() == lines[10]
    assert "Is a directory" in troubles[0][1]
    assert sink.lost == 0


async def test_all_files_can_be_kept(tmp_path: Path) -> None:
    """However large the number, and where somebody has taken one away, no other is lost."""
    path = tmp_path / "log"
    async with sink_on(path, Rotate(size=2, keep=10**15)) as (sink, _):
        sink.write(b"1\n2\n3\n4\n", None)
        await meddle(sink, (tmp_path / "log.2").unlink)
        sink.write(b"5\n6\n", None)
    assert parts(path) == [b"1\n", b"3\n", b"4\n", b"5\n", b"6\n"]


async def test_rotation_does_without_a_name_that_a_directory_holds(tmp_path: Path) -> None:
    path = tmp_path / "log"
    (tmp_path / "log.2" / "theirs").mkdir(parents=True)
    lines = [b"%d %s\n" % (i, b"x" * 40) for i in range(9)]
    async with sink_on(path, Rotate(size=50, keep=3)) as (sink, troubles):
        for line in lines:
            sink.write(line, None)
            sink._writer.flush()
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2", "log.3"]
    assert [(tmp_path / one).read_bytes() for one in ("log.3", "log.1", "log")] == lines[-3:]
    assert os.listdir(tmp_path / "log.2") == ["theirs"]
    assert [(lost, "log.2" in words) for _, words, lost in troubles] == [(0, True)]


async def test_a_pipe_without_a_reader_in_a_logs_place_holds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def replace() -> None:
        path.unlink()
        os.mkfifo(path)

    async with sink_on(path) as (sink, troubles):
        await meddle(sink, replace)
        sink.write(b"x" * 1_000_000, None)
        await meddle(sink, lambda: None)
    assert 0 < sink.lost < 1_000_000
    assert troubles == [(str(path), "Resource temporarily unavailable", sink.lost)]


async def test_rotation_goes_on_where_a_limit_forbids_its_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = b"".join(b"%d\n" % i for i in range(3000))
    async with sink_on(path, Rotate(size=10_000, keep=100)) as (sink, troubles):
        with file_limit(1000):
            sink.write(content[:7777], None)
            await meddle(sink, lambda: None)
            sink.write(content[7777:], None)
            await meddle(sink, lambda: None)
    assert b"".join(parts(path)) == content
    assert all(len(one) <= 1000 for one in parts(path))
    assert (sink.lost, troubles) == (0, [])


@turns
async def test_a_limit_that_lets_no_byte_through(rotate: Rotate | None, tmp_path: Path) -> None:
    async with sink_on(tmp_path / "log", rotate) as (sink, troubles):
        with file_limit(0):
            sink.write(b"lost\n" * 100, None)
            await meddle(sink, lambda: None)
            sink.write(b"lost\n", None)
            await meddle(sink, lambda: None)
        sink.write(b"new\n", None)
    assert (tmp_path / "log").read_bytes() == b"new\n"
    assert sink.lost == 505
    assert {words for _, words, _ in troubles} == {"File too large"}
    assert troubles[-1][2] == 505


CALLS = ["fstat", "stat", "lstat", "open", "close", "write", "writev", "pread", "ftruncate", "replace", "makedirs"]
ERRORS = [
    OSError(errno.ESTALE, "stale"),
    OSError(errno.EIO, "bad"),
    MemoryError(),
    UnicodeEncodeError("x", "", 0, 1, ""),
]


@turns
@pytest.mark.parametrize("call", CALLS)
async def test_whatever_fails_costs_bytes_that_are_counted_and_never_the_thread(
    call: str, rotate: Rotate | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of error once, twice, and for a while; then all is well again."""
    real = getattr(os, call)
    fail: list[Exception] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name != "test-files" or not fail:
            return real(*args, **kwargs)
        if call == "close":
            real(*args)  # as the kernel does
        raise fail.pop()

    path = tmp_path / "home" / "log"
    path.parent.mkdir()
    lines = [b"%03d %s\n" % (i, b"x" * 30) for i in range(120)]
    monkeypatch.setattr(os, call, fails)
    async with sink_on(path, rotate) as (sink, troubles):
        for number, line in enumerate(lines):
            sink.write(line[:9], None)
            await meddle(sink, fail.clear)
            if number == 60:
                await meddle(sink, lambda: rmtree(path.parent))
            if number < 100:
                fail += ERRORS[number // 10 % 4 :][:1] * {3: 1, 6: 2, 0: 9}.get(number % 10, 0)
            sink.write(line[9:], None)
            await meddle(sink, lambda: None)
    kept = b"".join(parts(path))
    assert kept.endswith(lines[-1])
    assert b"\0" not in kept
    assert sink._writer.behind == 0
    assert sink.lost <= sum(map(len, lines[:100]))
    assert max((lost for _, _, lost in troubles), default=0) == sink.lost
    if rotate is None:  # each byte since the directory went is there, or counted
        assert len(b"".join(lines[60:])) - 9 - sink.lost <= len(kept) <= len(b"".join(lines[60:])) - 9


async def test_what_a_thread_that_hangs_never_wrote_is_counted(tmp_path: Path) -> None:
    go = threading.Event()
    seen: list[SinkTrouble] = []
    before = set(threading.enumerate())
    logs = Logs(dir=tmp_path, tee=Std.NONE)

    def hear(event: Event) -> None:
        if isinstance(event, SinkTrouble):
            seen.append(event)

    try:
        async with Group(sh("echo 234"), logs=logs, stop=Stop(bound=0.05), on_event=hear) as group:
            group._supervisor.resources._files.put(lambda: go.wait() and None)
            result = await group.wait()
    finally:
        go.set()
        for thread in set(threading.enumerate()) - before:
            thread.join()
    assert result[0].stdout.lost == 4
    assert [(one.sink, one.lost) for one in seen] == [("log files", 4)]


# --- file systems that refuse, or stall ---


async def test_a_full_disk_is_told_and_counted_and_hurts_no_other_sink(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        seen: list[bytes] = []
        troubles: list[SinkTrouble] = []
        logs = Logs(dir=disk, prefix="", callback=lambda line: seen.append(line.data))
        with tee_to() as (out, _):
            reader = out.reader
            result = await supervise(
                sh("seq 100000; echo done >&2"),
                logs=logs,
                on_event=lambda event: troubles.append(event) if isinstance(event, SinkTrouble) else None,
            )
            await out.all()
        whole = b"".join(b"%d\n" % i for i in range(1, 100_001))
        assert result.ok
        assert reader.data == whole
        assert seen[:-1] == whole.split() or seen[-1] == b"100000"
        kept = saved(result, 0)
        assert whole.startswith(kept)
        assert 0 < len(kept) < len(whole)
        assert result[0].stdout.lost == len(whole) - len(kept)
        assert {one.sink for one in troubles} >= {str(result[0].stdout.path)}
        first = next(one for one in troubles if one.sink == str(result[0].stdout.path))
        assert "No space left" in first.problem
        assert 0 < first.lost <= result[0].stdout.lost


async def test_a_disk_that_has_room_again_is_used_again(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        ballast = disk / "ballast"
        async with sink_on(disk / "log") as (sink, troubles):
            sink.write(b"one\n", None)
            sink._writer.flush()
            await sink._writer.submit(lambda: fill(ballast))
            sink.write(b"x" * 8192, None)
            sink._writer.flush()
            await sink._writer.submit(ballast.unlink)
            sink.write(b"two\n", None)
        data = (disk / "log").read_bytes()
        assert data.startswith(b"one\n")
        assert data.endswith(b"two\n")
        assert len(data) + sink.lost == 4 + 8192 + 4
        assert sink.lost > 0
        assert len(troubles) == 1


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass


async def test_dev_full_counts_every_byte() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        async with sink_on(None, fd=fd) as (sink, troubles):
            for _ in range(10):
                sink.write(b"x" * 1000, None)
                sink._writer.flush()
    finally:
        os.close(fd)
    assert sink.lost == 10_000
    assert sink._writer.behind == 0
    assert troubles == [("sink", "No space left on device", 1000), ("sink", "No space left on device", 10_000)]


LIMITED = """
import asyncio, json, resource, sys
from aioelastic import *
from aioelastic.events import SinkTrouble
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
told = []
async def main():
    result = await supervise(
        lambda rank: Command("seq", "100000" if rank == 0 else "10"), n=2,
        logs=Logs(dir=sys.argv[1], prefix="{rank} ", match=Match(include="7", file="sevens")),
        on_event=lambda e: told.append([e.sink, e.problem, e.lost]) if isinstance(e, SinkTrouble) else None,
    )
    print(json.dumps({"ok": result.ok, "told": told, "paths": [str(r.stdout.path) for r in result],
                      "lost": [r.stdout.lost for r in result]}), file=sys.stderr)
asyncio.run(main())
"""


def test_a_file_size_limit_stops_one_file_only(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, check=True)
    said = json.loads(done.stderr)
    whole = b"".join(b"%d\n" % i for i in range(1, 100_001))
    assert said["ok"]
    big, small = map(Path, said["paths"])
    assert big.read_bytes() == whole[:50_000]
    assert said["lost"] == [len(whole) - 50_000, 0]
    assert small.read_bytes() == whole[:21]
    problems = {Path(sink).name: problem for sink, problem, _ in said["told"]}
    assert problems == {"stdout.log": "File too large", "sevens": "File too large"}
    shown = done.stdout.splitlines()
    assert [one[2:] for one in shown if one.startswith(b"0 ")] == whole.split()
    assert [one[2:] for one in shown if one.startswith(b"1 ")] == whole.split()[:10]


class Stalled:
    """Rank 0's stdout.log is a FIFO that nobody reads: its writer hangs in write(2)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fd = -1
        real = FileSink.open

        def open_(sink: FileSink) -> None:
            if sink.path is not None and sink.path.parts[-2:] == ("0", "stdout.log"):
                os.mkfifo(sink.path)
                self.fd = os.open(sink.path, os.O_RDONLY | os.O_NONBLOCK)
                sink._fd = os.open(sink.path, os.O_WRONLY)
            else:
                real(sink)

        monkeypatch.setattr(FileSink, "open", open_)


async def test_a_stalled_file_holds_its_worker_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: asyncio.Event, gate: Gate
) -> None:
    stalled = Stalled(monkeypatch)
    size = 12_000_000
    entries = [sh(f"head -c {size} /dev/zero"), sh(f"read x < {gate.path}; seq 10")]
    seen: list[bytes] = []

    def callback(line: Line) -> None:
        if line.rank == 1:
            seen.append(line.data)

    logs = Logs(dir=tmp_path / "runs", prefix="", ranks=[1], callback=callback)
    with tee_to() as (out, _):
        async with Group(entries, logs=logs) as group:
            feed = group.lines(ranks=[1])
            await held.wait()  # more than 4 MiB stand before the file
            gate.open()
            await event_of(group, Drained, rank=1)  # while rank 0 still hangs
            assert 0 in group.pids
            assert await out.until(b"10\n") == b"".join(b"%d\n" % i for i in range(1, 11))
            assert [(await anext(feed)).data for _ in range(10)] == seen == [b"%d" % i for i in range(1, 11)]
            got = await asyncio.to_thread(read_exactly, stalled.fd, size)
            result = await group.wait()
    os.close(stalled.fd)
    assert got == size
    assert result.ok
    assert result[0].stdout.total == size
    assert result[0].stdout.lost == 0
    assert saved(result, 1) == b"".join(b"%d\n" % i for i in range(1, 11))


def read_exactly(fd: int, size: int) -> int:
    os.set_blocking(fd, True)
    got = 0
    while got < size and (data := os.read(fd, 1 << 20)):
        assert not data.strip(b"\0")
        got += len(data)
    return got


async def test_a_file_holds_and_releases_its_pump() -> None:
    """Memory before a stalled file is bounded, and every byte arrives in the end."""
    loop = asyncio.get_running_loop()
    target_read, target_write = os.pipe()
    source_read, source_write = os.pipe()
    for fd in (source_read, source_write):
        os.set_blocking(fd, False)
    ended = asyncio.Event()
    async with sink_on(None, fd=target_write) as (sink, troubles):

        class Tap:
            def feed(self, data: bytes, pump: Pump) -> None:
                sink.write(data, pump)

            def eof(self) -> None: ...

        pump = Pump(Poller(loop), source_read, [Tap()], ended.set, lambda tap, exc: pytest.fail(str(exc)))
        pump.start()
        written = 0
        while True:  # until the pump is held and its pipe is full
            try:
                written += os.write(source_write, b"y" * 65_536)
            except BlockingIOError:
                if pump._held:
                    break
                await asyncio.sleep(0)
        assert sink._writer.behind <= 4_194_304 + 1_048_576
        assert written <= 8 * 2**20
        os.close(source_write)
        assert not pump.over
        reading = asyncio.create_task(asyncio.to_thread(read_y, target_read, written))
        await ended.wait()  # the pump went on by itself
        assert await reading
    assert not troubles
    os.close(target_read)
    os.close(target_write)


async def test_all_files_of_a_thread_together_are_bounded(tmp_path: Path) -> None:
    """Not so much for each: sixty-four would keep a quarter of a gigabyte in memory."""

    class Held:
        def __init__(self) -> None:
            self.by: set[object] = set()

        def hold(self, who: object) -> None:
            self.by.add(who)

        def release(self, who: object) -> None:
            self.by.discard(who)
            if all(not one.by for one in pumps):
                released.set()

    released = asyncio.Event()
    target_read, target_write = os.pipe()
    pumps = [Held() for _ in range(8)]
    async with sink_on(None, fd=target_write) as (stalled, troubles):
        others = [FileSink(stalled._writer, tmp_path / str(number), None, troubles) for number in range(7)]
        for one in others:
            await stalled._writer.submit(one.open)
        for sink, pump in zip([stalled, *others], pumps, strict=True):
            sink.write(b"y" * 2**20, pump)  # type: ignore[arg-type]
        assert [bool(one.by) for one in pumps] == [False] * 4 + [True] * 4
        assert await asyncio.to_thread(read_y, target_read, 2**20)
        await released.wait()
        for one in others:
            one.close()
    assert not troubles
    assert all((tmp_path / str(number)).stat().st_size == 2**20 for number in range(7))
    os.close(target_read)
    os.close(target_write)


def read_y(fd: int, size: int) -> bool:
    while size > 0:
        data = os.read(fd, 1 << 20)
        if data.strip(b"y"):
            return False
        size -= len(data)
    return size == 0
