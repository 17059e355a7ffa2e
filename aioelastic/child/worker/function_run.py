"""One function in this process: what a worker does from its first instruction to its last."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import codecs
import faulthandler
import fcntl
import functools
import gc
import os
import pickle
import socket
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

from ...system.descriptors import shut, shut_all
from ..kernel import process_marks, process_setup
from ..wire import datagrams, messages, pickling
from . import context, host_program, interpreter_exit, main_module, multiprocessing_state, stack_dump
from .error_record import write_error
from .exceptions import describe, tell
from .named_function import Named

# the phases that an error may come from, as the supervisor tells them
IMPORT, UNPICKLE, RUN, RESULT = "import", "unpickle", "call", "result"

UVLOOP_NEEDS = 9  # descriptors of its first loop, or two less for a later one
NO_DEBUGGER = (
    "breakpoint() has nobody to talk to here: the standard input of a function worker is /dev/null. Call the function "
    "in the program itself, or in a script that is run with tty=True (Command), or set PYTHONBREAKPOINT to a debugger "
    "that listens, such as debugpy.breakpoint or remote_pdb.set_trace"
)
STANDARD = tuple((fd, fd, True) for fd in range(3))
_left: list[Any] = []
mask: set[int] = set()  # of signals, which a function begins with
# what is called, and whether local variables are wanted in its traceback
Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]


def import_main(main: main_module.Main | None) -> None:
    """See `main_module.import_main`."""
    host_program.importing(main_module.import_main, main)


def fresh() -> NoReturn:
    """`start="spawn"`: this interpreter was started for one function. Its channel is standard input."""
    channel = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    shut(null)
    work(channel)


def copied(
    channel: int,
    stdout: int | None,
    stderr: int | None,
    overlay: Mapping[str, str | None],
    cwd: str | None,
    state: tuple[Any, ...] | None = None,
    place: tuple[tuple[Any, ...], str] | None = None,
    mark: int = 0,
    hold: Callable[[], object] | None = None,
    call: Call | None = None,
    ends: Iterable[tuple[int, int, bool]] = STANDARD,
) -> NoReturn:
    """Right after `forking.fork`: become a worker of its own. What was ours in the process it was copied from is gone
    already; all other descriptors stay where they are, for what was imported has them.

    Args:
        overlay: variables over those of that process; None unsets one.
        state: what the program has now (`process_setup.become`); None: this is a copy of the program itself.
        hold: sets what imports have set; None: this is a copy of the program itself.
        ends: descriptors, which stream each becomes, and whether what it starts inherits that.
    """
    try:
        os.setsid()
        # by the C half of `signal`: what makes enums of numbers takes a tenth of a worker's life
        for signum in (_signal.SIGPIPE, _signal.SIGXFSZ):
            _signal.signal(signum, _signal.SIG_IGN)  # as in any Python program
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        if hold is None:
            faulthandler.disable()  # it may write to a file of the program's
        stack_dump.forget()
        context.forget(hold is None)
        for name in ("aioelastic.child.worker.send_receive", "aioelastic.system.forked_copies"):
            if name in sys.modules:
                sys.modules[name].forget()
        mine = _given(stdout, stderr, channel, ends)
        _set(overlay)
        if state is not None:
            process_setup.become(state)
        if place is not None:
            orders, cgroup = place
            if cgroup:
                process_setup.move(cgroup)
            process_setup.take(orders)
        if mark:
            process_marks.put(mark)
        _forget_loop(hold is None)
        interpreter_exit.renew(is_host=hold is None)
        _reseed()
        gc.freeze()  # what is garbage of the process we were may speak of descriptors that are closed
        if hold is None:
            interpreter_exit.keep(
                sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
            )  # some module may print by them
            new_streams()
        sock = socket.socket(fileno=mine)
        if cwd is not None:
            os.chdir(cwd)
        if hold is not None:
            hold()
            context.catch()
    except BaseException as exc:  # nobody is there yet to catch it
        os.write(2, f"aioelastic: a worker could not be set up: {type(exc).__name__}: {exc}\n".encode())
        os._exit(1)
    work(sock, call)


def work(channel: socket.socket, call: Call | None = None) -> NoReturn:
    """Take the function from the channel (unless `call` is it), run it, send what came of it, and leave."""
    code = 1
    try:
        context.take(channel, functools.partial(_tell_ready, channel))
        interpreter_exit.mine()
        try:
            if not faulthandler.is_enabled():  # by imports of a zygote, to a file of theirs
                faulthandler.enable(all_threads=True)
        except (OSError, ValueError, RuntimeError):
            pass  # stderr is closed: a crash will be told by its signal alone
        stack_dump.offer()
        if sys.breakpointhook is sys.__breakpointhook__:  # else the program has its own
            sys.breakpointhook = _no_debugger
        code = _work(channel, call)
    except BaseException as exc:  # a bug of ours, or the supervisor is gone
        write_error(exc)
    finally:
        interpreter_exit.leave(code)


def _work(channel: socket.socket, call: Call | None) -> int:
    phase, with_locals, pid = IMPORT, False, os.getpid()
    try:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)  # only here is somebody who knows what to do with a Ctrl-C
        if call is None:
            packet, fds = datagrams.receive(channel)
            program, main, with_locals, key, tracked = messages.decode(packet, fds)
            datagrams.close(fds[tracked:])
            multiprocessing_state.adopt(key, fds[:tracked])
            host_program.adopt(program)
            messages.on_main = functools.partial(import_main, main)
            packet, fds = datagrams.receive(channel)
            if messages.needs_main(packet):
                import_main(main)
            phase = UNPICKLE
            fn, args, kwargs = messages.decode(packet, fds, private=True)
            datagrams.close(fds)
            host_program.filter_warnings()
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
        _send(channel, pid, *pack(messages.VALUE, (value,)))
    except SystemExit as exc:
        if phase != RUN:
            _tell(channel, pid, phase, describe(exc, 1, with_locals))
            return 1
        code = interpreter_exit.code_of(exc)
        if code == 0:
            _send(channel, pid, *pack(messages.VALUE, (None,)))
        return code
    except BaseException as exc:
        if os.getpid() != pid:
            return interpreter_exit.tell(exc)  # nor is what a copy raises the worker's error
        # the first to fail has the others stopped: one that fails beside it must not lose half of what it tells
        before = _signal.pthread_sigmask(_signal.SIG_SETMASK, process_setup.BLOCKED)
        try:
            if isinstance(exc, Exception | KeyboardInterrupt):
                write_error(exc)
            _tell(channel, pid, phase, describe(exc, 1, with_locals))
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
        return 1
    return 0


def _no_debugger(*args: Any, **kwargs: Any) -> Any:
    """What `breakpoint()` does where pdb would find the end of its input, and end with an error of its own."""
    if os.environ.get("PYTHONBREAKPOINT") or sys.stdin is not sys.__stdin__ or not _is_empty(0):
        return sys.__breakpointhook__(*args, **kwargs)  # noqa: T100 - it is what was asked for
    raise RuntimeError(NO_DEBUGGER)


def _is_empty(fd: int) -> bool:
    """Whether nothing can be read there: it is /dev/null, or closed."""
    try:
        return os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
    except OSError:
        return True


def run(coroutine: Any) -> Any:
    """In an event loop of its own: by the policy that was set, else uvloop's where that is installed. Raises `OSError`:
    there are not enough descriptors for that."""
    events = sys.modules.get("asyncio.events")
    policy = None if events is None else events._event_loop_policy
    in_loop: Callable[[Any], Any] | None = None
    if policy is None or type(policy).__module__ == "asyncio.unix_events":
        try:
            import uvloop
        except ImportError:
            pass
        else:
            in_loop = uvloop.run
    if in_loop is None:
        import asyncio

        in_loop = asyncio.run
    if "uvloop" in sys.modules:  # by a policy, too
        try:
            _check_free(UVLOOP_NEEDS)
        except OSError:
            coroutine.close()
            raise
    return in_loop(coroutine)


def _check_free(count: int) -> None:
    """Raises `OSError`: so many descriptors cannot be had. libuv would end the process where it got some of them."""
    taken: list[int] = []
    try:
        while len(taken) < count:
            taken.append(os.eventfd(0))
    finally:
        shut_all(taken)


class NoMain(pickle.PicklingError):
    """Something is found in a main module that a worker cannot import."""


def pack(
    kind: bytes,
    body: tuple[Any, ...],
    forked: bool = False,
    fds: list[int] | None = None,
    inline: int = messages.INLINE,
    **who: bool,
) -> tuple[bytes, list[int]]:
    """As `messages.encode`, and by value what cannot be found by name there, if cloudpickle is here.

    Args:
        forked: for a copy of this process, which has its main module.
        fds: an empty list for the descriptors; what is raised may leave some in it.
        inline: bytes that the body may have beside its datagram.
        who: gets it, as `for_others` and `read_only` of that.

    Raises:
        NoMain: for a function in a main module that its worker cannot import.
    """
    fds = [] if fds is None else fds
    try:
        packet, _ = messages.encode(kind, body, False, fds, inline, **who)
    except pickling.FAILURES as exc:
        if not pickling.is_pickles_own(exc) or messages.by_value() is None:
            raise
    else:
        if not messages.needs_main(packet):
            return packet, fds
        call = kind in (messages.CALL, messages.TASK)
        # what a worker says is heard where its main module is known
        if not (call or context.channel is None) or main_module.importable() is not None:
            return packet, fds
        if messages.by_value() is None:
            if not call or forked:
                return packet, fds
            shut_all(fds)
            raise NoMain(
                "it is defined in a main module that a worker cannot import: put it into a module of its own, "
                "or install cloudpickle"
            )
        shut_all(fds)
    return messages.encode(kind, body, True, fds, inline, **who)


def _tell_ready(channel: socket.socket) -> None:
    datagrams.send(channel, *messages.encode(messages.RUNS, ()))


def _tell(channel: socket.socket, pid: int, phase: str, told: dict[str, Any]) -> None:
    _send(channel, pid, *tell(messages.ERROR, {"phase": phase, **told}))


def _send(channel: socket.socket, pid: int, packet: bytes, fds: list[int]) -> None:
    """If this is the worker itself, and not a copy that it has forked."""
    try:
        if os.getpid() == pid:
            context.check_channel()
            datagrams.deliver(channel, packet, fds)
    finally:
        datagrams.close(fds)


def _given(stdout: int | None, stderr: int | None, channel: int, ends: Iterable[tuple[int, int, bool]]) -> int:
    """The streams go where they belong; the channel to a number that is free, which is returned."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    given = [null if fd is None else fd for fd in (None, stdout, stderr, channel)]
    # first out of the way of 0 to 2, which may have been closed, then into place
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in given]
    for fd in {null, *given}:
        shut(fd)
    for fd, number, inherited in ends:
        os.dup2(high[number], fd, inherited)
    for fd in high[:3]:
        shut(fd)
    return high[3]


def _set(overlay: Mapping[str, str | None]) -> None:
    zone = os.environ.get("TZ")
    for key, value in overlay.items():
        if value is None:
            os.environ.pop(key, None)
        elif os.environ.get(key) != value:
            os.environ[key] = value
    if os.environ.get("TZ") != zone:
        time.tzset()


def new_streams() -> None:
    """As Python makes them where it finds these variables, but line by line: what is printed should arrive then.

    The old ones may hold what the other process has not written yet, or be somebody's replacement.
    """
    found = os.environ.get
    encoding, _, errors = ("" if sys.flags.ignore_environment else found("PYTHONIOENCODING", "")).partition(":")
    if not encoding and found("PYTHONUTF8") == "1":
        encoding, errors = "utf-8", errors or "surrogateescape"
    for number, name, mode, buffering in ((0, "stdin", "r", -1), (1, "stdout", "w", 1), (2, "stderr", "w", 1)):
        old = getattr(sys, f"__{name}__")
        how = errors or ("strict" if encoding else getattr(old, "errors", None))
        stream = open(  # noqa: SIM115
            number,
            mode,
            buffering,
            encoding=codecs.lookup(encoding).name if encoding else getattr(old, "encoding", None),
            errors="backslashreplace" if number == 2 else how,
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def flush() -> None:
    """What this process has printed, so that copies of it do not print it once more."""
    for stream in {id(one): one for one in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)}.values():
        try:
            stream.flush()  # type: ignore[union-attr]
        except (AttributeError, OSError, ValueError):
            pass  # there is none, nobody reads it, or it is closed
    interpreter_exit.flush_c(None)


def _forget_loop(of_program: bool) -> None:
    """No loop runs here; and one that was made before is not that of both. The policy stays."""
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is None:
        return
    asyncio._set_running_loop(None)
    policy = asyncio.events._event_loop_policy
    local = getattr(policy, "_local", None)
    loop = getattr(local, "_loop", None)
    if loop is None:
        return
    if of_program:
        _left.append(loop)  # that of the program may run: it is not ours, and never closed here
        policy._local = policy._Local()
        if getattr(policy, "_watcher", None) is not None:
            policy._watcher = None
    elif not loop.is_closed():
        from ...system.forked_copies import part  # it is loaded where there is a loop

        part(loop)


def _reseed() -> None:
    """Copies of one process must not draw the same numbers."""
    found = sys.modules.get
    for source in (found("random"), found("numpy.random"), getattr(found("torch"), "default_generator", None)):
        seed = getattr(source, "seed", None)  # none of a stub, as applications have it that avoid the import
        if seed is not None:
            seed()
