"""`WorkerExecutor`: a `concurrent.futures.Executor` whose workers are supervised."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # asyncio would import it when an executor is left
import copy
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar, overload

from ..child.worker import task_loop
from ..child.worker.main_module import importable as importable_main
from ..model.entries import Function
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.logs import Logs
from ..model.placement import Placement, Places, resolve_places
from ..model.stop_policy import Stop
from ..model.validation import PID_MAX, check_timeout, check_whole
from ..system.waiting import insist
from .map_results import Calls, MapResults, tasks_of
from .pool import Pool, exiting
from .tasks import Limits, Options

P = ParamSpec("P")
T = TypeVar("T")


class WorkerExecutor(Executor):
    """Runs functions in warm worker processes, one task at a time in each, in the order in which they were submitted.

    Like `concurrent.futures.ProcessPoolExecutor`, and: a worker that dies fails only the task it had begun, with its
    exit and its last words (`WorkerFailed`), and is replaced; what a task raises comes back with its notes and causes,
    and the remote traceback as `__cause__` (`RemoteError`); async functions are run too; large arrays travel by memory.
    Workers are started when there is work for them. Made and used from any thread, with or without an event loop; in a
    signal's handler, too, but for what may wait for what it has interrupted: `shutdown(wait=True)`, any `result()`, and
    `submit` of arrays, or while there is no room (`max_pending`).

    Args:
        max_workers: how many at most; the CPUs this process may use when not given.
        start: how workers are started: `"zygote"`, `"spawn"` or `"fork"`, as in `supervise`.
        preload: modules that the zygote imports once.
        initializer: called once in each worker, before its first task. If it raises, the executor is broken
            (`BrokenExecutor`).
        initargs: the arguments of `initializer`, a tuple.
        task_timeout: seconds from its start on a worker after which a task fails with `TaskTimeout`; its worker is
            killed and replaced.
        tasks_per_worker: a worker ends after so many, and another takes its place.
        memory_limit: bytes; a worker that is larger than that after a task is replaced.
        max_pending: tasks that may be submitted and not done; `submit` waits while there are more, but neither in the
            thread of an event loop that runs, where `run` waits, nor in a callback of a task, which would make room.
        env: variables for all workers.
        placement: where workers run, as in `supervise`: one `Placement` for all; a list with one for each of
            `max_workers`; or a function, called with 0 to `max_workers` - 1, that returns one. A worker that takes
            another's place has its Placement.
        logs: where what they print goes; to the caller's own stdout and stderr, unchanged, when not given.
        name: of the executor, in errors and of its thread.

    Raises:
        SpecError: an argument is wrong.

    Example::

        with WorkerExecutor(4, preload=["numpy"]) as executor:
            print(list(executor.map(simulate, range(100))))

        async with WorkerExecutor(4) as executor:
            print(await executor.run(simulate, 7))
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        start: Literal["zygote", "spawn", "fork"] = "zygote",
        preload: Sequence[str] = (),
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        task_timeout: float | None = None,
        tasks_per_worker: int | None = None,
        memory_limit: int | None = None,
        max_pending: int | None = None,
        env: Mapping[str, str | None] | None = None,
        logs: Logs | None = None,
        placement: Places | None = None,
        name: str = "executor",
    ) -> None:
        if max_workers is None:
            max_workers = len(os.sched_getaffinity(0))
        check_whole("max_workers", max_workers, 1, PID_MAX)
        if not isinstance(start, str):
            raise SpecError("start", start, "is not for an executor", 'use "zygote", "spawn" or "fork"')
        if initializer is not None and not callable(initializer):
            raise SpecError("initializer", initializer, "cannot be called", "give a function")
        if not isinstance(initargs, tuple | list):
            raise SpecError("initargs", initargs, "is no tuple", "give one; of a single argument: (value,)")
        task_timeout = _limit("task_timeout", task_timeout)
        for field, value in (
            ("tasks_per_worker", tasks_per_worker),
            ("memory_limit", memory_limit),
            ("max_pending", max_pending),
        ):
            if value is not None:
                check_whole(field, value, 1)
        logs = logs if logs is not None else Logs(prefix="")
        if isinstance(logs, Logs) and logs.dir is not None:
            raise SpecError("Logs.dir", str(logs.dir), "is not for an executor", "tee its output, or log in the tasks")
        limits = Limits(max_workers, tasks_per_worker, memory_limit, max_pending)
        spec = GroupSpec.of(
            _served(initializer, tuple(initargs), limits, start),
            max_workers if _is_by_rank(placement) else None,
            name=name,
            env=env,
            logs=logs,
            stop=Stop(grace=5),
            start=start,
            preload=preload,
            placement=placement,
        )
        self._placement = placement
        self._options = Options(task_timeout)
        self._origin: WorkerExecutor | None = None
        self._pool = Pool(spec, limits)
        # one that is forgotten ends when its last task is done
        self._finalizer = weakref.finalize(self, self._pool.close, False)
        self._finalizer.atexit = False
        _pools.add(self._pool)

    # --- concurrent.futures.Executor ---

    # an `async def` function runs in a loop of the worker's: what it returns comes back, not its coroutine

    @overload
    def submit(self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` in a worker. A future that runs already cannot be cancelled.

        It does not hold an event loop up: called in the thread of one, it does not wait for room (`max_pending`; `run`
        does), private arrays of 8 MiB and more are copied by other threads, and GPUs waited for there. Do not change
        such arrays until the future is done.

        Args:
            fn: the function; that of an `async def` runs in an event loop of the worker's.
            args, kwargs: what it is called with.

        Raises:
            RuntimeError: after `shutdown`.
            BrokenExecutor: no worker can be started.
        """
        return self._pool.submit((fn, args, kwargs), self._options.timeout)

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        return_exceptions: Literal[False] = False,
    ) -> MapResults[T]: ...

    @overload
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        return_exceptions: Literal[False] = False,
    ) -> MapResults[T]: ...

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        return_exceptions: bool,
    ) -> MapResults[T | Exception]: ...

    @overload
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        return_exceptions: bool,
    ) -> MapResults[T | Exception]: ...

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        return_exceptions: bool = False,
    ) -> MapResults[Any]:
        """As `concurrent.futures.Executor.map`: what `fn` returns for each, in their order, by `for` or `async for`.

        Args:
            fn: called with one of each of the iterables, until the shortest is at its end.
            iterables: of its arguments.
            timeout: seconds from now, after which no result is waited for any longer: `TimeoutError`.
            chunksize: so many calls are one task: worth it for very short ones.
            buffersize: so many tasks are submitted at most beyond what has been read, and the iterables are read no
                further; else all are submitted at once. As in Python 3.14.
            return_exceptions: what a call raises is its result, and the others go on; else the first exception ends it.

        Raises:
            SpecError: an argument is wrong.
        """
        seconds = _limit("timeout", timeout)
        if buffersize is not None:
            check_whole("buffersize", buffersize, 1)
        calls = self._calls(
            *(fn, iterables, chunksize, return_exceptions),
            ordered=True,
            ahead=lambda: buffersize or math.inf,
            until=None if seconds is None else time.monotonic() + seconds,
        )
        try:
            calls.fill()
        except BaseException:
            calls.cancel()
            raise
        return MapResults(calls, self)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more tasks; those that wait are done first, unless `cancel_futures`. All workers end.

        In a callback of a task it does not wait.

        Args:
            wait: until all workers have ended.
            cancel_futures: cancel the tasks that have not begun.
        """
        self._finalizer.detach()
        self._pool.close(cancel_futures)
        if wait:
            self._pool.join()

    def terminate_workers(self) -> None:
        """No more tasks, and all workers end now: by SIGTERM, and 5 s later by SIGKILL. Does not wait for that.

        What waits is cancelled; the tasks that run fail (`WorkerFailed`). As in `ProcessPoolExecutor` of Python 3.14.
        """
        self._finalizer.detach()
        self._pool.stop()

    def kill_workers(self) -> None:
        """The same by SIGKILL, at once."""
        self._finalizer.detach()
        self._pool.stop(kill=True)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if isinstance(exc, KeyboardInterrupt):  # nobody waits for what runs
            self.terminate_workers()
        self.shutdown(wait=True)
        return False

    # --- what it has besides ---

    @overload
    async def run(self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    async def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run it in a worker and await what comes of it.

        Cancelled, by `asyncio.timeout` for instance, it is not run any more: if it has not begun, it never does; else
        its worker is killed (SIGKILL), and dead when the cancellation is raised; another takes its place. With
        `with_options(kill_on_cancel=False)` what has begun goes on to its end, and keeps its worker for so long.

        Args:
            fn: the function; that of an `async def` runs in an event loop of the worker's.
            args, kwargs: what it is called with.

        Raises:
            WorkerFailed: its worker died while it ran.
            TaskTimeout: it took longer than `task_timeout`.
            RuntimeError: after `shutdown`.
            BrokenExecutor: no worker can be started.
            Exception: whatever it raised.
        """
        future = await self._pool.submit_soon((fn, args, kwargs), self._options.timeout)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            await self._pool.leave([future], self._options.kill)
            raise

    @overload
    def map_unordered(
        self,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *iterables: Iterable[Any],
        chunksize: int = 1,
        return_exceptions: Literal[False] = False,
    ) -> MapResults[T]: ...

    @overload
    def map_unordered(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        chunksize: int = 1,
        return_exceptions: Literal[False] = False,
    ) -> MapResults[T]: ...

    @overload
    def map_unordered(
        self,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *iterables: Iterable[Any],
        chunksize: int = 1,
        return_exceptions: bool,
    ) -> MapResults[T | Exception]: ...

    @overload
    def map_unordered(
        self, fn: Callable[..., T], *iterables: Iterable[Any], chunksize: int = 1, return_exceptions: bool
    ) -> MapResults[T | Exception]: ...

    def map_unordered(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], chunksize: int = 1, return_exceptions: bool = False
    ) -> MapResults[Any]:
        """What `fn` returns for each, as soon as it is there, by `for` or `async for`.

        Nothing is submitted before the first is asked for, and then two to four tasks ahead for each worker.

        Args:
            fn: called with one of each of the iterables, until the shortest is at its end.
            iterables: of its arguments.
            chunksize: so many calls are one task: worth it for very short ones.
            return_exceptions: what a call raises is its result, and the others go on; else the first exception ends it.

        Raises:
            SpecError: an argument is wrong.
        """
        pool = self._pool
        most = math.inf if pool.limits.pending is None else pool.limits.pending
        calls = self._calls(
            *(fn, iterables, chunksize, return_exceptions),
            ordered=False,
            ahead=lambda: min(4 * pool.most, most),
        )
        return MapResults(calls, self)

    def with_options(self, *, task_timeout: float | None = None, kill_on_cancel: bool | None = None) -> Self:
        """The same executor, with its workers and its queue, and something else for what is called through it.

        No argument of a function can be mistaken for one of these. To shut it down is to shut down the executor.

        Args:
            task_timeout: as that of the executor, seconds from the start of a call on its worker; `math.inf` for none.
                With `chunksize`, those of a chunk have it together. None: as it is.
            kill_on_cancel: whether the worker of a call is killed when whoever awaits it (`run`, `async for`) is
                cancelled; True in an executor. None: as it is.

        Raises:
            SpecError: it is no number of seconds, or neither True nor False.

        Example::

            quick = executor.with_options(task_timeout=5)
            await quick.run(simulate, 7)  # TaskTimeout after 5 s; its worker is killed and replaced
        """
        other = copy.copy(self)
        other._origin = self  # which ends when it is forgotten
        if task_timeout is not None:
            other._options = replace(other._options, timeout=_limit("task_timeout", task_timeout))
        if kill_on_cancel is not None:
            if not isinstance(kill_on_cancel, bool):
                raise SpecError("kill_on_cancel", kill_on_cancel, "says neither yes nor no", "use True or False")
            other._options = replace(other._options, kill=kill_on_cancel)
        return other

    @property
    def max_workers(self) -> int:
        """How many at most."""
        return self._pool.most

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return self._pool.pids

    def resize(self, max_workers: int) -> None:
        """Have more workers, or fewer: those that are too many end after the task they hold.

        Args:
            max_workers: how many at most, from now on.

        Raises:
            SpecError: it is no number of workers, or `placement` has no place for so many.
        """
        check_whole("max_workers", max_workers, 1, PID_MAX)
        places = self._pool.places
        if _is_by_rank(self._placement) and max_workers > len(places):
            if not callable(self._placement):
                problem = f"is more than `placement` has places for, {len(places)}"
                remedy = "give an executor a function rank -> Placement, or a longer list"
                raise SpecError("max_workers", max_workers, problem, remedy)
            places = resolve_places(self._placement, max_workers)
        self._pool.resize(max_workers, places)

    def _calls(
        self, fn: Callable[..., Any], iterables: tuple[Any, ...], chunksize: int, return_exceptions: bool, **how: Any
    ) -> Calls:
        check_whole("chunksize", chunksize, 1)
        tasks = tasks_of(fn, iterables, chunksize, return_exceptions)
        return Calls(self._pool, tasks, self._options, chunked=chunksize > 1, as_values=return_exceptions, **how)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool.lost is not None:
            return
        # what nobody will wait for need not be done
        self.shutdown(wait=False, cancel_futures=exc is not None)
        if isinstance(exc, asyncio.CancelledError):
            self._pool.stop()
        joined = self._pool.joined()
        try:
            await asyncio.shield(joined)
        except asyncio.CancelledError:
            self._pool.stop()
            await insist(joined)
            raise
        finally:
            self._pool.join()


def _served(initializer: Any, initargs: tuple[Any, ...], limits: Limits, start: str) -> Function:
    """The function that each worker runs. A forked copy of ours has our main module."""
    main = None if start == "fork" else importable_main()
    return Function(task_loop.serve, initializer, initargs, limits.memory is not None, main)


def _limit(field: str, timeout: float | None) -> float | None:
    """As `check_timeout`; None for none."""
    seconds = check_timeout(field, timeout)
    return seconds if seconds < math.inf else None


def _is_by_rank(placement: Places | None) -> bool:
    """Whether each worker has a place of its own."""
    return placement is not None and not isinstance(placement, Placement)


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _at_exit() -> None:
    """As concurrent.futures does: what was submitted is done before the interpreter ends; but not after Ctrl-C."""
    exiting()
    pools = list(_pools)
    interrupted = _is_ended_by_ctrl_c()
    try:
        for pool in pools:
            if interrupted:
                pool.stop()
            else:
                pool.close(False)
        for pool in pools:
            pool.join()
    except KeyboardInterrupt:
        for pool in pools:
            pool.stop(kill=True)
        for pool in pools:
            pool.join()
        raise


def _is_ended_by_ctrl_c() -> bool:
    """Whether the program has; in an interactive session it was only what ran at the prompt."""
    last = getattr(sys, "last_type", None)
    return isinstance(last, type) and issubclass(last, KeyboardInterrupt) and not hasattr(sys, "ps1")


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
