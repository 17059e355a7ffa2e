"""The program forks while groups run: the copy owns nothing of them, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked_host
import psutil
import pytest
from helpers import QUIET, alive, child_process, gone, kill_and_see_it_dead, sh

from aioelastic import Group
from aioelastic.launch import end_helpers

pytestmark = pytest.mark.fresh

LOOPS = ["asyncio", "uvloop"]

# Python 3.12 and later warn of each fork of a process with threads
PYTHON = (sys.executable, "-W", "ignore::DeprecationWarning")


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["command", "direct", "zygote", "spawn", "fork"])
def test_the_original_goes_on(kind: str, loop: str, tmp_path: Path) -> None:
    """Its workers live, its pids are complete, its output goes on and is whole in the log files, in `lines()` and in
    the tee; it stops as ever. In the copy each call tells why it is none, and new groups work."""
    argv = [*PYTHON, forked_host.__file__, loop, kind, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    *shown, last = done.stdout.splitlines()
    texts = ["up", *(f"line {number + 1}" for number in range(len(forked_host.HOWS)))]
    assert sorted(shown) == sorted(f"[w{rank}]: {text}" for rank in range(2) for text in texts)
    assert last == "original"
    assert done.stderr == ""


BUSY = """
import asyncio, os, sys, time, uvloop
from aioelastic import *
from aioelastic.events import *
loop, moment, where = sys.argv[1:]
copies = []

def fork_now(event):
    if type(event).__name__ == moment and event.rank in (0, None) and not copies:
        pid = os.fork()
        copies.append(pid)
        if pid == 0:
            raise SystemExit(3)  # out of the loop, whose tasks the copy's asyncio.run() then cancels

async def main():
    program = "for ((i = 0; i < 20000; i++)); do echo $i; done"
    logs = Logs(dir=where, tee=Std.ALL, prefix="")
    strays = "setsid sleep 1000 >/dev/null 2>&1 & "
    return await supervise(Command("bash", "-c", strays + program), n=2, logs=logs, on_event=fork_now, check=False)

me = os.getpid()
try:
    result = (asyncio if loop == "asyncio" else uvloop).run(main())
finally:
    if os.getpid() == me:
        sys.stderr.write(f"{os.waitstatus_to_exitcode(os.waitpid(copies[0], 0)[1])}\\n")
sys.stderr.write(f"{result.ok} {len(result.leaked)} {result.clean}\\n")
"""


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("moment", ["Spawned", "Exited", "Leaked", "Drained", "GroupDone"])
def test_a_fork_in_the_middle_of_the_groups_own_work(moment: str, loop: str, tmp_path: Path) -> None:
    argv = [*PYTHON, "-c", BUSY, loop, moment, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.stderr == "3\nTrue 2 True\n"
    lines = [str(number) for number in range(20_000)]
    assert sorted(done.stdout.split()) == sorted(lines * 2)
    assert [log.read_text().split() for log in tmp_path.glob("*/attempt_0/*/stdout.log")] == [lines] * 2


ENDS = """
import asyncio, os, signal, sys, time, uvloop
from aioelastic import *
loop, kind, end = sys.argv[1:]

async def main():
    one = Function(time.sleep, 1000) if kind == "zygote" else Command("sleep", "1000")
    async with Group(one, n=2, logs=Logs(tee=Std.NONE)) as group:
        ready, up = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(up, b"!")
            signal.pause()  # the copy lives on
        os.read(ready, 1)
        print(pid, *group.pids.values(), flush=True)
        sys.stdin.readline()
        if end == "exec":
            os.execv("/bin/sleep", ["sleep", "1000"])
        os.kill(os.getpid(), signal.SIGKILL)
(asyncio if loop == "asyncio" else uvloop).run(main())
"""


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["command", "zygote"])
@pytest.mark.parametrize("end", ["kill", "exec"])
async def test_the_end_of_the_original_is_noticed_while_its_copy_lives(end: str, kind: str, loop: str) -> None:
    with child_process(
        [*PYTHON, "-c", ENDS, loop, kind, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        copy, *workers = map(int, program.stdout.readline().split())
        try:
            above = [one.pid for one in psutil.Process(workers[0]).parents()]
            helpers = above[: above.index(program.pid)]
            assert helpers
            program.stdin.write("\n")
            program.stdin.flush()
            for pid in (*workers, *helpers):
                await gone(pid)
            assert alive(copy)
        finally:
            kill_and_see_it_dead(copy, signal.SIGKILL)
            program.kill()
            await gone(copy)


EXECUTOR = """
import asyncio, os, sys, threading, uvloop
from aioelastic import *
loop, how = sys.argv[1:]

async def main():
    async with WorkerExecutor(2, name="x") as executor:
        before = await asyncio.gather(*(executor.run(os.getpid) for _ in range(4)))
        while len(executor.pids) < 2:  # the second may have come too late for these
            await asyncio.sleep(0.001)
        pids = sorted(executor.pids)
        assert set(before) <= set(pids)
        pid = os.fork()
        if pid == 0:
            if how == "return":
                return
            if how == "sys.exit":
                sys.exit(0)
            for call in (lambda: executor.submit(abs, 1), lambda: executor.pids, lambda: executor.resize(1)):
                try:
                    call()
                except RuntimeError as exc:
                    words = "this is a forked copy of the program that started executor 'x': it owns nothing of it"
                    assert str(exc) == words, exc
                else:
                    os._exit(1)
            executor.shutdown()
            with WorkerExecutor(1) as mine:
                assert mine.submit(abs, -2).result() == 2
            return
        _, got = await asyncio.to_thread(os.waitpid, pid, 0)
        assert got == 0, got
        assert sorted(executor.pids) == pids
        assert {await executor.run(os.getpid) for _ in range(4)} <= set(pids)

me = os.getpid()
(asyncio if loop == "asyncio" else uvloop).run(main())
if os.getpid() == me:
    print("original", threading.active_count())
"""


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["return", "sys.exit", "calls"])
def test_an_executor_is_the_originals(how: str, loop: str) -> None:
    argv = [*PYTHON, "-c", EXECUTOR, loop, how]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("original 1\n", "")


KINDS_OF_COPIES = """
import asyncio, multiprocessing, os, pty, sys, threading
from aioelastic import *
from aioelastic.launch import _guardian, _zygote
from aioelastic.processes import census as _proc

def held():
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return {one for one in found if one.startswith(("socket", "pipe", "anon_inode:[pidfd]", "/proc"))}

def work(theirs):
    kept = {one for one in held() & theirs if one not in mine}
    assert not kept, kept
    result = asyncio.run(supervise(Command("echo", "hello"), logs=Logs(tee=Std.NONE)))
    assert str(result[0].stdout) == "hello\\n" and result.clean

def ended(pid):
    assert os.waitpid(pid, 0)[1] == 0

async def main():
    global mine
    mine = held()  # of the program, and of its loop
    async with Group(Function(abs, 1), n=1, logs=Logs(tee=Std.NONE)) as done:
        await done.wait()
    async with Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE)) as group:
        theirs = held()
        assert len(theirs - mine) >= 8
        process = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
        process.start()
        process.join()
        assert process.exitcode == 0
        for fork in (os.fork, lambda: os.forkpty()[0]):
            pid = fork()
            if pid == 0:
                try:
                    work(theirs)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            ended(pid)
        # other threads are in the middle of something
        for lock in (_guardian._lock, _zygote._lock, _proc._lock):
            lock.acquire()
        try:
            pid = os.fork()
        finally:
            if pid:
                for lock in (_guardian._lock, _zygote._lock, _proc._lock):
                    lock.release()
        if pid == 0:
            work(theirs)
            sys.exit(0)
        ended(pid)
        assert len(group.pids) == 2

if __name__ == "__main__":
    me = os.getpid()
    asyncio.run(main())
    print("original")
"""


def test_copies_of_all_kinds_have_none_of_our_descriptors_and_wait_for_no_lock(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KINDS_OF_COPIES)
    done = subprocess.run([*PYTHON, script], capture_output=True, text=True, timeout=100)
    assert done.stdout == "original\n", done.stderr
    assert done.stderr == ""


async def test_a_group_made_before_the_fork_has_a_name_of_its_own_in_the_copy() -> None:
    group = Group(sh("echo $AIOELASTIC_RUN_ID"), logs=QUIET)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            loop = asyncio.SelectorEventLoop()
            os.write(writer, str(loop.run_until_complete(_first_line(group))).encode())
            end_helpers()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as told:
        theirs = (await asyncio.to_thread(told.read)).strip()
    os.waitpid(pid, 0)
    ours = (await _first_line(group)).strip()
    assert ours == group.run_id
    assert theirs
    assert theirs != ours


async def _first_line(group: Group) -> str:
    async with group:
        return str((await group.wait())[0].stdout)


async def test_an_inherited_loop_has_no_new_groups() -> None:
    async with Group(sh("sleep 1000"), logs=QUIET) as group:
        loop = asyncio.get_running_loop()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                asyncio._set_running_loop(loop)
                fresh = Group(sh("exit 0"), logs=QUIET)
                fresh.__aenter__().send(None)
            except RuntimeError as exc:
                code = 7 if "use a new one" in str(exc) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, pid, 0))[1]) == 7
        assert alive(group.pids[0])


SLOW = """
import asyncio, os, sys, threading, uvloop
from aioelastic import *
loop = sys.argv[1]
COUNT = "i=0; while [ $i -lt 300000 ]; do echo $i; i=$((i + 1)); done; echo all >&2"

def forked():
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    copies.append(pid)

copies = []
async def main():
    logs = Logs(tee=Std.OUT, prefix="")
    async with Group(Command("sh", "-c", COUNT), logs=logs) as group:
        lines = group.lines()
        async for line in lines:  # nobody reads stdout: this waits in our memory
            if line.data == b"100000":
                break
        lines.close()
        thread = threading.Thread(target=forked)  # which is not the loop's
        thread.start()
        thread.join()
        copies.append(os.fork())
        if copies[-1] == 0:
            return
        os.write(2, b"forked\\n")
        await group.wait()

me = os.getpid()
(asyncio if loop == "asyncio" else uvloop).run(main())
if os.getpid() == me:
    assert not any(os.waitpid(pid, 0)[1] for pid in copies)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_what_waits_to_be_written_is_written_once(loop: str) -> None:
    with child_process(
        [*PYTHON, "-c", SLOW, loop], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stderr.readline() == "forked\n"
        assert program.stdout.read().split() == [str(number) for number in range(300_000)]
        assert program.stderr.read() == ""
    assert program.returncode == 0


LENT = """
import asyncio, os, sys, uvloop
from concurrent.futures import ProcessPoolExecutor
from aioelastic import *

def runs(fifo):
    with open(fifo, "w") as file:
        file.write("!")
    stopping().wait()
    return os.getpid()

async def main():
    with ProcessPoolExecutor(2) as pool:
        fifo = sys.argv[2]
        os.mkfifo(fifo)
        end = os.open(fifo, os.O_RDWR)
        async with Group(Function(runs, fifo), n=2, start=pool, logs=Logs(tee=Std.NONE)) as group:
            for _ in range(2):
                await asyncio.to_thread(os.read, end, 1)
            pid = os.fork()
            if pid == 0:
                for worker in group:
                    for call in (lambda: worker.send_signal(15), lambda: group.begin_stop() or group.pids):
                        try:
                            call()
                        except RuntimeError:
                            continue
                        os._exit(1)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert not any(worker.exit for worker in group)
            result = await group.stop()
            assert len({one.value for one in result}) == 2, result

if __name__ == "__main__":
    (asyncio if sys.argv[1] == "asyncio" else uvloop).run(main())
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_calls_in_a_lent_executor_are_the_originals(loop: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LENT)
    done = subprocess.run([*PYTHON, script, loop, tmp_path / "fifo"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


BEGINS = """
import os, sys, threading
from aioelastic import WorkerExecutor

def works(executor):
    with executor:
        assert executor.submit(abs, -1).result(60) == 1

def forks():
    for _ in range(10):
        begins.wait()
        pid = os.fork()
        if pid == 0:
            works(WorkerExecutor(1, start=sys.argv[1]))
            os._exit(7)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        begins.wait()

if __name__ == "__main__":
    codes, begins = [], threading.Barrier(2)
    other = threading.Thread(target=forks)
    other.start()
    for _ in range(10):
        executor = WorkerExecutor(1, start=sys.argv[1])
        begins.wait()
        works(executor)
        begins.wait()
    other.join()
    print(set(codes))
"""


@pytest.mark.long
@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
def test_a_fork_in_another_thread_while_an_executor_begins(start: str) -> None:
    """Both work: the original's executor, and one of the copy's own."""
    done = subprocess.run([*PYTHON, "-c", BEGINS, start], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{7}\n", "")


LOWERED = """
import asyncio, os, resource, sys, uvloop
from aioelastic import *

def held():
    return {int(one): os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{one}")}

async def main():
    low = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]
    async with Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE)):
        high = {fd for fd in held() if fd > low[-1]}
        for fd in low:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (low[-1], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        found = (await supervise(Function(held), start="fork", logs=Logs(tee=Std.NONE)))[0].value
        assert high and not high & set(found), found
        pid = os.fork()
        if pid == 0:
            assert not high & set(held())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

(asyncio if sys.argv[1] == "asyncio" else uvloop).run(main())
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_descriptors_above_a_limit_that_was_lowered(loop: str) -> None:
    done = subprocess.run([*PYTHON, "-c", LOWERED, loop], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


FEW = """
import os, resource, sys
import numpy
from aioelastic import sharing

def free():
    got = []
    try:
        while True:
            got.append(os.dup(0))
    except OSError:
        pass
    for fd in got:
        os.close(fd)
    return len(got)

shared = sharing.copy(numpy.ones(100_000))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
blocked = [os.dup(0) for _ in range(free())]
for fd in blocked[: int(sys.argv[1])]:
    os.close(fd)
pid = os.fork()
if pid == 0:
    os._exit(free())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), free())
"""


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_fork_with_few_descriptors_left_costs_none(left: int) -> None:
    done = subprocess.run([*PYTHON, "-c", FEW, str(left)], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == (f"{left} {left}\n", "")
