"""`start="fork"`: a function worker that is a copy of this very process, with all its memory."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import warnings
from collections.abc import Mapping
from functools import partial

from ..child.kernel.child_processes import pidfd_or_none
from ..child.kernel.forking import fork
from ..child.wire import datagrams
from ..child.worker import function_run
from ..planning import WorkerPlan
from ..system import forked_copies
from ..watch import Poller, ThreadWatch
from ._direct import DirectProcess, reap_soon
from ._pipe_ends import Ends


class ForkLauncher:
    """Forks the caller in the thread of its event loop, which alone goes on in the copy.

    Nothing is pickled: closures and large data are simply there. The dangers: a lock that another thread holds at that
    moment stays locked in the copy, and CUDA cannot be used there once it was used here. The loop stands still for the
    length of fork(2), about 10 ms per GiB of memory in use.
    """

    name = "fork"

    def __init__(self, environ: Mapping[str, str], poller: Poller) -> None:
        self._environ = environ
        self._poller = poller

    def start(self, worker: WorkerPlan) -> asyncio.Future[DirectProcess]:
        """See `Launcher.start`."""
        done: asyncio.Future[DirectProcess] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(self._start(worker))
        except OSError as exc:
            done.set_exception(exc)
        return done

    def _start(self, worker: WorkerPlan) -> DirectProcess:
        ends = Ends(worker)
        try:
            environ = worker.environ(self._environ)
            started_at, started_ns = time.time(), time.monotonic_ns()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # threads: our docstring says it
                pid = fork(partial(_become, worker, ends, environ), stop=worker.stop_signal, dies_with_us=True)
            try:
                pidfd = pidfd_or_none(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                reap_soon(pid)
                raise
        except BaseException:
            ends.close_ours()
            raise
        finally:
            ends.close_theirs()
        watch = self._poller if pidfd is not None else ThreadWatch(asyncio.get_running_loop())
        forked_copies.register(process := DirectProcess(pid, pidfd, ends, started_ns, started_at, watch))
        return process


def _become(worker: WorkerPlan, ends: Ends, environ: dict[str, str], _: str) -> None:
    """In the new process, where what is ours is gone already (`forked_copies`), but for what this start needs."""
    function, channel, stdout, stderr = worker.function, ends.their_channel, ends.their_stdout, ends.their_stderr
    assert function is not None
    assert channel is not None
    datagrams.close([fd for fd in ends.disown() if fd not in (channel, stdout, stderr)])
    call = (function.fn, function.args, dict(function.kwargs), function.show_locals)
    overlay = {**{key: None for key in os.environ if key not in environ}, **environ}
    function_run.copied(channel, stdout, stderr, overlay, worker.cwd, place=worker.place, mark=worker.mark, call=call)
