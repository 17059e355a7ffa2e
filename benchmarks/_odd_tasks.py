"""Tasks that end in every way that a task can, for `chaos_tasks.py`; and what may come of each."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, NoReturn

LARGE = 300_000  # bytes: they travel by a memfd
_kept: list[Any] = []


class Mute(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("not this one")


class Leaves:
    """Ends whoever unpickles it."""

    def __reduce__(self) -> Any:
        return (sys.exit, (5,))


def plain(number: int) -> int:
    return 2 * number


async def later(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def large(number: int) -> bytes:
    return number.to_bytes(4, "little") * (LARGE // 4)


def forks(number: int) -> int:
    """The copy returns, raises, leaves or ends, and no other hears of it."""
    pid = os.fork()
    if pid == 0:
        if number % 4 == 0:
            return -1
        if number % 4 == 1:
            raise KeyError("of a copy")
        if number % 4 == 2:
            sys.exit(3)
        os._exit(4)
    os.waitpid(pid, 0)
    return 2 * number


def changes_its_process(number: int) -> int:
    """As far as it may without harm to the next."""
    os.chdir(tempfile.gettempdir())
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    done = threading.Event()
    _kept.append(done)
    threading.Thread(target=done.wait, daemon=True).start()
    return 2 * number


def closes_descriptors(number: int) -> int:
    os.closerange(3, 1024)
    return 2 * number


def exits(number: int) -> NoReturn:
    os._exit(number % 8)


def dies(number: int) -> NoReturn:
    os.kill(os.getpid(), (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)[number % 3])
    raise AssertionError


def raises(number: int) -> NoReturn:
    kinds: list[Callable[[], BaseException]] = [
        lambda: StopIteration(number),
        lambda: SystemExit(256),
        lambda: SystemExit("words"),
        lambda: KeyboardInterrupt(),
        lambda: GeneratorExit(),
        lambda: asyncio.CancelledError(),
        lambda: Mute(),
        lambda: ExceptionGroup("two", [ValueError(1), Mute()]),
    ]
    raise kinds[number % len(kinds)]()


def returns_trouble(number: int) -> Any:
    return Leaves() if number % 2 else threading.Lock()


# what a task may come to: its value, an exception that the task itself has brought about, or either
VALUE: dict[Callable[..., Any], Callable[[int], Any]] = {
    plain: lambda number: 2 * number,
    later: lambda number: 2 * number,
    large: lambda number: number.to_bytes(4, "little") * (LARGE // 4),
    forks: lambda number: 2 * number,
    changes_its_process: lambda number: 2 * number,
}
FAILS = (exits, dies, raises, returns_trouble, closes_descriptors)
KINDS = (*VALUE, *FAILS)
