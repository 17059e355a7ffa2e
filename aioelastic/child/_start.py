"""How the guardian starts one process: by vfork(2) what it is itself, by fork(2) what it could not take back."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os

from . import _mark, _place
from ._link import Environ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


def spawn(
    program: bytes,
    argv: list[bytes],
    environ: Environ,
    stdio: tuple[int, ...],
    blocked: Iterable[int],
    stop: int = 0,
    mark: int = 0,
) -> int:
    """By vfork(2): it is what this process is, so what it shall have, this process has for that moment."""
    had = _mark.put(mark) if mark else None
    try:
        return os.posix_spawn(
            program,
            argv,
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, at) for at, fd in enumerate(stdio)],
            setsid=True,
            setsigmask=blocked,
            setsigdef=(*_place.DEFAULT, stop) if stop else _place.DEFAULT,
        )
    finally:
        if had is not None:
            _mark.take_off(had)


def fork(
    program: bytes,
    argv: list[bytes],
    environ: Environ,
    stdio: tuple[int, ...],
    blocked: Iterable[int],
    stop: int = 0,
    mark: int = 0,
    state: tuple[Any, ...] | None = None,
    place: tuple[tuple[Any, ...], str] | None = None,
) -> int:
    """The same where it shall have what this process could not take back."""
    orders, cgroup = place or (None, "")
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        pid, later = _place.fork(cgroup)
    except OSError:
        os.close(ours)
        os.close(theirs)
        raise
    if pid == 0:
        try:
            os.setsid()
            if later:
                _place.move(later)
            for at, fd in enumerate(stdio):
                os.dup2(fd, at)
            _place.dispositions(None if state is None else state[-1], stop)
            if state is not None:
                _place.become(state)
            if orders is not None:
                _place.take(orders)
            if mark:
                _mark.put(mark)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, blocked)
            os.execve(program, argv, environ)
        except OSError as exc:
            os.write(theirs, b"%d %s" % (exc.errno or 1, os.fsencode(exc.filename or "")))
        finally:
            os._exit(127)
    os.close(theirs)
    code, _, what = os.read(ours, 4096).partition(b" ")
    os.close(ours)
    if code:
        os.waitpid(pid, 0)
        raise OSError(int(code), os.strerror(int(code)), os.fsdecode(what) or None)
    return pid


def attempt(place: tuple[tuple[Any, ...], str], state: tuple[Any, ...] | None) -> tuple[int, str]:
    """Whether a process could have that place: (0, ""), or errno and field of what the system refused."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        told = b"1 "
        try:
            if state is not None:
                _place.become(state)
            _place.take(place[0])
            told = b"0 "
        except OSError as exc:
            told = b"%d %s" % (exc.errno or 1, os.fsencode(exc.filename or ""))
        finally:
            os.write(theirs, told)
            os._exit(0)
    os.close(theirs)
    code, _, field = os.read(ours, 4096).partition(b" ")
    os.close(ours)
    os.waitpid(pid, 0)
    return int(code or b"1"), os.fsdecode(field)
