"""The types of the public surface, as a user's checkers see them: read by mypy and basedpyright, never run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, assert_type

from aioelastic import (
    Cause,
    Command,
    Exit,
    Failure,
    Function,
    Group,
    GroupFailed,
    GroupResult,
    GroupTimeout,
    LaunchPlan,
    Line,
    Logs,
    Match,
    Output,
    Placement,
    Remains,
    RemoteError,
    Restart,
    Result,
    Rotate,
    SpecError,
    Std,
    Stop,
    TaskTimeout,
    Unkillable,
    Usage,
    Worker,
    WorkerExecutor,
    WorkerFailed,
    attempt,
    events,
    gpu,
    local_rank,
    rank,
    read_env,
    ready,
    record,
    run,
    sharing,
    stopping,
    supervise,
    world_size,
)
from aioelastic.executor import MapResults
from aioelastic.testing import FakeLauncher, Life, Program, Recorder


def double(number: int) -> int:
    return 2 * number


async def tripled(number: int) -> str:
    return str(3 * number)


# --- what is written ---


def specs() -> None:
    assert_type(Restart.on_failure(max=3, scope="all"), Restart)
    assert_type(Restart.never(), Restart)
    assert_type(Function(double, 2).options(env={"A": "1", "B": None}, cwd=Path("/")), Function)
    Logs(dir="runs", tee={0: Std.ALL}, save=Std.OUT, match="error", rotate=Rotate(size=1, keep=2), callback=print)
    Logs(match=[Match("error"), Match(include=["a", "b"], exclude="c", std=Std.ERR, file="d.log"), "e"])
    Stop(signal="SIGINT", grace=1)
    Command("true", pass_fds=[3], user="nobody", group=7, extra_groups=(), umask=0o027, secrets={"A": "a", "B": b"b"})
    Placement(gpus=[0], cpus=[0, 1])
    assert_type(read_env(Path(".env"), {"A": "1"}), dict[str, str])
    Command("serve", name="web", env={**read_env(".env"), "B": None})


# --- what comes of a group ---


def a_program() -> None:
    async def main() -> int:
        return 5

    assert_type(run(main), int)
    assert_type(run(main()), int)


async def results() -> None:
    result = await supervise(Command("true"), n=4, logs=Logs(dir="runs", tee=Std.ALL), stop=Stop(grace=5))
    assert_type(result, GroupResult)
    assert_type(result[0], Result)
    assert_type(result[1:], tuple[Result, ...])
    assert_type(len(result), int)
    assert_type(list(result), list[Result])
    assert_type(result.ok, bool)
    assert_type(result.clean, bool)
    assert_type(result.log_dir, Path | None)
    assert_type(result.duration, float)
    assert_type(result.first_failure, Failure | None)
    assert_type(result.failures, tuple[Failure, ...])
    assert_type(result.unkillable, tuple[Unkillable, ...])
    assert_type(result.remains, tuple[Remains, ...])
    await supervise(lambda rank: Command("echo", str(rank)), n=4, restart=Restart.on_failure(max=3))
    await supervise([Command("server"), Function(double, 2)], timeout=5.0, check=False, on_success="stop")
    await supervise(Command("true"), n=2, on_failure=lambda rank: "stop" if rank == 0 else "continue")
    await supervise(Command("true"), n=2, on_failure=["stop", "continue"])
    await supervise(Function(double, 2), n=2, placement=lambda rank: Placement(gpus=[rank]), start="fork")


def one_result(one: Result) -> None:
    assert_type(one.rank, int)
    assert_type(one.worker, str)
    assert_type(one.pid, int | None)
    assert_type(one.exit, Exit | None)
    assert_type(one.usage, Usage | None)
    assert_type(one.stdout, Output)
    assert_type(one.failure, Failure | None)
    assert_type(one.value, Any)
    assert_type(one.why, Cause | None)
    assert_type(one.ok, bool)
    assert_type(one.outcome, str)
    assert_type(one.stdout.path, Path | None)
    assert_type(one.stdout.tail, bytes)
    assert_type(one.stdout.last_lines(3), list[str])
    if one.exit is not None:
        assert_type(one.exit.code, int | None)
        assert_type(one.exit.signal, int | None)
        assert_type(one.exit.ok, bool)
        assert_type(one.exit.duration, float)
    if one.usage is not None:
        assert_type(one.usage.max_rss, int)
    if one.why is not None:
        assert_type(one.why.words, str)
        assert_type(one.why.certain, bool)


def errors(failed: GroupFailed, late: GroupTimeout, wrong: SpecError, task: TaskTimeout, far: RemoteError) -> None:
    assert_type(failed.result, GroupResult)
    for one in failed.exceptions:
        if isinstance(one, WorkerFailed):
            assert_type(one.failure, Failure)
            assert_type(one.failure.cause, str)
            assert_type(one.failure.exception, RemoteError | None)
            assert_type(one.failure.headline, str)
    assert_type(late.result, GroupResult)
    assert_type(late.timeout, float)
    assert_type(wrong.field, str)
    assert_type(task.timeout, float)
    assert_type(far.traceback, str)
    assert_type(far.exception, BaseException | None)


# --- a group that runs ---


async def handles() -> None:
    async with Group(Function(double, 1), n=8) as group:
        assert_type(group, Group)
        assert_type(len(group), int)
        assert_type(list(group), list[Worker])
        assert_type(group.pids, dict[int, int])
        assert_type(group.plan, LaunchPlan | None)
        assert_type(group.run_id, str)
        async with aclosing(group.events()) as some:
            async for event in some:
                assert_type(event, events.Event)
        assert_type(group.send_signal(15), int)
        assert_type(await group.dump_stacks(timeout=1), dict[int, str])
        async with aclosing(group.lines(ranks=[0], when_full="drop")) as lines:
            async for line in lines:
                assert_type(line, Line)
                assert_type(line.text, str)
                assert_type(line.data, bytes)
        async with aclosing(group.as_completed()) as values:
            async for which, value in values:
                assert_type(which, int)
                assert_type(value, Any)
        assert_type(await group.wait(), GroupResult)
        assert_type(await group.stop(), GroupResult)


async def one_worker(worker: Worker) -> None:
    assert_type(worker.rank, int)
    assert_type(worker.attempt, int)
    assert_type(worker.pid, int | None)
    assert_type(worker.exit, Exit | None)
    assert_type(worker.stacks, str | None)
    assert_type(worker.send_signal(15), bool)
    assert_type(worker.signal_group(15), bool)
    assert_type(await worker.wait(), Exit | None)
    assert_type(await worker.stop(), Exit | None)
    assert_type(await worker.receive(), Any)
    await worker.send({"any": "object"})
    async for value in worker:
        assert_type(value, Any)


def on_event(event: events.Event) -> None:
    assert_type(event.rank, int | None)
    assert_type(event.pid, int | None)
    assert_type(event.attempt, int | None)
    assert_type(event.time, float)
    match event:
        case events.Exited():
            assert_type(event.exit, Exit)
        case events.Drained():
            assert_type(event.holders, tuple[int, ...])
        case events.Stopping():
            assert_type(event.signal, int)
        case events.Restarting():
            assert_type(event.next_attempt, int)
            assert_type(event.reason, str)
        case events.GaveUp():
            assert_type(event.attempts, int)
        case events.SinkTrouble():
            assert_type(event.lost, int)
        case events.Leaked():
            assert_type(event.process.pid, int)
        case events.GroupDone():
            assert_type(event.result, GroupResult)
        case _:
            pass


# --- an executor ---


async def executors() -> None:
    with WorkerExecutor(4, preload=["json"]) as executor:
        assert_type(executor, WorkerExecutor)
        assert_type(executor.submit(double, 1), Future[int])
        assert_type(executor.submit(tripled, 1), Future[str])  # run in a loop there: no coroutine comes back
        assert_type(executor.map(double, range(3)), MapResults[int])
        numbers_again: Iterator[int] = executor.map(double, range(3), return_exceptions=False, buffersize=2)
        assert_type(next(numbers_again), int)
        assert_type(next(executor.map(double, range(3), return_exceptions=True)), int | Exception)
        assert_type(next(executor.map_unordered(tripled, range(3), return_exceptions=True)), str | Exception)
        assert_type(next(executor.map_unordered(double, range(3), chunksize=2)), int)
        assert_type(list(executor.map(tripled, range(3))), list[str])
        assert_type(executor.max_workers, int)
        assert_type(executor.pids, list[int])
        executor.resize(2)
        assert_type(executor.with_options(task_timeout=5, kill_on_cancel=False), WorkerExecutor)
    async with WorkerExecutor(4) as executor:
        assert_type(await executor.run(double, 1), int)
        assert_type(await executor.run(tripled, 1), str)
        async with aclosing(executor.map_unordered(double, range(3))) as numbers:
            async for one in numbers:
                assert_type(one, int)
        async for other in executor.map_unordered(tripled, range(3)):
            assert_type(other, str)
        async for other in executor.map(tripled, range(3)):
            assert_type(other, str)


# --- in a worker ---


@record
def main(name: str) -> int:
    return rank() + local_rank() + world_size() + attempt()


async def inside() -> None:
    assert_type(main("a"), int)
    ready()
    assert_type(bool(stopping()), bool)
    assert_type(stopping().wait(1.0), bool)
    await stopping()


# --- arrays, queues and objects that are shared ---


def arrays() -> None:
    x = sharing.empty((2, 3), "float32")
    assert_type(x, sharing.SharedArray)
    assert_type(sharing.empty(3, isolated=True), sharing.SharedArray)
    assert_type(sharing.copy(b"abc", device="cpu"), sharing.SharedArray)
    assert_type(x.shape, tuple[int, ...])
    assert_type(x.dtype, str)
    assert_type(x.nbytes, int)
    assert_type(x.device, str)
    assert_type(x.buffer, memoryview)
    assert_type(x.read_only, bool)
    assert_type(sharing.is_shared(x), bool)
    assert_type(sharing.stats(), sharing.ShareStats)
    assert_type(sharing.leases(), list[sharing.Lease])
    assert_type(sharing.audit(), list[sharing.Held])
    with sharing.scope():
        assert_type(sharing.trim(), int)


async def queues() -> None:
    queue = sharing.Queue(maxsize=8)
    await queue.put({"any": "object"})
    assert_type(await queue.get(), Any)
    assert_type(queue.get_sync(timeout=1), Any)
    assert_type(queue.get_nowait(), Any)
    async for item in queue:
        assert_type(item, Any)
    sharing.send({"any": "object"})
    assert_type(sharing.receive(timeout=1), Any)
    assert_type(await sharing.receive_async(), Any)


async def offered() -> None:
    async with sharing.Endpoint("/run/x", {"x": sharing.empty(3)}) as endpoint:
        assert_type(endpoint, sharing.Endpoint)
    with sharing.attach("/run/x", timeout=1) as there:
        assert_type(there, sharing.Attachment)
        assert_type(there["x"], Any)


def gpus() -> None:
    assert_type(gpu.probe(), gpu.Probe)
    assert_type(gpu.devices(), tuple[gpu.Gpu, ...])
    assert_type(gpu.stats("cuda:0"), sharing.ShareStats)
    assert_type(gpu.GpuEvent("cuda:0").query(), bool)


# --- for tests ---


async def tests(recorder: Recorder) -> None:
    launcher = FakeLauncher({1: Life(code=3)})
    assert_type(await supervise(Command("true"), launcher=launcher, on_event=recorder), GroupResult)
    assert_type(await recorder.wait(events.Exited, rank=1), events.Exited)
    assert_type(recorder.of(events.Spawned), list[events.Spawned])
    with Program("print(1)") as program:
        assert_type(program.line("1"), str)
        assert_type(program.wait(), int)


# --- what is wrong is seen ---


def wrong() -> None:
    Function(double, "two")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    WorkerExecutor(1).submit(double, 1, 2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Group(Command("true"), start="thread")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    never: Literal["one"] = Restart.on_failure(max=1).scope  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    assert never
