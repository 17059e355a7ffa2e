"""The supervisors of survival.py, each as a program: python _survival_peers.py NAME PATH.

Each starts one worker that lives until it is ended, and waits for it. The asyncio ones cancel that wait when SIGUSR1
comes, and then live on, as a service does. Nothing here cleans up beyond what a user of that library gets.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import _survivor

HOME = Path(__file__).parent


def command(door: str) -> list[str]:
    """The worker as a command."""
    return [sys.executable, "-S", str(HOME / "_survivor.py"), door, "worker"]


def cancellable(work: Callable[[str], Coroutine[Any, Any, Any]], door: str, loop: Any = None) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(work(door))
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, task.cancel)
        await asyncio.wait({task})
        if task.cancelled():
            await asyncio.Event().wait()
        await task

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


# --- ours ---


async def _ours_commands(door: str) -> None:
    from aioelastic import Command, supervise

    await supervise(Command(*command(door)))


async def _ours_functions(door: str) -> None:
    from aioelastic import Function, supervise

    await supervise(Function(_survivor.worker, door))


# --- asyncio and its like ---


async def _asyncio(door: str) -> None:
    process = await asyncio.create_subprocess_exec(*command(door))
    await process.wait()


def _in_scope(work: Callable[[str], Coroutine[Any, Any, Any]], door: str) -> None:
    """anyio's own way to cancel: after a bare task.cancel() its run_process waits for the process to end by itself."""
    import anyio

    async def main() -> None:
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, scope.cancel)
            await work(door)
        await asyncio.Event().wait()

    asyncio.run(main())


async def _anyio(door: str) -> None:
    import anyio

    await anyio.run_process(command(door))


async def _anyio_function(door: str) -> None:
    from anyio import to_process

    await to_process.run_sync(_survivor.worker, door, cancellable=True)


def _trio(door: str) -> None:
    import trio

    async def cancel_on_signal(scope: Any) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _ in signals:
                scope.cancel()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_on_signal, scope)
                await trio.run_process(command(door))
            await trio.sleep_forever()

    trio.run(main)


async def _simpervisor(door: str) -> None:
    from simpervisor import SupervisedProcess

    await SupervisedProcess("worker", *command(door)).start()
    await asyncio.Event().wait()


async def _processkit(door: str) -> None:
    import processkit

    program, *args = command(door)
    async with processkit.ProcessGroup() as group:
        await group.aoutput(processkit.Command(program, args))


async def _processkit_with_parent(door: str) -> None:
    import processkit

    program, *args = command(door)
    await processkit.Command(program, args).kill_on_parent_death().aoutput()


async def _executor(door: str) -> None:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, _survivor.worker, door)


async def _ours_executor(door: str) -> None:
    from aioelastic import WorkerExecutor

    async with WorkerExecutor(1) as executor:
        await asyncio.wrap_future(executor.submit(_survivor.worker, door))


# --- the standard library ---


def _popen(door: str) -> None:
    subprocess.Popen(command(door)).wait()


def _popen_pdeathsig(door: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    # the usual way: to be told in the child, before it becomes the program
    subprocess.Popen(command(door), preexec_fn=lambda: libc.prctl(1, signal.SIGKILL)).wait()  # noqa: PLW1509


def _multiprocessing(method: str) -> Callable[[str], None]:
    def run(door: str) -> None:
        import multiprocessing

        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=_survivor.worker, args=(door,))
        process.start()
        process.join()

    return run


def _psutil(door: str) -> None:
    """The recipe of psutil's documentation, run on SIGTERM too."""
    import psutil

    def stop(*_signal: object) -> None:
        family = psutil.Process().children(recursive=True)
        for one in family:
            one.terminate()
        _, alive = psutil.wait_procs(family, timeout=3)
        for one in alive:
            one.kill()
        sys.exit(1)

    signal.signal(signal.SIGTERM, stop)
    subprocess.Popen(command(door)).wait()


# --- pools and launchers ---


def _loky(door: str) -> None:
    from loky import get_reusable_executor

    get_reusable_executor(max_workers=1).submit(_survivor.worker, door).result()


def _pebble(door: str) -> None:
    from pebble import ProcessPool

    with ProcessPool(max_workers=1) as pool:
        pool.schedule(_survivor.worker, args=(door,)).result()


def _mpire(door: str) -> None:
    from mpire import WorkerPool

    with WorkerPool(n_jobs=1) as pool:
        pool.apply(_survivor.worker, (door,))


def _torch_spawn(door: str) -> None:
    import torch.multiprocessing

    torch.multiprocessing.spawn(_indexed, (door,), nprocs=1)


def _indexed(_: int, door: str) -> None:
    _survivor.worker(door)


def _torch_elastic(door: str) -> None:
    import tempfile

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    argv = command(door)
    with tempfile.TemporaryDirectory() as home:
        logs = DefaultLogsSpecs(log_dir=home)
        start_processes("worker", argv[0], {0: tuple(argv[1:])}, {0: {}}, logs).wait()


def _uvloop(door: str) -> None:
    cancellable(_asyncio, door, importlib.import_module("uvloop").new_event_loop)


def _async(work: Callable[[str], Coroutine[Any, Any, Any]]) -> Callable[[str], None]:
    return lambda door: cancellable(work, door)


# name → (needed module, program); asyncio ones can be cancelled
CANCELLABLE: dict[str, tuple[str, Callable[[str], None]]] = {
    "ours: supervise(Command)": ("aioelastic", _async(_ours_commands)),
    "ours: supervise(Function)": ("aioelastic", _async(_ours_functions)),
    "ours: WorkerExecutor": ("aioelastic", _async(_ours_executor)),
    "asyncio": ("asyncio", _async(_asyncio)),
    "uvloop": ("uvloop", _uvloop),
    "anyio.run_process": ("anyio", lambda door: _in_scope(_anyio, door)),
    "anyio.to_process": ("anyio", lambda door: _in_scope(_anyio_function, door)),
    "trio.run_process": ("trio", _trio),
    "simpervisor": ("simpervisor", _async(_simpervisor)),
    "asyncio + ProcessPoolExecutor": ("concurrent.futures", _async(_executor)),
    "processkit group": ("processkit", _async(_processkit)),
    "processkit kill_on_parent_death": ("processkit", _async(_processkit_with_parent)),
}
OTHERS: dict[str, tuple[str, Callable[[str], None]]] = {
    "subprocess.Popen": ("subprocess", _popen),
    "Popen + PR_SET_PDEATHSIG": ("ctypes", _popen_pdeathsig),
    "Popen + psutil's recipe": ("psutil", _psutil),
    **{f"multiprocessing {one}": ("multiprocessing", _multiprocessing(one)) for one in ("spawn", "fork", "forkserver")},
    "loky": ("loky", _loky),
    "pebble pool": ("pebble", _pebble),
    "mpire": ("mpire", _mpire),
    "torch.multiprocessing.spawn": ("torch", _torch_spawn),
    "torch elastic start_processes": ("torch", _torch_elastic),
}

if __name__ == "__main__":
    signal.alarm(_survivor.LIFE)  # one that lives on after its worker must not do so for ever
    name, where = sys.argv[1:]
    _, run = {**CANCELLABLE, **OTHERS}[name]
    run(where)
