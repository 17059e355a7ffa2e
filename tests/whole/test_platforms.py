"""The promise of docs/explanation/nothing-left-behind.md, where it is made: each cell of its table is one of these."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Sequence

import psutil
import pytest

from aioelastic.system.shared_memory_names import sweep
from aioelastic.testing._environment import Unavailable, pid_namespace
from aioelastic.testing._supervisor_process import Program

# leaves a child in its group, one in a session of its own, a daemon without a variable, and one that also has taken
# off its mark; says who they are
WORKER = """
import os, resource, time
def leave(session, environ, mark=True):
    ours, theirs = os.pipe()
    if os.fork() == 0:
        if session:
            os.setsid()
        if not mark:
            resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            os.write(theirs, str(os.getpid()).encode())
            os.execve("/bin/sleep", ["sleep", "1000"], environ)
        os._exit(0)
    os.wait()
    return os.read(ours, 100).decode()
here = dict(os.environ)
print(leave(False, here), leave(True, here), leave(True, {}), leave(True, {}, mark=False), flush=True)
"""

ENDS = """
import asyncio, os, sys
from aioelastic import *
async def main():
    result = await supervise(Command(sys.executable, "-S", "-c", WORKER), n=2, logs=Logs(tee=Std.NONE))
    pids = {int(one) for result in result for one in str(result.stdout).split()}
    states = [one for one in pids if os.path.exists(f"/proc/{one}")]
    print("found", len(pids & {one.pid for one in result.leaked}), "there", states, "clean", result.clean, flush=True)
asyncio.run(main())
""".replace("WORKER", repr(WORKER))

# owns two such workers, which stay, until it is killed
OWNS = """
import asyncio, sys
from aioelastic import *
async def main():
    async with Group(Command(sys.executable, "-S", "-c", WORKER + "time.sleep(1000)"), n=2) as group:
        count = 0
        async for line in group.lines():
            print("left", line.text, group.pids[line.rank], flush=True)
            count += 1
            if count == 2:
                print("ready", flush=True)
asyncio.run(main())
""".replace("WORKER", repr(WORKER))

# kills such a program, and waits until nothing of it runs, its guardian and keeper neither, with a bound; whatever is
# orphaned there is never waited for
KILLS = """
import os, psutil, select, signal, subprocess, sys, time
program = subprocess.Popen([sys.executable, "-c", OWNS], stdout=subprocess.PIPE, text=True)
pids = []
for line in program.stdout:
    if line.startswith("left"):
        pids += map(int, line.split()[1:])
    elif line.startswith("ready"):
        break
helpers = [one.pid for one in psutil.Process(program.pid).children(recursive=True) if one.name().startswith("aio-")]
pidfds = [os.pidfd_open(pid) for pid in (*pids, *helpers)]
program.kill()
there, until = [], time.monotonic() + BOUND
for pid, pidfd in zip((*pids, *helpers), pidfds):
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(max(until - time.monotonic(), 0) * 1000):
        there.append([pid, *open(f"/proc/{pid}/stat").read().split()[1:4]])
print("gone", len(pids), len(helpers), *there, flush=True)
""".replace("OWNS", repr(OWNS)).replace("BOUND", "40")


def a_plain_user() -> tuple[str, ...]:
    """Words to run a command without any privilege: a user namespace in which we are nobody."""
    words = ("unshare", "--user")
    try:
        done = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    except OSError as exc:
        raise Unavailable(f"unshare: {exc.strerror}") from exc
    if done.returncode:
        raise Unavailable(done.stderr.strip())
    return words


def as_we_are() -> tuple[str, ...]:
    return ()


PLACES = {"here": as_we_are, "plain_user": a_plain_user, "without_init": pid_namespace}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Sequence[str]:
    try:
        return PLACES[request.param]()
    except Unavailable as exc:
        pytest.skip(f"no {request.param} to be had here: {exc}")


def test_what_workers_leave_is_ended(place: Sequence[str]) -> None:
    with Program(ENDS, before=place) as program:
        assert program.line("found") == "8 there [] clean True", program.errors


def test_all_of_a_killed_program_is_ended(place: Sequence[str]) -> None:
    with Program(KILLS, before=place) as program:
        assert program.line("gone") == "10 2", program.errors


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_manager_signals_all_of_it_at_once(signum: signal.Signals) -> None:
    """As systemd does at `systemctl stop` (KillMode=control-group), and after its TimeoutStopSec."""
    with Program(OWNS) as program, contextlib.ExitStack() as stack:
        program.line("ready")
        family = [program.pid, *(one.pid for one in psutil.Process(program.pid).children(recursive=True))]
        assert len(family) == 1 + 2 + 2 * 5  # with the guardian and its keeper
        pidfds = [os.pidfd_open(pid) for pid in family]
        for fd in pidfds:
            stack.callback(os.close, fd)
        for fd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signum)
        for fd in pidfds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()
        assert program.wait() == -signum
    sweep(tempfile.gettempdir())  # nobody was left to do it: what the next program does
