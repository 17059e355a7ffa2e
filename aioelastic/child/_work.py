"""One function in this process: what a worker does from its first instruction to its last."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from . import _context, _mark, _place, _socket, _stacks, _wire
from ._failure import describe
from ._named import Named
from ._record import write_error

# the phases that an error may come from, as the supervisor tells them
IMPORT, UNPICKLE, RUN, RESULT = "import", "unpickle", "call", "result"

# what is called, and whether local variables are wanted in its traceback
_imported: tuple[str, str] | None = None  # the main module; multiprocessing has one of that name, too
Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]


def fresh() -> NoReturn:
    """`start="spawn"`: this interpreter was started for one function. Its channel is standard input."""
    channel = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    work(channel)


def copied(
    channel: int,
    stdout: int | None,
    stderr: int | None,
    environ: dict[str, str],
    cwd: str | None,
    state: tuple[Any, ...] | None = None,
    place: tuple[tuple[Any, ...], str] | None = None,
    mark: int = 0,
    call: Call | None = None,
) -> NoReturn:
    """Right after `_fork.fork`: become a worker of its own, with nothing of the process it was copied from.

    Args:
        state: what the program has now (`_place.become`); None: this is a copy of the program itself.
    """
    try:
        os.setsid()
        for signum in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signum, signal.SIG_IGN)  # as in any Python program
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _stacks.forget()
        mine = _only(stdout, stderr, channel)
        os.environ.clear()
        os.environ.update(environ)
        if state is not None:
            _place.become(state)
        if place is not None:
            orders, cgroup = place
            if cgroup:
                _place.move(cgroup)
            _place.take(orders)
        if mark:
            _mark.put(mark)
        _context.forget()
        for name in ("aioelastic.child._letters", "aioelastic.forked"):
            if name in sys.modules:
                sys.modules[name].forget()
        atexit._clear()  # those of the process we were are not ours to run
        _forget_loop()
        _reseed()
        gc.freeze()  # what is garbage of the process we were holds numbers of descriptors that are ours now
        _new_streams()
        sock = socket.socket(fileno=mine)
        if cwd is not None:
            os.chdir(cwd)
    except BaseException as exc:
        os.write(2, f"aioelastic: a worker could not be set up: {type(exc).__name__}: {exc}\n".encode())
        os._exit(1)
    work(sock, call)


def work(channel: socket.socket, call: Call | None = None) -> NoReturn:
    """Take the function from the channel (unless `call` is it), run it, send what came of it, and leave."""
    code = 1
    try:
        _context.channel = channel
        try:
            faulthandler.enable(all_threads=True)
        except (OSError, ValueError, RuntimeError):
            pass  # stderr is closed: a crash will be told by its signal alone
        _stacks.offer()
        code = _work(channel, call)
    except BaseException as exc:  # a bug of ours, or the supervisor is gone
        write_error(exc)
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """End as the interpreter would: non-daemon threads first, then atexit, then the streams; and nothing of a host."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        ctypes.CDLL(None).fflush(None)  # what C code has printed
    except BaseException:
        pass  # whoever read them is gone
    finally:
        os._exit(code)


def import_main(main: tuple[str, str] | None) -> None:
    """Import the caller's main module as multiprocessing does: under another name, so that its guard is false."""
    global _imported
    if main is None or main == _imported:
        return
    kind, where = main
    _context.importing_main = True
    try:
        module = types.ModuleType("__mp_main__")
        if kind == "module":
            content = runpy.run_module(where, run_name="__mp_main__", alter_sys=True)
        else:
            content = runpy.run_path(where, run_name="__mp_main__")
        module.__dict__.update(content)
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
        _imported = main
    finally:
        _context.importing_main = False


def adopt(path: Sequence[str], argv: Sequence[str]) -> None:
    """The host's `sys.path` and `sys.argv`."""
    if sys.path != path:
        sys.path[:] = path
        importlib.invalidate_caches()
    sys.argv[:] = argv


def _work(channel: socket.socket, call: Call | None) -> int:
    phase, with_locals, pid = IMPORT, False, os.getpid()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # only here is somebody who knows what to do with a Ctrl-C
        if call is None:
            packet, fds = _socket.receive(channel)
            path, argv, main, with_locals = _wire.decode(packet, fds)
            _socket.close(fds)
            adopt(path, argv)
            import_main(main)
            phase = UNPICKLE
            packet, fds = _socket.receive(channel)
            fn, args, kwargs = _wire.decode(packet, fds, private=True)
            _socket.close(fds)
        else:
            fn, args, kwargs, with_locals = call
            if isinstance(fn, Named):
                phase = UNPICKLE
                fn = fn.function()
        phase = RUN
        value = fn(*args, **kwargs)
        if isinstance(value, types.CoroutineType):
            value = run(value)
        if os.getpid() != pid:
            return 0  # a forked copy has returned: the value is what the worker itself returns
        phase = RESULT
        _send(channel, _wire.VALUE, (value,))
    except SystemExit as exc:
        if phase != RUN:
            _send(channel, _wire.ERROR, (phase, describe(exc, 1, with_locals)))
            return 1
        if exc.code is None or exc.code == 0:
            if os.getpid() == pid:
                _send(channel, _wire.VALUE, (None,))
            return 0
        if isinstance(exc.code, int):
            return exc.code & 0xFF
        print(exc.code, file=sys.stderr)
        return 1
    except BaseException as exc:
        if os.getpid() != pid:
            sys.excepthook(type(exc), exc, exc.__traceback__)  # nor is what a copy raises the worker's error
            return 1
        # the first to fail has the others stopped: one that fails beside it must not lose half of what it tells
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            if isinstance(exc, Exception | KeyboardInterrupt):
                write_error(exc)
            _send(channel, _wire.ERROR, (phase, describe(exc, 1, with_locals)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return 1
    return 0


def run(coroutine: Any) -> Any:
    """In an event loop of its own, uvloop's where that is installed."""
    try:
        import uvloop
    except ImportError:
        import asyncio

        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


def pack(kind: bytes, body: tuple[Any, ...]) -> tuple[bytes, list[int]]:
    """As `_wire.encode`, and by value what cannot be found by name, if cloudpickle is here."""
    try:
        return _wire.encode(kind, body)
    except OSError:
        raise
    except Exception:
        dumps = _wire.by_value()
        if dumps is None:
            raise
        return _wire.encode(kind, body, dumps)


def _send(channel: socket.socket, kind: bytes, body: tuple[Any, ...]) -> None:
    packet, fds = pack(kind, body)
    try:
        _socket.send(channel, packet, fds)
    finally:
        _socket.close(fds)


def _only(stdout: int | None, stderr: int | None, keep: int) -> int:
    """Put them where they belong, `keep` to 3, and close everything else."""
    null = os.open(os.devnull, os.O_RDWR)
    wanted = [null if fd is None else fd for fd in (None, stdout, stderr, keep)]
    # first out of the way of 0 to 3, then into place
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in wanted]
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=number < 3)
    memory = sys.modules.get("aioelastic.memory")
    first = 4
    for fd in memory.descriptors() if memory is not None else ():  # of arrays that were inherited
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
    return 3


def _new_streams() -> None:
    """Not the old ones: they may hold what the other process has not written yet, or be somebody's replacement."""
    for number, name, errors in ((1, "stdout", None), (2, "stderr", "backslashreplace")):
        # line by line: they should arrive when they are printed
        stream = open(number, "w", buffering=1, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115


def _forget_loop() -> None:
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None:
        asyncio._set_running_loop(None)
        asyncio.set_event_loop_policy(None)


def _reseed() -> None:
    """Copies of one process must not draw the same numbers."""
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
