"""Waiting for one line: `group.line(pattern)`; feeds of some ranks, and that nobody has any more; unfinished lines."""

from __future__ import annotations

import asyncio
import gc
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, event_of, py, sh, until
from helpers_streams import Gate, gate, held

from aioelastic import Function, Group, Restart, SpecError, WorkerFailed
from aioelastic.events import Drained, Event, Restarting, Spawned

__all__ = ["gate", "held"]  # fixtures

SERVER = "echo starting; echo 'listening on port 8123' >&2; exec sleep 1000"


# --- group.line() ---


async def test_the_match_of_the_first_line() -> None:
    async with Group(sh(SERVER), logs=QUIET) as group:
        match = await group.line(r"port (\d+)")
        assert (match[1], match.string) == ("8123", "listening on port 8123")


async def test_a_compiled_pattern() -> None:
    async with Group(sh(SERVER), logs=QUIET) as group:
        assert (await group.line(re.compile("PORT", re.IGNORECASE)))[0] == "port"


async def test_each_rank_is_waited_for_although_all_have_said_it() -> None:
    """What came before the call is found: nothing is missed between two calls."""
    async with Group(sh("echo ready $RANK; exec sleep 1000"), n=3, logs=QUIET) as group:
        assert (await group.line("ready (.)", ranks=[2]))[1] == "2"
        for rank in (0, 1):
            assert (await group.line("ready (.)", ranks=[rank]))[1] == str(rank)


async def test_a_line_is_found_once() -> None:
    async with Group(sh("echo ready $RANK; exec sleep 1000"), n=3, logs=QUIET) as group:
        assert {(await group.line("ready (.)"))[1] for _ in range(3)} == {"0", "1", "2"}
        with pytest.raises(TimeoutError, match=r"no line matched 'ready \(\.\)' within 0\.01 s"):
            await group.line("ready (.)", timeout=0.01)


async def test_lines_of_one_read_one_after_the_other() -> None:
    async with Group(sh("printf 'a1\\nb\\na2\\nb\\n'; exec sleep 1000"), logs=QUIET) as group:
        assert [(await group.line(one))[0] for one in ("a.", "b", "a.", "b")] == ["a1", "b", "a2", "b"]


async def test_two_at_once() -> None:
    async with Group(sh("echo one; echo two; exec sleep 1000"), logs=QUIET) as group:
        found = await asyncio.gather(group.line("two"), group.line("one"))
    assert [one[0] for one in found] == ["two", "one"]


async def test_who_was_cancelled_has_found_nothing(gate: Gate) -> None:
    async with Group(sh(f"read x < {gate.path}; echo one; exec sleep 1000"), logs=QUIET) as group:
        waiting = asyncio.create_task(group.line("one"))
        other = asyncio.create_task(group.line("one"))
        other.add_done_callback(lambda _: waiting.cancel())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open()
        assert (await other)[0] == "one"


async def test_an_unfinished_line_at_the_end() -> None:
    async with Group(sh("printf 'the end'"), logs=QUIET) as group:
        assert (await group.line("end")).string == "the end"


@pytest.mark.parametrize("ranks", [None, [1]])
async def test_there_is_none(ranks: list[int] | None) -> None:
    async with Group([sh("exec sleep 1000" if ranks else "exit 0"), sh("echo no")], logs=QUIET) as group:
        who = "ranks [1]" if ranks else "all workers"
        with pytest.raises(EOFError, match=re.escape(f"{who} have ended, and no line matched 'yes'")):
            await group.line("yes", ranks=ranks)
        assert (await group.line("n.", ranks=ranks))[0] == "no"
        with pytest.raises(EOFError):  # they have ended before the call
            await group.line("n.", ranks=ranks)


async def test_a_group_that_is_over_can_be_asked() -> None:
    async with Group(sh("echo one; echo two"), logs=QUIET) as group:
        await group.wait()
        assert (await group.line("one"))[0] == "one"
    assert (await group.line("two"))[0] == "two"
    with pytest.raises(EOFError):
        await group.line("two")


async def test_a_restarted_worker_is_listened_to(tmp_path: Path) -> None:
    worker = sh(f"if [ -e {tmp_path}/was ]; then echo again; exec sleep 1000; fi; touch {tmp_path}/was; exit 1")
    async with Group(worker, logs=QUIET, restart=Restart.on_failure(max=1)) as group:
        assert (await group.line("again", ranks=[0]))[0] == "again"


async def test_a_function() -> None:
    async with Group(Function(print, "it says", flush=True), logs=QUIET) as group:
        assert (await group.line("it (.*)"))[1] == "says"


async def test_a_line_that_is_cut_in_the_tail_is_not_taken_for_whole() -> None:
    """The tail begins in the middle of a line that begins with "no"."""
    body = "import sys, time; print('no' + 'yes' * 9000); print('end', flush=True); time.sleep(1000)"
    async with Group(py(body), logs=QUIET) as group:
        await group.line("end")
    async with Group(py(body), logs=QUIET) as group:
        await group.line("^no(yes)+$")  # while it is read, it is whole
        feed = group.lines()
        feed.close()
        with pytest.raises(TimeoutError):
            await group.line("^(yes)+$", timeout=0.01)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"pattern": "("}, "pattern"),
        ({"pattern": b"bytes"}, "pattern"),
        ({"pattern": re.compile(b"bytes")}, "pattern"),
        ({"pattern": "x", "ranks": [2]}, "ranks"),
        ({"pattern": "x", "ranks": "01"}, "ranks"),
        ({"pattern": "x", "ranks": [True]}, "ranks"),
        ({"pattern": "x", "timeout": -1}, "timeout"),
    ],
)
async def test_what_is_wrong_is_said_at_once(given: Any, field: str) -> None:
    async with Group(sh("exec sleep 1000"), n=2, logs=QUIET) as group:
        with pytest.raises(SpecError) as caught:
            await group.line(**given)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "pattern",
    [r"ready\n", "ready\n", r"(?:a|b)\n", r"(\n|a\nb)", r"(?=x\n)x", r"(\n)+", r"(?P<x>\n){2}", r"\x0a", r"(?>a\n)"],
)
async def test_a_pattern_with_a_newline_is_found_in_no_line(pattern: str) -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        with pytest.raises(SpecError, match="has a newline in it, and a line has none") as caught:
            await group.line(pattern)
    assert caught.value.field == "pattern"


@pytest.mark.parametrize(
    "pattern", [r"[^\n]+", r"ready(\n|$)", r"ready\n?", r"ready\n*$", r"(?!\n)r", r"ready\s*", "(?x) ready\n"]
)
async def test_one_that_need_not_have_it_is(pattern: str) -> None:
    async with Group(sh("echo ready"), logs=QUIET) as group:
        assert (await group.line(pattern)).string == "ready"


async def test_why_the_workers_have_ended_is_told() -> None:
    """Whoever of them has failed: the others were stopped for it."""
    workers = [sh("exec sleep 1000"), sh("echo bad >&2; exit 3")]
    for ranks in (None, [0], [1]):
        async with Group(workers, logs=QUIET, check=False) as group:
            with pytest.raises(EOFError, match=r"no line matched 'yes': rank 1 .*failed: exit code 3") as caught:
                await group.line("yes", ranks=ranks)
        assert isinstance(caught.value.__cause__, WorkerFailed)
        assert "bad" in str(caught.value.__cause__)
    workers[0] = sh("echo no")
    async with Group(workers, logs=QUIET, on_failure="continue", check=False) as group:
        await group.wait()
        with pytest.raises(EOFError, match=r"no line matched 'yes'$"):
            await group.line("yes", ranks=[0])


# --- feeds ---


@pytest.mark.parametrize("what", ["lines", "events"])
async def test_a_task_that_waits_and_that_nobody_refers_to_reads_on(what: str, gate: Gate) -> None:
    """asyncio refers to its tasks weakly; what one waits for refers to it."""
    read = []

    async def reads(group: Group) -> None:
        async for one in group.lines() if what == "lines" else group.events():
            read.append(one)
        read.append(None)

    async with Group(sh(f"read x <{gate.path}; echo some"), logs=QUIET) as group:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.create_task(reads(group)) and None)
        await event_of(group, Spawned)
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
        gate.open()
        await group.wait()
        await until(lambda: read[-1] is None)
    assert len(read) > 1


async def test_a_feed_that_nobody_has_any_more_holds_nobody(held: asyncio.Event) -> None:
    """A `break` out of the loop over a server that goes on to log."""
    server = "echo ready; head -c 5000000 /dev/zero | tr '\\0' '\\n'"
    async with Group(sh(server), logs=QUIET) as group:
        async for line in group.lines():
            if line.data == b"ready":
                break
        assert (await group.wait())[0].stdout.total == 5_000_006


async def test_a_feed_that_held_its_worker_when_it_was_forgotten(held: asyncio.Event) -> None:
    async with Group(sh("head -c 5000000 /dev/zero | tr '\\0' '\\n'"), logs=QUIET) as group:
        feed: Any = group.lines()
        await held.wait()
        assert (await anext(feed)).data == b""
        feed = [feed]
        feed.append(feed)  # found by the collector only
        del feed
        gc.collect()
        assert (await group.wait())[0].stdout.total == 5_000_000


async def test_a_feed_of_ranks_ends_with_them() -> None:
    async with Group([sh("echo one"), sh("exec sleep 1000")], logs=QUIET) as group:
        assert [line.data async for line in group.lines(ranks=[0])] == [b"one"]
        assert [line async for line in group.lines(ranks=[0])] == []
        assert [line async for line in group.lines(ranks=[])] == []
        assert 1 in group.pids


async def test_a_feed_of_ranks_goes_on_after_a_restart(tmp_path: Path) -> None:
    worker = sh(f"if [ -e {tmp_path}/was ]; then echo again; exit 0; fi; touch {tmp_path}/was; echo once; exit 1")
    policy = Restart.on_failure(max=1)
    async with Group([worker, sh("exec sleep 1000")], logs=QUIET, restart=policy) as group:
        assert [line.data async for line in group.lines(ranks=[0])] == [b"once", b"again"]


async def test_a_feed_of_ranks_ends_when_no_restart_of_all_comes_any_more() -> None:
    policy = Restart.on_failure(max=1, scope="all")
    async with Group([sh("echo one"), sh("exec sleep 1000")], logs=QUIET, restart=policy) as group:
        feed = group.lines(ranks=[0])
        assert (await anext(feed)).data == b"one"
        await event_of(group, Drained, rank=0)
        waiting = asyncio.create_task(anext(feed, None))
        await asyncio.sleep(0)
        assert not waiting.done()  # rank 1 may fail yet, and all begin anew
        group.begin_stop()
        assert await waiting is None


@pytest.mark.parametrize("ranks", [[2], [-1], ["0"], 0, "0"])
async def test_ranks_that_there_are_not(ranks: Any) -> None:
    async with Group(sh("exec sleep 1000"), n=2, logs=QUIET) as group:
        with pytest.raises(SpecError, match="ranks"):
            group.lines(ranks=ranks)


# --- unfinished lines ---


async def test_a_prompt_can_be_had(gate: Gate) -> None:
    async with Group(sh(f"printf 'name? '; read x < {gate.path}; echo thanks"), logs=QUIET) as group:
        feed = group.lines(partial=0.001)
        prompt = await anext(feed)
        assert (prompt.data, prompt.continued) == (b"name? ", True)
        gate.open()
        rest = await anext(feed)
        assert (rest.data, rest.continued) == (b"thanks", False)
        assert [line async for line in feed] == []


async def test_a_prompt_that_stands_there_already(gate: Gate) -> None:
    async with Group(sh(f"echo one; printf 'name? '; read x < {gate.path}"), logs=QUIET) as group:
        whole = group.lines()
        assert (await anext(whole)).data == b"one"
        assert (await anext(group.lines(partial=0.001))).data == b"name? "
        gate.open()
        assert (await anext(whole)).data == b"name? "  # who has not asked for parts gets it when it is at its end


@pytest.mark.parametrize("partial", [-1, "soon", True, float("nan")])
async def test_a_time_for_parts_that_is_none(partial: Any) -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        with pytest.raises(SpecError, match="partial"):
            group.lines(partial=partial)


async def test_a_feed_that_is_made_when_a_restart_is_told_has_what_follows(tmp_path: Path) -> None:
    made = []

    def hook(event: Event) -> None:
        if isinstance(event, Restarting):
            made.append(group.lines(ranks=[0]))

    script = f"mkdir {tmp_path}/was 2>/dev/null && echo first && exit 1; echo second"
    group = Group(sh(script), logs=QUIET, restart=Restart.on_failure(max=1, scope="one"), on_event=hook)
    async with group:
        before = group.lines(ranks=[0])
        await group.wait()
    assert [line.text async for line in before] == ["first", "second"]
    assert [line.text async for line in made[0]] == ["second"]


async def test_an_unfinished_line_is_passed_on_once_although_a_feed_was_lost_at_it() -> None:
    async with Group(sh("read x; printf 'done\n> '; read x; echo end", stdin="pipe"), logs=QUIET) as group:
        group.lines(partial=0.02)  # that nobody has any more: found out when something comes
        gc.collect()
        await group[0].stdin.send(b"\n")
        await group.line("done")
        feed = group.lines(partial=0.02)
        assert (await anext(feed)).data == b"> "
        await asyncio.sleep(0.05)
        await group[0].stdin.send(b"\n")
        assert [line.data async for line in feed] == [b"end"]
