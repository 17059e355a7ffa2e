"""Workers on a terminal of their own (`Command(tty=...)`), and those whose streams are one (`stderr="stdout"`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, py, sh, until
from helpers_streams import Gate, gate

from aioelastic import Command, Function, Group, Line, Logs, Placement, SpecError, Std, plan, supervise
from aioelastic.model.group_spec import GroupSpec
from aioelastic.streams import StandardInput

__all__ = ["gate"]  # a fixture

LAUNCHERS = pytest.mark.parametrize("launcher", ["guardian", "direct"])


@LAUNCHERS
async def test_it_is_a_terminal_and_the_controlling_one(launcher: Any) -> None:
    code = (
        "import os; print(*(os.isatty(fd) for fd in range(3)), os.get_terminal_size(0)); os.open('/dev/tty', os.O_RDWR)"
    )
    code += "; print(os.tcgetpgrp(0) == os.getpgrp() == os.getsid(0) == os.getpid())"
    result = await supervise(py(code, tty=(30, 100)), logs=QUIET, launcher=launcher)
    want = "True True True os.terminal_size(columns=100, lines=30)\nTrue\n"
    assert result[0].stdout.tail.decode() == want


async def test_in_a_place_of_its_own() -> None:
    """By fork(2) of the guardian."""
    place = Placement(nice=1)
    result = await supervise(
        py("import os; os.open('/dev/tty', os.O_RDWR); print(os.nice(0))", tty=True), placement=place
    )
    assert result[0].stdout.tail == b"1\n"


async def test_a_dialogue() -> None:
    """A prompt without a newline; what is sent is not shown again, and the end of the input is one."""
    script = "import sys; name = input('name? '); print('hello', name); print('rest', sys.stdin.read().split())"
    async with Group(py(script, tty=True), logs=QUIET) as group:
        feed = group.lines(partial=0.001)
        assert (await anext(feed)).data == b"name? "
        await group[0].stdin.send(b"world\n")
        assert await rest_of_line(feed) == b"hello world"
        await group[0].stdin.send(b"a\nb")  # in the middle of a line
        await group[0].stdin.aclose()
        assert await rest_of_line(feed) == b"rest ['a', 'b']"
        assert (await group.wait()).ok
        assert [line async for line in feed] == []


async def rest_of_line(feed: AsyncIterator[Line]) -> bytes:
    """A terminal takes what is written in pieces: it may have the end of a line after the rest of it."""
    parts = [await anext(feed)]
    while parts[-1].continued:
        parts.append(await anext(feed))
    return b"".join(part.data for part in parts)


async def fill(stdin: StandardInput) -> None:
    """The worker does not read: there is room for nothing more."""
    sending = asyncio.create_task(stdin.send(b"a line\n" * 100_000))
    await until(lambda: stdin._room is not None)
    sending.cancel()
    await asyncio.wait({sending})


async def test_the_end_of_the_input_when_there_is_no_room_for_it(gate: Gate) -> None:
    """It is a character of the input, and waits until the worker has read."""
    async with Group(sh(f"read x <{gate.path}; exec wc -l", tty=True), logs=QUIET) as group:
        await fill(group[0].stdin)
        await group[0].stdin.aclose()
        with pytest.raises(BrokenPipeError, match="was closed"):
            await group[0].stdin.send(b"x")
        gate.open()
        result = await group.wait()
    assert int(said(result)) > 1000


async def test_the_end_of_the_input_of_one_that_never_reads() -> None:
    """It waits for that no longer than the worker lives."""
    async with Group(sh("exec sleep 1000", tty=True), logs=QUIET) as group:
        await fill(group[0].stdin)
        await group[0].stdin.aclose()
        await group.stop()


async def test_one_that_has_closed_its_streams_is_not_hung_up_on(gate: Gate) -> None:
    """As programs of coreutils do before they exit; and the input had ended before."""
    script = f"cat; exec <&- >&- 2>&-; read x <{gate.path}; exit 0"
    async with Group(sh(script, tty=True, input="some\n"), logs=QUIET) as group:
        await until(lambda: group._supervisor.workers[0].output.over)
        gate.open()
        assert said(await group.wait()) == b"some\n"


async def test_control_c_and_input() -> None:
    trap = "trap 'echo interrupted; exit 4' INT; echo up; read x; echo never"
    async with Group(sh(trap, tty=True), logs=QUIET, check=False) as group:
        await group.line("up")
        await group[0].stdin.send(b"\x03")
        result = await group.wait()
    assert result[0].stdout.tail == b"up\ninterrupted\n"
    assert said(await supervise(sh("read x; echo got $x", tty=True, input="this\n"), logs=QUIET)) == b"got this\n"


async def test_a_child_that_stays_hears_the_hang_up() -> None:
    """The terminal is gone with the worker."""
    script = "(trap 'exit 0' HUP; echo child; while :; do sleep 0.01; done) & read x; exit 0"
    async with Group(sh(script, tty=True), logs=QUIET) as group:
        await group.line("child")
        await group[0].stdin.send(b"\n")
        assert (await group.wait()).ok


async def test_more_than_a_terminal_holds() -> None:
    result = await supervise(
        py("import sys; sys.stdout.write('x' * 99 + '\\n' + 'y' * 1_000_000)", tty=True), logs=QUIET
    )
    assert result[0].stdout.total == 1_000_100


@LAUNCHERS
async def test_one_stream_for_both_in_order(launcher: Any, tmp_path: Path) -> None:
    script = "for i in 1 2 3; do echo out $i; echo err $i >&2; done"
    result = await supervise(sh(script, stderr="stdout"), logs=Logs(dir=tmp_path, tee=Std.NONE), launcher=launcher)
    both = "".join(f"out {i}\nerr {i}\n" for i in (1, 2, 3)).encode()
    assert said(result) == both
    assert result[0].stdout.path is not None
    assert result[0].stdout.path.read_bytes() == both
    assert (result[0].stderr.path, result[0].stderr.total) == (None, 0)


def said(result: Any) -> bytes:
    tail: bytes = result[0].stdout.tail
    return tail


def test_a_plan_shows_it() -> None:
    text = str(plan(GroupSpec.of(Command("top", tty=True))))
    assert "  terminal: 24 rows, 80 columns\n  stdin: pipe\n" in text


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"tty": (0, 80)}, "tty (rows)"),
        ({"tty": (24,)}, "tty"),
        ({"tty": "24x80"}, "tty"),
        ({"tty": 1}, "tty"),
        ({"tty": True, "stdin": "inherit"}, "tty"),
        ({"tty": True, "input": Path("/etc/hosts")}, "tty"),
        ({"stderr": "null"}, "stderr"),
        ({"tty": True, "stderr": "pipe"}, "stderr"),
    ],
)
def test_what_is_wrong_is_said_at_once(given: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Command("cat", **given)
    assert caught.value.field == field


async def test_functions_have_none() -> None:
    async with Group(Function(print), logs=QUIET) as group:
        with pytest.raises(RuntimeError):
            group[0].stdin  # noqa: B018
        await group.wait()
