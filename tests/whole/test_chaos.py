"""Groups at random deaths, cancellations and stops: nothing is left, and the supervisor always answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from group_chaos import assert_over, disturb
from helpers import QUIET, alive, event_of, gone, kill_and_see_it_dead, sh, until

from aioelastic import Command, Group, Stop, Unkillable, supervise
from aioelastic.events import Drained, Event, Exited, Spawned
from aioelastic.launch import DirectLauncher, DirectProcess
from aioelastic.model.states import State
from aioelastic.testing._misbehaving_workers import daemon, fork_storm, made, stubborn
from aioelastic.testing._recorder import Recorder
from aioelastic.testing._supervisor_process import Program
from aioelastic.testing._unrelated_processes import bystanders

pytestmark = pytest.mark.fresh

TREE = "sleep 1000 & setsid sleep 1000 & sleep 1000 >/dev/null 2>&1 & echo up; "


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("what", ["worker", "cancel", "grandchildren", "stop", "hurry", "pause"])
async def test_a_random_party_dies_at_a_random_event(what: str, seed: int) -> None:
    dice = random.Random(f"{what} {seed}")
    moment = dice.randrange(12 if what in ("cancel", "stop", "hurry") else 5)  # later, somebody may be gone
    count = done = 0
    task: asyncio.Task[Any] | None = None
    group: Group

    def strike(event: Event) -> None:
        nonlocal count
        count += 1
        if count > moment and task is not None:
            attempt()

    def attempt() -> None:
        nonlocal done
        done = done or blow()
        if not done:
            asyncio.get_running_loop().call_later(0.001, attempt)

    def blow() -> bool:
        if what == "grandchildren":
            pids = group.pids.values()
            return any(subprocess.run(["pkill", "-KILL", "-P", str(pid)], check=False).returncode == 0 for pid in pids)
        return disturb(what, group, task, dice)

    endings = ["exit 0", "exec sleep 0.01", "wait"]
    if what in ("cancel", "stop", "hurry"):  # else there is nobody to be struck for long, if one fails
        endings += ["exit 3", "kill -9 $$"]
    plans = [TREE + dice.choice(endings) for _ in range(4)] + [TREE + "wait"]

    async def main() -> None:
        nonlocal group
        group = Group([sh(one) for one in plans], logs=QUIET, stop=Stop(grace=0.2), on_event=strike, check=False)
        async with group:
            if what == "grandchildren":
                await until(lambda: bool(done))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(group.wait(), 1.0)

    task = asyncio.create_task(main())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert done
    assert_over(group)


async def test_a_worker_that_forks_while_it_is_killed() -> None:
    async with Group(fork_storm(), logs=QUIET, stop=Stop(grace=0.05)) as group:
        await event_of(group, Spawned)
    assert group[0].exit is not None


async def test_many_cancels_in_a_row() -> None:
    recorder = Recorder()
    stop = Stop(grace=3600)
    task = asyncio.create_task(supervise(stubborn(), n=3, logs=QUIET, stop=stop, on_event=recorder))
    await recorder.wait(Spawned, rank=2)
    for _ in range(20):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_starting() -> None:
    for moment in range(6):
        pids: list[int] = []
        tasks: list[asyncio.Task[Any]] = []

        def watch(
            event: Event, moment: int = moment, pids: list[int] = pids, tasks: list[asyncio.Task[Any]] = tasks
        ) -> None:
            if isinstance(event, Spawned):
                pids.append(event.pid or 0)
                if event.rank == moment:
                    tasks[0].cancel()

        tasks.append(asyncio.create_task(supervise(sh("exec sleep 1000"), n=8, logs=QUIET, on_event=watch)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert not any(map(alive, pids))


class Undying(DirectLauncher):
    """A launcher whose processes do not feel SIGKILL, as one in uninterruptible sleep does not."""

    def start(self, worker: Any) -> Any:
        process = super().start(worker).result()

        class Deaf:
            def __getattr__(self, name: str) -> Any:
                return getattr(process, name)

            def send_signal(self, signum: int) -> bool:
                return True if signum == signal.SIGKILL else process.send_signal(signum)

            def signal_group(self, signum: int) -> bool:
                return True if signum == signal.SIGKILL else process.signal_group(signum)

        deaf = asyncio.get_running_loop().create_future()
        deaf.set_result(Deaf())
        return deaf


async def test_unkillable_is_data() -> None:
    group = Group(
        sh("trap '' TERM; echo up; while :; do sleep 1000 & wait; done"),
        n=2,
        logs=QUIET,
        stop=Stop(grace=0.01, bound=0.01, scope="leader"),
        launcher=Undying(dict(os.environ)),
        check=False,
    )
    async with group:
        up: set[int] = set()
        async for line in group.lines():
            up.add(line.rank)
            if len(up) == 2:
                break
    result = await group.wait()
    pids = [one.pid for one in result]
    try:
        assert not result.ok
        assert [one.rank for one in result.unkillable] == [0, 1]
        assert all(
            isinstance(one, Unkillable) and one.pid == pid for one, pid in zip(result.unkillable, pids, strict=True)
        )
        assert all(one.state in "SRD" for one in result.unkillable)
        assert [one.exit for one in result] == [None, None]
        assert group[0].state is State.UNKILLABLE
        assert await group[0].wait() is None
        assert "would not die" in result[0].outcome
        assert all(one.why is not None and one.why.kind == "stuck" for one in result)
        assert f"pid {pids[0]}, state " in str(result[0].why)
    finally:
        for pid in pids:
            assert pid is not None
            os.killpg(pid, signal.SIGKILL)
            await gone(pid)
    await supervise(sh("exit 0"), logs=QUIET)  # a later group reaps those that were ours


async def test_bystanders_live() -> None:
    """Processes of every kind that are not ours, some of them much alike, are never touched."""
    with bystanders():
        for _ in range(3):
            await supervise(sh(TREE + "exit 1"), n=3, logs=QUIET, stop=Stop(grace=0.1), check=False)


async def test_exit_event_comes_before_the_pipes_end() -> None:
    async with Group(sh("sleep 1000 & exit 0"), logs=QUIET, stop=Stop(grace=0.2)) as group:
        kinds = [type(e) async for e in group.events() if isinstance(e, Exited | Drained)]
    assert kinds == [Exited, Drained]


@pytest.mark.parametrize("kind", [ZeroDivisionError, asyncio.CancelledError])
async def test_on_event_that_raises_is_told_to_the_loop_only(kind: type[BaseException]) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))

    def bad(event: Event) -> None:
        raise kind

    result = await supervise(sh("exit 0"), n=2, logs=QUIET, on_event=bad)
    assert result.ok
    assert len(told) == 7  # three per worker, and the end
    assert all(isinstance(one["exception"], kind) for one in told)


def test_interpreter_exit_without_closing_the_loop() -> None:
    """A loop that is dropped with a live group (KeyboardInterrupt in run_until_complete, say) leaves no worker."""
    code = """
import asyncio
from aioelastic import *
loop = asyncio.new_event_loop()
async def main():
    group = Group(Command("sleep", "1000"), n=2, logs=Logs(tee=Std.NONE))
    await group.__aenter__()
    print(*group.pids.values(), flush=True)
    return group
group = loop.run_until_complete(main())
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    pids = [int(one) for one in out.stdout.split()]
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_a_forked_copy_of_the_host_kills_nobody() -> None:
    code = """
import asyncio, os, sys
from aioelastic import *
async def main():
    async with Group(Command("sleep", "1000"), logs=Logs(tee=Std.NONE)) as group:
        pid = os.fork()
        if pid == 0:
            import atexit
            atexit._run_exitfuncs()
            os._exit(0)
        os.waitpid(pid, 0)
        state = open(f"/proc/{group[0].pid}/stat").read().rpartition(")")[2].split()[0]
        assert state in "SR", state
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_twice_in_a_script() -> None:
    """asyncio.run: the first SIGINT cancels politely; the second raises KeyboardInterrupt in the middle of whatever
    runs, our own code included; no worker survives."""
    code = """
import asyncio, sys
from aioelastic import *
from aioelastic.events import *
from aioelastic.testing import stubborn
def told(event):
    if isinstance(event, (Stopping, Killed)):
        print(type(event).__name__, event.pid, flush=True)
logs = Logs(tee=Std.NONE, callback=lambda line: print(line.text, flush=True))
asyncio.run(supervise(stubborn(), n=2, logs=logs, stop=Stop(grace=3600), on_event=told))
"""
    with Program(code) as script:
        for _ in range(2):
            script.line("up")
        script.send_signal(signal.SIGINT)
        pids = [int(script.line("Stopping")) for _ in range(2)]
        script.send_signal(signal.SIGINT)
        script.wait()
    assert "KeyboardInterrupt" in script.errors
    assert not any(map(alive, pids))


INTERRUPTING = """
import asyncio, sys
from aioelastic import *
Loop = __import__(sys.argv[1]).new_event_loop
async def main(what, how, end):
    once = iter([how])
    def told(one):
        if type(one).__name__ == what:
            for ending in once:
                raise ending
    stays = "echo up; exec sleep 600"
    script = {"ends": "echo up", "fails": "[ $RANK = 1 ] && exit 3; " + stays, "left": stays}
    logs = Logs(tee=Std.NONE, callback=told)
    async with Group(Command("sh", "-c", script[end]), n=3, on_event=told, logs=logs) as group:
        if end != "left":
            await group.wait()
for end, kinds in (
    ("ends", ("Spawned", "Line", "Exited", "Drained", "GroupDone")),
    ("fails", ("Spawned", "Exited", "Stopping", "Drained", "GroupDone")),
    ("left", ("Spawned", "Stopping", "Exited", "Drained", "GroupDone")),
):
    for what in kinds:
        for how in (KeyboardInterrupt, SystemExit):
            try:
                with asyncio.Runner(loop_factory=Loop) as runner:
                    runner.run(main(what, how, end))
            except how:
                pass
            except BaseException as exc:
                print(end, what, how, repr(exc))
            else:
                print(end, what, how, "was lost")
print("all")
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_callback_that_ends_the_program_ends_the_group(loop: str) -> None:
    """Ctrl-C, or `sys.exit()`, in the caller's own code that we call: our work goes on to its end, and so does that."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTING, loop], capture_output=True, text=True, timeout=150)
    assert (done.stdout, done.stderr) == ("all\n", "")


@pytest.mark.long
async def test_two_thousand_workers() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 7000:
        pytest.fail(f"this test needs `ulimit -Hn` of 7000; it is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 7000), hard))
    try:
        async with Group(sh("exec sleep 1000"), n=2000, logs=QUIET, check=False) as group:
            kill_and_see_it_dead(group[1234].pid, signal.SIGKILL)
            result = await group.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [one.rank for one in result.failures] == [1234]
    assert sum(one.stopped for one in result) == 1999


async def test_host_waits_for_all_its_children_in_a_thread() -> None:
    """A thread of the host that calls waitpid(-1) steals statuses: nothing hangs, and nothing is made up."""
    ready = threading.Event()

    def thief() -> None:
        ready.set()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    async with Group(sh("exec sleep 1000"), n=3, logs=QUIET, check=False, launcher="direct") as group:
        thread = threading.Thread(target=thief)
        thread.start()
        ready.wait()
        os.kill(group[1].pid or 0, signal.SIGKILL)
        result = await group.wait()
    thread.join()
    for one in result:
        assert one.exit is not None
        assert one.exit.code != 0
    assert result.failures


async def test_reaped_by_the_host_between_our_look_and_our_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    look = DirectProcess._has_ended

    def then_reaped(process: DirectProcess) -> bool:
        ended = look(process)
        if not ended and process.pid == group[0].pid:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
        return ended

    async with Group(sh("exec sleep 1000"), n=2, logs=QUIET, check=False, launcher="direct") as group:
        monkeypatch.setattr(DirectProcess, "_has_ended", then_reaped)
        os.kill(group[1].pid or 0, signal.SIGKILL)
        result = await group.wait()
    assert all(one.exit is not None and one.exit.code != 0 for one in result)


async def test_pipe_closed_by_the_worker_itself() -> None:
    result = await supervise(sh("exec >&- 2>&-; exec sleep 0.01"), logs=QUIET)
    assert result.ok


async def test_worker_that_daemonises() -> None:
    result = await supervise(daemon(clean=False), logs=QUIET)
    (pid,) = made(result[0].stdout)
    assert not alive(pid)
    assert [one.pid for one in result.leaked] == [pid]


async def test_nested_supervisors() -> None:
    """A worker that is a supervisor itself is SIGKILLed: its guardian ends its workers, if ours does not."""
    inner = Command(
        sys.executable,
        "-c",
        "import asyncio\n"
        "from aioelastic import *\n"
        "async def main():\n"
        "    async with Group(Command('sleep', '1000'), n=2, logs=Logs(tee=Std.NONE)) as group:\n"
        "        print(*group.pids.values(), flush=True)\n"
        "        await group.wait()\n"
        "asyncio.run(main())\n",
    )
    async with Group(inner, logs=QUIET, check=False) as group:
        async for line in group.lines():
            pids = [int(one) for one in line.text.split()]
            break
        os.kill(group[0].pid or 0, signal.SIGKILL)
        result = await group.wait()
    assert len(pids) == 2
    assert not any(map(alive, pids))
    assert {one.pid for one in result.leaked if one.command == "sleep 1000"} <= set(pids)


async def test_a_sink_that_cannot_be_made_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in us just after a start, the process is known and ended."""
    from aioelastic.streams import Sinks

    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Sinks, "taps", broken)
    with pytest.raises(ZeroDivisionError):
        await supervise(sh("exec sleep 1000"), n=3, logs=QUIET)
