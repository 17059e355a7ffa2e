"""`start="fork"`: a function worker that is a copy of this very process, with all its memory."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial

from .. import forked
from ..child import _work
from ..child._fork import fork
from ..watch import Poller, pidfd_or_none
from ._direct import DirectProcess, reap_soon
from ._ends import Ends
from ._plan import WorkerPlan


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
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # or both would write it
            environ = worker.environ(self._environ)
            started_at, started_ns = time.time(), time.monotonic_ns()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # threads: our docstring says it
                pid = fork(partial(_become, worker, ends, environ), stop=worker.stop_signal, dies_with_us=True)
            try:
                pidfd = pidfd_or_none(pid)
                if pidfd is None:
                    raise OSError("this kernel has no pidfds, which start='fork' needs")
            except OSError:
                os.kill(pid, signal.SIGKILL)
                reap_soon(pid)
                raise
        except BaseException:
            ends.close_ours()
            raise
        finally:
            ends.close_theirs()
        forked.register(process := DirectProcess(pid, pidfd, ends, started_ns, started_at, self._poller))
        return process


def _become(worker: WorkerPlan, ends: Ends, environ: dict[str, str], _: str) -> None:
    """In the new process."""
    function, channel = worker.function, ends.their_channel
    assert function is not None
    assert channel is not None
    call = (function.fn, function.args, dict(function.kwargs), function.show_locals)
    streams = ends.their_stdout, ends.their_stderr
    _work.copied(channel, *streams, environ, worker.cwd, None, worker.place, worker.mark, call)
