"""Processes that are none of ours, some of them much alike: nobody may touch them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

from ..planning import TAG
from ..system.descriptors import shut
from ._process_tree import read_stat

SLEEP = ["sleep", "100000"]  # the same name as many a worker; longer than any test


@contextlib.contextmanager
def bystanders() -> Iterator[dict[str, int]]:
    """Start one of each kind for the time of the block; gives kind → pid.

    `"child"` (in our session and group), `"group"` and `"session"` (leaders of their own, as workers are), `"stranger"`
    (of another supervisor: it carries another run's mark), `"orphan"` (once a descendant, adopted by init since),
    `"stopped"` (by SIGSTOP; whoever sends it SIGCONT has touched it).

    Raises:
        AssertionError: somebody has ended or continued one of them.

    Example::

        with bystanders():
            await supervise(setsid_escape("exit 1"), n=3, check=False)
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("AIOELASTIC")}
    kinds: dict[str, dict[str, Any]] = {
        "child": {},
        "group": {"process_group": 0},
        "session": {"start_new_session": True},
        "stranger": {"start_new_session": True, "env": {**environ, TAG: "19700101-000000-worker-00000000/0/0"}},
        "stopped": {"process_group": 0},
    }
    with contextlib.ExitStack() as stack:
        pids: dict[str, int] = {}
        for kind, how in kinds.items():
            child = subprocess.Popen(SLEEP, **{"env": environ, **how})
            stack.callback(_end, child)
            pids[kind] = child.pid
        os.kill(pids["stopped"], signal.SIGSTOP)
        os.waitid(os.P_PID, pids["stopped"], os.WSTOPPED | os.WNOWAIT)
        pids["orphan"] = _orphan(stack, environ)
        yield pids
        states = {kind: (read_stat(pid) or "?Z")[1] for kind, pid in pids.items()}
        ended = [f"{kind} {pids[kind]}" for kind, state in states.items() if state in "ZX"]
        continued = [] if states["stopped"] in "TZX" else [f"stopped {pids['stopped']}"]
        assert not ended, f"bystanders were ended: {', '.join(ended)}"
        assert not continued, f"a bystander was continued: {continued[0]}"


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _orphan(stack: contextlib.ExitStack, environ: dict[str, str]) -> int:
    script = "sleep 1000 >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.PIPE, env=environ, check=True).stdout)
    pidfd = os.pidfd_open(pid)
    stack.callback(shut, pidfd)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    stack.callback(end)
    return pid
