"""What becomes of a message to a peer: one that is gone needs none; what the system does not take is said, or again."""

from __future__ import annotations

import errno
import os
import select
from typing import Any

import pytest

from aioelastic.child.wire import datagrams, requests
from aioelastic.child.wire.links import Link, complain

PASSING = [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS]
GONE = [errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN]


def test_who_does_not_read_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    stderr = os.dup(2)
    try:
        os.set_blocking(writer, False)
        filled = 0
        try:
            while True:
                filled += os.write(writer, bytes(65536))
        except BlockingIOError:
            os.set_blocking(writer, True)
        os.dup2(writer, 2)
        complain("nobody hears it")
        while filled:
            filled -= len(os.read(reader, filled))
        complain("x" * 100_000)
        assert os.read(reader, 65536).startswith(b"aioelastic: xxx")
    finally:
        os.dup2(stderr, 2)
        for fd in (reader, writer, stderr):
            os.close(fd)


class Peers:
    """A link, and the other end of it. Sending raises `errors`, the first first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[int] = []
        ours, self.theirs = datagrams.pair()
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.epoll = select.epoll()
        self.epoll.register(ours, select.EPOLLIN)
        self.link = Link(ours, self.epoll)
        self._real = datagrams.send
        monkeypatch.setattr(datagrams, "send", self._send)

    def _send(self, *args: Any) -> None:
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        self._real(*args)

    def comes(self) -> list[bytes]:
        """The kinds of messages that have come by now; their descriptors are closed."""
        found = []
        try:
            while not found or found[-1]:
                packet, fds = datagrams.receive(self.theirs)
                datagrams.close(fds)
                found.append(packet[:1])
        except BlockingIOError:
            pass
        return found


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Peers(monkeypatch)
    yield found
    found.link.close()
    found.theirs.close()
    found.epoll.close()


@pytest.mark.parametrize("code", PASSING)
def test_what_can_be_said_later_is_said_again_in_its_order(peers: Peers, code: int) -> None:
    peers.errors = [code, code]
    peers.link.say(requests.EXITED, (1,))
    peers.link.say(requests.REFUSED, (2,))
    assert peers.link.again
    assert peers.epoll.poll(0) == [], "it would be asked without a rest"
    peers.link.write()
    assert peers.link.again
    assert peers.comes() == []
    peers.link.write()
    assert peers.comes() == [requests.EXITED, requests.REFUSED]
    assert not peers.link.again


@pytest.mark.parametrize("code", [*PASSING, errno.EMSGSIZE])
def test_a_descriptor_that_the_system_does_not_take_is_an_error(peers: Peers, code: int) -> None:
    """Whoever is asked can refuse then."""
    peers.errors = [code]
    with pytest.raises(OSError, match=os.strerror(code)):
        peers.link.say(requests.STARTED, (1,), 0)
    peers.link.say(requests.REFUSED, (1,))
    assert peers.comes() == [requests.REFUSED]


@pytest.mark.parametrize("code", PASSING)
def test_a_descriptor_that_had_to_wait_is_sent_again(peers: Peers, code: int) -> None:
    peers.errors = [errno.EAGAIN, code]
    peers.link.say(requests.STARTED, (1,), 0)
    assert not peers.link.again
    assert [event for _, event in peers.epoll.poll(0)] == [select.EPOLLOUT]
    peers.link.write()
    assert peers.link.again
    peers.link.write()
    assert peers.comes() == [requests.STARTED]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", GONE)
def test_nothing_is_said_to_who_is_gone(peers: Peers, code: int, late: bool) -> None:
    peers.errors = [errno.EAGAIN] * late + [code]
    peers.link.say(requests.STARTED, (1,), 0)
    if late:
        peers.link.write()
    assert not peers.link.again
    assert peers.comes() == []


def test_what_had_to_wait_and_can_never_be_sent_ends_the_link(peers: Peers, capfd: Any) -> None:
    """So nobody waits for it."""
    peers.errors = [errno.EAGAIN, errno.EMSGSIZE]
    peers.link.say(requests.EXITED, (1,))
    peers.link.write()
    assert peers.comes() == [b""]
    assert os.strerror(errno.EMSGSIZE) in capfd.readouterr().err
