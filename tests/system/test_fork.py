"""A signal that waits for a forked copy at its birth is the copy's own: no handler of the original hears of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fresh

SETTING = """
import asyncio, os, signal, sys
sent, copies = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}, [True]
def at_birth():
    if copies[0]:
        for one in sent:
            os.kill(os.getpid(), one)
os.register_at_fork(after_in_child=at_birth)
"""

HOST = (
    SETTING
    + """
from aioelastic import *
got = []
def work():
    return "ran"
async def main():
    for one in sent:
        asyncio.get_running_loop().add_signal_handler(one, got.append, one)
    result = await supervise(Function(work), n=3, start="fork", logs=Logs(tee=Std.NONE), check=False)
    await asyncio.sleep(0)
    # one may end before the last is begun, which is not needed then
    print({one.exit.signal in sent for one in result if one.exit is not None}, got)
if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
)

ONE = (
    SETTING
    + """
import select
from aioelastic.child.guardian import process_start as _start
from aioelastic.child.kernel import forking as _fork
got, (ours, theirs) = [], os.pipe()
os.set_blocking(theirs, False)
signal.set_wakeup_fd(theirs)
for one in sent:
    signal.signal(one, lambda *_: got.append(os.write(theirs, b"heard")))
def look(_):
    told = signal.sigpending() >= sent, {signal.getsignal(one) for one in sent} == {signal.SIG_DFL}
    os.write(1, repr((told, signal.set_wakeup_fd(-1))).encode() + b" ")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.write(1, b"lives")
before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
pid = _fork.fork(look)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
status = os.waitpid(pid, 0)[1]
if sys.argv[1] == "trial":
    pid, pipe = _start.trial(((None, None, None, None, ()), ""), None)
    assert os.waitpid(pid, 0)[1] in sent | {127 << 8}
    print(_start.outcome(pipe), end=" ")
copies[0] = False
print(status in sent, got, select.select([ours], [], [], 0)[0])
"""
)

ZYGOTE = """
import asyncio, sys
from aioelastic import *
import jobs_at_birth
async def main():
    quiet = Logs(tee=Std.NONE)
    result = await supervise(Function(jobs_at_birth.work), n=3, preload=["jobs_at_birth"], logs=quiet, check=False)
    # one may end before the last is begun, which is not needed then
    print({one.exit.signal in jobs_at_birth.sent for one in result if one.exit is not None})
    jobs_at_birth.copies[0] = False
    print((await supervise(Command("true"), logs=Logs(tee=Std.NONE))).ok)
if __name__ == "__main__":
    asyncio.run(main())
"""


def run(script: str, *args: str, cwd: object = None) -> str:
    ran = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=str(cwd or "/"))
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_worker_by_fork(loop: str) -> None:
    assert run(HOST, loop) == "{True} []\n"


def test_a_worker_of_the_zygote(tmp_path: object) -> None:
    """It ends by the signal, and its zygote goes on."""
    with open(f"{tmp_path}/jobs_at_birth.py", "w") as file:
        file.write(SETTING + "def work():\n    return 1\n")
    assert run(ZYGOTE, cwd=tmp_path) == "{True}\nTrue\n"


def test_the_function_itself() -> None:
    """Pending, with nobody's handler and no wake-up descriptor; and it ends the copy as soon as that unblocks it."""
    assert run(ONE, "fork") == "((True, True), -1) True [] []\n"


def test_a_trial() -> None:
    """It is blocked there as long as it lives."""
    assert run(ONE, "trial") == "((True, True), -1) (0, '') True [] []\n"


# a thread that asks for the interpreter lock all the time
BUSY = """
import asyncio, os, sys, threading
from aioelastic import *
from aioelastic.child.kernel.forking import fork
sys.setswitchinterval(1e-6)
over = False
def work():
    while not over:
        pass
thread = threading.Thread(target=work)
thread.start()
try:
    for cgroup in ["", "/there/is/none"]:
        for _ in range(50):
            pid = fork(lambda told: os._exit(told == cgroup), cgroup=cgroup)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    print("forked", flush=True)
    logs = Logs(tee=Std.NONE)
    print(asyncio.run(supervise(Command("true", umask=0o27), n=20, launcher="direct", logs=logs)).ok)
finally:
    over = True
"""


def test_a_copy_does_not_wait_for_a_thread_that_it_has_not() -> None:
    """One that asked for the interpreter lock just then was waited for, by a copy that came to Python too early."""
    ran = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.stderr) == ("forked\nTrue\n", "")


# while a thread imports a package, whose module waits for a gate
IMPORTS = """
import os, sys, threading
from aioelastic import *
sys.path.insert(0, sys.argv[1])
os.environ["HOST"] = str(os.getpid())
def value():
    import slow.inner
    return slow.inner.VALUE
begun, ours = threading.Event(), os.pipe()
sys.modules["begun"], os.environ["GATE"] = begun, str(ours[0])
thread = threading.Thread(target=value)
thread.start()
begun.wait()
with WorkerExecutor(1, start="fork", logs=Logs(tee=Std.NONE)) as executor:
    print(executor.submit(value).result())
os.write(ours[1], b"x")
thread.join()
"""


def test_a_copy_does_not_wait_for_an_import_of_another_thread(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/__init__.py").write_text("from . import inner")
    (tmp_path / "slow/inner.py").write_text(
        "import os, sys\n"
        "if os.environ['HOST'] == str(os.getpid()):\n"
        "    sys.modules['begun'].set()\n"
        "    os.read(int(os.environ['GATE']), 1)\n"
        "VALUE = 7\n"
    )
    ran = subprocess.run([sys.executable, "-c", IMPORTS, tmp_path], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("7\n", "")
