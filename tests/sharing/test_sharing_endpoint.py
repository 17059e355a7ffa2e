"""Processes that nobody here has started get what an endpoint offers, if they may."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import child_process, no_descriptors_left, until

from aioelastic import SpecError, sharing
from aioelastic.sharing import _endpoint


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: a socket's name has 107 bytes (unix(7)), and TMPDIR may be deep."""
    with tempfile.TemporaryDirectory(prefix="socket-", dir="/tmp") as name:
        yield Path(name)


HOUSE = str(Path(sharing.__file__).parents[2])


def service_of(endpoint: sharing.Endpoint) -> _endpoint._Service:
    assert endpoint._service is not None
    return endpoint._service


async def stranger(code: str, *argv: str) -> Any:
    env = {**os.environ, "PYTHONPATH": HOUSE}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, *argv, stdin=pipe, stdout=pipe, env=env)


async def test_a_stranger_attaches(tmp_path: Path) -> None:
    x = sharing.copy(np.zeros(100_000))
    q = sharing.Queue(1)
    path = tmp_path / "offered"
    code = """
import sys
import numpy
from aioelastic import sharing
with sharing.attach(sys.argv[1]) as offered:
    print(sorted(offered))
    numpy.asarray(offered["x"])[:] = 3
    offered["queue"].put_sync(numpy.ones(50_000))
"""
    async with sharing.Endpoint(path, {"x": x, "queue": q}):
        assert path.stat().st_mode & 0o777 == 0o600
        process = await stranger(code, str(path))
        assert (await q.get()).sum() == 50_000
        out, _ = await process.communicate()
        assert out.decode() == "['queue', 'x']\n"
        assert (np.asarray(x) == 3).all()
    assert not path.exists()
    with pytest.raises(sharing.ShareLost, match="nobody offers"):
        sharing.attach(path)


async def test_what_was_attached_outlives_the_endpoint(tmp_path: Path) -> None:
    x = sharing.copy(np.ones(100_000))
    async with sharing.Endpoint(tmp_path / "one", {"x": x}) as endpoint:
        offered = await asyncio.to_thread(sharing.attach, endpoint.path)
        mine = offered["x"]
        offered.close()
        assert len(offered) == 0
    assert mine.address == x.address
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_stranger_that_dies_wakes_who_waits(tmp_path: Path) -> None:
    q = sharing.Queue(1)
    code = """
import sys
from aioelastic import sharing
from aioelastic.child.wire import datagrams as _socket
offered = sharing.attach(sys.argv[1])
taken = _socket.receive(offered["queue"]._get)
print("has it", flush=True)
sys.stdin.read()
"""
    async with sharing.Endpoint(tmp_path / "two", {"queue": q}) as endpoint:
        await q.put("lost")
        process = await stranger(code, endpoint.path)
        assert await process.stdout.readline() == b"has it\n"
        putter = asyncio.create_task(q.put("next"))
        await asyncio.sleep(0)
        assert not putter.done()
        process.send_signal(signal.SIGKILL)
        await putter
        assert await q.get() == "next"
        await process.communicate()


async def test_a_name_in_use_and_one_that_was_left(tmp_path: Path) -> None:
    path = tmp_path / "three"
    async with sharing.Endpoint(path, {}):
        with pytest.raises(SpecError, match="in use"):
            await sharing.Endpoint(path, {}).__aenter__()
        assert path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(os.fspath(path))
    async with sharing.Endpoint(path, {}):
        pass
    path.write_text("a file of somebody's")
    with pytest.raises(SpecError, match="in use"):
        await sharing.Endpoint(path, {}).__aenter__()
    assert path.read_text()
    with pytest.raises(SpecError, match="107 bytes"):
        sharing.Endpoint("/tmp/" + "x" * 200, {})


async def test_a_successor_keeps_its_name(tmp_path: Path) -> None:
    """Somebody has removed ours, and another offers there by now."""
    path = tmp_path / "name"
    first = sharing.Endpoint(path, {"a": 1})
    await first.__aenter__()
    path.unlink()
    async with sharing.Endpoint(path, {"a": 2}):
        await first.__aexit__(None, None, None)
        with await asyncio.to_thread(sharing.attach, path) as offered:
            assert offered["a"] == 2
    assert os.listdir(tmp_path) == []


async def test_a_successor_that_comes_at_the_last_moment_keeps_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "name"
    first, second = sharing.Endpoint(path, {"a": 1}), sharing.Endpoint(path, {"a": 2})
    await first.__aenter__()
    name = service_of(first)._name
    inode = name._inode
    entering: list[Any] = []

    def replaced(which: str) -> Any:
        found = inode(which)
        if not entering:
            path.unlink()
            entering.append(second.__aenter__())
            with pytest.raises(StopIteration):
                entering[0].send(None)
        return found

    monkeypatch.setattr(name, "_inode", replaced)
    await first.__aexit__(None, None, None)
    with await asyncio.to_thread(sharing.attach, path) as offered:
        assert offered["a"] == 2
    await second.__aexit__(None, None, None)
    assert os.listdir(tmp_path) == []


async def test_of_two_that_replace_a_left_over_one_has_the_name(tmp_path: Path, monkeypatch: Any) -> None:
    """Both have seen that nobody listens there."""
    path = tmp_path / "name"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(os.fspath(path))
    quick, real = sharing.Endpoint(path, {"a": 1}), _endpoint._Name._stale
    entering: list[Any] = []

    def stale(name: Any, where: str) -> Any:
        found = real(name, where)
        if not entering:
            entering.append(quick.__aenter__())
            with pytest.raises(StopIteration):
                entering[0].send(None)
        return found

    monkeypatch.setattr(_endpoint._Name, "_stale", stale)
    with pytest.raises(SpecError, match="in use"):
        await sharing.Endpoint(path, {"a": 2}).__aenter__()
    with await asyncio.to_thread(sharing.attach, path) as offered:
        assert offered["a"] == 1
    await quick.__aexit__(None, None, None)
    assert os.listdir(tmp_path) == []


async def test_a_name_without_hard_links(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fails)
    path = tmp_path / "name"
    async with sharing.Endpoint(path, {"a": 1}):
        assert os.listdir(tmp_path) == ["name"]
        with pytest.raises(SpecError, match="in use"):
            await sharing.Endpoint(path, {"a": 2}).__aenter__()
        with await asyncio.to_thread(sharing.attach, path) as offered:
            assert offered["a"] == 1
    assert os.listdir(tmp_path) == []


async def test_who_comes_again_and_again_costs_nothing(tmp_path: Path) -> None:
    code = """
import sys
from aioelastic import sharing
for _ in range(50):
    with sharing.attach(sys.argv[1]) as offered:
        assert dict(offered) == {"a": 1}
print("done", flush=True)
sys.stdin.read()
"""
    async with sharing.Endpoint(tmp_path / "again", {"a": 1}):
        process = await stranger(code, str(tmp_path / "again"))
        before = len(os.listdir("/proc/self/fd"))
        assert process.stdout is not None
        assert await process.stdout.readline() == b"done\n"
        try:  # one is for the process, whose end it awaits
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)
        finally:
            await process.communicate(b"")
        await until(lambda: len(os.listdir("/proc/self/fd")) < before)


async def test_what_cannot_be_sent_is_told_to_who_asks(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    told = loop.create_future()
    loop.set_exception_handler(lambda _, context: told.set_result(context["message"]))
    async with sharing.Endpoint(tmp_path / "socket", {"lock": threading.Lock()}):
        with pytest.raises(sharing.ShareLost, match=r"cannot be sent: TypeError: cannot pickle '_thread.lock'"):
            await asyncio.to_thread(sharing.attach, tmp_path / "socket")
        assert "cannot be sent" in await told


async def test_who_does_not_answer(tmp_path: Path) -> None:
    async with sharing.Endpoint(tmp_path / "socket", {}):
        with pytest.raises(TimeoutError, match="does not answer"):
            sharing.attach(tmp_path / "socket", timeout=0.01)  # our own loop, which stands still meanwhile


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("objects", ("x", [1])),
        ("objects", ("x", {1: 2})),
        ("uids", ("x", {}, 1000)),
        ("uids", ("x", {}, ["root"])),
        ("uids", ("x", {}, "7")),
    ],
)
def test_wrong_offers(field: str, arguments: Any) -> None:
    with pytest.raises(SpecError, match=f"^{field}="):
        sharing.Endpoint(*arguments)


async def test_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/socket"):
        await sharing.Endpoint(tmp_path / "no" / "socket", {}).__aenter__()
    with pytest.raises(SpecError, match=r"^timeout=-1"):
        sharing.attach(tmp_path / "socket", timeout=-1)
    with pytest.raises(SpecError, match=r"^keep=-1"):
        sharing.trim(-1)


async def test_without_descriptors_the_loop_goes_on_and_nobody_is_turned_away(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with sharing.Endpoint(tmp_path / "full", {"a": 1}) as endpoint:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            with no_descriptors_left():
                peer.connect(os.fspath(tmp_path / "full"))
                await until(lambda: service_of(endpoint)._rest is not None)
                assert not loop.remove_reader(
                    service_of(endpoint)._listener.fileno()
                )  # else it were told of it in each turn
            peer.setblocking(False)
            assert await loop.sock_recv(peer, 100)


async def test_a_name_that_somebody_has_removed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with sharing.Endpoint(tmp_path / "gone", {"a": 1}) as endpoint:
        with await asyncio.to_thread(sharing.attach, endpoint.path) as offered:
            assert offered["a"] == 1
        os.unlink(endpoint.path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_other_users_are_not_let_in(tmp_path: Path) -> None:
    path = Path(f"/tmp/aioelastic-test-{os.getpid()}")
    # it may connect, by the mode; who it is decides
    code = """
import os, sys
from aioelastic import sharing
import aioelastic.child.worker.function_run, aioelastic.sharing._endpoint
os.setuid(65534)
try:
    with sharing.attach(sys.argv[1], uids=[int(uid) for uid in sys.argv[2:]]) as offered:
        print(dict(offered))
except PermissionError as exc:
    print(exc)
"""
    for uids, trusted, said in (
        ([65533], ["0"], "does not let user 65534 in"),
        ([65534], [], "belongs to user 0"),
        ([65534], ["0"], "{'a': 1}"),
    ):
        async with sharing.Endpoint(path, {"a": 1}, uids=uids):
            process = await stranger(code, str(path), *trusted)
            out, _ = await process.communicate()
            assert said in out.decode()
    gc.collect()


COPIES = """
import asyncio, contextlib, os, sys, uvloop
from aioelastic import sharing
loop, end, path, fifo = sys.argv[1:]

def held():
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {one for one in found if one.startswith(("socket", "anon_inode:[pidfd]"))}

async def main():
    before = held()
    async with sharing.Endpoint(path, {"a": 1}) as endpoint:
        with await asyncio.to_thread(sharing.attach, path) as offered:
            theirs = held() - before
            pid = os.fork()
            if pid == 0:
                kept = theirs & held()
                assert not kept and offered["a"] == 1, kept
                if end == "sys.exit":
                    sys.exit(0)
                if end == "return":
                    return
                await endpoint.__aexit__(None, None, None)
                open(fifo).read()  # it lives longer than the original
                os._exit(0)
            if end != "lives":
                assert (await asyncio.to_thread(os.waitpid, pid, 0))[1] == 0
            with await asyncio.to_thread(sharing.attach, path) as again:
                assert again["a"] == 1
        while endpoint._service._peers:  # the copy has none of their ends
            await asyncio.sleep(0)
    assert not os.path.exists(path)

me = os.getpid()
(asyncio if loop == "asyncio" else uvloop).run(main())
if os.getpid() == me:
    print("original")
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("end", ["sys.exit", "return", "lives"])
def test_a_forked_copy_has_nothing_of_it(end: str, loop: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    argv = ("-W", "ignore::DeprecationWarning", "-c", COPIES, loop, end, tmp_path / "name", fifo)
    with child_process([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        said = program.stdout.readline()
        if end == "lives" and said:
            program.wait()
            fifo.write_text("")
        assert (said, program.stderr.read()) == ("original\n", "")


async def test_those_who_come_do_not_use_up_the_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_endpoint, "_most", lambda: 4)
    async with sharing.Endpoint(tmp_path / "many", {"a": 1}) as endpoint:
        attach = partial(asyncio.to_thread, sharing.attach, endpoint.path)
        came = [await attach() for _ in range(3)]  # and one for this process
        with pytest.raises(sharing.ShareLost, match="as many processes as it has descriptors for"):
            await attach()
        came.pop().close()
        service = service_of(endpoint)
        await until(lambda: len(service._peers) == 2)
        came.append(await attach())
        for one in came:
            one.close()
    await asyncio.get_running_loop().shutdown_default_executor()
