"""`supervise()` and `Group`: success, first failure, stopping, and what is left: nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
import signal
import sys
from pathlib import Path

import anyio
import pytest
from helpers import QUIET, alive, event_of, gone, kill_and_see_it_dead, py, sh, stopped_itself

from aioelastic import Command, Group, GroupFailed, GroupTimeout, Logs, Std, Stop, WorkerFailed, supervise
from aioelastic.events import Drained, Exited, GroupDone, Killed, Leaked, Spawned, Stopping
from aioelastic.model.states import State
from aioelastic.system import time_slices


async def test_all_succeed() -> None:
    result = await supervise(sh("exit 0"), n=3, logs=QUIET)
    assert result.ok
    assert result.reason == "done"
    assert [one.exit.code for one in result if one.exit] == [0, 0, 0]
    assert [one.rank for one in result] == [0, 1, 2]
    assert not result.failures


async def test_three_forms_of_entry() -> None:
    built = await supervise(lambda rank: sh(f"echo {rank}"), n=2, logs=QUIET)
    assert [str(one.stdout) for one in built] == ["0\n", "1\n"]
    listed = await supervise([sh("echo server"), sh("echo client")], logs=QUIET)
    assert [str(one.stdout) for one in listed] == ["server\n", "client\n"]
    single = await supervise(sh("echo $RANK $WORLD_SIZE"), logs=QUIET)
    assert str(single[0].stdout) == "0 1\n"


async def test_first_failure_stops_the_others_and_is_marked() -> None:
    entry = lambda rank: sh("kill -STOP $$; exit 3" if rank == 1 else "exec sleep 1000")  # noqa: E731
    async with Group(entry, n=4, logs=QUIET) as group:
        await stopped_itself(group[1].pid)
        group[1].send_signal(signal.SIGCONT)
        with pytest.raises(GroupFailed) as caught:
            await group.wait()
    result = caught.value.result
    assert [failure.rank for failure in result.failures] == [1]
    assert result.first_failure is not None
    assert result.first_failure.first
    assert result.first_failure.cause == "exit code 3"
    assert [one.stopped for one in result] == [True, False, True, True]
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGTERM
    assert result[0].exit.stopped_by == signal.SIGTERM
    assert not result[0].failure
    assert isinstance(caught.value.exceptions[0], WorkerFailed)


async def test_check_false_returns() -> None:
    result = await supervise(sh("echo oops >&2; exit 3"), logs=QUIET, check=False)
    assert not result.ok
    assert result.failures[0].stderr.last_lines() == ["oops"]


async def test_failures_in_true_order() -> None:
    """Three die by themselves before the loop looks: listed by the kernel's order, not by rank."""
    async with Group(sh("exec sleep 1000"), n=3, logs=QUIET, check=False) as group:
        for rank in (2, 0, 1):
            kill_and_see_it_dead(group[rank].pid, signal.SIGSEGV)
        result = await group.wait()
    assert [one.rank for one in result.failures] == [2, 0, 1]
    assert [one.first for one in result.failures] == [True, False, False]
    ended = [one.exit.ended_ns for one in result.failures if one.exit]
    assert ended == sorted(ended)


async def test_two_crashes_before_we_signal_are_both_failures() -> None:
    """A worker that had died by itself when we came to stop it is not `stopped by us`."""
    async with Group(sh("exec sleep 1000"), n=2, logs=QUIET, check=False) as group:
        for worker in group:
            kill_and_see_it_dead(worker.pid, signal.SIGKILL)
        result = await group.wait()
    assert [one.cause for one in result.failures] == ["SIGKILL", "SIGKILL"]
    assert not any(one.stopped for one in result)


async def test_grace_then_kill() -> None:
    ignoring = py(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    )
    async with Group(ignoring, logs=QUIET, stop=Stop(grace=0.05)) as group:
        async for line in group.lines():
            assert line.data == b"up"
            break
        result = await group.stop()
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGKILL
    assert result[0].exit.stopped_by == signal.SIGKILL
    assert result.ok


async def test_events_in_order() -> None:
    seen = []
    async with Group(sh("exit 0"), n=2, logs=QUIET) as group:
        async for event in group.events():
            seen.append((type(event), event.rank))
    for rank in (0, 1):
        assert [kind for kind, r in seen if r == rank] == [Spawned, Exited, Drained]
    assert seen[-1] == (GroupDone, None)


async def test_leaving_the_block_stops_what_runs() -> None:
    async with Group(sh("exec sleep 1000"), n=3, logs=QUIET) as group:
        pids = list(group.pids.values())
        assert len(pids) == 3
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    result = await group.wait()
    assert result.ok
    assert result.reason == "stopped"
    assert all(one.stopped for one in result)


async def test_stops_in_reverse_order() -> None:
    async with Group(sh("exec sleep 1000"), n=4, logs=QUIET) as group:
        await group.stop()
        order = [event.rank async for event in group.events() if isinstance(event, Stopping)]
    assert order == [3, 2, 1, 0]


async def test_all_are_signalled_and_told_of_before_more_is_done_about_any() -> None:
    tasks: list[int] = []

    def watch(event: object) -> None:
        if isinstance(event, Stopping):
            tasks.append(len(asyncio.all_tasks()))

    async with Group([sh("exec sleep 1000")] * 3 + [sh("exit 3")], logs=QUIET, check=False, on_event=watch) as group:
        result = await group.wait()
    assert [one.stopped for one in result] == [True, True, True, False]
    assert len(tasks) == 3
    assert len(set(tasks)) == 1  # what waits for them comes after the last


async def test_the_state_tells_how_it_ended() -> None:
    async with Group([sh("exit 0"), sh("exit 3"), sh("exec sleep 1000")], logs=QUIET, check=False) as group:
        assert repr(group) == f"<Group 'worker': 3 workers, running, run id {group.run_id}>"
        await group.wait()
        assert [worker.state for worker in group] == [State.SUCCEEDED, State.FAILED, State.STOPPED]
        assert repr(group[1]) == f"<Worker rank=1 pid={group[1].pid} failed>"
    assert repr(group) == f"<Group 'worker': 3 workers, ended: 1 failed, 1 stopped, 1 succeeded; run id {group.run_id}>"


def test_a_group_before_its_start_is_shown() -> None:
    group = Group(sh("exit 0"), n=2, name="web")
    assert repr(group) == f"<Group 'web': 2 workers, not started; run id {group.run_id}>"


async def test_exception_in_the_body() -> None:
    with pytest.raises(KeyError):
        async with Group(sh("exec sleep 1000"), n=2, logs=QUIET) as group:
            raise KeyError("mine")
    assert group.pids == {}
    assert all(worker.state is State.STOPPED for worker in group)


async def test_cancelled_task_stops_the_group() -> None:
    started = asyncio.Event()
    pids: list[int] = []

    def watch(event: object) -> None:
        if isinstance(event, Spawned):
            pids.append(event.pid or 0)
            if len(pids) == 3:
                started.set()

    task = asyncio.create_task(supervise(sh("exec sleep 1000"), n=3, logs=QUIET, on_event=watch))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(map(alive, pids))


async def test_second_cancel_skips_the_grace() -> None:
    stubborn = sh("trap '' TERM; echo up; while :; do sleep 1000 & wait; done")
    killed: list[object] = []
    up = asyncio.Event()
    stopping = asyncio.Event()

    def watch(event: object) -> None:
        if isinstance(event, Stopping):
            stopping.set()
        if isinstance(event, Killed):
            killed.append(event)

    task = asyncio.create_task(
        supervise(
            stubborn,
            logs=Logs(tee=Std.NONE, callback=lambda line: up.set()),
            stop=Stop(grace=3600),
            on_event=watch,
        )
    )
    await up.wait()
    task.cancel()
    await stopping.wait()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(killed) == 1


async def test_a_cancellation_while_many_workers_are_made_ready_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slices, "SLICE", -1.0)  # the loop gets a turn after each
    group = Group(Command("sleep", "1000"), n=20, logs=QUIET)

    async def hold() -> None:
        async with group:
            await asyncio.sleep(1000)

    task = asyncio.create_task(hold())
    while not len(group):  # noqa: ASYNC110  # no event tells
        await asyncio.sleep(0)
    assert len(group) < 20
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), 150)
    result = await group.wait()
    assert (result.reason, len(result)) == ("stopped", 20)
    assert {one.outcome for one in result} == {"never started"}


async def test_anyio_cancel_scope() -> None:
    with anyio.CancelScope() as scope:
        async with Group(sh("exec sleep 1000"), n=2, logs=QUIET) as group:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert group.pids == {}


async def test_timeout() -> None:
    with pytest.raises(GroupTimeout) as caught:
        await supervise(sh("exec sleep 1000"), n=2, logs=QUIET, timeout=0.01)
    assert caught.value.result.reason == "timeout"
    assert isinstance(caught.value, TimeoutError)
    result = await supervise(sh("exec sleep 1000"), logs=QUIET, timeout=0, check=False)
    assert not result.ok


async def test_wait_for_bounds_a_wait_without_stopping() -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.wait(), 0.01)
        assert alive(group[0].pid or 0)


async def test_group_failed_when_leaving_unless_told() -> None:
    with pytest.raises(GroupFailed):
        async with Group(sh("exit 1"), logs=QUIET) as group:
            await event_of(group, Exited)
    async with Group(sh("exit 1"), logs=QUIET) as group:
        with pytest.raises(GroupFailed):
            await group.wait()


async def test_one_cannot_start_takes_back_the_others(tmp_path: Path) -> None:
    """Only the kernel can tell: the head of the file is that of a program for this machine, the rest is not."""
    program = tmp_path / "prog"
    program.write_bytes(Path("/bin/sleep").read_bytes()[:64])
    program.chmod(0o755)
    entries = [sh("exec sleep 1000"), sh("exec sleep 1000"), Command(program, "1000"), sh("exec sleep 1000")]
    with pytest.raises(GroupFailed) as caught:
        await supervise(entries, logs=QUIET)
    result = caught.value.result
    (failure,) = result.failures
    assert failure.rank == 2
    assert failure.argv == (str(program), "1000")
    assert "Exec format error" in failure.cause
    assert str(program) in str(caught.value.exceptions[0])
    assert failure.status == 126
    assert result[0].stopped
    assert result[1].stopped
    assert result[3].stopped or result[3].outcome == "never started"


async def test_exit_is_known_while_a_grandchild_holds_the_pipe() -> None:
    # setsid: out of the group's reach; the supervisor finds it by its lineage
    script = (
        "setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1000 & wait; done' & read x < /proc/self/stat; exit 7"
    )
    async with Group(sh(script), logs=QUIET, stop=Stop(grace=0.05), check=False) as group:
        exited = await event_of(group, Exited)
        assert exited.exit.code == 7
        result = await group.wait()
        drained = await event_of(group, Drained)
    assert drained.holders == ()
    assert result.leaked
    assert not any(alive(one.pid) for one in result.leaked)


async def test_one_that_hides_is_ended_all_the_same() -> None:
    """In a session of its own, without a variable of ours, and its parent is gone."""
    script = (
        "trap 'exit 0' USR1; "
        "env -i P=$$ setsid sh -c 'echo $$; kill -USR1 $P; exec sleep 1000' & while :; do wait; done"
    )
    result = await supervise(sh(script), logs=QUIET)
    assert [one.pid for one in result.leaked] == [int(str(result[0].stdout))]
    assert result[0].stdout.holders == ()


async def test_a_holder_that_hides_is_named() -> None:
    """A holder that has shed all our signs is not that worker's to kill: the drain is bounded and names it. When no
    group is left but this one, it is nobody else's, and ends."""
    shed = "import os, resource as r; r.setrlimit(r.RLIMIT_RTTIME, (-1, -1)); os.kill(int(os.environ['P']), 10)"
    shed = f'{shed}; os.execl("/bin/sleep", "sleep", "1000")'
    script = (
        "trap 'exit 0' USR1; "
        f"env -i P=$$ setsid sh -c 'echo $$; exec {sys.executable} -S -c \"$0\"' {shlex.quote(shed)} &"
        " while :; do wait; done"
    )
    result = await supervise(sh(script), logs=Logs(tee=Std.NONE, drain=0.05))
    pid = int(str(result[0].stdout))
    assert result.ok
    assert result[0].stdout.holders == (pid,)
    assert result[0].stderr.holders == (pid,)
    assert [one.pid for one in result.leaked] == [pid]
    assert not alive(pid)
    assert result.clean


async def test_silent_grandchild_in_its_own_session_is_ended() -> None:
    script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!"
    async with Group(sh(script), logs=QUIET) as group:
        result = await group.wait()
        pid = int(str(result[0].stdout))
        leaked = await event_of(group, Leaked)
    assert leaked.process.pid == pid
    assert not alive(pid)
    assert [one.pid for one in result.leaked] == [pid]


async def test_children_of_a_crashed_worker_are_ended() -> None:
    script = "sleep 1000 >/dev/null 2>&1 & echo $!; kill -9 $$"
    result = await supervise(sh(script), logs=QUIET, check=False)
    assert not alive(int(str(result[0].stdout)))


async def test_scope_leader_leaves_others_alone() -> None:
    script = "sleep 1000 >/dev/null 2>&1 & echo $!"
    result = await supervise(sh(script), logs=QUIET, stop=Stop(scope="leader"))
    pid = int(str(result[0].stdout))
    try:
        assert alive(pid)
        assert [one.pid for one in result.leaked] == [pid]
    finally:
        os.kill(pid, signal.SIGKILL)
        await gone(pid)


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
async def test_scope_group_signals_the_worker_once(launcher: str) -> None:
    """A program may take a second one for impatience, as we do. Real-time signals queue, so they can be counted, and
    it is continued last."""
    code = (
        "import os, signal as s; rt = s.SIGRTMIN + 3; s.pthread_sigmask(s.SIG_BLOCK, [rt, s.SIGCONT])\n"
        "child = os.fork()\n"
        "if not child: os.write(1, b'up\\n')\n"
        "s.sigwait([rt]); child and s.sigwait([s.SIGCONT])\n"
        "os.write(1, f'{child > 0} {s.sigtimedwait([rt], 0)}\\n'.encode())\n"
        "if child: os.wait()"
    )
    stop = Stop(signal="SIGRTMIN+3", scope="group", grace=600)
    async with Group(py(code), logs=QUIET, stop=stop, launcher=launcher) as group:
        await group.line("up")
        result = await group.stop()
    assert sorted(str(result[0].stdout).splitlines()) == ["False None", "True None", "up"]
    assert result[0].stopped


async def test_leader_first() -> None:
    """The worker's child must outlive its parent's last save."""
    code = (  # a shell is no such leader: what it has just forked takes its signals with its handlers until execve(2)
        "import signal, subprocess; child = subprocess.Popen(['sleep', '1000']);"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [15]); print('up', flush=True); signal.sigwait([15]);"
        "print('saved' if child.poll() is None else 'late')"
    )
    async with Group(py(code), logs=QUIET) as group:
        async for _ in group.lines():
            break
        result = await group.stop()
    assert "saved" in str(result[0].stdout)
    assert result[0].exit is not None
    assert result[0].exit.code == 0
    assert result[0].stopped


async def test_send_signal_and_pids() -> None:
    script = "trap 'echo got; exit 0' USR1; echo up; while :; do sleep 1000 & wait; done"
    async with Group(sh(script), n=2, logs=QUIET) as group:
        up = 0
        async for line in group.lines():
            if line.data == b"up":
                up += 1
                if up == 2:
                    assert group.send_signal(signal.SIGUSR1) == 2
        result = await group.wait()
    assert [str(one.stdout) for one in result] == ["up\ngot\n"] * 2
    assert group.send_signal(signal.SIGUSR1) == 0


async def test_one_worker_stopped_by_hand_is_no_failure() -> None:
    async with Group(sh("exec sleep 1000"), n=2, logs=QUIET) as group:
        exit = await group[0].stop()
        assert exit is not None
        assert exit.stopped_by == signal.SIGTERM
        assert group[1].state is State.RUNNING
        assert list(group.pids) == [1]


async def test_stopped_worker_can_still_be_stopped() -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        group[0].send_signal(signal.SIGSTOP)
    result = await group.wait()
    assert result[0].exit is not None
    assert result[0].exit.signal == signal.SIGTERM


async def test_several_groups_at_once() -> None:
    results = await asyncio.gather(*(supervise(sh(f"exit {code}"), n=2, logs=QUIET, check=False) for code in (0, 1, 2)))
    assert [one.ok for one in results] == [True, False, False]


async def test_usage_and_duration() -> None:
    result = await supervise(py("x = sum(range(3_000_000)); import os; os.write(1, bytes(50_000_000)[:1])"), logs=QUIET)
    usage, exit = result[0].usage, result[0].exit
    assert usage is not None
    assert exit is not None
    assert usage.user > 0
    assert usage.max_rss > 0
    assert usage.minor_faults > 0
    assert 0 < exit.duration < 60
    assert exit.ended_ns > exit.started_ns
    assert exit.ended_at >= exit.started_at


async def test_host_is_untouched() -> None:
    environ = dict(os.environ)
    handlers = {one: signal.getsignal(one) for one in signal.Signals}
    mine = {"A": "1"}
    await supervise(sh("exit 0", env=mine), n=2, env=mine, logs=QUIET)
    assert dict(os.environ) == environ
    assert {one: signal.getsignal(one) for one in signal.Signals} == handlers
    assert mine == {"A": "1"}


def test_from_another_threads_loop() -> None:
    import threading

    out: list[bool] = []
    thread = threading.Thread(target=lambda: out.append(asyncio.run(supervise(sh("exit 0"), n=2, logs=QUIET)).ok))
    thread.start()
    thread.join()
    assert out == [True]


async def test_loop_shutdown_with_a_running_group() -> None:
    """asyncio.run cancels what is left: a background group must then be gone, not orphaned."""

    def program() -> list[int]:
        pids: list[int] = []

        async def main() -> None:
            up = asyncio.Event()

            async def serve() -> None:
                async with Group(sh("exec sleep 1000"), n=2, logs=QUIET) as group:
                    pids.extend(group.pids.values())
                    up.set()
                    await group.wait()

            main.task = asyncio.create_task(serve())  # type: ignore[attr-defined]
            await up.wait()

        asyncio.run(main())
        return pids

    pids = await asyncio.get_running_loop().run_in_executor(executor := _one_thread(), program)
    executor.shutdown()
    assert len(pids) == 2
    assert not any(map(alive, pids))


def _one_thread():  # type: ignore[no-untyped-def]
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1)


async def test_who_raised_first_is_the_root_cause_even_if_it_ends_last(tmp_path: Path) -> None:
    """Rank 1 raises, which makes rank 0 fail and exit first; we then stop rank 1 while it still cleans up."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = Command(
        sys.executable,
        "-c",
        "import os, sys, signal\n"
        "from aioelastic import record\n"
        "@record\n"
        "def main(): raise ValueError('the root cause')\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(1))\n"
        "try: main()\n"
        "except ValueError: open(os.environ['GATE'], 'w').close()\n"
        "while True: signal.pause()\n",
    )
    second = sh("read x < $GATE; echo connection closed by peer >&2; exit 5")
    result = await supervise([second, first], env={"GATE": str(gate)}, logs=QUIET, check=False)
    assert [one.rank for one in result.failures] == [1, 0]
    assert result.first_failure is not None
    assert result.first_failure.error is not None
    assert result.first_failure.error.message == "ValueError: the root cause"
    assert not result[1].stopped


async def test_lines_asked_for_in_the_middle_of_a_line_come_whole(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with Group(sh(f"printf first-; read x < {gate}; echo second"), logs=QUIET) as group:
        group._supervisor.begin_reading()
        while not str(group[0]._life.output.of(Std.OUT)):  # noqa: ASYNC110  # until the pump has read it
            await asyncio.sleep(0)
        feed = group.lines()
        gate.write_text("")
        assert [line.data async for line in feed] == [b"first-second"]


async def test_closed_feeds_are_forgotten() -> None:
    async with Group(sh("exec sleep 1000"), logs=QUIET) as group:
        for _ in range(100):
            group.lines().close()
        assert group._supervisor._feeds._feeds == {}
        assert all(len(pump.taps) == 1 for pump in group[0]._life.output._pumps.values())


async def test_one_that_may_not_be_signalled_keeps_no_signal_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has changed its user, say."""
    send, kill, asked = signal.pidfd_send_signal, os.kill, list[int]()

    def refused(pidfd: int, signum: int) -> None:
        asked.append(pidfd)
        if len(asked) == 1:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        send(pidfd, signum)

    def refused_by_number(pid: int, signum: int) -> None:
        if pid == group.pids[0]:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        kill(pid, signum)

    async with Group(sh("exec sleep 1000"), n=3, logs=QUIET, on_failure="continue", check=False) as group:
        with monkeypatch.context() as patch:
            patch.setattr("_signal.pidfd_send_signal", refused)  # what a guardian has, too: it imports no more
            patch.setattr(os, "kill", refused_by_number)
            assert group.send_signal(signal.SIGKILL) == 2
        for rank in (1, 2):
            await group[rank].wait()
        assert group[0].exit is None
