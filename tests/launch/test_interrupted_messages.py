"""A signal's handler raises while a message of the guardian's is taken: that message is taken all the same."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import pytest

from aioelastic.child.wire import datagrams, requests
from aioelastic.launch import _helper_process
from aioelastic.launch._helper_process import ServedProcess, Server

RUSAGE = (0.0,) * 16
FILES = (_helper_process.__file__, datagrams.__file__, requests.__file__)
EXITED = (1, 7 << 8, RUSAGE, 5, 6.0, False)


class Interrupt:
    """Raises KeyboardInterrupt once, before the line of that number which is run in `FILES`, but not in clean-up."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.has_come = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        code: CodeType = frame.f_code
        if code.co_filename not in FILES or code.co_name in ("close", "__del__"):
            return None
        if event == "line" and not self.has_come:
            self._left -= 1
            if self._left < 0:
                self.has_come = True
                raise KeyboardInterrupt
        return self


async def heard(body: tuple[Any, ...], kind: bytes, at: int) -> tuple[bool, dict[str, Any]]:
    """A message comes and is interrupted there. Whether it came to that, and what was learnt."""
    ours, theirs = datagrams.pair()
    ours.setblocking(False)
    server = Server(ours)
    loop = server.loop = asyncio.get_running_loop()
    started: asyncio.Future[ServedProcess] = loop.create_future()
    told: list[Any] = []
    poller: Any = SimpleNamespace(remove=lambda _: None)
    ends: Any = SimpleNamespace(stdin=None, stdout=None, stderr=None, channel=None, close_ours=lambda: None)
    ends.disown = list
    if kind == requests.EXITED:
        pidfd = os.pidfd_open(os.getpid())
        process = ServedProcess(server, 1, os.getpid(), pidfd, 0, (started, ends, 0.0, 0, poller))
        server._running[1] = process
        process._on_exit = told.append
    else:
        server._starting[1] = (started, ends, 0.0, 0, poller)
    packet, fds = requests.encode(kind, body)
    lent = [os.pidfd_open(os.getpid())] if kind == requests.STARTED else []
    datagrams.send(theirs, packet, [*fds, *lent])
    datagrams.close([*fds, *lent])
    interrupt = Interrupt(at)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        server.hear()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    turn = loop.create_future()
    loop.call_soon(turn.set_result, None)
    await turn
    if select.select([ours], [], [], 0)[0]:
        server.hear()  # as the loop does then
    assert not server.gone
    found = {"started": started, "told": told, "running": [*server._running], "starting": [*server._starting]}
    found["left"] = bool(select.select([ours], [], [], 0)[0])
    for one in (
        [*server._running.values()] if kind == requests.STARTED else [process] if kind == requests.EXITED else []
    ):
        one.abandon()
    server.end()
    theirs.close()
    return interrupt.has_come, found


@pytest.mark.parametrize("kind", [requests.EXITED, requests.STARTED, requests.REFUSED])
async def test_a_message_is_taken_whatever_interrupts_it(kind: bytes) -> None:
    body: tuple[Any, ...] = {
        requests.EXITED: EXITED,
        requests.STARTED: (1, os.getpid(), 0),
        requests.REFUSED: (1, 2, b"/x"),
    }[kind]
    at, comes = 0, True
    while comes:
        comes, found = await heard(body, kind, at)
        assert found["left"] is False, at
        assert found["starting"] == [], at
        if kind == requests.EXITED:
            assert found["told"], at
            assert {one.status for one in found["told"]} == {7 << 8}
            assert found["running"] == [], at
        elif kind == requests.STARTED:
            assert found["running"] == [1], at
            assert found["started"].result().pid == os.getpid(), at
        else:
            assert isinstance(found["started"].exception(), FileNotFoundError), at
        at += 1
    assert at > 10
