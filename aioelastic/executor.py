"""`WorkerExecutor`: a `concurrent.futures.Executor` whose workers are supervised."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # asyncio would import it when an executor is left
import itertools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from .checks import PID_MAX, check_seconds, check_whole
from .child import _tasks
from .entry import Function
from .errors import SpecError
from .launch import importable_main
from .placement import Places
from .pool import Pool, exiting
from .spec import GroupSpec, Logs, Stop
from .tasks import Limits
from .thread import insist

T = TypeVar("T")


class WorkerExecutor(Executor):
    """Runs functions in warm worker processes, one task at a time in each, in the order in which they were submitted.

    Like `concurrent.futures.ProcessPoolExecutor`, and: a worker that dies fails only the task it held, with its exit
    and its last words (`WorkerFailed`), and is replaced; what a task raises comes back with its notes and causes, and
    the remote traceback as `__cause__` (`RemoteError`); async functions are run too; large arrays travel by memory.
    Workers are started when there is work for them. Made and used from any thread, with or without an event loop.

    Args:
        max_workers: how many at most; the CPUs this process may use when not given.
        start: as in `supervise`.
        preload: modules that the zygote imports once.
        initializer, initargs: called once in each worker. If it raises, the executor is broken (`BrokenExecutor`).
        task_timeout: seconds after which a task fails with `TaskTimeout`; its worker is killed and replaced.
        tasks_per_worker: a worker ends after so many, and another takes its place.
        memory_limit: bytes; a worker that is larger than that after a task is replaced.
        max_pending: tasks that may be submitted and not done; `submit` waits while there are more, but in a callback
            of a task, which runs in the thread that would make room.
        env: variables for all workers.
        logs: where what they print goes; to the caller's own stdout and stderr, unchanged, when not given.

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
        if task_timeout is not None:
            check_seconds("task_timeout", task_timeout)
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
        limits = Limits(max_workers, task_timeout, tasks_per_worker, memory_limit, max_pending)
        spec = GroupSpec.of(
            _served(initializer, tuple(initargs), limits),
            name=name,
            env=env,
            logs=logs,
            stop=Stop(grace=5),
            start=start,
            preload=preload,
            placement=placement,
        )
        self._pool = Pool(spec, limits)
        # one that is forgotten ends when its last task is done
        self._finalizer = weakref.finalize(self, self._pool.close, False)
        self._finalizer.atexit = False
        _pools.add(self._pool)

    # --- concurrent.futures.Executor ---

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` in a worker. A future that runs already cannot be cancelled.

        It does not hold an event loop up: called in the thread of one, private arrays of 8 MiB and more are copied by
        other threads, and GPUs waited for there. Do not change such arrays until the future is done.

        Raises:
            RuntimeError: after `shutdown`.
            BrokenExecutor: no worker can be started.
        """
        return self._pool.submit((fn, args, kwargs))

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """As `Executor.map`. With `chunksize`, so many calls are one task: worth it for very short ones."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        calls = zip(*iterables, strict=False)
        chunks = iter(lambda: list(itertools.islice(calls, chunksize)), [])
        lists = super().map(_tasks.chunk, itertools.repeat(fn), chunks, timeout=timeout)
        return itertools.chain.from_iterable(lists)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more tasks; those that wait are done first, unless `cancel_futures`. All workers end.

        In a callback of a task it does not wait.
        """
        self._finalizer.detach()
        self._pool.close(cancel_futures)
        if wait:
            self._pool.join()

    # --- what it has besides ---

    async def run(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run it in a worker and await what comes of it. Cancelled while it waits, it is never run."""
        return await asyncio.wrap_future(await self._pool.submit_soon((fn, args, kwargs)))

    async def map_unordered(self, fn: Callable[..., T], *iterables: Iterable[Any]) -> AsyncIterator[T]:
        """What `fn` returns for each, as soon as it is there. Reads ahead as much as keeps all workers busy.

        The first exception ends it; what has not begun then is cancelled.
        """
        calls = zip(*iterables, strict=False)
        pending: set[asyncio.Future[T]] = set()
        try:
            while True:
                for args in itertools.islice(calls, 2 * self.max_workers - len(pending)):
                    pending.add(asyncio.ensure_future(self.run(fn, *args)))
                if not pending:
                    return
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    yield one.result()
        finally:
            for one in pending:
                one.cancel()
            if pending:
                await asyncio.wait(pending)

    @property
    def max_workers(self) -> int:
        """How many at most."""
        return self._pool.most

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return self._pool.pids

    def resize(self, max_workers: int) -> None:
        """Have more workers, or fewer: those that are too many end after the task they hold."""
        check_whole("max_workers", max_workers, 1, PID_MAX)
        self._pool.resize(max_workers)

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


def _served(initializer: Callable[..., object] | None, initargs: tuple[Any, ...], limits: Limits) -> Function:
    """The function that each worker runs."""
    return Function(_tasks.serve, initializer, initargs, limits.memory is not None, importable_main())


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _at_exit() -> None:
    """As concurrent.futures does: what was submitted is done before the interpreter ends."""
    exiting()
    for pool in list(_pools):
        pool.close(False)
    for pool in list(_pools):
        pool.join()


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
