"""A program that replaces itself by execve(2) leaves no worker and no zombie behind, however often."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import until

from aioelastic.testing._process_tree import descendants, strays

PROGRAM = """
import asyncio, json, os, select, sys, time
from aioelastic import Command, Function, Group, Logs, Std, supervise
QUIET = Logs(tee=Std.NONE)
again, pids = int(sys.argv[1]), json.loads(sys.argv[2])

def ended(pid):
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(30_000))

async def main():
    async with Group([Command("sleep", "1000"), Function(time.sleep, 1000)], logs=QUIET, check=False) as group:
        if again:
            now = json.dumps([*pids, *group.pids.values()])
            os.execv(sys.executable, [sys.executable, __file__, str(again - 1), now])
        print(len(pids), all([ended(pid) for pid in pids]))
    await supervise(Command("true"), logs=QUIET)
    names = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = open(f"/proc/{name}/stat").read()
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[:2] == ["Z", str(os.getpid())]:
                names.append(stat)
    print(names)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.long
@pytest.mark.parametrize("uvloop", [False, True])
async def test_ten_times(tmp_path: Path, uvloop: bool) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("asyncio.run(main())", "__import__('uvloop').run(main())") if uvloop else PROGRAM)
    ran = subprocess.run([sys.executable, script, "10", "[]"], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.stderr) == ("20 True\n[]\n", "")
    await until(lambda: not list(strays(descendants())))  # the guardian ends just after its program
