"""A fork of the program while another thread is in the middle of a call on shared memory: tried at every line."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import fcntl, os, sys, threading

ran = [lambda: None]
os.register_at_fork(before=lambda: ran[0]())  # the first that is registered runs last: the fork comes next

import numpy as np
from aioelastic import memory, sharing

SIZE = 1 << 20
HOME = os.path.dirname(memory.__file__)


def file():
    fd = os.memfd_create("piece", os.MFD_ALLOW_SEALING)
    os.write(fd, bytes(SIZE))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def received():
    return memory.received(fd, SIZE)


def ours():
    return np.asarray(sharing.empty(SIZE, "u1"))


def at_line(number, act):
    count = [0]

    def step(frame, event, arg):
        if event == "line":
            count[0] += 1
            if count[0] == number:
                act()
        return step

    sys.settrace(lambda frame, event, arg: step if frame.f_code.co_filename.startswith(HOME) else None)
    try:
        return make(), count[0] >= number
    finally:
        sys.settrace(None)


def check(pid, view, number):
    code = os.waitpid(pid, 0)[1]
    if make is received:
        assert code == 0 and view[0] == 0, f"{number}: the copy's writing is seen"
    else:
        segment = next(one for one in memory.shared_segments.segments() if one.owned and one.in_use)
        assert segment.has_copies, f"{number}: it would be used again under the copy's view"
        del segment


def in_another_thread(number):
    "It is at that line when the fork is prepared, and done when that is made."
    there, go, result = threading.Event(), threading.Event(), []

    def run():
        result.append(at_line(number, lambda: (there.set(), go.wait())))
        there.set()

    thread = threading.Thread(target=run)
    thread.start()
    there.wait()
    ran[0] = lambda: (go.set(), thread.join())
    pid = os.fork()
    ran[0] = lambda: None
    if not pid:
        result[0][0][0] = 7
        os._exit(0)
    view, more = result.pop()
    check(pid, view, number)
    return more


fd = file()
make = globals()[sys.argv[1]]
at_line(0, None)
number = 1
while in_another_thread(number):
    number += 1
assert number > 10
"""


@pytest.mark.parametrize("make", ["received", "ours"])
def test_a_copy_s_memory_is_its_own(make: str) -> None:
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, make]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
