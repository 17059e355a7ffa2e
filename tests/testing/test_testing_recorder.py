"""What a group told, in plain words; and words that are not true fail."""

from __future__ import annotations

import asyncio

import pytest
from helpers import QUIET, sh

from aioelastic import Group, Restart, supervise
from aioelastic.events import Drained, Event, Exited, GroupDone, Killed, Restarting, Spawned
from aioelastic.testing._recorder import Recorder

SLEEP = sh("exec sleep 1000")


async def story() -> Recorder:
    recorder = Recorder()
    entry = [SLEEP, sh('exit "$((AIOELASTIC_ATTEMPT + 3))"')]
    policy = Restart.on_failure(max=1)
    await supervise(entry, logs=QUIET, restart=policy, on_event=recorder, check=False)
    return recorder


async def test_of() -> None:
    recorder = await story()
    assert [one.exit.code for one in recorder.of(Exited, rank=1)] == [3, 4]
    assert [one.exit.code for one in recorder.of(Exited, rank=1, attempt=1)] == [4]
    assert len(recorder.of(Event)) == len(recorder.events) == len([*recorder])
    assert isinstance(recorder.events[-1], GroupDone)


async def test_true_words() -> None:
    recorder = await story()
    recorder.in_order(
        "rank 0 spawned",
        "rank 1 spawned",
        "rank 1 exited",
        "rank 1 drained",
        "rank 1 restarting",
        "rank 1 spawned in attempt 1",
        "rank 1 gave up in attempt 1",
        "rank 0 stopping",
        "rank 0 exited",
        "group done",
    )
    recorder.in_order("restarting", "spawned in attempt 1")
    recorder.in_order()
    recorder.never("killed", "rank 0 restarting", "rank 2 spawned", "spawned in attempt 2", "leaked", "sink trouble")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["rank 2 spawned"], "'rank 2 spawned' did not happen\nwhat happened:"),
        (["rank 0 stopping", "rank 1 restarting"], "did not happen after 'rank 0 stopping' (only before it)"),
        (["rank 1 exited", "rank 1 exited", "rank 1 exited"], "did not happen after 'rank 1 exited'"),
        (["group done", "rank 0 killed"], "'rank 0 killed' did not happen after 'group done'\n"),
        (["rank 1 spawned in attempt 2"], "did not happen"),
    ],
)
async def test_words_that_are_not_true(steps: list[str], words: str) -> None:
    recorder = await story()
    with pytest.raises(AssertionError) as caught:
        recorder.in_order(*steps)
    assert words in str(caught.value)
    assert "\n  rank 1 gave up in attempt 1\n" in str(caught.value)


async def test_never_that_did_happen() -> None:
    with pytest.raises(AssertionError, match="'gave up' did happen"):
        (await story()).never("killed", "gave up")


@pytest.mark.parametrize("step", ["", "rank 0 vanished", "rank x exited", "event", "exited attempt 1", "rank 0"])
def test_words_that_mean_nothing(step: str) -> None:
    with pytest.raises(ValueError, match=r"is no step like .* one of: drained, exited, gave up, group done"):
        Recorder().in_order(step)


async def test_waiting() -> None:
    recorder = Recorder()
    async with Group(SLEEP, n=2, logs=QUIET, on_event=recorder) as group:
        assert (await recorder.wait(Spawned, rank=1)).pid == group[1].pid  # past
        waiting = asyncio.create_task(recorder.wait(Exited, rank=1))
        await group[1].stop()
        assert (await waiting).exit == group[1].exit  # to come
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await recorder.wait(Killed)
        last = asyncio.create_task(recorder.wait(Restarting))
    with pytest.raises(AssertionError, match="the group ended without restarting\nwhat happened:\n  rank 0 spawned"):
        await last


async def test_what_a_listener_raises_is_not_lost() -> None:
    """A group swallows it, so a test that never asks again would pass."""
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))

    def bad(event: Event) -> None:
        raise ZeroDivisionError

    recorder = Recorder(bad)
    async with Group(sh("exit 0"), logs=QUIET, on_event=recorder) as group:
        await recorder.wait(Spawned)  # it did happen
        with pytest.raises(ZeroDivisionError):
            await recorder.wait(Killed)
        await group.wait()
    assert len(told) == len(recorder.events) == 4
    for ask in (recorder.in_order, recorder.never):
        with pytest.raises(ZeroDivisionError):
            ask()


async def test_others_hear_it_too() -> None:
    heard: list[Event] = []
    recorder = Recorder(heard.append, lambda event: None)
    await supervise(sh("exit 0"), logs=QUIET, on_event=recorder)
    assert heard == recorder.events
    assert [type(one) for one in heard] == [Spawned, Exited, Drained, GroupDone]
