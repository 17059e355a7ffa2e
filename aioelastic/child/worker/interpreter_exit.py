"""How a worker ends: as the interpreter would, step by step, and each step whatever became of the one before. The
process that it was copied from has exit work of its own, which is not done here."""

from __future__ import annotations

import atexit
import gc
import io
import os
import stat
import sys
import threading
from _weakref import ref
from typing import Any, NoReturn

from ..kernel.libc import forget_printed, function

flush_c = function("fflush")  # with None: what C code has printed
_pid = 0  # of the worker: it may fork
_streams: list[Any] = []  # that were standard streams before
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
_imported: list[ref[Any]] = []  # files that imports of a zygote have opened
_kept: list[Any] = []  # of the program that we were: to free it closes descriptors, whose numbers are others' by now


def mine() -> None:
    """This process is the worker."""
    global _pid
    _pid = os.getpid()


class _Nowhere(io.RawIOBase):
    """A file that takes everything."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return len(data)


def keep(*streams: Any) -> None:
    """They were standard streams of the program, and somebody may still print by them. What waits in them is written by
    the program, which has not waited for that before the fork: perhaps nobody reads."""
    forget_printed()
    for one in streams:
        # what else is put there, as by a notebook, writes somewhere else, or waits for a thread that is not here
        if type(one) is io.TextIOWrapper and all(one is not other for other in _streams):
            _streams.append(one)
            try:
                _empty(one)
            except (OSError, ValueError):
                pass  # it is closed, or detached


def _empty(stream: io.TextIOWrapper) -> None:
    buffer = stream.buffer
    if type(buffer) is not io.BufferedWriter:
        return  # none, as with `-u`
    raw = buffer.raw
    io.BufferedWriter.__init__(
        buffer, _Nowhere()
    )  # with nothing in it, and a lock that no thread has which is not here
    try:
        stream.flush()
    finally:
        io.BufferedWriter.__init__(buffer, raw)


def keep_files() -> None:
    """In a zygote, before `gc.freeze` takes its objects out of the collector's sight: its workers may write to files
    that were opened so far. What was written to them by imports is written once."""
    found = _open_files()
    _flush(found)
    standard: list[Any] = [sys.__stdin__, sys.__stdout__, sys.__stderr__]  # flushed last; each takes a worker 5 µs
    standard += [getattr(one, "buffer", None) for one in standard]
    _imported.extend(ref(file) for file in found if file not in standard)


def renew(is_host: bool) -> None:
    """In a copy: what would be done for the other process at its end is not ours.

    Args:
        is_host: it is a copy of the program, and all exit work so far is the program's; but what the standard library
            registers once, when a module is imported, is registered again. A copy of a zygote does what was registered
            by imports.
    """
    loaded = sys.modules
    util = loaded.get("multiprocessing.util")
    if is_host:
        atexit._clear()
        # registered in the order in which modules are loaded as a rule; called in the reverse
        if "logging" in loaded:
            for handler in [ref() for ref in loaded["logging"]._handlerList]:
                if hasattr(handler, "capacity") and isinstance(getattr(handler, "buffer", None), list):
                    handler.buffer = []  # of a MemoryHandler: what waits there is written by the other process
            atexit.register(loaded["logging"].shutdown)
        if "weakref" in loaded:
            finalize = loaded["weakref"].finalize
            for info in list(finalize._registry.values()):
                info.atexit = False
            if finalize._registered_with_atexit:
                atexit.register(finalize._exitfunc)
        if util is not None:
            util._finalizer_registry.clear()
            atexit.register(util._exit_function)
    if util is not None:
        util._run_after_forkers()  # as multiprocessing's own copies do
    _forget_children()
    _forget_pools()


def leave(code: int) -> NoReturn:
    """Non-daemon threads are joined, children of `multiprocessing` are joined or ended, `atexit`, `weakref.finalize`
    and `logging.shutdown` are done, open files and streams are flushed; then the process ends."""
    if os.getpid() != _pid:
        _forget_children()
    shutdown = threading._shutdown  # type: ignore[attr-defined]
    for step in (shutdown, atexit._run_exitfuncs, _flush_files):
        try:
            step()
        except BaseException as exc:  # as in the interpreter it is told, and the rest is done
            tell(exc)
    copy(code)


def copy(code: int) -> NoReturn:
    """End a process that somebody has forked, with what it has printed, and no exit work of the original's."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__, *_streams):
        try:
            stream.flush()
        except BaseException:
            pass  # there is none, whoever read it is gone, or it is closed
    try:
        flush_c(None)
    finally:
        os._exit(code)


def tell(exc: BaseException) -> int:
    """Have the program's hook tell what nobody has caught. Returns the exit code for it, which may be the hook's."""
    try:
        sys.excepthook(type(exc), exc, exc.__traceback__)
    except SystemExit as left:  # as many do, after they have logged it
        return code_of(left)
    except BaseException:
        try:
            sys.__excepthook__(type(exc), exc, exc.__traceback__)
        except BaseException:
            pass  # another Ctrl-C
    return 1


def code_of(exc: BaseException) -> int:
    """The exit code that this would end an interpreter with; what `sys.exit` was given besides is printed."""
    if not isinstance(exc, SystemExit):
        return 1
    code = exc.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    try:
        print(code, file=sys.stderr)  # noqa: T201  # as an interpreter does
    except BaseException:
        pass  # its own __str__, or stderr is closed
    return 1


def _flush_files() -> None:
    """An interpreter closes them as it takes its modules down. Those of who we are a copy of are frozen, and so not
    found."""
    _flush([*_open_files(), *(file for one in _imported if (file := one()) is not None)])


def _open_files() -> list[Any]:
    return [one for one in gc.get_objects() if issubclass(type(one), _WRITERS)]


def _flush(files: list[Any]) -> None:
    alone = threading.active_count() == 1
    for one in files:
        try:
            # a thread that waits for the reader of a pipe has the lock of what it writes to, and may wait for ever
            if alone or stat.S_ISREG(os.fstat(one.fileno()).st_mode):
                one.flush()
        except BaseException:
            pass  # it is closed, or the disk is full: an interpreter says nothing either


def _forget_children() -> None:
    """Those of the other process: to end them, or wait for them, is not ours."""
    process: Any = sys.modules.get("multiprocessing.process")
    if process is not None:
        _kept.append(process._children)
        process._children = set()


def _forget_pools() -> None:
    """Executors of concurrent.futures: their threads are not here, and their pipes have numbers of others now."""
    processes: Any = sys.modules.get("concurrent.futures.process")
    if processes is not None:
        for thread, wakeup in list(processes._threads_wakeups.items()):
            wakeup._closed = True  # it is written to no more, whoever does that
            _kept.append((thread, wakeup, vars(wakeup).copy()))
        processes._threads_wakeups.clear()
    threads: Any = sys.modules.get("concurrent.futures.thread")
    if threads is not None:
        threads._threads_queues.clear()
