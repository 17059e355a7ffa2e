"""Nothing of ours stays among the temporary files, however a program ends, killed at whatever moment."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import until

from aioelastic.testing._process_tree import descendants, strays

HEAD = """
import asyncio, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from aioelastic import Command, Function, Group, Logs, Std, supervise
QUIET = Logs(tee=Std.NONE)
LONG = {
    "command": (lambda: Command("sleep", "1000"), {}),
    "direct": (lambda: Command("sleep", "1000"), {"launcher": "direct"}),
    "direct, short": (lambda: Command("true"), {"launcher": "direct"}),
    "zygote": (lambda: Function(time.sleep, 1000), {}),
    "spawn": (lambda: Function(time.sleep, 1000), {"start": "spawn"}),
    "fork": (lambda: Function(time.sleep, 1000), {"start": "fork"}),
}
make, how = LONG[sys.argv[1]]
"""

ENDS = {
    "returns": "async def main():\n    async with Group(make(), logs=QUIET, check=False, **how): pass",
    "raises": "async def main():\n    async with Group(make(), logs=QUIET, check=False, **how): raise KeyError",
    "exits in a callback": """
async def main():
    async with Group(make(), logs=QUIET, check=False, on_event=lambda event: sys.exit(3), **how) as group:
        await group.wait()
""",
    "never leaves": "async def main():\n    await Group(make(), logs=QUIET, check=False, **how).__aenter__()",
    "closes its loop": """
async def main():
    await Group(make(), logs=QUIET, check=False, **how).__aenter__()
    asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)
    await asyncio.sleep(100)
""",
    "exits at once": """
async def main():
    await Group(make(), logs=QUIET, check=False, **how).__aenter__()
    os._exit(0)
""",
}


def environ(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(tmp_path)}


WAYS = ["command", "direct", "zygote", "spawn", "fork"]
# after the one that is left out there is nobody to do it, and the next program does: see below
CASES = [(way, end) for way in WAYS for end in ENDS if (way, end) != ("direct", "exits at once")]


@pytest.mark.long
@pytest.mark.parametrize(("way", "end"), CASES)
async def test_however_a_program_ends(tmp_path: Path, way: str, end: str) -> None:
    program = f"{HEAD}{ENDS[end]}\nasyncio.run(main())\n"
    subprocess.run([sys.executable, "-c", program, way], capture_output=True, env=environ(tmp_path), timeout=150)
    # after `os._exit` the guardian does it, and then ends
    await until(lambda: os.listdir(tmp_path) == [] and not list(strays(descendants())))


KILLED = """
count, last = 0, int(sys.argv[2])
def hook(name, args):
    global count
    if armed and name.partition(".")[0] in ("os", "open", "socket", "fcntl", "subprocess", "shutil", "tempfile"):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
armed = False
sys.addaudithook(hook)
async def main():
    global armed
    armed = True
    async with Group(make(), n=2, logs=QUIET, check=False, **how):
        pass
asyncio.run(main())
print(count)
"""


@pytest.mark.long
@pytest.mark.parametrize("way", ["command", "zygote", "fork"])
def test_killed_at_any_moment(tmp_path: Path, way: str) -> None:
    """From the beginning of its group to the end."""

    def run(last: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", HEAD + KILLED, way, str(last)]
        return subprocess.run(words, capture_output=True, text=True, env=environ(tmp_path), timeout=150)

    count = int(run(0).stdout)
    for last in range(1, count, max(count // 16, 1)):
        ran = run(last)
        assert (ran.returncode, ran.stderr) in ((-signal.SIGKILL, ""), (0, ""))  # they are not as many each time
        asyncio.run(until(lambda: os.listdir(tmp_path) == [] and not list(strays(descendants()))))


async def test_directories_that_a_worker_put_there_go_with_the_killed_program(tmp_path: Path) -> None:
    program = """
import asyncio, os, signal, sys
from aioelastic import Command, Logs, supervise
code = '''import os
os.makedirs(os.environ["TORCHELASTIC_ERROR_FILE"] + "/a/b"); print(flush=True); os.kill(os.getpid(), 19)'''
def kill(line):
    assert os.listdir(os.environ["TMPDIR"])
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(supervise(Command(sys.executable, "-c", code), logs=Logs(callback=kill)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environ(tmp_path), timeout=150)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    await until(lambda: os.listdir(tmp_path) == [] and not list(strays(descendants())))


def test_what_nobody_could_remove_goes_with_the_next_program(tmp_path: Path) -> None:
    program = f"{HEAD}{ENDS['exits at once']}\nasyncio.run(main())\n"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, "direct, short"], env=environ(tmp_path), timeout=150, check=True)
        assert len(os.listdir(tmp_path)) == 1
    program = f"{HEAD}{ENDS['returns']}\nasyncio.run(main())\n"
    subprocess.run([sys.executable, "-c", program, "direct, short"], env=environ(tmp_path), timeout=150, check=True)
    assert os.listdir(tmp_path) == []
