"""Dialogues with workers: `worker.dialogue()`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers import QUIET, event_of, py, sh
from helpers_streams import Gate, gate, held

from aioelastic import Command, Group, SpecError
from aioelastic.events import Drained
from aioelastic.streams import _dialogue

__all__ = ["gate", "held"]  # fixtures

ASKS = "while printf 'next? ' && read x; do echo \"got $x\"; done; echo over"


@pytest.mark.parametrize("how", [{"stdin": "pipe"}, {"tty": True}])
async def test_questions_and_answers(how: Any) -> None:
    async with Group(sh(ASKS, **how), n=2, logs=QUIET) as group:
        for worker in group:
            async with worker.dialogue() as io:
                for word in ("one", "grüße"):
                    assert (await io.read_until(r"\? $"))[0] == "? "
                    await io.send_line(word)
                    assert await io.read_line() == f"got {word}"
                await worker.stdin.aclose()
                match = await io.read_until("over")
                assert match.string[: match.start()] == "next? "
        assert (await group.wait()).ok


async def test_what_was_said_before_is_heard_and_what_a_line_was_found_in_is_not() -> None:
    async with Group(sh("echo one; echo two; echo three; exec cat", stdin="pipe"), logs=QUIET) as group:
        await group.line("one")
        async with group[0].dialogue() as io:
            assert await io.read_line() == "two"
        async with group[0].dialogue() as io:  # the one before had heard it all
            await io.send_line("four")
            assert await io.read_line() in ("three", "four")


async def test_bytes_are_a_line_too_and_what_is_neither_is_told() -> None:
    async with Group(Command("cat", stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        for text in (b"one", "two"):
            await io.send_line(text)
        for number in (3, None):
            with pytest.raises(TypeError, match=f"sends text or bytes, not {type(number).__name__}"):
                await io.send_line(number)  # type: ignore[arg-type]
        assert [await io.read_line(), await io.read_line()] == ["one", "two"]


async def test_each_of_several_tasks_that_read_gets_what_is_its_turn() -> None:
    async with Group(Command("cat", stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        first, second = (asyncio.create_task(io.read_line()) for _ in range(2))
        await asyncio.sleep(0)
        await io.send("one\ntwo\n")
        assert [await first, await second] == ["one", "two"]


async def test_a_task_that_was_cancelled_does_not_have_the_next_wait_for_ever() -> None:
    async with Group(Command("cat", stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        first = asyncio.create_task(io.read_line())
        await asyncio.sleep(0)
        first.cancel()
        second = asyncio.create_task(io.read_line())
        await asyncio.wait([first])
        await io.send_line("one")
        assert await second == "one"


async def test_who_still_reads_when_it_is_left_hears_so() -> None:
    async with Group(Command("cat", stdin="pipe"), logs=QUIET) as group:
        async with group[0].dialogue() as io:
            reading = asyncio.create_task(io.read_line())
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="is over"):
            await reading


async def test_its_end() -> None:
    async with Group(sh("echo some; exec cat", stdin="pipe"), logs=QUIET) as group:
        async with group[0].dialogue() as io:
            await io.send("a\udc80b".encode(errors="surrogateescape"))
            await group[0].stdin.aclose()
            with pytest.raises(
                EOFError, match=r"'never' is not in the output, which has ended.*; the last .*a\\\\x80b"
            ):
                await io.read_until("never")
            assert await io.read_line() == "some"
            assert (await io.read_until("b"))[0] == "b"
        await event_of(group, Drained)
        async with group[0].dialogue() as io:
            with pytest.raises(EOFError):
                await io.read_line()
            with pytest.raises(BrokenPipeError):
                await io.send_line("x")


async def test_how_the_worker_has_ended_is_told(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output ends a moment before its exit is known."""
    monkeypatch.setattr(_dialogue, "ENDING", 150.0)
    worker = sh(f"exec >&-; echo closed >&2; read x <{gate.path}; kill -SEGV $$", stdin="pipe")

    async def talk() -> None:
        async with Group(worker, logs=QUIET) as group, group[0].dialogue() as io:
            await group.line("closed")
            asking = asyncio.create_task(io.read_until("never"))
            for _ in range(10):
                await asyncio.sleep(0)
            gate.open()
            await asking

    with pytest.raises(EOFError, match="which has ended with SIGSEGV; the last") as caught:
        await talk()
    assert "rank 0" in caught.value.__notes__[0]
    assert "failed: SIGSEGV" in caught.value.__notes__[0]


async def test_a_worker_that_closes_its_output_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dialogue, "ENDING", 0.01)
    async with Group(sh("exec >&-; exec sleep 1000", stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        with pytest.raises(EOFError, match="'never' is not in the output, which has ended; the last"):
            await io.read_until("never", timeout=150)


async def test_a_time_out_loses_nothing() -> None:
    async with Group(sh(ASKS, stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        with pytest.raises(TimeoutError, match=r"'got' has not come within 0\.01 s"):
            await io.read_until("got", timeout=0.01)
        await io.send_line("x")
        assert (await io.read_until("got x")).string.startswith("next? got x")


async def test_what_nobody_reads_holds_the_worker(held: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dialogue, "HIGH", 1000)
    code = "import sys; print('x' * 3_000_000); print('end', flush=True); input()"
    async with Group(py(code, stdin="pipe"), logs=QUIET) as group:
        async with group[0].dialogue() as io:
            await held.wait()
            with pytest.raises(BufferError, match="'end' is not in 1000 bytes"):
                await io.read_until("end")
        await group.line("end")  # it goes on without us


async def test_one_that_is_not_entered_holds_nobody_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dialogue, "HIGH", 1000)
    code = "import sys; print('x' * 3_000_000); print('end', flush=True); input()"
    async with Group(py(code, stdin="pipe"), logs=QUIET) as group:
        io = group[0].dialogue()
        await group.line("end", timeout=60)
        with pytest.raises(RuntimeError, match="enter it first"):
            await io.read_line()
        async with io:
            await io.send_line("x")
            with pytest.raises(EOFError):
                await io.read_line()
        with pytest.raises(RuntimeError, match="is over"):
            await io.read_line()
        with pytest.raises(RuntimeError, match="entered once"):
            await io.__aenter__()


@pytest.mark.parametrize(
    ("given", "field"), [({"pattern": "("}, "pattern"), ({"pattern": "x", "timeout": -1}, "timeout")]
)
async def test_what_is_wrong_is_said(given: Any, field: str) -> None:
    async with Group(Command("cat", stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        with pytest.raises(SpecError) as caught:
            await io.read_until(**given)
    assert caught.value.field == field


async def test_a_worker_that_reads_nothing() -> None:
    async with Group(Command("true"), logs=QUIET) as group:
        with pytest.raises(RuntimeError, match="is no pipe"):
            group[0].dialogue()
        await group.wait()


async def test_so_many_bytes_and_then_lines_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bytes they are, and more than are kept for a pattern."""
    monkeypatch.setattr(_dialogue, "HIGH", 4096)
    large = bytes(range(256)) * 100
    async with Group(Command("cat", stdin="pipe"), logs=QUIET) as group, group[0].dialogue() as io:
        sending = asyncio.create_task(
            io.send("größe \udc80 5\n".encode(errors="surrogateescape") + b"\xff\xc3\xbc\n\0" + large)
        )
        assert (await io.read_until(r"(\d)\n")).string.startswith("größe \\x80 5\n")
        assert await io.read_exactly(5) == b"\xff\xc3\xbc\n\0"
        assert await io.read_exactly(len(large)) == large
        await sending
        assert await io.read_exactly(0) == b""
        await io.send(b"\xc3\xbc\xff\xffA\xe2\x82\xacB\n")
        assert await io.read_exactly(1) == b"\xc3"  # in the middle of a character
        await io.read_until(r"\\xff\\")  # in the middle of the next one's escape
        assert await io.read_line() == "A€B"


async def test_so_many_bytes_that_do_not_come() -> None:
    worker = sh("printf abc; read x; printf d; exit 3", stdin="pipe")
    async with Group(worker, logs=QUIET, check=False) as group, group[0].dialogue() as io:
        with pytest.raises(TimeoutError, match="the last of 4 bytes has not come within 0 s"):
            await io.read_exactly(4, timeout=0)
        await io.send_line()
        assert await io.read_exactly(2) == b"ab"
        with pytest.raises(EOFError, match=r"the last of 3 bytes .* ended with exit code 3; .*'cd'"):
            await io.read_exactly(3)
        assert await io.read_exactly(2) == b"cd"
        for n in (-1, 1.5, "3"):
            with pytest.raises(SpecError) as caught:
                await io.read_exactly(n)  # type: ignore[arg-type]
            assert caught.value.field == "n"
