"""The zygote: one small process with a single thread that has imported what workers need, and forks them on request.

It speaks over one socket, which is its lifeline too: when that closes, the supervisor is gone, and so are its workers.
It leaves by itself after a time without any.
"""

from __future__ import annotations

import _locale
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref
from typing import Any, NoReturn, TypeAlias

from ...system.descriptors import shut
from ..kernel.child_processes import send_signal, status_of_dead
from ..kernel.forking import fork
from ..wire import datagrams, messages, requests
from ..wire.links import Link, complain
from ..worker import function_run, host_program, interpreter_exit, multiprocessing_state
from .imported_state import Imported

_importing = True
# threads that ran before we had done anything, as those of an agent that comes into each interpreter (site, .pth):
# it lives with forks in any program. They are not in the copies, and what imports start is another matter.
_agents: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
Problem: TypeAlias = "tuple[str, Any, str, str]"  # field and value as of a `SpecError`, words, traceback
_HIGH = 200  # from which on our own descriptors are
REAP = 1.0  # seconds between two looks at whether a debugger has let go of who has ended
# that end a process by default and are not its own fault
_LATER = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPWR),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)


def main() -> NoReturn:
    """Serve until the supervisor is gone or there was nothing to do for long enough."""
    try:
        _main()
    except OSError as exc:  # which its supervisor learns from its end
        complain(f"a zygote could not begin: {exc}")
    if os.getpgrp() == os.getpid():
        with contextlib.suppress(OSError):
            os.killpg(0, signal.SIGTERM)  # what imports have started; we do not heed it
    os._exit(0)


def _main() -> None:
    global _importing
    _agents.update(threading.enumerate())  # this one, too
    control = socket.socket(fileno=_out_of_the_way())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    shut(null)
    _outlive_signals_unseen()
    # it was started with all signals blocked; what is imported may start processes, which would inherit that
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        packet, fds = datagrams.receive(control)
        (cwd, program, locales, where, preload, idle, key), tracker = requests.decode(packet, fds)
        datagrams.close(fds[: len(fds) - len(tracker)])
        multiprocessing_state.adopt(key, [*tracker])
        for category, name in locales:
            with contextlib.suppress(_locale.Error):  # type: ignore[attr-defined]
                _locale.setlocale(category, name)
        with contextlib.suppress(OSError):  # gone, or not to be entered: what needs it will say so
            os.chdir(cwd)
        if "PYTHONUNBUFFERED" not in os.environ:
            function_run.new_streams()  # before an import takes hold of those: they are its workers', too
        imported = Imported()
        problem = _warm_up(program, preload, where)
        _importing = False
        imported.end()
        os.chdir("/")  # a file system that is to be unmounted is not held
        _outlive_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if problem is None:
            packet, fds = requests.encode(requests.READY, (os.getpid(), imported.files()))
            datagrams.deliver(control, packet, fds)
            datagrams.close(fds)
            Zygote(control, imported).serve(idle)
        else:
            datagrams.deliver(control, *requests.encode(requests.BROKEN, problem))
    except OSError as exc:
        if not datagrams.is_gone(exc):
            raise
    finally:
        control.close()


class Zygote:
    """Serves one supervisor. It never waits for a child or for the supervisor, and no request ends it."""

    def __init__(self, control: socket.socket, imported: Imported) -> None:
        self._imported = imported
        self._epoll = select.epoll()
        control.setblocking(False)
        self._control = control
        self._link = Link(control, self._epoll)
        # pidfd → (id, pid, how it ends with the supervisor), until they have ended
        self._children: dict[int, tuple[int, int, tuple[int, float] | None]] = {}
        self._pids: dict[int, int] = {}  # the same by id
        self._unreaped: set[int] = set()  # have ended, and a debugger holds them
        self._was_asked = False  # until then, who started it is about to ask
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # workers are told theirs

    def serve(self, idle: float) -> None:
        """Until the other end closes, or nobody has wanted anything for `idle` seconds after a first worker."""
        self._epoll.register(self._control, select.EPOLLIN)
        try:
            while True:
                bound = REAP if self._unreaped else None if self._children or not self._was_asked else idle
                if self._link.again:
                    self._link.write()
                    bound = datagrams.AGAIN
                events = self._epoll.poll(bound)
                self._reap()
                if not events and bound is idle:
                    return
                for fd, event in events:
                    try:
                        if fd in self._children:
                            self._tell_exit(fd)
                        elif fd == self._control.fileno() and not self._hear(event):
                            return
                    except OSError as exc:  # it concerns that request alone
                        complain(f"a zygote could not do its work: {exc}")
                    except Exception:
                        traceback.print_exc()  # a bug of ours
        finally:
            self._give_grace()
            for pidfd, (_, pid, _) in self._children.items():
                _kill(pidfd, pid)

    def _hear(self, event: int) -> bool:
        """False: the supervisor is gone."""
        if event & select.EPOLLOUT:
            self._link.write()
        if not event & ~select.EPOLLOUT:
            return True
        try:
            packet, fds = datagrams.receive(self._control)
        except OSError as exc:
            return datagrams.passes(exc)
        except datagrams.Missing as exc:  # no descriptors left: that start is refused, and no other
            if exc.packet[:1] == requests.FORK:
                self._refuse(requests.number(exc.packet), OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            return True
        if not packet:
            return False
        try:
            body, given = requests.decode(packet, fds)
            datagrams.close(fds[: len(fds) - len(given)])
            fds = given
            if packet[:1] == requests.FORK:
                self._was_asked = True
                self._fork(body, given)
            elif packet[:1] == requests.SIGNAL:
                self._signal(*body)
        finally:
            datagrams.close(fds)
        return True

    def _reap(self) -> None:
        for pid in list(self._unreaped):
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self._unreaped.discard(pid)
            except ChildProcessError:
                self._unreaped.discard(pid)

    def _give_grace(self) -> None:
        """The supervisor is gone, and some of its groups give their workers time to end."""
        now = time.monotonic()
        graces = {}
        for pidfd, (_, pid, lost) in list(self._children.items()):
            if lost is None:
                _kill(pidfd, pid)
                continue
            for signum in (lost[0], signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    send_signal(pidfd, pid, signum)
            graces[pidfd] = now + lost[1]
        if graces:
            self._epoll.unregister(self._control)
        while graces:
            for pidfd, _ in self._epoll.poll(min(max(min(graces.values()) - time.monotonic(), 0), datagrams.LONGEST)):
                _, pid, _ = self._children.pop(pidfd)
                self._epoll.unregister(pidfd)
                _kill(pidfd, pid)  # others of its group
                graces.pop(pidfd, None)
            for pidfd in [one for one, until in graces.items() if until <= time.monotonic()]:
                del graces[pidfd]

    def _refuse(self, number: int, exc: OSError) -> None:
        self._link.say(requests.REFUSED, (number, exc.errno or 0, exc.strerror or str(exc)))

    def _fork(self, body: tuple[Any, ...], fds: list[int]) -> None:
        number, overlay, cwd, place, streams, mark, lost, state, stop = body
        ends = iter(fds)
        channel = next(ends)
        stdout = next(ends) if streams & 1 else None
        stderr = next(ends) if streams & 2 else None
        words = unsafe()
        if words:
            self._link.say(requests.REFUSED, (number, 0, f'{words}; start="spawn" can be used'))
            return

        imported = self._imported

        filters = warnings.filters

        def become(_: str) -> None:
            warnings.filters = filters
            self._disown()
            there, given = imported.cwd(cwd), imported.state(state)
            function_run.copied(
                channel, stdout, stderr, overlay, there, given, place, mark, imported.hold, ends=imported.ends
            )

        pid, pidfd = 0, -1
        try:
            if threading.active_count() > 1:  # of which Python warns from 3.12 on: see `_agents`
                warnings.filters = [("ignore", None, DeprecationWarning, None, 0)]
            pid = fork(become, ignored=state[-1], stop=stop, dies_with_us=True)
            pidfd = os.pidfd_open(pid)
            self._epoll.register(pidfd, select.EPOLLIN)
            self._link.say(requests.STARTED, (number, pid, 0), pidfd)  # fork(2) begins a count of its own
        except OSError as exc:
            if pid:
                os.kill(pid, signal.SIGKILL)
                self._unreaped.add(pid)
            datagrams.close((pidfd,) if pidfd >= 0 else ())
            self._refuse(number, exc)
            return
        finally:
            warnings.filters = filters
        self._children[pidfd] = (number, pid, lost)
        self._pids[number] = pid

    def _disown(self) -> None:
        """In a worker: what is ours is closed, and nothing else. What imports have opened stays where it is."""
        self._epoll.close()
        datagrams.close(tuple(self._children))
        self._link.disown()

    def _tell_exit(self, pidfd: int) -> None:
        at, wall = time.monotonic_ns(), time.time()
        number, pid, _ = self._children.pop(pidfd)
        del self._pids[number]
        with contextlib.suppress(OSError):
            self._epoll.unregister(pidfd)  # closing is not enough: the supervisor holds the same open file
        datagrams.close((pidfd,))
        status: int | None = None
        used: tuple[Any, ...] | None = None
        with contextlib.suppress(ChildProcessError):  # somebody else has reaped it: how it ended is not known
            reaped, status, rusage = os.wait4(pid, os.WNOHANG)
            if reaped:
                used = tuple(rusage)
            else:
                self._unreaped.add(pid)
                status = status_of_dead(pid)
        try:
            os.killpg(pid, 0)  # the id of a group that has members is never given to a new process
            left = True
        except ProcessLookupError:
            left = False
        except PermissionError:
            left = True  # they changed their user
        self._link.say(requests.EXITED, (number, status, used, at, wall, left))

    def _signal(self, number: int, signum: int) -> None:
        pid = self._pids.get(number)
        if pid is not None:  # it is not reaped, so the group is its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                try:
                    os.killpg(pid, signum)
                except ProcessLookupError:  # it has not come to its setsid(2), or only what it has started has ended
                    os.kill(pid, signum)


def _outlive_signals() -> None:
    """Whoever signals a whole service, as systemd does, means the program, which has yet to see its workers to their
    end. Not ignored, which programs that are started meanwhile would inherit."""
    for signum in _LATER:
        signal.signal(signum, lambda *_: None)


def _outlive_signals_unseen() -> None:
    """The same while there are imports, which may ask what becomes of a signal, and shall hear what Python says: the
    handler is a function of C that does nothing. What they fork meanwhile heeds signals as ever."""
    libc, me = ctypes.CDLL(None), os.getpid()
    for signum in _LATER:
        libc.signal(int(signum), ctypes.cast(libc.abs, ctypes.c_void_p))

    def heed() -> None:
        if _importing and os.getppid() == me:
            for signum in _LATER:
                signal.signal(signum, signal.getsignal(signum) or signal.SIG_DFL)

    os.register_at_fork(after_in_child=heed)


def _out_of_the_way() -> int:
    """Our standard input, at a number that nobody expects to be free."""
    for least in (_HIGH, 3):
        with contextlib.suppress(OSError):  # we may have so many only
            return fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, least)
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _kill(pidfd: int, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send_signal(pidfd, pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # not reaped, so the group is its own


def unsafe() -> str:
    """Why this process must not be forked, in words; empty when it may."""
    others = [one.name for one in threading.enumerate() if one not in _agents]
    if others:
        return f"threads run in it ({', '.join(others)}), and a forked copy would have their locks but not them"
    try:
        opened = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return ""  # there is no /proc, and so no telling
    except OSError as exc:
        return f"it cannot look at its descriptors ({exc.strerror})"
    for fd in opened:
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("/dev/nvidia"):
            return "CUDA is initialised in it, and a forked copy cannot use the GPU"
    return ""


def _warm_up(program: host_program.Program, preload: list[str], where: tuple[str, str] | None) -> Problem | None:
    """Import all; returns what went wrong."""
    try:
        host_program.adopt(program)
    except BaseException as exc:  # imports run the program's code
        return _not_imported("hooks for imports", host_program.missing_hooks(program), "", exc)
    for name in preload:
        try:
            importlib.import_module(name)
        except BaseException as exc:  # as above
            return _not_imported("preload", preload, f"{name!r} ", exc)
    try:
        function_run.import_main(where)
    except BaseException as exc:  # as above
        return _not_imported("main module", where and where[1], "", exc)
    host_program.prepare()
    messages.memory()  # workers that have arrays will need it
    if "asyncio" in sys.modules:
        importlib.import_module("aioelastic.system.forked_copies")  # and those for which a loop was made here, that
    words = unsafe()
    if words:
        field, value = ("preload", preload) if preload else ("start", "zygote")
        return field, value, f"cannot be used, as it cannot be forked after its imports: {words}", ""
    function_run.flush()  # or each worker would say it
    _spare_exit_work()
    gc.collect()
    interpreter_exit.keep_files()
    gc.freeze()  # collecting would write to, and so copy, every page that workers share
    return None


def _not_imported(field: str, value: Any, which: str, exc: BaseException) -> Problem:
    words = f"{which}could not be imported: {type(exc).__name__}: {exc}"
    return field, value, words, "".join(traceback.format_exception(exc))


def _spare_exit_work() -> None:
    """torch takes its operators down one by one at the end: 0.1 s in each worker, for what ends with the process."""
    for one in weakref.finalize._registry:  # type: ignore[attr-defined]
        found = one.peek()
        if found is not None and getattr(found[1], "__module__", None) == "torch.library":
            one.atexit = False
