"""Functions of workers that look at what they have inherited (`test_warm.py`)."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import sys
import time
from typing import Any


def uses_opened() -> dict[str, Any]:
    from aioelastic.child.worker import context

    others = [os.memfd_create("other") for _ in range(12)]
    for one in others:
        os.write(one, b"mine")
    import warm_opens as held  # type: ignore[import-not-found]

    works = []
    held.file.write("file")
    held.file.flush()
    works.append(os.pread(held.file.fileno(), 4, 0).decode())
    os.write(held.right, b"pipe")
    works.append(os.read(held.left, 4).decode())
    held.one.send(b"socket")
    works.append(held.other.recv(6).decode())
    with held.lock:
        works.append("lock")
    held.queue.put("queue")
    works.append(held.queue.get())
    import multiprocessing.resource_tracker
    import multiprocessing.shared_memory

    made = multiprocessing.shared_memory.SharedMemory(create=True, size=16)  # tells the tracker
    made.close()
    made.unlink()
    numbers = [held.file.fileno(), held.left, held.right, held.one.fileno(), held.other.fileno()]
    numbers.append(multiprocessing.resource_tracker._resource_tracker._fd)  # type: ignore[attr-defined]
    assert context.channel is not None
    return {
        "works": works,
        "others": [os.pread(one, 100, 0).decode() for one in others],
        "numbers": numbers,
        "channel": {context.channel.fileno()},
    }


def descriptors() -> dict[int, str]:
    found = {}
    for one in os.listdir("/proc/self/fd"):
        try:
            found[int(one)] = os.readlink(f"/proc/self/fd/{one}")
        except OSError:
            pass  # that of the list itself
    return found


def what_is_set() -> dict[str, Any]:
    import warm_sets as mine  # type: ignore[import-not-found]

    umask = os.umask(0)
    os.umask(umask)
    handlers = (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    signal.raise_signal(signal.SIGUSR1)
    return {
        "variables": {key: one for key, one in os.environ.items() if key.startswith("WARM_")},
        "path": [one for one in sys.path if one.startswith("/warm/")],
        "argv": sys.argv,
        "umask": umask,
        "cwd": os.getcwd(),
        "policy": os.sched_getscheduler(0),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "cpus": os.sched_getaffinity(0),
        "handlers": [getattr(how, "__name__", getattr(how, "name", "")) for how in map(signal.getsignal, handlers)],
        "before": [getattr(how, "__name__", getattr(how, "name", "")) for how in mine.before.values()],
        "timer": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "mask": {int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, ())},
        "rings": os.read(mine.ring, 1) == bytes([signal.SIGUSR1]),
    }


def core_limit() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_CORE)


def imports(name: str) -> None:
    importlib.import_module(name)


def child_of(name: str) -> int:
    pid: int = importlib.import_module(name).child.pid
    return pid


def says(name: str) -> None:
    taken = importlib.import_module(name).taken
    print("printed")
    logging.getLogger().warning("logged")
    taken.write("written\n")


async def loop_of(name: str) -> str:
    import asyncio

    return type(asyncio.get_running_loop()).__name__


def policy_of(name: str) -> str:
    import asyncio

    importlib.import_module(name)
    return type(asyncio.get_event_loop_policy()).__name__


def uses_loop(name: str) -> bytes:
    """Wait for the other to wait, too, for a descriptor of the same number in both."""
    loop = importlib.import_module(name).loop
    reader, writer = os.pipe()
    came = loop.create_future()
    loop.add_reader(reader, lambda: came.done() or came.set_result(os.read(reader, 1)))
    loop.call_soon(os.write, writer, os.environ["RANK"].encode())
    got: bytes = loop.run_until_complete(came)
    loop.remove_reader(reader)
    return got


def asks(name: str) -> tuple[bool, bool]:
    stop = importlib.import_module(name).stop
    first = stop.wait(0)
    if os.environ["RANK"] == "0":
        signal.raise_signal(signal.SIGTERM)
    return first, stop.wait(0)


def asked_by(name: str) -> tuple[bool, str, bool]:
    """By SIGTERM, by SIGINT; and whose SIGTERM is."""
    stop = importlib.import_module(name).stop
    signal.raise_signal(signal.SIGTERM)
    first = stop.wait(0)
    signal.raise_signal(signal.SIGINT)
    return first, getattr(signal.getsignal(signal.SIGTERM), "__name__", ""), stop.wait(0)


def aborts(name: str) -> None:
    importlib.import_module(name)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.raise_signal(signal.SIGUSR1)
    os.abort()


def says_by(name: str) -> list[int]:
    """Returns descriptors that what it starts has."""
    own = getattr(importlib.import_module(name), "own", None)
    if own is not None:
        own.write("own\n")
    os.system("echo system")
    return [fd for fd in sorted(descriptors()) if os.get_inheritable(fd)]


def attribute(name: str) -> tuple[Any, int]:
    return importlib.import_module(name).VALUE, os.getppid()


def attribute_of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def path_hooks() -> list[str]:
    return [one.__name__ for one in sys.path_hooks]


def long() -> tuple[str, int]:
    return sys.path[-1], sum(len(one) for key, one in os.environ.items() if key.startswith("WARM_LONG_"))


def told() -> dict[str, Any]:
    """What Python has made of its variables."""
    with open("/proc/self/environ", "rb") as file:
        first = file.read().split(b"\0")
    return {
        "streams": [(one.encoding.lower(), one.errors) for one in (sys.stdin, sys.stdout, sys.stderr)],
        "unbuffered": getattr(sys.stdout, "write_through", False),
        "lines": sys.stdout.line_buffering,
        "hash": hash("one") if os.environ.get("PYTHONHASHSEED") else None,
        "warnings": sys.warnoptions,
        "flags": (sys.flags.utf8_mode, sys.flags.dev_mode),
        "tz": time.tzname,
        "arenas": [one for one in first if one.startswith(b"MALLOC_")],
    }


def tell() -> None:
    print(repr(told()))


def shown(seen: dict[str, Any], keys: tuple[str, ...] | None) -> dict[str, Any]:
    """The part that is to be alike."""
    if keys is None:
        keys = tuple(one for one in seen if one not in ("unbuffered", "lines") or os.environ.get("PYTHONUNBUFFERED"))
    return {key: seen[key] for key in keys}


def filters() -> list[tuple[str, str]]:
    import warnings

    return [(action, str(getattr(category, "__name__", category))) for action, _, category, *_ in warnings.filters]


def raised(category: Any) -> str | None:
    import warnings

    try:
        warnings.warn("one", category, stacklevel=1)
    except Warning as exc:
        return type(exc).__name__
    return None


def raised_by_name(module: str, name: str) -> str | None:
    return raised(getattr(importlib.import_module(module), name))


def found() -> dict[str, str]:
    names = {name: importlib.import_module(name).found for name in ("warm_by_path", "warm_by_finder")}
    first, last = sys.path_hooks[0], sys.meta_path[-1]
    return {**names, "first": first.__name__, "last": last.__name__}  # type: ignore[attr-defined]


def call(module: str, name: str) -> None:
    getattr(importlib.import_module(module), name)()


def greets() -> None:
    from aioelastic import sharing

    sharing.send("hello")


def hears_from_a_worker(start: Any) -> Any:
    import asyncio

    from aioelastic import Function, Group, Logs, Std

    async def hear() -> Any:
        async with Group(Function(greets), start=start, logs=Logs(tee=Std.NONE)) as group:
            return await group[0].receive()

    return asyncio.run(hear())
