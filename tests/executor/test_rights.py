"""A program that gives up rights keeps no worker that has them still."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jobs
import pytest

import aioelastic

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root has rights to give up"),
    pytest.mark.parametrize("start", ["zygote", "spawn", "fork"]),
]

OTHER = 54323  # nobody else's: other tests count the processes of theirs
PROGRAM = """
import ctypes, os, resource, sys, time
sys.path.insert(0, {home!r})
from aioelastic import WorkerExecutor
from jobs import waits_in

def rights():
    with open("/proc/self/status") as file:
        had = dict(line.split(":\\t") for line in file.read().splitlines() if ":\\t" in line)
    core = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return had["Uid"].split()[1], *(had[one].strip("0") for one in ("CapEff", "CapBnd", "NoNewPrivs")), core

def give_up_capabilities():
    for one in range(41):
        ctypes.CDLL(None).prctl(24, one, 0, 0, 0)  # PR_CAPBSET_DROP
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(head, (ctypes.c_uint32 * 6)()) == 0

def give_up_user():
    os.setgroups([])
    os.setresgid(54323, 54323, 54323)
    os.setresuid(54323, 54323, 54323)

def give_up_limits():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

if __name__ == "__main__":
    executor = WorkerExecutor(1, start={start!r})
    first = executor.submit(os.getpid).result()
    had = executor.submit(rights).result()
    {how}
    now = executor.submit(rights).result()
    assert executor.submit(os.getpid).result() != first
    executor.shutdown()
    print(had == rights(), now == rights(), had[0])
"""

SEVERAL = {
    "user": "give_up_user()",
    "capabilities": "give_up_capabilities()",
    "limits": "give_up_limits()",
    "effective user": "os.seteuid(54323)",
    "while a task runs": """os.umask(0)
    os.mkfifo({path!r})
    running = executor.submit(waits_in, {path!r})
    gate = open({path!r}, "w")
    give_up_user()
    late = executor.submit(rights)
    gate.write("\\\\n")
    gate.close()
    running.result()
    assert late.result() == rights()""",
}


def run(code: str, home: Path, as_others: bool = False) -> str:
    """What it prints; by an interpreter that others may run, too, if it is to."""
    # what root has made there before it became somebody else, nobody removes but the next program of root's
    environ = {
        **os.environ,
        "TMPDIR": str(home),
        "PYTHONPATH": ":".join([str(Path(aioelastic.__file__).parents[1]), *sys.path]),
    }
    several = [sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"]
    for python in several if as_others else several[:1]:
        tried = [python, "-c", "import aioelastic"]
        who = OTHER if as_others else None
        with suppress(OSError):
            if not subprocess.run(tried, user=who, env=environ, cwd="/", check=False, capture_output=True).returncode:
                break
    else:
        pytest.skip("needs root, and a Python that other users may run")
    script = home / "program.py"
    script.write_text(code)
    for one in (home, *home.parents):  # as deep as a runner of pytest-xdist has them
        if not one.stat().st_mode & 0o001:
            one.chmod(0o755)
    done = subprocess.run([python, str(script)], capture_output=True, text=True, timeout=120, cwd="/", env=environ)
    return done.stdout + done.stderr


@pytest.mark.parametrize("how", SEVERAL)
def test_no_worker_keeps_what_the_program_has_given_up(start: str, how: str, tmp_path: Path) -> None:
    given_up = SEVERAL[how].replace("{path!r}", repr(str(tmp_path / "gate")))
    code = PROGRAM.format(home=str(Path(jobs.__file__).parent), start=start, how=given_up)
    assert run(code, tmp_path, "user" in how or "runs" in how) == "False True 0\n"


def test_no_worker_is_replaced_for_nothing(start: str, tmp_path: Path) -> None:
    code = PROGRAM.format(home=str(Path(jobs.__file__).parent), start=start, how="os.setgroups(os.getgroups())")
    assert run(code.replace("!= first", "== first"), tmp_path) == "True True 0\n"
