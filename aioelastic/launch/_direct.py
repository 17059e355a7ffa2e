"""The direct launcher: a process from this very process, with a pidfd taken before anybody can reap."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ..child.guardian import process_start
from ..child.kernel import process_marks
from ..child.kernel.child_processes import is_still_copy, pidfd_or_none, send_signal, status_of_dead
from ..child.wire import datagrams
from ..model.errors import SpecError
from ..planning import Who, WorkerPlan
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.helper_thread import HelperThread
from ..system.interpreter import interpreter
from ..system.waiting import nothing
from ..watch import Poller, ThreadWatch, Watch
from ._contract import RawExit
from ._pipe_ends import Ends, disowned
from ._spawn import Spawner, defaults
from ._standard_streams import standard

SOON = 0.1  # seconds in which a killed process ends, but where a debugger or the kernel holds it
_LOOK = 0.1  # seconds between two looks at one whose start is not told
# SIGKILLed children that did not die in time, still ours to reap one day
_abandoned: set[int] = set()
forked_copies.in_copies(_abandoned.clear)

# linux/pidfd.h: since 6.15 a pidfd tells the exit status even after somebody else has reaped the process
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_WANTED = struct.pack("=Q", _PIDFD_INFO_EXIT).ljust(64, b"\0")


class DirectLauncher:
    """Starts commands from this very process, by posix_spawn where the C library has all it takes, else by Popen.

    One belongs to one event loop; several groups on that loop may share it.

    Args:
        environ: the variables that every worker inherits.
        thread: where processes are started, so that the loop goes on meanwhile; in the loop when not given.
        poller: where their exits are watched, shared with others on that loop; one of its own when not given.
        watch: `"auto"`, or `"thread"` to force the mechanism for kernels without pidfd.
        spawn: `"auto"`, or `"popen"` to force the way for other C libraries.
    """

    name = "direct"

    def __init__(
        self,
        environ: Mapping[str, str],
        thread: HelperThread | None = None,
        poller: Poller | None = None,
        watch: str = "auto",
        spawn: str = "auto",
    ) -> None:
        self._environ = environ
        self._thread = thread
        self._pidfds = watch == "auto"
        self._poller = poller
        self._threads: ThreadWatch | None = None  # where there are no pidfds
        self._spawner: Spawner | None = None
        if spawn == "auto":
            try:
                self._spawner = Spawner(environ)
            except OSError:
                pass  # not glibc 2.34: Popen it is

    def start(self, worker: WorkerPlan, anew: bool = False) -> asyncio.Future[DirectProcess]:
        """See `Launcher.start`.

        Args:
            anew: not in the helper thread, which is older, but in one that is born now: a process begins with what the
                thread has that starts it.
        """
        loop = asyncio.get_running_loop()
        if self._thread is not None and not anew:
            return self._thread.submit(lambda: self._start(worker, loop))
        if self._thread is not None:
            thread = HelperThread(loop, "aioelastic-start")
            try:
                return thread.submit(lambda: self._start(worker, loop))
            except SpecError as exc:
                raise OSError(errno.EAGAIN, str(exc)) from None
            finally:
                thread.end()
        done: asyncio.Future[DirectProcess] = loop.create_future()
        try:
            done.set_result(self._start(worker, loop))
        except OSError as exc:
            done.set_exception(exc)
        return done

    def _start(self, worker: WorkerPlan, loop: asyncio.AbstractEventLoop) -> DirectProcess:
        ends = Ends(worker)
        forked_copies.register(ends)
        try:
            started_at, started_ns = time.time(), time.monotonic_ns()
            pid = self._spawn(worker, ends)
            if worker.who is None:  # else it has it already
                # almost at once: what it has started by now is known by its variables
                process_marks.give(pid, worker.mark)
            try:
                pidfd = pidfd_or_none(pid) if self._pidfds else None
            except ProcessLookupError:
                pidfd = None  # ended, and reaped by somebody else within microseconds: the watch will find out
            except OSError:
                os.killpg(pid, signal.SIGKILL)
                reap_soon(pid)
                raise
        except BaseException:
            ends.close_ours()
            raise
        finally:
            ends.close_theirs()
        watch = self._threads_on(loop) if pidfd is None else self._poller_on(loop)
        forked_copies.register(process := DirectProcess(pid, pidfd, ends, started_ns, started_at, watch))
        ends.forget()
        return process

    def _spawn(self, worker: WorkerPlan, ends: Ends) -> int:
        argv: Sequence[str] = worker.argv
        program = worker.program
        stdin = standard(0) if worker.stdin == "inherit" else ends.their_stdin
        if worker.function is not None:
            argv = interpreter("aioelastic.child.worker.function_run:fresh")
            program, stdin = argv[0], ends.their_channel
        assert program is not None
        stdout, stderr = ends.their_stdout, ends.their_stderr
        stdio: tuple[int | bytes | None, ...] = (stdin, stdout, stderr)
        if worker.tty is not None and stdin is not None:
            stdio = (os.fsencode(os.ttyname(stdin)), 0, 0)
        passed = list(zip(ends.passed, worker.numbers, strict=True))
        if worker.who is not None or (passed and self._spawner is None):
            return self._fork(worker, ends, stdio, passed)
        if self._spawner is not None:
            stop = worker.stop_signal
            return self._spawner.spawn(program, argv, worker.overlay, worker.cwd, stdio, stop, passed=passed)
        ends.forked_by = threading.get_ident()
        popen = subprocess.Popen(
            argv,
            executable=program,
            env=worker.environ(self._environ),
            cwd=worker.cwd,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            start_new_session=True,
            preexec_fn=defaults(worker.stop_signal, terminal=worker.tty is not None),  # noqa: PLW1509  # C calls that take no lock
        )
        # we reap it ourselves: a Popen that believes in a live child would reap it behind our back
        popen.returncode = 0
        return popen.pid

    def _fork(
        self, worker: WorkerPlan, ends: Ends, stdio: Sequence[int | bytes | None], passed: list[tuple[int, int]]
    ) -> int:
        """By a copy of this process, which sets what posix_spawn(3) cannot, and goes straight on to execve(2)."""
        environ = process_start.variables(process_start.packed(worker.environ(self._environ)), {})
        start = process_start.Start(
            os.fsencode(worker.program or ""),
            [os.fsencode(one) for one in worker.argv],
            environ,
            os.fsencode(worker.cwd or "."),
            tuple(os.fsencode(os.devnull) if one is None else one for one in stdio),
            None,
        )
        start.passed, start.who, start.mark, start.stop = passed, worker.who, worker.mark, worker.stop_signal
        ends.forked_by = threading.get_ident()
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        pid, pipe = process_start.fork(start, files)
        code, what = _told(pipe, pid)
        if code:
            reap_soon(pid)
            raise OSError(code, os.strerror(code), what)
        return pid

    def _poller_on(self, loop: asyncio.AbstractEventLoop) -> Poller:
        self._poller = self._poller or Poller(loop)
        return self._poller

    def _threads_on(self, loop: asyncio.AbstractEventLoop) -> ThreadWatch:
        self._threads = self._threads or ThreadWatch(loop)
        return self._threads


class DirectProcess:
    """A child of this process. See `LiveProcess`."""

    answer = None

    __slots__ = (
        "__weakref__",
        "_child",
        "_on_exit",
        "_pidfd",
        "_reaped",
        "_watch",
        "_watched",
        "channel",
        "pid",
        "rss_floor",
        "started_at",
        "started_ns",
        "stderr",
        "stdin",
        "stdout",
    )

    def __init__(
        self,
        pid: int,
        pidfd: int | None,
        ends: Ends,
        started_ns: int,
        started_at: float,
        watch: Watch,
    ) -> None:
        self.pid = pid
        self.stdin = ends.stdin
        self.stdout = ends.stdout
        self.stderr = ends.stderr
        self.channel = ends.channel
        self.started_ns = started_ns
        self.started_at = started_at
        self.rss_floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._pidfd = pidfd
        self._child = pid if pidfd is None else pidfd  # as its watch knows it
        self._reaped = False
        self._watch = watch
        self._watched = False

    def watch(self, on_exit: Callable[[RawExit], None]) -> None:
        self._on_exit, self._watched = on_exit, True
        self._watch.add_exit(self._child, self._ended)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        if self._reaped:
            return []
        self._reaped, self._on_exit = True, nothing
        pidfd, self._pidfd = self._pidfd, None
        return [*([] if pidfd is None else [pidfd]), *disowned(self, self._watched)]

    def send_signal(self, signum: int) -> bool:
        if self._has_ended():
            return False
        try:
            if self._pidfd is not None:
                send_signal(self._pidfd, self.pid, signum)
            else:
                os.kill(self.pid, signum)  # it is not reaped, so the pid is its own
        except ProcessLookupError:
            return False  # another part of the program has reaped it this very moment
        return True

    def signal_group(self, signum: int) -> bool:
        if self._reaped:
            return False
        try:
            os.killpg(self.pid, signum)
        except (ProcessLookupError, PermissionError):  # they changed their user
            return False
        return True

    def group_alive(self) -> bool:
        # the id of a group that has members is never given to a new process, so a yes is about ours
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it changed its user: there, but not ours to signal
        return True

    def abandon(self) -> None:
        if not self._reaped:
            _abandoned.add(self.pid)
            self._on_exit = nothing
            self._let_go()

    def _has_ended(self) -> bool:
        if self._reaped:
            return True
        try:
            return self._peek() is not None
        except ChildProcessError:
            return True

    def _peek(self) -> os.waitid_result | None:
        """How it ended, without reaping it: half as long as wait4(2)."""
        how, child = (os.P_PID, self.pid) if self._pidfd is None else (os.P_PIDFD, self._pidfd)
        return os.waitid(how, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _ended(self) -> None:
        ended_ns, ended_at = time.monotonic_ns(), time.time()
        status: int | None
        try:
            info = self._peek()
            if info is None:  # it has ended, and a debugger keeps it from being reaped
                status = status_of_dead(self.pid)
            else:
                status = info.si_status << 8 if info.si_code == os.CLD_EXITED else info.si_status
                if info.si_code == os.CLD_DUMPED:
                    status |= 0x80
        except ChildProcessError:
            status = None if self._pidfd is None else status_of_reaped(self._pidfd)
        self._on_exit(RawExit(status, ended_ns, ended_at))
        self._on_exit = nothing  # who has us shall not be held by us

    def reap(self) -> resource.struct_rusage | None:
        rusage = None
        try:
            pid, _, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                rusage = used
            else:
                _abandoned.add(self.pid)  # a debugger holds it
        except ChildProcessError:
            pass  # somebody else was quicker
        self._let_go()
        return rusage

    def _let_go(self) -> None:
        self._reaped = True
        self._watch.remove(self._child)
        if self._pidfd is not None:
            shut(self._pidfd)
            self._pidfd = None


def tried(who: Who) -> tuple[int, str]:
    """Whether a process can be of that user, tried in one that ends at once: errno and field, or (0, "")."""
    pid, pipe = process_start.trial(None, None, who)
    told = _told(pipe, pid)
    reap_soon(pid)
    return told


def _told(pipe: int, pid: int) -> tuple[int, str]:
    """See `process_start.outcome`, to the end. Another thread may have forked at that moment: then its copy has the
    other end, too, for as long as it lives, and all is well once the process has come to its execve(2)."""
    try:
        copied = True
        while (told := process_start.outcome(pipe)) is None and copied:
            copied = datagrams.readable(_LOOK, pipe) or is_still_copy(pid)
        return told or (0, "")
    finally:
        shut(pipe)


def status_of_reaped(pidfd: int) -> int | None:
    """The wait status of a process that somebody else has reaped, where the kernel still tells it."""
    info = bytearray(_WANTED)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask: int = struct.unpack_from("=Q", info, 0)[0]
    exit_code: int = struct.unpack_from("=i", info, 60)[0]
    return exit_code if mask & _PIDFD_INFO_EXIT else None


def status_of_others(pid: int, pidfd: int) -> int | None:
    """The wait status of a process that has ended and is not our child, where the kernel tells it."""
    status = status_of_reaped(pidfd)
    if status is None:
        status = status_of_dead(pid)
    if status is None:
        status = status_of_reaped(pidfd)  # reaped while we looked
    return status


def early_status(pid: int, pidfd: int) -> int | None:
    """The same of one that its parent may be about to reap; None also where it cannot be told from 0.

    proc(5) shows an exit code of 0 to those who may not see it.
    """
    status = status_of_others(pid, pidfd)
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError:  # reaped: what /proc showed of that pid may have been another's
        return status_of_reaped(pidfd)
    return status or None


def reap_soon(pid: int) -> None:
    """Reap a child that was killed, and for which there is no pidfd: within `SOON`, else at some later launch."""
    _abandoned.add(pid)
    until = time.monotonic() + SOON
    reap_abandoned()
    while pid in _abandoned and time.monotonic() < until:
        signal.sigtimedwait((), SOON / 50)  # a pause
        reap_abandoned()


def reap_abandoned() -> None:
    """Reap those given up earlier that have died since."""
    for pid in list(_abandoned):
        try:
            done, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            done = pid
        if done:
            _abandoned.discard(pid)
