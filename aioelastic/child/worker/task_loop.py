"""What a worker of an executor does: one task after another, until there are no more."""

from __future__ import annotations

import errno
import functools
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from ...model.text import call_text
from ..wire import datagrams, messages
from . import context, function_run, host_program
from .exceptions import describe, tell

_PAGE = os.sysconf("SC_PAGE_SIZE")
_copies: list[int] = []  # not empty: this is a forked copy of the worker


def serve(
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
    report_size: bool,
    main: tuple[str, str] | None,
) -> None:
    """Run tasks from our channel until its other end stops sending.

    Args:
        report_size: tell our resident size in bytes with each reply.
        main: the caller's main module, imported for the first task that needs it.
    """
    channel = context.channel
    assert channel is not None
    context.serving = True
    _copies.clear()  # a worker may have been forked by a worker
    os.register_at_fork(after_in_child=lambda: _copies.append(1))
    if initializer is not None:
        begun = initializer(*initargs)
        if type(begun) is types.CoroutineType:
            function_run.run(begun)
    if _copies:
        return  # the worker itself says that it is ready, and has the tasks
    context.ready()
    receive, send = datagrams.receive, datagrams.deliver
    decode = functools.partial(host_program.importing, messages.decode)  # it imports what a task needs
    check = context.check_channel
    while True:
        lack: OSError | None = None
        try:
            packet, fds = receive(channel)
        except datagrams.Missing as exc:  # a task has used them up: this one fails, and later ones may have more luck
            packet, fds, lack = exc.packet, [], OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}: {exc}")
        if not packet:
            return
        phase = function_run.IMPORT
        try:
            if lack is not None:
                raise lack
            try:
                if messages.needs_main(packet):
                    function_run.import_main(main)
                phase = function_run.UNPICKLE
                fn, args, kwargs = decode(packet, fds)
            finally:
                if fds:
                    datagrams.close(fds)
            if _copies:
                return  # made by what was imported, or unpickled: the worker itself does the task
            phase = function_run.RUN
            value = fn(*args, **kwargs)
            if type(value) is types.CoroutineType:
                value = function_run.run(value)
            phase = function_run.RESULT
            if not _copies:
                out, fds = _packed(fn, args, value)
        except BaseException as exc:
            if not _copies:
                out, fds = tell(messages.FAILED, {"phase": phase, **describe(exc, 1)})
            if _copies:
                raise
            BaseException.with_traceback(exc, None)
        fn = args = kwargs = value = None  # nothing of a task stays until the next
        if _copies:
            return  # what is to be told is what the worker itself tells, and so are the tasks to come
        check()
        size = _resident() if report_size else 0
        try:
            send(channel, out[:2] + size.to_bytes(8, "little") + out[2:], fds)
        except OSError as exc:
            if datagrams.is_gone(exc):
                raise
            out, _ = tell(
                messages.FAILED, {"phase": phase, **describe(exc)}
            )  # that many cannot travel, or not just now
            send(channel, out[:2] + bytes(8) + out[2:])
        finally:
            if fds:
                datagrams.close(fds)


class Raised:
    """What a call in a chunk has raised, in the place of its value.

    Attributes:
        told: as `describe` tells it.
        task: the call, and how long it had run.
    """

    def __init__(self, told: dict[str, Any], task: str) -> None:
        self.told, self.task = told, task


def chunk(fn: Callable[..., Any], columns: tuple[tuple[Any, ...], ...], go_on: bool) -> list[Any]:
    """Several calls as one task: what they return, or `Raised`. The first that raises is the last, unless `go_on`.

    Args:
        columns: the first arguments of all calls, the second ones, ...
    """
    values: list[Any] = []
    add, now, coroutine = values.append, time.monotonic, types.CoroutineType
    for one in zip(*columns, strict=True):
        began = now()
        try:
            value = fn(*one)
            if type(value) is coroutine:
                value = function_run.run(value)
        except BaseException as exc:  # as a task by itself
            if _copies:
                raise
            add(_raised(exc, f"{call_text(fn, one, {})}, {now() - began:.2f} s after its start"))
            BaseException.with_traceback(exc, None)
            if not go_on:
                break
        else:
            add(value)
            if _copies:  # such a one does no other call
                break
    return values


def _packed(fn: Callable[..., Any], args: tuple[Any, ...], value: Any) -> tuple[bytes, list[int]]:
    """The reply. In one of a chunk, `Raised` is in the place of what cannot be pickled."""
    try:
        return function_run.pack(messages.DONE, (value,))
    except BaseException:
        if fn is not chunk:
            raise
    call, columns, go_on = args
    values: list[Any] = []
    for given, one in zip(zip(*columns, strict=True), value, strict=False):
        try:
            datagrams.close(function_run.pack(messages.DONE, (one,))[1])
            values.append(one)
        except BaseException as exc:  # as of a task by itself
            values.append(Raised({"phase": function_run.RESULT, **describe(exc, 1)}, call_text(call, given, {})))
            if not go_on:
                break
    return function_run.pack(messages.DONE, (values,))


def _raised(exc: BaseException, task: str) -> Raised:
    return Raised({"phase": function_run.RUN, **describe(exc, 1)}, task)


def _resident() -> int:
    memory = sys.modules.get("aioelastic.memory")
    if memory is not None:
        memory.arena.trim()  # what lies idle for the next result is no growth
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0  # no descriptor is left for that: the next reply may tell
