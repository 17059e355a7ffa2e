"""What stdout may be: sockets of all kinds, files, objects, nothing at all; and who else writes there."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import contextvars
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import event_of, sh
from helpers_streams import Gate, Reader, Target, console_on, gate, held, tee_to, tiny_disk

from aioelastic import Group, Logs, supervise
from aioelastic.events import Drained, Event, Exited, SinkTrouble
from aioelastic.streams import Console, ConsoleTap, Pump
from aioelastic.system.deadlines import Deadline

__all__ = ["gate", "held"]  # fixtures

SIZE = 60_000
SEQ = f"seq -f %07.0f 0 {SIZE - 1}"
PREFIX = b"[worker0]: "
WHOLE = b"".join(b"[worker0]: %07d\n" % i for i in range(SIZE)) * 3
LINE = re.compile(rb"\[worker0\]: \d{7}\n")


def sockets(kind: int, size: int | None = None) -> tuple[int, Any]:
    """A reading descriptor, and a file that stands in for stdout."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    if size is not None:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return ours.detach(), open(theirs.detach(), "w")


def lost_by_the_end(told: list[Event]) -> int:
    return max((one.lost for one in told if isinstance(one, SinkTrouble) and one.sink == "stdout"), default=0)


# --- sockets ---


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_socket_gets_all_and_keeps_its_blocking_mode(blocking: bool, held: asyncio.Event) -> None:
    read, file = sockets(socket.SOCK_STREAM)
    os.set_blocking(file.fileno(), blocking)
    threads = set(threading.enumerate())
    with file, tee_to(file, "pipe"):
        async with Group(sh(f"{SEQ}; {SEQ}; {SEQ}")) as group:
            await held.wait()
            assert os.get_blocking(file.fileno()) is blocking
            mine = {one.name for one in set(threading.enumerate()) - threads}
            assert "aioelastic-stdout" not in mine  # no thread has to wait for it
            reader = Reader(read)
            await group.wait()
        assert os.get_blocking(file.fileno()) is blocking
    assert await reader.all() == WHOLE


async def test_a_default_timeout_of_sockets_changes_nothing(gate: Gate) -> None:
    read, file = sockets(socket.SOCK_STREAM)
    reader = Reader(read)
    socket.setdefaulttimeout(30)
    try:
        with file, tee_to(file, "pipe"):
            async with Group(sh(f"echo x; read x < {gate.path}")) as group:
                await reader.until(b"x\n")
                assert os.get_blocking(file.fileno())
                gate.open()
                await group.wait()
    finally:
        socket.setdefaulttimeout(None)
    assert await reader.all() == b"[worker0]: x\n"


class Records:
    """Collects messages."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.all: list[bytes] = []
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._last: bytes | None = None
        self._done = asyncio.Event()
        self._loop.add_reader(fd, self._read)

    async def until(self, last: bytes) -> bytes:
        self._last = last
        if not (self.all and self.all[-1].endswith(last)):
            await self._done.wait()
        return b"".join(self.all)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        while True:
            try:
                one = os.read(self._fd, 1 << 20)
            except BlockingIOError:
                return
            if not one:
                self._loop.remove_reader(self._fd)
                return
            self.all.append(one)
            if self._last is not None and one.endswith(self._last):
                self._done.set()


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("size", [None, 1])  # the kernel makes 4,608 of 1: less than what we send at once
async def test_messages_hold_whole_lines(kind: int, size: int | None, held: asyncio.Event) -> None:
    read, file = sockets(kind, size)
    with file, tee_to(file, "pipe"):
        async with Group(sh(f"{SEQ}; {SEQ}; {SEQ}; echo last")) as group:
            await held.wait()
            reader = Records(read)
            await group.wait()
        assert await reader.until(b"last\n") == WHOLE + PREFIX + b"last\n"
    reader.close()
    assert max(map(len, reader.all)) <= 8192
    assert all(one.endswith(b"\n") for one in reader.all)
    assert len(reader.all) > 400


async def test_a_line_longer_than_a_message_comes_in_several() -> None:
    read, file = sockets(socket.SOCK_SEQPACKET)
    reader = Records(read)
    with file, tee_to(file, "pipe"):
        await supervise(sh("head -c 100000 /dev/zero | tr '\\0' x; echo; echo last"))
        assert await reader.until(b"last\n") == PREFIX + b"x" * 100_000 + b"\n" + PREFIX + b"last\n"
    reader.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
async def test_a_socket_whose_reader_goes_away(kind: int, gate: Gate) -> None:
    read, file = sockets(kind)
    reader = Records(read)
    with file, tee_to(file, "pipe"):
        async with Group(sh(f"echo one; read x < {gate.path}; {SEQ}")) as group:
            await reader.until(b"one\n")
            reader.close()
            gate.open()
            trouble = await event_of(group, SinkTrouble)
            result = await group.wait()
    assert result.ok
    assert trouble.problem == "Broken pipe"
    assert trouble.lost > 0


# --- whatever it is, and whatever the policy: each line comes whole, or is counted ---


@pytest.mark.parametrize("when_full", ["block", "drop"])
@pytest.mark.parametrize("kind", ["pipe", "pty", "stream", "seqpacket", "dgram", "text"])
async def test_a_slow_reader_of_any_kind(kind: str, when_full: Any, monkeypatch: Any, held: asyncio.Event) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    read, file, wait = -1, None, threading.Event()
    got: list[str] = []
    if kind in ("pipe", "pty"):
        target = Target(kind)
        read, file = os.dup(target.read_fd), target.file
    elif kind == "text":

        class Slow(io.StringIO):
            def write(self, text: str) -> int:
                wait.wait()
                got.append(text)
                return len(text)

        file = Slow()
    else:
        read, file = sockets(getattr(socket, f"SOCK_{kind.upper()}"))
    told: list[Event] = []
    with tee_to(file, "pipe"):
        async with Group(
            sh(f"{SEQ}; {SEQ}; {SEQ}; echo 9999999"), logs=Logs(when_full=when_full), on_event=told.append
        ) as group:
            if when_full == "block":
                await held.wait()
            else:
                await event_of(group, Drained)  # nobody reads, and yet it could write all
            wait.set()
            if kind != "text":
                reader = Records(read)
            await group.wait()
        if kind == "text":
            data = "".join(got).encode()
        else:
            data = await reader.until(b"9999999\n")
            reader.close()
    if kind in ("pipe", "pty"):
        target.close()
    else:
        file.close()
    whole = WHOLE + PREFIX + b"9999999\n"
    assert len(data) + lost_by_the_end(told) == len(whole)
    assert LINE.sub(b"", data) == b""
    if when_full == "block":
        assert data == whole
    else:
        assert lost_by_the_end(told) > 0
        assert data.endswith(PREFIX + b"9999999\n")  # the newest, however large the piece before it was


# --- files ---


async def test_a_disk_with_room_again_is_written_again(tmp_path: Path, gate: Gate) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"")
        with open(disk / "out", "a") as file, tee_to(file, "pipe"):
            with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(b"x" * 4096)
            async with Group(sh(f"echo one; read x < {gate.path}; echo two; echo three")) as group:
                trouble = await event_of(group, SinkTrouble)
                (disk / "filler").unlink()
                gate.open()
                await group.wait()
                told = [one async for one in group.events() if isinstance(one, SinkTrouble)]
        assert (disk / "out").read_text() == "[worker0]: two\n[worker0]: three\n"
    assert (trouble.problem, trouble.lost) == ("No space left on device", len("[worker0]: one\n"))
    assert told == [trouble]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-16"])
async def test_a_real_file_gets_the_workers_bytes_whatever_its_encoding(encoding: str, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding=encoding) as file, tee_to(file, "pipe"):
        await supervise(sh(r"printf 'na\303\257ve\n\377\n'"))
    assert (tmp_path / "out").read_bytes() == b"[worker0]: na\xc3\xafve\n[worker0]: \xff\n"


async def test_a_compressed_file_is_one(tmp_path: Path) -> None:
    """It has a descriptor, which is not where its text goes."""
    with gzip.open(tmp_path / "out.gz", "wt") as file, tee_to(file, "pipe"):
        print("before", file=file)
        await supervise(sh("echo x"))
    assert gzip.decompress((tmp_path / "out.gz").read_bytes()) == b"before\n[worker0]: x\n"


async def test_what_was_printed_to_a_full_pipe_holds_no_loop(gate: Gate) -> None:
    """A text that is not flushed yet, and there is no room for it: the loop goes on, and the order is kept."""
    target = Target()
    os.set_blocking(target.file.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(target.file.fileno(), b"." * 4096)
    os.set_blocking(target.file.fileno(), True)
    target.file.write("mine, not flushed\n")
    with tee_to(target.file, "pipe"):
        async with Group(sh(f"echo x; read x < {gate.path}")) as group:
            reader = target.reader  # only now, and we have come here
            await reader.until(b"x\n")
            gate.open()
            await group.wait()
    data = await target.all()
    assert data.lstrip(b".") == b"mine, not flushed\n[worker0]: x\n"


# --- objects in place of a stream ---


@pytest.mark.parametrize(
    ("encoding", "want"),
    [
        ("latin-1", b"[worker0]: na\xefve\n[worker0]: \\u4e2d\n[worker0]: after\n"),
        ("ascii", b"[worker0]: na\\xefve\n[worker0]: \\u4e2d\n[worker0]: after\n"),
        ("utf-16-le", "[worker0]: naïve\n[worker0]: 中\n[worker0]: after\n".encode("utf-16-le")),
    ],
)
@pytest.mark.parametrize("kind", ["codec", "wrapper"])
async def test_a_stand_in_gets_what_its_encoding_can_say(encoding: str, want: bytes, kind: str) -> None:
    raw = io.BytesIO()
    stream: Any
    stream = codecs.getwriter(encoding)(raw) if kind == "codec" else io.TextIOWrapper(raw, encoding=encoding)
    with tee_to(stream, "pipe"):
        told: list[Event] = []
        await supervise(sh("echo naïve; echo 中; echo after"), on_event=told.append)
    assert raw.getvalue() == want
    assert not [one for one in told if isinstance(one, SinkTrouble)]
    if kind == "wrapper":
        stream.detach()


async def test_a_stand_in_that_blocks_holds_no_loop() -> None:
    free, entered = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            loop.call_soon_threadsafe(entered.set)
            free.wait()
            return super().write(text)

    slow = Slow()
    with tee_to(slow, "pipe"):
        async with Group(sh("echo x")) as group:
            await entered.wait()  # on the loop this would be the end
            await event_of(group, Exited)
            free.set()
            await group.wait()
        assert slow.getvalue() == "[worker0]: x\n"  # it is there when the group is over


async def test_a_codec_over_a_non_blocking_pipe_loses_nothing(held: asyncio.Event) -> None:
    target = Target()
    os.set_blocking(target.file.fileno(), False)
    stream: Any = codecs.getwriter("utf-8")(target.file.buffer)
    with tee_to(stream, "pipe"):
        async with Group(sh(f"{SEQ}; {SEQ}; {SEQ}")) as group:
            await held.wait()
            reader = target.reader
            await group.wait()
    await target.all()
    assert reader.data == WHOLE


async def test_a_stand_in_that_fails_at_times_gets_the_rest(gate: Gate) -> None:
    class Moody(io.StringIO):
        def write(self, text: str) -> int:
            if "bad" in text:
                raise RuntimeError("no")
            return super().write(text)

    moody = Moody()
    with tee_to(moody, "pipe"):
        async with Group(sh(f"echo bad; read x < {gate.path}; echo good")) as group:
            trouble = await event_of(group, SinkTrouble)
            gate.open()
            await group.wait()
    assert moody.getvalue() == "[worker0]: good\n"
    assert (trouble.problem, trouble.lost) == ("RuntimeError: no", len("[worker0]: bad\n"))


async def test_a_stand_in_sees_the_context_of_its_group() -> None:
    """Notebooks ask it whose cell this is."""
    cell: contextvars.ContextVar[str] = contextvars.ContextVar("cell", default="none")
    seen: set[str] = set()

    class Notebook(io.StringIO):
        def write(self, text: str) -> int:
            seen.add(cell.get())
            return super().write(text)

    cell.set("In[3]")
    with tee_to(Notebook(), "pipe"):
        await supervise(sh("echo x"))
    assert seen == {"In[3]"}


async def test_a_file_that_does_something_else_is_asked_to_do_it(tmp_path: Path) -> None:
    class Upper(io.TextIOWrapper):
        def write(self, text: str) -> int:
            return super().write(text.upper())

    with open(tmp_path / "out", "wb") as raw:
        stream = Upper(raw)
        with tee_to(stream, "pipe"):
            await supervise(sh("echo x"))
        stream.detach()
    assert (tmp_path / "out").read_text() == "[WORKER0]: X\n"


@pytest.mark.parametrize("what", [object(), 7, "text"])
async def test_what_is_no_stream_is_trouble_and_nothing_more(what: Any, tmp_path: Path) -> None:
    with tee_to("pipe", "pipe"):
        sys.stdout = what
        told: list[Event] = []
        result = await supervise(sh("echo x"), logs=Logs(dir=tmp_path), on_event=told.append)
    assert result.ok
    assert lost_by_the_end(told) == len("[worker0]: x\n")
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == b"x\n"


# --- closed descriptors ---

DAEMON = """
import asyncio, os, sys
import uvloop
from aioelastic import Command, Function, Logs, events, supervise
def job():
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    return 7
closed, when, kind, loop, home = sys.argv[1:]
def shut():
    for fd in map(int, closed):
        os.close(fd)
told = []
def watch(e):
    if isinstance(e, events.SinkTrouble):
        told.append((e.sink, e.problem.partition(" (")[0]))
async def main():
    if when == "loop":
        shut()
    entry = Function(job) if kind == "function" else Command("sh", "-c", "echo to stdout; echo to stderr >&2")
    for turn in range(2):
        r = await supervise(entry, n=2, logs=Logs(dir=home + "/logs"), check=False, on_event=watch)
        try:
            print("of the program's own", flush=True)
        except OSError:
            pass
        told.append([str(one.exit) for one in r])
    return [fd for fd in map(int, closed) if os.path.exists(f"/proc/self/fd/{fd}")]
if __name__ == "__main__":
    if when == "start":
        shut()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        left = runner.run(main())
    with open(home + "/told", "w") as file:
        print([told, left if when == "loop" else []], file=file)
    os._exit(0)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("when", "loop"), [("start", "asyncio"), ("loop", "asyncio"), ("loop", "uvloop")]
)  # libuv aborts when it is to close a descriptor below 3
@pytest.mark.parametrize("kind", ["command", "function"])
@pytest.mark.parametrize("closed", ["1", "2", "12", "012"])
def test_a_daemon_that_has_closed_its_outputs(closed: str, when: str, kind: str, loop: str, tmp_path: Path) -> None:
    """Before its loop was made, which then has these numbers, or later: nothing of the tee goes there."""
    (tmp_path / "daemon.py").write_text(DAEMON)
    null = subprocess.DEVNULL
    ran = subprocess.run(
        [sys.executable, tmp_path / "daemon.py", closed, when, kind, loop, str(tmp_path)],
        stdin=null, stdout=null, stderr=null, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0
    told, left = json.loads((tmp_path / "told").read_text().replace("'", '"').replace("(", "[").replace(")", "]"))
    sinks = [name for fd, name in (("1", "stdout"), ("2", "stderr")) if fd in closed]
    assert told.count(["exit code 0"] * 2) == 2
    assert told[-1] == ["exit code 0"] * 2
    middle = told.index(["exit code 0"] * 2)
    for turn in (told[:middle], told[middle + 1 : -1]):
        # once, and once more at the end if more was lost since then
        assert {(name, "is closed") for name in sinks} == set(map(tuple, turn))
        assert max(map(turn.count, turn)) <= 2
    assert left == []  # and nothing of ours stays there
    for name in ("stdout", "stderr"):
        logs = list((tmp_path / "logs").glob(f"*/attempt_0/*/{name}.log"))
        assert [one.read_text() for one in logs] == [f"to {name}\n"] * 4


def test_a_descriptor_that_got_the_number_of_stdout_by_chance_is_not_written_to(tmp_path: Path) -> None:
    code = (
        "import asyncio, os; from aioelastic import Command, supervise\n"
        f"os.close(1); file = open({str(tmp_path / 'data')!r}, 'w'); assert file.fileno() == 1\n"
        "asyncio.run(supervise(Command('echo', 'x')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "data").read_text() == ""


def test_a_stdout_that_was_put_there_is_written_to(tmp_path: Path) -> None:
    code = (
        "import asyncio, os; from aioelastic import Command, supervise\n"
        f"os.dup2(os.open({str(tmp_path / 'data')!r}, os.O_WRONLY | os.O_CREAT), 1)\n"
        "asyncio.run(supervise(Command('echo', 'x')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "data").read_text() == "[worker0]: x\n"


# --- who else writes there ---


async def test_a_json_line_is_a_line_beside_a_prompt(gate: Gate) -> None:
    with tee_to() as (out, _):
        async with Group(sh(f"printf 'name? '; read x < {gate.path}; echo $x"), name="plain") as plain:
            await out.until(b"name? ")
            await supervise(sh("echo hello"), name="json", logs=Logs(json=True))
            gate.open()
            await plain.wait()
        lines = (await out.all()).split(b"\n")
    assert [lines[0], *lines[2:]] == [b"[plain0]: name? ", b"[plain0]: go", b""]
    assert json.loads(lines[1])["line"] == "hello"


async def test_groups_of_different_policies_know_of_each_others_prompt(gate: Gate) -> None:
    with tee_to() as (out, _):
        async with Group(sh(f"printf 'a? '; read x < {gate.path}; echo a"), name="a") as first:
            await out.until(b"a? ")
            await supervise(sh("echo b"), name="b", logs=Logs(when_full="drop"))
            gate.open()
            await first.wait()
        assert await out.all() == b"[a0]: a? \n[b0]: b\n[a0]: a\n"


async def test_two_loops_in_two_threads_know_of_each_others_prompt(gate: Gate) -> None:
    with tee_to() as (out, _):
        async with Group(sh(f"printf 'a? '; read x < {gate.path}; echo a"), name="a") as first:
            await out.until(b"a? ")
            await asyncio.to_thread(lambda: asyncio.run(supervise(sh("echo b; printf c"), name="b")))
            gate.open()
            await first.wait()
        assert await out.all() == b"[a0]: a? \n[b0]: b\n[b0]: c\n[a0]: a\n"


@pytest.mark.parametrize("kind", ["pipe", "text"])
async def test_two_loops_in_two_threads_share_a_slow_reader(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither writes between the halves of what the other could write in part."""
    free, full = threading.Event(), threading.Semaphore(0)
    real = Pump.hold

    def hold(pump: Pump, who: object) -> None:
        real(pump, who)
        full.release()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            free.wait()
            return super().write(text)

    monkeypatch.setattr(Pump, "hold", hold)
    slow = Slow()
    work = f"{SEQ}; {SEQ}; {SEQ}"
    with tee_to("pipe" if kind == "pipe" else slow, "pipe") as (out, _):
        groups = [
            asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(supervise(sh(work), name="b")))),
            asyncio.create_task(supervise(sh(work), name="a")),
        ]
        for _ in groups:  # both wait for the reader
            await asyncio.to_thread(full.acquire)
        free.set()
        if kind == "pipe":
            reader = out.reader
        await asyncio.gather(*groups)
        data = await out.all() if kind == "pipe" else slow.getvalue().encode()
        assert kind == "text" or reader.over
    for name in (b"a", b"b"):
        prefix = b"[" + name + b"0]: "
        got = [one.removeprefix(prefix) for one in data.split(b"\n") if one.startswith(prefix)]
        assert got == [b"%07d" % i for i in range(SIZE)] * 3
    assert data.count(b"\n") == 6 * SIZE


async def test_a_loop_that_is_busy_holds_up_no_other(held: asyncio.Event) -> None:
    """What it has queued is written by the others that wait behind it."""
    target = Target()
    stuck, go = threading.Event(), threading.Event()
    troubles: list[Any] = []

    async def busy() -> None:
        console = Console(asyncio.get_running_loop(), target.file, "stdout", "block", lambda *one: troubles.append(one))
        console.write([b"x" * 99_999 + b"\n"], None)
        stuck.set()
        go.wait()  # whatever a program does on its loop
        await console.leave(Deadline(), 60)

    other = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(busy())))
    await asyncio.to_thread(stuck.wait)
    async with console_on(target.file) as (console, _):
        console.write([b"mine\n"], None)
        await target.until(b"mine\n")
    go.set()
    await other
    assert await target.all() == b"x" * 99_999 + b"\nmine\n"
    assert troubles == []


async def test_who_gives_up_takes_nothing_from_others(held: asyncio.Event) -> None:
    target = Target()
    async with console_on(target.file) as (patient, troubles):
        async with console_on(target.file, bound=0.0) as (hasty, others):
            hasty.write([b"h" * 99_999 + b"\n"], None)
            patient.write([b"p" * 99_999 + b"\n"], None)
        assert others == [("stdout", f"did not take its last {hasty.lost} bytes", hasty.lost)]
        reader = target.reader
    await target.all()
    begun = 100_000 - hasty.lost
    assert reader.data == b"h" * begun + b"\n" + b"p" * 99_999 + b"\n"
    assert troubles == []


async def test_the_end_of_one_says_nothing_of_the_line_of_another(tmp_path: Path, gate: Gate) -> None:
    """Its own unfinished line was followed by another's long ago."""
    gates = [gate, Gate(tmp_path / "second"), Gate(tmp_path / "third")]
    asks = [
        sh(f"printf 'a? '; read x < {gates[0].path}"),
        sh(f"read x < {gates[1].path}; printf 'b? '; read x < {gates[1].path}"),
    ]
    with tee_to() as (out, _):
        async with Group([*asks, sh(f"read x < {gates[2].path}; echo c")]) as group:
            await out.until(b"a? ")
            gates[1].open()
            await out.until(b"b? ")
            gates[0].open()
            await event_of(group, Drained, rank=0)
            gates[2].open()
            await event_of(group, Drained, rank=2)
            gates[1].open()
            await group.wait()
        assert await out.all() == b"[worker0]: a? \n[worker1]: b? \n[worker2]: c\n"
    for one in gates[1:]:
        one.close()


async def test_json_after_lost_json_is_json(tmp_path: Path, gate: Gate) -> None:
    with tiny_disk(tmp_path / "disk") as disk, open(disk / "out", "a") as file, tee_to(file, "pipe"):
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        async with Group(sh(f"echo one; read x < {gate.path}; echo two"), logs=Logs(json=True)) as group:
            await event_of(group, SinkTrouble)
            (disk / "filler").unlink()
            gate.open()
            await group.wait()
        assert [json.loads(one)["line"] for one in (disk / "out").read_text().splitlines()] == ["two"]


# --- lines of which a part is lost ---


async def test_a_line_whose_beginning_was_dropped_is_dropped_whole() -> None:
    """And the line of which the beginning is there is not continued by another."""
    target = Target()
    loop = asyncio.get_running_loop()
    async with console_on(target.file, "drop") as (console, troubles):
        tap = ConsoleTap(loop, console, lambda at: b"> ", True)
        nobody: Any = None
        for letter in b"abcdefghijklmnopqrst":
            for size in (70_000, 200_000, 30_000):  # shown in parts
                tap.feed(bytes([letter]) * size, nobody)
            tap.feed(b"\n", nobody)
        tap.eof()
        reader = target.reader
    await target.all()
    lines = bytes(reader.data).split(b"\n")
    assert lines.pop() == b""
    assert all(one == b"> " + one[2:3] * 300_000 for one in lines[1:])
    assert re.fullmatch(rb"> a+", lines[0])
    assert lines[-1][-1:] == b"t"
    assert troubles[-1][2] == console.lost
    assert len(reader.data) + console.lost - (len(lines[0]) < 300_002) == 20 * 300_003


async def test_a_group_in_a_forked_copy_writes_by_itself(tmp_path: Path) -> None:
    """A console that has a thread, and a copy of the program that does not have it."""
    code = (
        "import asyncio, os, sys; from aioelastic import Command, Group, supervise\n"
        "async def main():\n"
        "    async with Group(Command('sh', '-c', 'echo parent; read x; true')) as group:\n"
        "        async for line in group.lines(): break\n"
        "        pid = os.fork()\n"
        "        if not pid:\n"
        "            asyncio._set_running_loop(None)\n"
        "            asyncio.set_event_loop(None)\n"
        "            asyncio.run(child())\n"
        "            os._exit(0)\n"
        "        assert await asyncio.to_thread(os.waitpid, pid, 0) == (pid, 0)\n"
        "async def child():\n"
        "    from aioelastic.system.deadlines import Deadline\n"
        "    from aioelastic.streams import Console\n"
        "    console = Console(asyncio.get_running_loop(), sys.stdout, 'stdout', 'block', print)\n"
        "    console.write([b'child\\n'], None)\n"
        "    await console.leave(Deadline(), 30)\n"
        "asyncio.run(main())"
    )
    with open(tmp_path / "out", "w") as out:
        ran = subprocess.run([sys.executable, "-c", code], stdout=out, stdin=subprocess.PIPE, timeout=150)
    assert ran.returncode == 0
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["[worker0]: parent", "child"]


# --- hosts that meddle with descriptor 1, and what opens as something else ---

TEED = """
import asyncio, os, sys
from aioelastic import Command, supervise
{before}
lost = []
asyncio.run(supervise(Command("echo", "hello"), n=1, on_event=lambda event: lost.append(getattr(event, "problem", ""))))
sys.stderr.write("".join(lost))
"""


@pytest.mark.parametrize(
    "before",
    ["os.set_inheritable(1, False)", "os.close(1); sys.stdout = open(sys.argv[1], 'w')"],
    ids=["hidden", "new"],
)
def test_a_stdout_that_is_close_on_exec(tmp_path: Path, before: str) -> None:
    words = [sys.executable, "-c", TEED.format(before=before), str(tmp_path / "log")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=150)
    written = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ran.stdout
    assert (written, ran.stderr) == ("[worker0]: hello\n", "")


async def test_the_master_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    master, slave = os.openpty()
    try:
        with open(master, "w") as file, contextlib.redirect_stdout(file):
            await supervise(sh("echo hello"))
            assert os.read(slave, 4096) == b"[worker0]: hello\n"
    finally:
        os.close(slave)


async def test_no_thread_for_a_file_is_told_and_counted(tmp_path: Path, monkeypatch: Any) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "aioelastic-stdout":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    told: list[Event] = []
    with open(tmp_path / "out", "w") as file, contextlib.redirect_stdout(file):
        await supervise(sh("for i in 1 2 3 4; do echo $i; done"), on_event=told.append)
    assert lost_by_the_end(told) == 4 * len("[worker0]: 1\n")
    assert "can't start new thread" in str([one.problem for one in told if isinstance(one, SinkTrouble)])


async def test_a_carriage_return_at_the_end_arrives() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        await supervise(sh("printf 'abc\\r'"))
    assert out.getvalue() == "[worker0]: abc\r\n"
