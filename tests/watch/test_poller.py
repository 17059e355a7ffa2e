"""The poller: one epoll for exits and pipes."""

from __future__ import annotations

import asyncio
import os

from aioelastic.watch import Poller


async def test_an_exit_is_told_once_and_the_loop_gets_its_turn_before_it_is_looked_at_again() -> None:
    """What follows an exit (its reaping) comes with the next turn of the loop: until then it must not be told anew."""
    poller = Poller(asyncio.get_running_loop())
    pipe, end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    told: list[str] = []
    over = asyncio.Event()

    def readable() -> None:
        os.eventfd_read(pipe)
        told.append("data")
        os.eventfd_write(end, 1)  # the exit follows within the same slice
        os.eventfd_write(pipe, 1)

    def exited() -> None:
        told.append("exit")
        asyncio.get_running_loop().call_soon(reap)

    def reap() -> None:
        poller.remove(end)
        poller.remove(pipe)
        over.set()

    poller.add_reader(pipe, readable)
    poller.add_exit(end, exited)
    os.eventfd_write(pipe, 1)
    await over.wait()
    assert told == ["data", "exit"]
    os.close(pipe)
    os.close(end)


async def test_a_callback_may_remove_another_of_the_same_batch() -> None:
    poller = Poller(asyncio.get_running_loop())
    fds = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)]
    told: list[int] = []
    over = asyncio.Event()

    def ready(fd: int) -> None:
        told.append(fd)
        for one in fds:
            poller.remove(one)
        over.set()

    for fd in fds:
        poller.add_reader(fd, lambda fd=fd: ready(fd))
    await over.wait()
    assert len(told) == 1
    for fd in fds:
        os.close(fd)


async def test_one_that_is_kept_has_its_epoll_until_it_is_let_go() -> None:
    poller = Poller(asyncio.get_running_loop())
    fds = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    before = len(os.listdir("/proc/self/fd"))
    poller.keep()
    for fd in fds:
        seen = asyncio.Event()
        poller.add_reader(fd, seen.set)
        await seen.wait()
        poller.remove(fd)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    poller.let_go()
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)
