"""Functions with outcomes that are not like others; what they send is what a test looks at."""

from __future__ import annotations

import atexit
import concurrent.futures
import importlib
import io
import logging
import logging.handlers
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aioelastic

KINDS: dict[str, Callable[[], BaseException]] = {
    "StopIteration": lambda: StopIteration("odd"),
    "StopAsyncIteration": lambda: StopAsyncIteration("odd"),
    "CancelledError": lambda: __import__("asyncio").CancelledError("odd"),
    "futures.CancelledError": lambda: concurrent.futures.CancelledError("odd"),
    "GeneratorExit": lambda: GeneratorExit("odd"),
    "KeyboardInterrupt": lambda: KeyboardInterrupt("odd"),
    "SystemExit": lambda: SystemExit("odd"),
    "SystemExit 256": lambda: SystemExit(256),
    "Failed": lambda: Failed("odd"),
    "Outcome": lambda: Outcome("odd"),
    "Unpicklable": lambda: Unpicklable("odd"),
    "TwoArguments": lambda: TwoArguments("odd", 2),
    "Mute": lambda: Mute("odd"),
    "Frozen": lambda: Frozen("odd"),
    "FrozenWhole": lambda: FrozenWhole("odd"),
    "group": lambda: BaseExceptionGroup("odd", [StopIteration("a"), KeyboardInterrupt("b")]),
}


class Outcome(BaseException):
    """As pytest's."""


class Failed(Outcome):
    pass


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


class TwoArguments(Exception):
    def __init__(self, one: str, two: int) -> None:
        super().__init__(f"{one}{two}")


class Mute(Exception):
    """Whoever asks what it says is ended."""

    def __str__(self) -> str:
        raise SystemExit(7)


@dataclass(frozen=True)
class Frozen(Exception):
    """Nothing of it can be set, and so it cannot be made again from its pickle."""

    word: str


@dataclass(frozen=True)
class FrozenWhole(Exception):
    word: str

    def __reduce__(self) -> Any:
        return FrozenWhole, (self.word,)


class HasNoCause(Exception):
    @property
    def __cause__(self) -> None:  # type: ignore[override]
        return None


def raises_one_that_has_no_cause() -> None:
    raise HasNoCause("odd")


def raises(kind: str) -> None:
    raise KINDS[kind]()


def throw(name: str) -> None:
    raise THROWN[name]()


THROWN: dict[str, type[BaseException]] = {
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "Outcome": Outcome,
    "StopIteration": StopIteration,
    "GeneratorExit": GeneratorExit,
    "ValueError": ValueError,
    "EOFError": EOFError,
    "CancelledError": concurrent.futures.CancelledError,
}


class Rude:
    """To unpickle it raises that."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return throw, (self.name,)


class RudeError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__("rude")
        self.name = name

    def __reduce__(self) -> Any:
        return throw, (self.name,)


def returns_rude(name: str) -> Rude:
    return Rude(name)


def raises_rude(name: str) -> None:
    raise RudeError(name)


def sends_rude(name: str) -> str:
    aioelastic.sharing.send(Rude(name))
    aioelastic.sharing.send("the next")
    return "value"


async def twice(number: int) -> int:
    return 2 * number


def forks(how: str) -> str:
    """The copy returns, raises or leaves; it is waited for."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return "itself"
    if how == "raises":
        raise ValueError("of the copy")
    if how == "exits":
        sys.exit(5)
    return "copy"


class ForksWhilePickled:
    def __reduce__(self) -> Any:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return str, ("itself" if pid else "copy",)


class ForksWhileUnpickled:
    def __reduce__(self) -> Any:
        return forks, ("returns",)


def same(value: Any) -> Any:
    return value


def returns_what_forks() -> ForksWhilePickled:
    return ForksWhilePickled()


def closes_all() -> str:
    os.closerange(3, 1000)
    return "closed"


def closes_all_and_opens(sent: int) -> bytes:
    """What it opens then has the numbers of what it has closed."""
    os.closerange(3, 1000)
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept.extend((one, other))
    return bytes(sent)


kept: list[Any] = []


def where() -> tuple[str, int]:
    return os.getcwd(), os.getpid()


def goes_to(path: str) -> int:
    os.chdir(path)
    return os.getpid()


def leaves_a_thread() -> int:
    done = threading.Event()
    kept.append(done)
    threading.Thread(target=done.wait, daemon=True).start()
    return threading.active_count()


def own_pid() -> int:
    return os.getpid()


def limits_its_core_dumps(size: int) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (size, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    return os.getpid()


def core_limit() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_CORE)[0], os.getpid()


# --- exit work ---


def exit_work_that_hangs(path: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    atexit.register(threading.Event().wait)
    atexit.register(note, path, "begins")


def note(path: str, word: str) -> None:
    with open(path, "a") as file:
        file.write(word + "\n")


class Thing:
    pass


alias = sys.stdout


def does_exit_work(path: str, by_alias: bool) -> None:
    thing = Thing()
    kept.append(thing)
    weakref.finalize(thing, note, path, "finalize")
    atexit.register(note, path, "atexit")
    target = logging.FileHandler(path)
    memory = logging.handlers.MemoryHandler(100, target=target)
    log = logging.getLogger("exit-work")
    log.addHandler(memory)
    log.warning("logged")

    def last() -> None:
        threading.main_thread().join()
        note(path, "thread")

    threading.Thread(target=last).start()
    fork = multiprocessing.get_context("fork")
    fork.Process(target=notes_when_told, args=(path, "child")).start()
    daemon = fork.Process(target=stays, daemon=True)
    daemon.start()
    note(path, f"daemon {daemon.pid}")
    print("no line end", end="", file=alias if by_alias else sys.stdout)


def notes_when_told(path: str, word: str) -> None:
    note(path, word)


def stays() -> None:
    threading.Event().wait()


def exit_work_that_raises(path: str, how: str) -> None:
    atexit.register(note, path, "first")  # which is done last
    atexit.register(throw, how)
    atexit.register(note, path, "last")
    sys.stdout.write("no line end")


def forks_beside_a_child(path: str) -> None:
    """A copy that does its exit work neither ends nor waits for a daemonic child of the worker."""
    child = multiprocessing.get_context("fork").Process(target=stays, daemon=True)
    child.start()
    pid = os.fork()
    if pid == 0:
        return
    os.waitpid(pid, 0)
    note(path, "alive" if child.is_alive() else "dead")


def hook_that_leaves(*_: object) -> None:
    sys.exit(3)


def has_a_hook_that_leaves(path: str) -> int:
    """What joins threads at the end raises, which that hook is told."""
    sys.excepthook = hook_that_leaves
    threading._register_atexit(throw, "ValueError")  # type: ignore[attr-defined]
    atexit.register(note, path, "atexit")
    sys.stdout.write("no line end")
    return 7


def forks_with_a_hook_that_leaves(path: str) -> int:
    pid = os.fork()
    if pid == 0:
        sys.excepthook = hook_that_leaves
        atexit.register(note, path, "atexit")
        raise ValueError
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def leaves_files_open(path: str) -> None:
    kept.append(open(path, "w"))  # noqa: SIM115
    kept.append(open(path + ".binary", "wb"))  # noqa: SIM115
    kept.append(open(path + ".both", "w+b"))  # noqa: SIM115
    for one, what in zip(kept[-3:], ("text", b"bytes", b"both"), strict=True):
        one.write(what)


of_program: Any = None


def writes_to(module: str, name: str = "file") -> None:
    getattr(importlib.import_module(module), name).write("worked\n")


def replaces_stdout() -> None:
    print("begun", end="")
    sys.stdout = io.StringIO()


def leaves_a_writer(path: str) -> None:
    reader, writer = os.pipe()
    kept.append(open(path, "w"))  # noqa: SIM115
    kept[-1].write("text")
    pipe = open(writer, "wb")  # noqa: SIM115
    threading.Thread(target=pipe.write, args=(bytes(1_000_000),), daemon=True).start()
    os.read(reader, 1)  # it writes
    kept.append(reader)


def has_a_copy_speak() -> int:
    """How many of its calls are refused."""
    import asyncio

    from aioelastic import sharing

    pid = os.fork()
    if pid:
        refused = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sharing.send("by itself")
        return refused
    refused = 0
    aioelastic.ready()
    for call in (lambda: sharing.send("by a copy"), sharing.receive, lambda: asyncio.run(sharing.receive_async())):
        try:
            call()
        except RuntimeError as exc:
            refused += "that a worker has forked" in str(exc)
    os._exit(refused)
