"""The end of all children of a process, and of what they leave to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aioelastic

# a child that has one of its own ends just after we have looked for those that have ended, and is seen to be dead then
LATE = """
import ctypes, os, select, signal, subprocess
from aioelastic.child.kernel import child_processes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!; wait"
shell = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
daemon = os.pidfd_open(int(shell.stdout.readline()))
looked = []
reaped, is_dead = child_processes._reaped, child_processes.is_dead
def late_reaped():
    looked.append(True)
    return reaped() if len(looked) > 1 else 0
def late_is_dead(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return is_dead(pid)
child_processes._reaped, child_processes.is_dead = late_reaped, late_is_dead
child_processes.end_children()
print(bool(select.select([daemon], [], [], 0)[0]))
"""


def test_what_one_leaves_that_ends_between_two_looks_is_ended_too() -> None:
    argv = [sys.executable, "-c", LATE]
    house = str(Path(aioelastic.__file__).parents[1])
    ran = subprocess.run(
        argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": house, "PATH": "/usr/bin:/bin"}
    )
    assert ran.stdout == "True\n", ran.stderr
