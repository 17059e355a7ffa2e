"""What a user may have under way at most, and items of other users."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import share_jobs
from helpers import QUIET, child_process

from aioelastic import Function, Group, SpecError, WorkerExecutor, sharing, supervise
from aioelastic.child.wire import datagrams, messages

HOUSE = str(Path(sharing.__file__).parents[2])
NOBODY, OTHER = 65_534, 65_533
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


# --- descriptors under way ---

# as an ordinary user of whom nothing else is under way, who may have 64 of them open, and as many under way
BEGIN = """
import asyncio, fcntl, os, queue, resource, struct, threading, time
from aioelastic import sharing
from aioelastic.child.wire import datagrams as _socket
import aioelastic.sharing._queue, aioelastic.memory.array_messages
sharing.Queue(1).put_nowait(sharing.empty(3))  # all is imported
os.setgroups([]); os.setgid(UID); os.setuid(UID)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
x = [sharing.empty(100_000, "u1") for _ in range(8)]
first, second = sharing.Queue(128), sharing.Queue(2)
def fill(q):
    count = 0
    try:
        while True:
            q.put_nowait((count, x))
            count += 1
    except sharing.Full as exc:
        return count, str(exc)
count, why = fill(first)
assert 5 <= count < 20 and "descriptors under way" in why, (count, why)
def places(q):  # asked one by one: /proc/locks may leave lines out while others lock and unlock
    asked = (struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, number, 1, 0) for number in range(q.maxsize))
    told = (fcntl.fcntl(q._places, fcntl.F_OFD_GETLK, one) for one in asked)
    return sum(one[:2] != struct.pack("h", fcntl.F_UNLCK) for one in told)
assert places(first) == count  # its own was given back
before = sorted(os.listdir("/proc/self/fd"))
"""


def as_a_user(code: str) -> None:
    env = {**os.environ, "PYTHONPATH": HOUSE}
    argv = [sys.executable, "-c", BEGIN.replace("UID", str(100_000 + os.getpid())) + code]
    ran = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert (ran.stdout, ran.stderr) == ("right\n", "")


@needs_root
def test_a_put_with_a_time_out_says_that_there_is_no_room() -> None:
    as_a_user(
        """
for q, timeout in ((first, 0), (first, 0.02), (second, 0.02)):
    try:
        q.put_sync(x, timeout)
    except sharing.Full as exc:
        assert "descriptors under way" in str(exc)
    else:
        raise AssertionError
assert places(first) == count and places(second) == 0
assert sorted(os.listdir("/proc/self/fd")) == before
print("right")
"""
    )


@needs_root
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_put_waits_until_something_was_received(which: str) -> None:
    """From the same queue, or from another, of which no event tells."""
    as_a_user(
        f"""
q = {which}
refused = threading.Event()
real = _socket.send
def send(*args):
    try:
        real(*args)
    except _socket.Crowded:
        refused.set()
        raise
_socket.send = send
thread = threading.Thread(target=q.put_sync, args=(("late", x),))
thread.start()
refused.wait()
assert places(q) <= count + 1
got = [first.get_sync()[0] for _ in range(count)]
thread.join()
assert got == list(range(count)) and q.get_nowait()[0] == "late"
assert [fill(one)[0] for one in (second, first)] == [2, count - 2]
print("right")
"""
    )


@needs_root
def test_tasks_wait_too_and_keep_their_order() -> None:
    as_a_user(
        """
async def main():
    puts = [asyncio.create_task(first.put((count + number, x))) for number in range(20)]
    got = [(await first.get())[0] for _ in range(count + 20)]
    await asyncio.gather(*puts)
    assert got == list(range(count + 20)), got
    cancelled = fill(first)[0]
    late = asyncio.create_task(second.put(x))
    await asyncio.sleep(0)
    late.cancel()
    await asyncio.wait([late])
    assert late.cancelled() and places(second) == 0
asyncio.run(main())
print("right")
"""
    )


@needs_root
def test_who_waits_is_told_that_the_queue_is_closed() -> None:
    as_a_user(
        """
refused = threading.Event()
real = _socket.send
def send(*args):
    refused.set()
    real(*args)
_socket.send = send
came = []
def put():
    try:
        second.put_sync(x)
    except sharing.QueueClosed as exc:
        came.append(exc)
thread = threading.Thread(target=put)
thread.start()
refused.wait()
second.close()
thread.join()
assert len(came) == 1
print("right")
"""
    )


class Crowded:
    """The system refuses the first sends of messages with descriptors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int = 3, kind: bytes = messages.OBJECT) -> None:
        self.left, self._kind = times, kind
        self._real = datagrams.send
        monkeypatch.setattr(datagrams, "send", self._send)

    def _send(self, sock: Any, packet: bytes, fds: Any = (), *flags: int) -> None:
        if fds and packet[:1] == self._kind and self.left:
            self.left -= 1
            raise datagrams.Crowded
        self._real(sock, packet, fds, *flags)


def test_a_send_to_who_is_gone_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two the system tells first."""
    here, there = datagrams.pair()
    with here:
        there.close()
        crowded = Crowded(monkeypatch, 1_000_000)
        with pytest.raises(BrokenPipeError):
            datagrams.deliver(here, b"O1", [0])
        assert crowded.left > 999_000


async def test_a_put_into_a_closed_queue_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    q = sharing.Queue(1)
    Crowded(monkeypatch, 1_000_000, messages.ITEM)
    putting = asyncio.create_task(q.put(1))
    await asyncio.sleep(0)
    q.close()
    with pytest.raises(sharing.QueueClosed):
        await putting


async def test_a_send_to_a_worker_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        x = sharing.empty(100_000, "u1")
        crowded = Crowded(monkeypatch)
        sends = [asyncio.create_task(group[0].send(one)) for one in (x, "after it")]
        assert (await group[0].receive()).address == x.address
        assert await group[0].receive() == "after it"
        await asyncio.gather(*sends)
        assert crowded.left == 0
        await group[0].send(None)


async def test_a_worker_waits_with_what_it_sends_and_with_its_result() -> None:
    async with Group(Function(share_jobs.sends_crowded), logs=QUIET) as group:
        assert (await group[0].receive()).nbytes == 100_000
        result = (await group.wait())[0]
        assert result.value.nbytes == 100_000


def test_a_worker_of_an_executor_waits_with_its_result() -> None:
    with WorkerExecutor(1) as executor:
        assert executor.submit(share_jobs.crowded_once).result().nbytes == 100_000
        assert executor.submit(abs, -1).result() == 1


async def test_an_endpoint_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/tmp/aioelastic-test-{os.getpid()}"
    async with sharing.Endpoint(path, {"x": sharing.empty(100_000, "u1")}):
        crowded = Crowded(monkeypatch)
        with await asyncio.to_thread(sharing.attach, path) as offered:
            assert offered["x"].nbytes == 100_000
        assert crowded.left == 0
    await asyncio.get_running_loop().shutdown_default_executor()


# --- items of other users ---


@pytest.mark.parametrize("uids", [1000, "7", ["root"], [-1], [True], [2**32], None])
def test_what_are_no_users(uids: Any) -> None:
    with pytest.raises(SpecError, match=r"^uids="):
        sharing.Queue(1, uids)


def as_user(uid: int, work: Callable[[], object]) -> None:
    """In a forked copy, which may use descriptors that it has."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Runs:
    """What is called when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def put_by(uid: int, q: sharing.Queue, item: Any) -> None:
    """Raw, as a queue itself does not live in a forked copy."""
    assert q._put is not None
    packet, _ = messages.encode(messages.ITEM, (item,))
    place = os.open(f"/proc/self/fd/{q._places}", os.O_RDWR)
    put = socket.socket(fileno=os.dup(q._put.fileno()))
    as_user(uid, lambda: datagrams.send(put, packet, [place]))
    os.close(place)
    put.close()


@needs_root
def test_an_item_of_another_user_is_refused(capfd: Any) -> None:
    q = sharing.Queue(2)
    put_by(NOBODY, q, Runs())
    q.put_nowait("ours")
    with pytest.raises(PermissionError, match=rf"another user \(uid {NOBODY}\).*Queue\(uids=\[{NOBODY}\]\)"):
        q.get_nowait()
    assert q.get_nowait() == "ours"
    assert capfd.readouterr().out == ""
    q.put_nowait(1)
    q.put_nowait(2)  # its place is free
    assert [q.get_nowait(), q.get_nowait()] == [1, 2]


@needs_root
async def test_an_item_of_a_user_who_was_named(capfd: Any) -> None:
    q = sharing.Queue(2, uids=[NOBODY])
    put_by(NOBODY, q, "theirs")
    assert await q.get() == "theirs"
    put_by(OTHER, q, Runs())
    with pytest.raises(PermissionError, match=f"uid {OTHER}"):
        await q.get()
    assert capfd.readouterr().out == ""


@needs_root
def test_an_item_of_which_nobody_knows_who_has_put_it(capfd: Any) -> None:
    """Whoever has the queue can stop the kernel from saying so."""
    q = sharing.Queue(2, uids=[NOBODY])
    assert q._get is not None
    q._get.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    put_by(OTHER, q, Runs())
    put_by(OTHER, q, Runs())
    with pytest.raises(PermissionError, match="nobody knows whom"):
        q.get_nowait()
    datagrams.ask_who(q._get)  # the kernel has not noted it, and names that of nobody
    with pytest.raises(PermissionError, match=f"uid {NOBODY}"):
        q.get_nowait()
    assert capfd.readouterr().out == ""
    q.put_nowait(1)
    assert q.get_nowait() == 1


BETWEEN = """
import os, sys
from aioelastic import sharing
import aioelastic.child.worker.function_run, aioelastic.sharing._endpoint
os.setgroups([]); os.setresgid(UID, UID, UID); os.setresuid(UID, UID, UID)
with sharing.attach(sys.argv[1], uids=[OWNER]) as offered:
    there, back = offered["there"], offered["back"]
    back.put_sync(["got", there.get_sync()])
"""

OWNS = """
import asyncio, os, sys
from aioelastic import sharing
import aioelastic.child.worker.function_run, aioelastic.sharing._endpoint
os.setgroups([]); os.setresgid(OWNER, OWNER, OWNER); os.setresuid(OWNER, OWNER, OWNER)
async def main():
    there, back = sharing.Queue(1), sharing.Queue(1, uids=TRUSTED)
    async with sharing.Endpoint(sys.argv[1], {"there": there, "back": back}, uids=[UID]):
        print("up", flush=True)
        await there.put("item")
        try:
            print(await back.get())
        except PermissionError as exc:
            print("refused")
asyncio.run(main())
"""


@needs_root
@pytest.mark.parametrize(("trusted", "said"), [([NOBODY], "['got', 'item']"), ([], "refused")])
def test_two_ordinary_users(trusted: list[int], said: str) -> None:
    """Who attaches trusts the owner, and so the items of the owner; the owner trusts whom it names."""
    path = f"/tmp/aioelastic-test-{os.getpid()}"
    env = {**os.environ, "PYTHONPATH": HOUSE}

    def code(text: str) -> list[str]:
        text = text.replace("OWNER", str(OTHER)).replace("UID", str(NOBODY)).replace("TRUSTED", str(trusted))
        return [sys.executable, "-c", text, path]

    with child_process(code(OWNS), stdout=subprocess.PIPE, text=True, env=env) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        subprocess.run(code(BETWEEN), check=True, env=env)
        assert owner.stdout.read() == f"{said}\n"


async def test_a_queue_takes_the_users_along_that_it_trusts() -> None:
    q, back = sharing.Queue(1, uids=[12_345]), sharing.Queue(1)
    result = await supervise(Function(share_jobs.users_of, q), n=1, logs=QUIET)
    assert result[0].value == sorted({os.geteuid(), 12_345})
    del back


def test_who_has_sent_a_message_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def sender(pid: int, uid: int) -> bytes:
        return struct.pack("3I", pid, uid, uid)

    monkeypatch.setattr(datagrams, "_known", {bytes(4)})
    mine = os.getuid()
    for users in (None, frozenset({7})):
        assert datagrams._is_taken(sender(1, 0), users)
        assert datagrams._is_taken(sender(1, mine), users)
        assert datagrams._is_taken(sender(1, 7), users) == (users is not None)
        assert not datagrams._is_taken(sender(1, 8), users)
        assert not datagrams._is_taken(sender(0, NOBODY), users)
    assert datagrams._is_taken(b"", None)
    assert not datagrams._is_taken(b"", frozenset())
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    assert datagrams._is_taken(sender(1, NOBODY), None)
    assert not datagrams._is_taken(sender(0, NOBODY), None)
