"""The standard input of workers: `worker.stdin`, and `Command(input=...)`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pickle
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anyio.streams.text import TextSendStream
from helpers import QUIET, event_of, py, sh
from helpers_streams import Gate, gate

from aioelastic import Command, Function, Group, GroupResult, Restart, SpecError, plan, supervise
from aioelastic.events import Spawned
from aioelastic.model.group_spec import GroupSpec
from aioelastic.streams import StandardInput
from aioelastic.testing import FakeLauncher, Life

__all__ = ["gate"]  # a fixture

CAT = Command("cat", stdin="pipe")
LARGE = os.urandom(3_000_000)
COUNTS = "import sys; data = sys.stdin.buffer.read(); print(len(data), sum(data))"


def said(result: GroupResult) -> list[bytes]:
    return [one.stdout.tail for one in result]


# --- worker.stdin ---


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
async def test_what_is_sent_is_read(launcher: Any) -> None:
    async with Group(CAT, n=2, logs=QUIET, launcher=launcher) as group:
        for worker in group:
            await worker.stdin.send(b"to %d\n" % worker.rank)
            assert (await group.line("to", ranks=[worker.rank])).string == f"to {worker.rank}"
            await worker.stdin.aclose()
        result = await group.wait()
    assert said(result) == [b"to 0\n", b"to 1\n"]


async def test_it_waits_while_the_worker_does_not_read(gate: Gate) -> None:
    """More than a pipe holds: sent whole, and not before it is read."""
    program = f"open({str(gate.path)!r}).readline(); {COUNTS}"
    async with Group(py(program, stdin="pipe"), logs=QUIET) as group:
        sending = asyncio.create_task(group[0].stdin.send(LARGE))
        await asyncio.sleep(0)
        assert not sending.done()
        gate.open()
        await sending
        await group[0].stdin.aclose()
        result = await group.wait()
    assert said(result) == [b"%d %d\n" % (len(LARGE), sum(LARGE))]


async def test_what_two_tasks_send_is_not_mixed() -> None:
    parts = [bytes([65 + number]) * 200_000 for number in range(4)]
    program = "import sys, itertools; print([(k, len([*v])) for k, v in itertools.groupby(sys.stdin.read())])"
    async with Group(py(program, stdin="pipe"), logs=QUIET) as group:
        async with asyncio.TaskGroup() as tasks:
            for part in parts:
                tasks.create_task(group[0].stdin.send(part))
        await group[0].stdin.aclose()
        result = await group.wait()
    assert sorted(eval(said(result)[0])) == [(chr(one[0]), len(one)) for one in parts]


async def test_who_comes_later_waits_though_there_is_room() -> None:
    """A short piece, while a long one is under way."""
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    stdin = StandardInput(asyncio.get_running_loop(), write, "worker 0")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stdin.send(b"A" * 150_000))
        await asyncio.sleep(0)  # it waits for room now
        got = os.read(read, 65_536)
        tasks.create_task(stdin.send(b"B"))
        while len(got) < 150_001:
            await asyncio.sleep(0)
            with contextlib.suppress(BlockingIOError):
                got += os.read(read, 65_536)
    assert got == b"A" * 150_000 + b"B"
    await stdin.aclose()
    os.close(read)


@pytest.mark.parametrize("item", ["text", 7])
async def test_what_is_no_bytes(item: Any) -> None:
    async with Group(CAT, logs=QUIET) as group:
        with pytest.raises(TypeError, match=rf"input of worker 0 takes bytes, not {type(item).__name__}.*encode"):
            await group[0].stdin.send(item)
        await group[0].stdin.aclose()
        assert said(await group.wait()) == [b""]


async def test_a_worker_that_does_not_read_any_more() -> None:
    async with Group(sh("exec <&-; echo closed; exec sleep 1000", stdin="pipe"), logs=QUIET) as group:
        await group.line("closed")
        with pytest.raises(BrokenPipeError, match="worker 0 reads its standard input no more"):  # noqa: PT012
            while True:  # the guardian, who has started it, may have it for a moment longer
                await group[0].stdin.send(b"x")


async def test_who_sends_hears_of_the_end() -> None:
    """A child of the worker holds the pipe, and does not read."""
    async with Group(sh("exec 3<&0; sleep 1000 & read x; exit 0", stdin="pipe"), logs=QUIET) as group:
        worker = group[0]
        sending = asyncio.create_task(worker.stdin.send(b"\n" + bytes(1_000_000)))
        with pytest.raises(BrokenPipeError, match="the standard input of worker 0 is closed: it has ended"):
            await sending
        with pytest.raises(BrokenPipeError, match="it has ended"):
            await worker.stdin.send(b"x")


async def test_closing_while_somebody_sends() -> None:
    async with Group(sh("exec sleep 1000", stdin="pipe"), logs=QUIET) as group:
        sending = asyncio.create_task(group[0].stdin.send(bytes(1_000_000)))
        await asyncio.sleep(0)
        await group[0].stdin.aclose()
        with pytest.raises(BrokenPipeError, match="was closed"):
            await sending


async def test_a_cancelled_send_leaves_it_usable(gate: Gate) -> None:
    program = f"import sys; open({str(gate.path)!r}).readline(); print(sys.stdin.read()[-7:])"
    async with Group(py(program, stdin="pipe"), logs=QUIET) as group:
        sending = asyncio.create_task(group[0].stdin.send(bytes(1_000_000)))
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        gate.open()
        await group[0].stdin.send(b"the end")
        await group[0].stdin.aclose()
        result = await group.wait()
    assert said(result) == [b"the end\n"]


async def test_anyio_takes_it() -> None:
    async with Group(CAT, logs=QUIET) as group:
        async with TextSendStream(group[0].stdin, encoding="utf-8") as stream:
            await stream.send("grüße\n")
        result = await group.wait()
    assert said(result) == ["grüße\n".encode()]


async def test_each_attempt_has_its_own(tmp_path: Path) -> None:
    worker = sh(f"read x; echo got $x; mkdir {tmp_path}/was || exit 0; exit 1", stdin="pipe")
    async with Group(worker, logs=QUIET, restart=Restart.on_failure(max=1)) as group:
        first = group[0].stdin
        await first.send(b"one\n")
        await group.line("got one")
        await event_of(group, Spawned, attempt=1)
        with pytest.raises(BrokenPipeError):
            await first.send(b"x")
        await group[0].stdin.send(b"two\n")
        await group.line("got two")
        await group.wait()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Command("true"), "is no pipe"),
        (Command("true", input=b""), "is given by `input=`"),
        (Function(print), "is no pipe"),
    ],
)
async def test_a_worker_without(entry: Any, words: str) -> None:
    async with Group(entry, logs=QUIET) as group:
        with pytest.raises(RuntimeError, match=f"the standard input of worker 0 {words}"):
            group[0].stdin  # noqa: B018
        await group.wait()


async def test_a_launcher_that_makes_no_pipe() -> None:
    async with Group(CAT, logs=QUIET, launcher=FakeLauncher(Life(lasts=None))) as group:
        with pytest.raises(RuntimeError, match="is not there: whoever started it has made none"):
            group[0].stdin  # noqa: B018


async def test_no_other_worker_holds_the_pipe() -> None:
    """Neither those that start later nor copies of this program: its end comes."""
    cats = Group([CAT, Function(os.getpid), CAT], start="fork", logs=QUIET)
    async with cats, Group(sh("exec sleep 1000"), n=2, logs=QUIET):
        for rank in (0, 2):
            await cats[rank].stdin.aclose()
        assert (await cats.wait()).ok


# --- input= ---


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
@pytest.mark.parametrize("given", [b"some\n", "some\n", b"", bytearray(b"some\n"), memoryview(b"some\n")])
async def test_bytes_and_text(given: Any, launcher: Any) -> None:
    result = await supervise(Command("cat", input=given), n=2, logs=QUIET, launcher=launcher)
    assert said(result) == [b"some\n" if given else b""] * 2


async def test_more_than_a_pipe_holds() -> None:
    result = await supervise(py(COUNTS, input=LARGE), n=2, logs=QUIET)
    assert said(result) == [b"%d %d\n" % (len(LARGE), sum(LARGE))] * 2


async def test_text_is_encoded_part_by_part() -> None:
    """All of it, for each of many workers, would be copies of it in memory."""
    text = "aü€😀" * 400_000
    worker = sh("cat >/dev/null", input=text)
    tracemalloc.start()
    try:
        assert (await supervise(worker, n=4, logs=QUIET)).ok
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    result = await supervise(py(COUNTS, input=text), logs=QUIET)
    assert said(result) == [b"%d %d\n" % (len(text.encode()), sum(text.encode()))]


async def test_a_worker_that_has_read_enough() -> None:
    result = await supervise(Command("head", "-c", "3", input=LARGE), logs=QUIET)
    assert said(result) == [LARGE[:3]]


async def test_files(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a\nb\n")
    result = await supervise(Command("cat", input=tmp_path / "data"), n=2, logs=QUIET)
    assert said(result) == [b"a\nb\n"] * 2
    with open(tmp_path / "data") as file:
        assert said(await supervise(Command("head", "-n1", input=file), logs=QUIET)) == [b"a\n"]


async def test_an_iterable() -> None:
    closed = []

    async def parts() -> AsyncIterator[bytes | str]:
        try:
            yield b"a"
            await asyncio.sleep(0)
            yield "ü"
        finally:
            closed.append(True)

    assert said(await supervise(Command("cat", input=parts()), logs=QUIET)) == ["aü".encode()]
    assert closed == [True]


async def test_an_iterable_that_never_ends_is_closed_with_its_worker() -> None:
    closed = []

    async def parts() -> AsyncIterator[bytes]:
        try:
            yield b"a\n"
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    assert (await supervise(sh("read x", input=parts()), logs=QUIET)).ok
    assert closed == [True]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (ValueError("no more"), "no more"),
        (5, "takes bytes, not int"),
        (BrokenPipeError("of its own"), "of its own"),
        (asyncio.CancelledError(), "the input of worker 0 was cancelled"),
    ],
)
async def test_an_iterable_that_fails_ends_the_group(part: Any, words: str) -> None:
    """The worker would take the end of what came for the end of all."""

    async def parts() -> AsyncIterator[Any]:
        yield b"a"
        if isinstance(part, BaseException):
            raise part
        yield part

    with pytest.raises((ValueError, TypeError, OSError, RuntimeError), match=words):
        await supervise([Command("cat", input=parts()), sh("exec sleep 1000")], logs=QUIET)


async def test_each_attempt_reads_it_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("all")
    for given in ("all", tmp_path / "data"):
        worker = sh(f"cat; mkdir {tmp_path}/was || {{ rmdir {tmp_path}/was; exit 0; }}; exit 1", input=given)
        result = await supervise(worker, logs=QUIET, restart=Restart.on_failure(max=1))
        assert said(result) == [b"all"]


def test_what_a_plan_shows() -> None:
    """How much, not what: it may be a secret."""
    worker = Command("cat", input="grüße")
    assert "stdin: 7 bytes\n" in str(plan(GroupSpec.of(worker)))
    assert "grüße" not in repr(worker) + repr(plan(GroupSpec.of(worker)))
    assert "stdin: from /etc/hosts\n" in str(plan(GroupSpec.of(Command("cat", input=Path("/etc/hosts")))))
    assert "stdin: pipe\n" in str(plan(GroupSpec.of(CAT)))
    assert pickle.loads(pickle.dumps(worker)) == worker


async def never() -> AsyncIterator[bytes]:
    yield b""


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"stdin": "inherit", "input": b"x"}, "stdin"),
        ({"stdin": "tty"}, "stdin"),
        ({"input": 5}, "input"),
        ({"input": ["a", "b"]}, "input"),
        ({"input": "secret\ud800"}, "input"),
        ({"input": "a secret\udc80"}, "input"),
        ({"input": io.BytesIO(b"secret")}, "input"),
        ({"input": io.StringIO("secret")}, "input"),
    ],
)
def test_what_is_wrong_is_said_at_once(given: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Command("cat", **given)
    assert caught.value.field == field
    assert "secret" not in str(caught.value)


def test_a_file_that_is_closed(tmp_path: Path) -> None:
    with open(tmp_path / "data", "w") as file:
        pass
    with pytest.raises(SpecError, match=r"input=.* has no descriptor: I/O operation on closed file"):
        Command("cat", input=file)


@pytest.mark.parametrize("more", [{"n": 2}, {"restart": Restart.on_failure(max=1)}])
async def test_an_iterable_is_read_once(more: Any) -> None:
    given = never()
    with pytest.raises(SpecError, match="can be read only once"):
        await supervise(Command("cat", input=given), logs=QUIET, **more)
    await given.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "No such file"), ("", "is a directory"), ("fifo", "is a pipe"), ("x" * 300, "name too long")],
)
async def test_a_file_that_cannot_be_read(name: str, words: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    worker = Command("cat", input=tmp_path / name)
    with pytest.raises(SpecError, match=f"input.*{words}"):
        await supervise([sh(f"touch {tmp_path}/was"), worker], logs=QUIET)
    assert not (tmp_path / "was").exists()
