"""Supervisors that are daemons with a configuration file: supervisord, and circus's circusd.

They are not imported here: what they do to a process on import (circus changes `threading` and sets up logging) must
not happen to the one that measures.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PATIENCE = 60.0  # seconds for a daemon to start its workers, and to stop them


@dataclass
class Running:
    """A daemon with its workers."""

    pid: int
    # what it says, if it was asked to say it
    stdout: IO[str] | None = None
    # where it publishes what happens
    events: str = ""


# directory for its files, command of a worker, number of workers, file for what the workers print
Daemon = Callable[..., AbstractContextManager[Running]]


def children(pid: int) -> list[int]:
    """The children of a process, whichever of its threads started them."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@contextmanager
def _daemon(argv: Sequence[str], count: int, output: int) -> Iterator[Running]:
    """A daemon that has its `count` children. It is told to stop in the end, which stops them."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True) as process:
        try:
            late = time.monotonic() + PATIENCE
            while len(children(process.pid)) < count:
                if process.poll() is not None or time.monotonic() > late:
                    raise RuntimeError(f"{argv[2]} did not start {count} workers")
                time.sleep(0.01)
            yield Running(process.pid, process.stdout)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                for pid in children(process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.kill()
                raise


@contextmanager
def supervisord(
    home: Path,
    argv: Sequence[str],
    n: int = 1,
    stdout: str = "NONE",
    listener: Sequence[str] = (),
    told: bool = False,
    options: Sequence[str] = (),
) -> Iterator[Running]:
    """supervisord with `n` workers, whose output it reads; `listener` is a process that it tells of exits.

    With `told`, it says on its own stdout what it does, as it always does in the foreground. `options` are lines for
    the program's section.
    """
    with tempfile.TemporaryDirectory(dir=home) as place:
        lines = [
            "[supervisord]",
            "nodaemon = true",
            f"silent = {not told}",
            "logfile = /dev/null",
            "logfile_maxbytes = 0",
            f"pidfile = {place}/pid",
            f"childlogdir = {place}",
            f"minfds = {max(1024, 3 * n + 100)}",  # three pipes for each worker
            "[program:worker]",
            f"command = {_quoted(argv)}",
            f"numprocs = {n}",
            "process_name = worker%(process_num)d",
            "startsecs = 0",
            "autorestart = false",
            f"stdout_logfile = {stdout}",
            "stdout_logfile_maxbytes = 0",
            "stderr_logfile = NONE",
            *options,
        ]
        if listener:
            lines += [
                "[eventlistener:listener]",
                f"command = {_quoted(listener)}",
                "events = PROCESS_STATE_EXITED",
                "startsecs = 0",
                "stderr_logfile = NONE",
            ]
        config = Path(place) / "supervisord.conf"
        config.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)]
        output = subprocess.PIPE if told else subprocess.DEVNULL
        with _daemon(command, n + bool(listener), output) as running:
            yield running


@contextmanager
def circusd(
    home: Path, argv: Sequence[str], n: int = 1, stdout: str = os.devnull, options: Sequence[str] = ()
) -> Iterator[Running]:
    """circusd with `n` workers, whose output it reads. `options` are lines for the watcher's section."""
    with tempfile.TemporaryDirectory(dir=home) as place:
        lines = [
            "[circus]",
            f"endpoint = ipc://{place}/control",
            f"pubsub_endpoint = ipc://{place}/events",
            "[watcher:worker]",
            f"cmd = {_quoted(argv)}",
            f"numprocesses = {n}",
            "respawn = False",
            "copy_env = True",  # by itself it starts workers with an empty environment
            "stdout_stream.class = FileStream",
            f"stdout_stream.filename = {stdout}",
            "stderr_stream.class = FileStream",
            f"stderr_stream.filename = {os.devnull}",
            *options,
        ]
        config = Path(place) / "circus.ini"
        config.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "circus.circusd", "--log-level", "error", str(config)]
        with _daemon(command, n, subprocess.DEVNULL) as running:
            running.events = f"ipc://{place}/events"
            yield running


def _quoted(argv: Sequence[str]) -> str:
    """A command line for a configuration file: of one line, with its per cent signs doubled."""
    line = shlex.join(argv)
    assert "\n" not in line
    return line.replace("%", "%%")
